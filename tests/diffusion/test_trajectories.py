"""Walking: the states kept are those the pipeline visits, bit for bit, alone or under exits; nothing stays behind; bad input is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from factories import exits_for, pipeline
from stock import dit_pipeline

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.distillation.collect import Exited, FreshStates, fingerprint, identity_of, walk

SEEDS, LABELS = [11, 12, 13], [0, 3, 1]
CALL = {"num_inference_steps": 3, "guidance_scale": 2.0}


def visited(pipe: DiffusionPipeline, **more) -> list[dict[str, torch.Tensor]]:
    """What the transformer gets in a generation that nobody follows."""
    seen = []

    def look(module, args, kwargs):
        names = ["hidden_states", "timestep", "class_labels"]
        seen.append({name: value.clone() for name, value in (dict(zip(names, args, strict=False)) | kwargs).items()})

    hook = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipe(class_labels=LABELS, generator=generators, **({"output_type": "pt"} | CALL | more))
    hook.remove()
    return seen


def assert_same(states, seen: list[dict[str, torch.Tensor]]) -> None:
    assert states.shape == (3, len(seen), 2)
    for call, inputs in enumerate(seen):
        for name, rows in inputs.items():
            kept = states[torch.arange(3) * len(seen) + call][name]  # (T, G, ...)
            assert torch.equal(kept.transpose(0, 1).flatten(0, 1), rows), name


@pytest.mark.parametrize("make", [pipeline, dit_pipeline])
def test_the_states_kept_are_those_of_a_plain_generation(make):
    pipe = make()
    seen = visited(pipe)
    states = walk(pipe, SEEDS, LABELS, **CALL)
    assert_same(states, seen)
    assert set(states.constant) == {"class_labels"}
    assert "forward" not in pipe.transformer.__dict__
    again = visited(pipe)
    assert all(torch.equal(one[name], other[name]) for one, other in zip(seen, again, strict=True) for name in one)


def test_the_exited_model_visits_other_states_and_they_are_its_own():
    pipe, policy = pipeline(), Policy(Threshold(0.4))
    seen = visited(pipe, exit_policy=policy)
    states = walk(pipe, SEEDS, LABELS, exited=Exited(policy, pipe.exits), **CALL)
    assert_same(states, seen)
    full = walk(pipe, SEEDS, LABELS, **CALL)
    assert torch.equal(states.varying["hidden_states"][:, 0], full.varying["hidden_states"][:, 0])
    assert not torch.equal(states.varying["hidden_states"][:, 1], full.varying["hidden_states"][:, 1])
    apart = Policy(Threshold(0.4), cfg_exit="separate")
    assert_same(walk(pipe, SEEDS, LABELS, exited=Exited(apart, pipe.exits), **CALL), visited(pipe, exit_policy=apart))


def test_exits_on_a_stock_pipeline():
    pipe = dit_pipeline()
    exits = exits_for(pipe.transformer, (1, 2))
    states = walk(pipe, SEEDS, LABELS, exited=Exited(Policy(Threshold(0.3)), exits), **CALL)
    assert not torch.equal(states.varying["hidden_states"], walk(pipe, SEEDS, LABELS, **CALL).varying["hidden_states"])
    assert "_ee_hook" not in pipe.transformer.__dict__


def test_unconditional():
    states = walk(pipeline("unconditional"), SEEDS, None, num_inference_steps=2)
    assert states.shape == (3, 2, 1)
    assert not states.constant


def test_an_error_on_the_way_leaves_the_transformer_whole():
    pipe = pipeline()
    with pytest.raises(ValueError, match="num_inference_steps"):
        walk(pipe, SEEDS, LABELS, num_inference_steps=0)
    broken = Exited(Policy(Threshold(0.4)), exits_for(pipeline("unconditional").transformer, (1,)))
    with pytest.raises(ValueError, match="heads of another model"):
        walk(pipe, SEEDS, LABELS, exited=broken, **CALL)
    assert "forward" not in pipe.transformer.__dict__
    assert "_ee_hook" not in pipe.transformer.__dict__


def test_a_scheduler_that_draws_by_itself_draws_by_the_seeds():
    pipe = dit_pipeline()
    pipe.scheduler = DDPMScheduler(clip_sample=False)
    torch.manual_seed(5)
    first = walk(pipe, SEEDS, LABELS, **CALL)
    after = torch.rand(())
    torch.manual_seed(6)
    second = walk(pipe, SEEDS, LABELS, **CALL)
    assert torch.equal(first.varying["hidden_states"], second.varying["hidden_states"])
    torch.manual_seed(5)
    assert torch.equal(torch.rand(()), after), "the global generator goes on as if nothing had happened"


def test_fresh_states_belong_to_their_keys():
    pipe = pipeline()
    fresh = FreshStates(pipe, range(100, 110), [0, 1, 2], **CALL)
    keys = torch.tensor([7, -3, 41])
    together = fresh({"key": keys})
    assert torch.equal(together["key"], keys)
    assert together["hidden_states"].shape == (3, 6, 3, 8, 8)
    for place, key in enumerate(keys.tolist()):
        alone = fresh({"key": torch.tensor([key])})
        torch.testing.assert_close(alone["hidden_states"][0], together["hidden_states"][place], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone["class_labels"][0], together["class_labels"][place])
    first = walk(pipe, [107], [0], **CALL).by_trajectory()
    assert torch.equal(first["hidden_states"], fresh({"key": torch.tensor([7])})["hidden_states"])
    for pool, conditions in ((range(0), [0]), (range(3), [])):
        with pytest.raises(ValueError, match="expected at least one of each"):
            FreshStates(pipe, pool, conditions)


@pytest.mark.parametrize(
    "seeds, conditions, told",
    [
        ([], [], "0 seeds"),
        ([1], [1, 2], "1 seeds, 2 conditions"),
        ([1], ["a cat"], "takes no prompt"),
        ([1], [99], "class_labels .99."),
    ],
)
def test_what_does_not_fit_is_refused(seeds, conditions, told):
    with pytest.raises(ValueError, match=told):
        walk(pipeline(), seeds, conditions, num_inference_steps=2)


def test_pipelines_that_cannot_be_followed():
    with pytest.raises(ValueError, match="DiTPipeline takes no batch_size"):
        walk(dit_pipeline(), [1], None, num_inference_steps=2)
    pipe = dit_pipeline()
    pipe.transformer.train()
    with pytest.raises(ValueError, match="train mode"):
        walk(pipe, [1], [1], num_inference_steps=2)
    with pytest.raises(ValueError, match="policy that is off"):
        Exited(Policy(), exits_for(pipe.transformer, (1,)))


def test_identities_tell_what_differs():
    pipe = pipeline()

    def identity(**changes):
        given = {"seeds": SEEDS, "conditions": LABELS, "exited": None, **CALL} | changes
        return identity_of(pipe, given.pop("seeds"), given.pop("conditions"), **given)

    same = identity()
    assert identity() == same
    exited = Exited(Policy(Threshold(0.4)), pipe.exits)
    for changes in (
        {"seeds": [1, 2, 3]},
        {"conditions": [0, 0, 0]},
        {"guidance_scale": 2.5},
        {"exited": exited},
    ):
        assert identity(**changes) != same
    before = fingerprint(pipe.transformer)
    with torch.no_grad():
        pipe.transformer.pos_embed[0, 0, 0] += 1
    assert fingerprint(pipe.transformer) != before
    assert identity() != same
    pipe.exits = None
    assert identity()["transformer"] != same["transformer"]
