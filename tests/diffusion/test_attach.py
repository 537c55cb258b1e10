"""Attaching: exits in both halves of the skip stack, what may be passed how, NaN, half precision, misuse before any work."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from contextlib import contextmanager

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from factories import (
    IMAGES,
    LAYOUTS,
    SIZE,
    STEPS,
    AttachedDriver,
    answer_at,
    dit,
    driver_named,
    exits_for,
    images_of,
    run,
    uvit,
)
from laws import counting
from stock import dit_pipeline
from tiny_families import forward, inputs_of, model_named
from torch import Tensor, nn

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth, FixedLayers, PiecewiseDepth
from ee_diffusion.core.session import begin
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.packed import PackedExits
from ee_diffusion.diffusion.hooks.attach import attach_exits, detach_exits, hook_of
from ee_diffusion.diffusion.model_specs import MODEL_SPECS, ModelSpec, model_spec_of, register_model

EVERY_DEPTH = tuple(range(7))
EVERYBODY = list(range(IMAGES))
SINGLE = LAYOUTS["single"]


def plan(*depths: int, steps: int = STEPS) -> Policy:
    return Policy(DepthTable((depths,) * steps))


@pytest.fixture(scope="module", params=["uvit-paper", "uvit-released", "dit-paper", "dit-released"])
def driver(request) -> AttachedDriver:
    """Exits at every depth."""
    model = uvit() if request.param.startswith("uvit") else dit(num_layers=7)
    return AttachedDriver(model, EVERY_DEPTH, request.param.split("-")[1])


@pytest.mark.parametrize("depth", range(8))
def test_an_exit_is_a_model_cut_off_there_and_those_that_go_on_do_not_notice(driver: AttachedDriver, depth: int):
    """Images 0, 2, 5 leave after `depth` blocks; in the first half their place in the long skips goes with them."""
    depths = [depth, 7, depth, 7, 7, depth, 7]
    found = run(driver, plan(*depths), SINGLE)
    for index in range(STEPS):
        inputs = images_of(EVERYBODY, index, 1)
        cut, full = answer_at(driver, depth, inputs), answer_at(driver, 7, inputs)
        for image, chosen in enumerate(depths):
            torch.testing.assert_close(
                found.outputs[index][image], (full if chosen == 7 else cut)[image], rtol=1e-4, atol=1e-5
            )


def test_exits_in_both_halves_of_one_batch(driver: AttachedDriver):
    for depths in ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [1, 7, 2, 7, 5, 7, 6]):
        found = run(driver, plan(*depths), SINGLE)
        inputs = images_of(EVERYBODY, 1, 1)
        for image, depth in enumerate(depths):
            expected = answer_at(driver, depth, inputs)[image]
            torch.testing.assert_close(found.outputs[1][image], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 2, 5, 7])
def test_a_fixed_depth_is_the_truncated_model(driver: AttachedDriver, depth: int):
    with counting(driver) as work:
        found = run(driver, Policy(Threshold(1.0), FixedDepth(depth)), SINGLE, each=lambda step: work.clear())
    torch.testing.assert_close(found.outputs[1], answer_at(driver, depth, images_of(EVERYBODY, 1, 1)))
    assert work.current.blocks == [IMAGES * driver.tokens] * depth + [0] * (7 - depth)
    assert work.current.heads == [IMAGES * (exit == depth) for exit in EVERY_DEPTH]
    assert work.current.uncertainty == [IMAGES * (exit < depth) for exit in EVERY_DEPTH]


def test_depth_by_time(driver: AttachedDriver):
    found = run(driver, Policy(schedule=PiecewiseDepth((600.0,), (7, 2))), SINGLE)
    assert found.trace.depths.unique(dim=1).tolist() == [[2], [7]]  # times are 900 and 500
    torch.testing.assert_close(found.outputs[0], answer_at(driver, 2, images_of(EVERYBODY, 0, 1)))
    torch.testing.assert_close(found.outputs[1], driver.base(images_of(EVERYBODY, 1, 1)))


def test_holes_pass_their_input_on(driver: AttachedDriver):
    keep = (0, 2, 3, 6)
    found = run(driver, Policy(schedule=FixedLayers(keep)), SINGLE)
    for layer in set(range(7)) - set(keep):
        driver.blocks[layer].__dict__["forward"] = lambda hidden, *args, **kwargs: hidden
    try:
        expected = driver.base(images_of(EVERYBODY, 1, 1))
    finally:
        for layer in set(range(7)) - set(keep):
            del driver.blocks[layer].__dict__["forward"]
    torch.testing.assert_close(found.outputs[1], expected)
    assert found.trace.ran.sum((0, 1)).tolist() == [14 * (layer in keep) for layer in range(7)]


def test_everybody_stopped_early(driver: AttachedDriver):
    tails = []
    norm = driver.model.norm_out
    hook = norm.register_forward_hook(lambda module, args, output: tails.append(len(output)))
    depths, calls = [0, 1, 3, 3, 2, 0, 4], []
    hooks = [inner.register_forward_pre_hook(lambda module, args: calls.append(1)) for inner in driver.inners]
    found = run(driver, plan(*depths), SINGLE)
    for one in (hook, *hooks):
        one.remove()
    assert len(calls) == 4 * STEPS, "no block runs for nobody"
    empty = driver.heads.space == "output" and not driver.family.tail_takes_all
    assert tails == [0 if empty else IMAGES] * STEPS
    assert found.trace.ran[:, :, 4:].sum() == 0
    inputs = images_of(EVERYBODY, 1, 1)
    for image, depth in enumerate(depths):
        torch.testing.assert_close(
            found.outputs[1][image], answer_at(driver, depth, inputs)[image], rtol=1e-4, atol=1e-5
        )


def test_rows_that_left_do_not_go_through_the_u_vits_tail():
    driver, tails = driver_named("uvit-paper"), []
    hook = driver.model.norm_out.register_forward_hook(lambda module, args, output: tails.append(len(output)))
    run(driver, plan(0, 7, 2, 5, 7, 7, 3), SINGLE)
    hook.remove()
    assert tails == [3, 3]


def test_the_times_part_of_the_scores_is_made_once_and_only_where_a_score_is_measured(monkeypatch):
    driver, made = driver_named("uvit-paper"), []
    original = PackedExits.context
    monkeypatch.setattr(PackedExits, "context", lambda exits, timestep: made.append(1) or original(exits, timestep))
    for policy, calls in (
        (plan(0, 7, 2, 5, 7, 7, 3), 0),
        (Policy(schedule=FixedDepth(5)), 0),
        (Policy(Threshold(0.3)), 1),
    ):
        made.clear()
        run(driver, policy, SINGLE)
        assert len(made) == calls * STEPS


def test_each_run_packs_the_weights_of_its_time_and_gradients_find_the_parameters(monkeypatch):
    model = uvit()
    exits = exits_for(model, (1, 3))
    policy, inputs = Policy(Threshold(1.0)), (torch.randn(3, 3, SIZE, SIZE), torch.full((3,), 500), torch.arange(3))

    asked, confidence = [], exits.confidence
    monkeypatch.setitem(exits.__dict__, "confidence", lambda *args: asked.append(args[0]) or confidence(*args))

    def scores(grad: bool = False) -> Tensor:
        with attach_exits(model, exits) as attachment, torch.set_grad_enabled(grad):
            session = attachment.start(policy, rows=torch.arange(3), num_steps=1)
            with attachment.use(session.step(0, 500.0)):
                model(*inputs)
            return session.trace().scores[0]

    before = scores()
    with torch.no_grad():
        exits.uncertainty_modules[0].weight.mul_(-1)
        exits.uncertainty_modules[1].bias.add_(1)
    after = scores()
    assert ((after - before).abs() > 1e-3).all()
    assert asked == []
    torch.testing.assert_close(scores(grad=True), after, rtol=1e-5, atol=1e-6)
    assert asked == [0, 1], "where gradients are asked for, the modules with the parameters are"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["uvit", "dit"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_half_precision(kind: str, variant: str, dtype):
    driver = AttachedDriver(uvit() if kind == "uvit" else dit(), (0, 1, 3, 4), variant)
    driver.model.to(dtype)
    driver.heads.to(dtype)
    seen = []
    driver.blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].dtype), with_kwargs=True
    )
    original, driver.base = driver.base, lambda inputs: original(inputs | {"pixels": inputs["pixels"].to(dtype)})
    scores = run(driver, Policy(Threshold(0.5), record_all=True), SINGLE).trace.scores
    found = run(driver, Policy(Threshold(float(scores.quantile(0.7)))), SINGLE)
    assert set(seen) == {dtype}
    assert found.outputs.dtype == dtype
    assert found.outputs.isfinite().all()
    assert found.trace.scores.dtype == torch.float32
    assert len(found.trace.depths.unique()) >= 3


@pytest.mark.parametrize("name", ["uvit-paper", "uvit-released", "dit-paper", "dit-released"])
def test_nan_in_the_hidden_states(name: str):
    driver = driver_named(name)
    inputs = images_of(EVERYBODY, 0, 1)
    inputs["pixels"][2] = torch.nan
    before = driver.base(images_of(EVERYBODY, 0, 1))
    with driver.ready():
        session = driver.start(Policy(Threshold(0.0)), rows=torch.arange(IMAGES), num_steps=2)
        with pytest.raises(ValueError, match="NaN score at step 0"):
            driver.under(session.step(0, 900.0), inputs)
        first = driver.heads.depths[0]
        expected = [first, first, driver.num_layers, first, first, first, first]
        assert session.trace().depths.tolist() == [expected]
        again = driver.under(session.step(1, 500.0), images_of(EVERYBODY, 0, 1))  # the session can go on
        assert again.isfinite().all()
        assert torch.equal(driver.base(images_of(EVERYBODY, 0, 1)), before), "no lane is left behind"


def test_the_second_row_of_an_image_that_is_nan_holds_the_image_back():
    driver = driver_named("uvit-paper")
    inputs = images_of(EVERYBODY, 0, 2)
    inputs["pixels"][IMAGES + 2] = torch.nan
    with driver.ready():
        session = driver.start(Policy(Threshold(0.0)), rows=LAYOUTS["joint"].rows(IMAGES), num_steps=1)
        with pytest.raises(ValueError, match="NaN"):
            driver.under(session.step(0, 900.0), inputs)
    assert session.trace().depths[0].tolist() == [0, 0, 7, 0, 0, 0, 0]


def test_keywords_and_tuples_make_no_difference():
    for name in ("uvit-paper", "uvit-released", "dit-paper"):
        driver, policy = driver_named(name), plan(0, 1, 3, 7, 5, 2, 7)
        expected = run(driver, policy, SINGLE).outputs[0]
        given = images_of(EVERYBODY, 0, 1)
        calls = [
            lambda m, g: m(hidden_states=g["pixels"], timestep=g["timestep"], class_labels=g["labels"]).sample,
            lambda m, g: m(g["pixels"], g["timestep"], g["labels"], return_dict=False)[0],
            lambda m, g: m(g["pixels"], timestep=g["timestep"], class_labels=g["labels"], return_dict=False)[0],
        ]
        for call in calls:
            with torch.no_grad(), attach_exits(driver.model, driver.heads) as attachment:
                session = attachment.start(policy, rows=torch.arange(IMAGES), num_steps=STEPS)
                with attachment.use(session.step(0, 900.0)):
                    torch.testing.assert_close(call(driver.model, given), expected)


@pytest.mark.parametrize("name", ["uvit-paper", "dit-paper"])
def test_one_timestep_for_all_rows(name: str):
    driver, policy = driver_named(name), plan(0, 1, 3, 7, 5, 2, 7)
    given = images_of(EVERYBODY, 0, 1) | {"timestep": torch.full((IMAGES,), 321)}
    outputs = []
    for timestep in (given["timestep"], torch.tensor([321])):
        with torch.no_grad(), driver.ready():
            session = driver.start(policy, rows=torch.arange(IMAGES), num_steps=STEPS)
            outputs.append(driver.under(session.step(0, 900.0), given | {"timestep": timestep}))
    torch.testing.assert_close(outputs[1], outputs[0])


def test_hidden_states_of_a_text_model():
    model = uvit("text")
    driver = AttachedDriver(model, (0, 2, 5), "paper")
    text = torch.randn(IMAGES, 3, 6)
    driver.base = lambda inputs: model(inputs["pixels"], inputs["timestep"], encoder_hidden_states=text).sample
    depths = [0, 2, 5, 7, 7, 2, 0]
    found = run(driver, plan(*depths), SINGLE)
    for image, depth in enumerate(depths):
        expected = answer_at(driver, depth, images_of(EVERYBODY, 1, 1))[image]
        torch.testing.assert_close(found.outputs[1][image], expected, rtol=1e-4, atol=1e-5)


# --- misuse


def refused(driver: AttachedDriver, call, match: str, error=ValueError) -> None:
    """An error before any block ran, and a model that works as before."""
    before = driver.base(images_of(EVERYBODY, 0, 1))
    with counting(driver) as work, driver.ready():
        with pytest.raises(error, match=match):
            call(driver)
        assert sum(work.current.blocks) == 0
    assert torch.equal(driver.base(images_of(EVERYBODY, 0, 1)), before)


@pytest.fixture(params=["uvit-paper", "dit-released"])
def small(request) -> AttachedDriver:
    return driver_named(request.param)


def test_wrong_inputs_are_refused_before_work(small: AttachedDriver):
    def forward(change, count=IMAGES):
        def call(driver):
            session = driver.start(Policy(Threshold(0.5)), rows=torch.arange(count), num_steps=2)
            driver.under(session.step(0, 1.0), images_of(EVERYBODY, 0, 1) | change)

        return call

    refused(small, forward({}, count=5), "the transformer got 7 rows, the session was started for 5")
    refused(small, forward({"timestep": torch.zeros(3)}), "3 timesteps for 7 rows")
    closed = small.num_layers

    def again(driver):
        session = driver.start(plan(*[7] * 7, steps=2), rows=torch.arange(IMAGES), num_steps=2)
        step = session.step(0, 1.0)
        step.close()
        driver.under(step, images_of(EVERYBODY, 0, 1))

    refused(small, again, "step 0 is closed")

    def of_another_model(driver):
        session = begin(Policy(), closed + 1, driver.heads.depths, rows=torch.arange(IMAGES), num_steps=1)
        driver.under(session.step(0, 1.0), images_of(EVERYBODY, 0, 1))

    refused(small, of_another_model, "a session for")


def test_a_second_forward_needs_a_second_step(small: AttachedDriver):
    inputs = images_of(EVERYBODY, 0, 1)
    with small.ready():
        session = small.start(Policy(), rows=torch.arange(IMAGES), num_steps=2)
        with small.attachment.use(session.step(0, 1.0)):
            small.base(inputs)
            with pytest.raises(ValueError, match="second forward under one step"):
                small.base(inputs)
        with small.attachment.use(session.step(1, 0.0)):
            small.base(inputs)
        assert len(session.trace().times) == 2


def test_a_failing_forward_leaves_nothing_behind(small: AttachedDriver, monkeypatch):
    inputs = images_of(EVERYBODY, 0, 1)
    before = small.base(inputs)

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    with small.ready():
        session = small.start(Policy(Threshold(0.3)), rows=torch.arange(IMAGES), num_steps=2)
        with monkeypatch.context() as patch:
            patch.setattr(small.inners[3], "forward", broken)
            with pytest.raises(RuntimeError, match="broken"):
                small.under(session.step(0, 1.0), inputs)
        assert torch.equal(small.base(inputs), before)
        fresh = small.start(Policy(Threshold(0.3)), rows=torch.arange(IMAGES), num_steps=2)
        assert small.under(fresh.step(0, 1.0), inputs).isfinite().all()
    assert torch.equal(small.base(inputs), before)


def test_attaching_twice_and_detaching_nothing():
    driver = driver_named("uvit-paper")
    with pytest.raises(ValueError, match="no exits are attached"):
        detach_exits(driver.model)
    attach_exits(driver.model, driver.heads)
    with pytest.raises(ValueError, match="attached to this UViTTransformer2DModel already"):
        attach_exits(driver.model, driver.heads)
    detach_exits(driver.model)
    with pytest.raises(ValueError, match="no exits are attached"):
        detach_exits(driver.model)
    assert "forward" not in driver.model.__dict__


def test_heads_of_another_model_are_refused():
    model = uvit(num_layers=5)
    with pytest.raises(ValueError, match="an exit at depth 6, the model has 5 blocks"):
        attach_exits(model, exits_for(uvit(), (2, 6)))
    with pytest.raises(ValueError, match="heads of another model: hidden_dim is 8, the model's is 16"):
        attach_exits(model, exits_for(uvit(attention_head_dim=4), (2,)))
    with pytest.raises(ValueError, match="no family for Sequential"):
        attach_exits(nn.Sequential(), exits_for(model, (2,)))
    assert "forward" not in model.__dict__
    assert all("forward" not in block.__dict__ for block in model.transformer_blocks)


def test_families(monkeypatch):
    known = dict(MODEL_SPECS)
    monkeypatch.setattr("ee_diffusion.diffusion.model_specs.MODEL_SPECS", known)
    assert model_spec_of(uvit()).inner == "attn"
    with pytest.raises(ValueError, match="in the family table already"):
        register_model(model_spec_of(uvit()))

    class Mine(nn.Module):
        pass

    with pytest.raises(ValueError, match="no family for Mine"):
        model_spec_of(Mine())
    register_model(ModelSpec("Mine", "blocks"))
    assert model_spec_of(Mine()).blocks == "blocks"
    with pytest.raises(dataclasses.FrozenInstanceError):
        model_spec_of(Mine()).blocks = "layers"


# --- copies, and what comes after attaching


COPIES = {"copied": copy.deepcopy, "pickled": lambda one: pickle.loads(pickle.dumps(one))}


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_a_copy_of_an_attached_pipeline_is_plain_and_can_be_attached_to(made):
    pipe, call = dit_pipeline(), {"num_inference_steps": 2, "output_type": "np"}
    exits = AdapterExits.for_transformer(pipe.transformer, (1, 2), rank=0)

    def drawn(pipe) -> Tensor:
        return torch.from_numpy(pipe([1, 2], generator=torch.Generator().manual_seed(0), **call).images)

    attributes = [set(one.__dict__) for one in (pipe, *pipe.transformer.modules())]
    plain = drawn(pipe)
    attachment = attach_exits(pipe, exits, Policy(schedule=FixedDepth(1)))
    early = drawn(pipe)
    copied = made(pipe)
    alone = made(pipe.transformer)
    assert [set(one.__dict__) for one in alone.modules()] == attributes[1:]
    assert [set(one.__dict__) for one in (copied, *copied.transformer.modules())] == attributes
    assert torch.equal(drawn(copied), plain)
    with pytest.raises(ValueError, match="no exits are attached"):
        detach_exits(copied)
    with attach_exits(copied, exits, Policy(schedule=FixedDepth(2))) as other:
        between = drawn(copied)
        assert other.report.mean_executed == 2
    assert not torch.equal(between, plain)
    assert torch.equal(drawn(pipe), early)
    assert attachment.report.mean_executed == 1
    detach_exits(pipe)
    assert torch.equal(drawn(pipe), plain)
    assert torch.equal(drawn(copied), plain)
    assert [set(one.__dict__) for one in (pipe, *pipe.transformer.modules())] == attributes


def test_detached_within_its_context(small: AttachedDriver):
    attributes = [set(one.__dict__) for one in small.model.modules()]
    with attach_exits(small.model, small.heads) as attachment:
        detach_exits(small.model)
    assert [set(one.__dict__) for one in small.model.modules()] == attributes
    with pytest.raises(ValueError, match=r"were detached from their .* already"):
        attachment.detach()
    with attach_exits(small.model, small.heads), attach_again(small):
        pass  # the outer context leaves what is not its own
    assert [set(one.__dict__) for one in small.model.modules()] == attributes


@contextmanager
def attach_again(driver: AttachedDriver):
    detach_exits(driver.model)
    other = attach_exits(driver.model, driver.heads)
    yield
    other.detach()


def test_what_was_replaced_since_is_left_as_it_stands():
    pipe = dit_pipeline()
    exits, block = (
        AdapterExits.for_transformer(pipe.transformer, (1, 2), rank=0),
        pipe.transformer.transformer_blocks[1],
    )
    attach_exits(pipe, exits, Policy(schedule=FixedDepth(1)))
    ours, block.forward = block.forward, lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match="replaced by something else"):
        detach_exits(pipe)
    block.forward = ours
    pipe([1], num_inference_steps=2)
    assert hook_of(pipe).report.mean_executed == 1, "nothing was taken off"
    detach_exits(pipe)
    assert "forward" not in block.__dict__
    assert "progress_bar" not in pipe.__dict__


def test_a_cache_that_comes_after_the_exits():
    name = "FluxTransformer2DModel"
    model = model_named(name)
    exits = AdapterExits.for_transformer(model, (1, 2), rank=0)
    config = FirstBlockCacheConfig(threshold=0.1)
    with attach_exits(model, exits, Policy(schedule=FixedDepth(1)), rows_per_sample=1, num_steps=1):
        with pytest.raises(ValueError, match="exits are attached to this FluxTransformer2DModel: a cache answers"):
            model.enable_cache(config)
        assert not model.is_cache_enabled
        assert forward(model, inputs_of(name, [0, 1], time=500.0)).isfinite().all()
        apply_first_block_cache(model, config)
        with pytest.raises(ValueError, match="the diffusers hook 'fbc_leader_block_hook' is on transformer_blocks"):
            forward(model, inputs_of(name, [0, 1], time=900.0))
        for module in model.modules():
            registry = module.__dict__.get("_diffusers_hook")
            for hook in [] if registry is None else [hook for hook in registry.hooks if hook.startswith("fbc_")]:
                registry.remove_hook(hook, recurse=False)
    model.enable_cache(config)
    assert model.is_cache_enabled
