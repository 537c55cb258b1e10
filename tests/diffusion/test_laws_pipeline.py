"""The laws for whole generations: several steps that depend on one another, three solvers, with and without guidance."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from factories import CLASSES, CRITERIA, NULL_CLASS, criteria_for, pipeline
from laws import Work, counting, margin_of, say_near
from torch import Tensor

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.model_specs import model_spec_of
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline, EarlyExitPipelineOutput

COUNT, STEPS = 5, 3
SOLVERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "dpm++": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++"),
    "heun": lambda: HeunDiscreteScheduler(),
}
GUIDANCE = {"single": 1.0, "joint": 2.0, "separate": 2.0}


@dataclass(frozen=True)
class Setting:
    solver: str
    layout: str

    def __str__(self) -> str:
        return f"{self.solver}-{self.layout}"

    def policy(self, criterion, **more) -> Policy:
        return Policy(criterion, cfg_exit="separate" if self.layout == "separate" else "joint", **more)


SETTINGS = [Setting("ddim", "single"), Setting("dpm++", "joint"), Setting("heun", "separate")]


@functools.cache
def pipe_for(solver: str, variant: str = "paper") -> EarlyExitPipeline:
    made = pipeline(variant=variant)
    made.scheduler = SOLVERS[solver]()
    return made


def labels_of(images: list[int]) -> list[int]:
    return [image % CLASSES for image in images]


@torch.no_grad()
def generate(
    setting: Setting,
    policy: Policy | None,
    images: list[int] | None = None,
    pipe: EarlyExitPipeline | None = None,
    **call,
) -> EarlyExitPipelineOutput:
    images = list(range(COUNT)) if images is None else images
    generators = [torch.Generator().manual_seed(100 + image) for image in images]
    ids = None if setting.layout == "separate" else torch.tensor(images)
    pipe = pipe_for(setting.solver) if pipe is None else pipe
    return pipe(
        labels_of(images),
        STEPS,
        GUIDANCE[setting.layout],
        exit_policy=policy,
        generator=generators,
        image_ids=ids,
        output_type="pt",
        **call,
    )


@functools.cache
def recorded(setting: Setting) -> Trace:
    return generate(setting, setting.policy(Threshold(0.5), record_all=True)).trace


@functools.cache
def criteria(setting: Setting):
    return criteria_for(recorded(setting))


@functools.cache
def live(setting: Setting, name: str) -> EarlyExitPipelineOutput:
    return generate(setting, setting.policy(criteria(setting)[name]))


every_case = pytest.mark.parametrize(
    "setting,name", [(setting, name) for setting in SETTINGS for name in CRITERIA], ids=str
)


@every_case
def test_the_batch_is_split_and_replay_is_the_live_run(setting: Setting, name: str):
    output = live(setting, name)
    trace, policy = output.trace, setting.policy(criteria(setting)[name])
    assert len(trace.depths.unique()) >= 2
    assert (trace.depths == 7).any()
    assert max(len(depths.unique()) for depths in trace.depths) >= 2
    assert torch.equal(replay(trace, policy), trace.depths)
    assert trace.samples.tolist() == list(range(COUNT * (2 if setting.layout == "separate" else 1)))
    assert trace.rows.unique().tolist() == [2 if setting.layout == "joint" else 1]


@every_case
def test_batch_mates_do_not_matter(setting: Setting, name: str):
    policy, together = setting.policy(criteria(setting)[name]), live(setting, name)
    if setting.layout == "separate" and name == "planned":
        return  # a plan has a column per branch there, and the ids of branches cannot be given
    for image in (0, 2, COUNT - 1):
        alone = generate(setting, policy, [image])
        columns = [image, image + COUNT] if setting.layout == "separate" else [image]
        depths = together.trace.depths[:, columns]
        if not torch.equal(alone.trace.depths, depths):
            assert not isinstance(policy.criterion, DepthTable)
            first = int((alone.trace.depths != depths).any(1).nonzero()[0])  # what follows differs for good reason
            near = margin_of(together.trace, policy)[:, columns][first]
            say_near(f"1 in {setting}, {name}, image {image}")
            assert near[alone.trace.depths[first] != depths[first]].max() <= 1e-5
            continue
        torch.testing.assert_close(alone.images, together.images[[image]], rtol=1e-3, atol=1e-4)


@every_case
def test_save_and_load_keep_the_decisions(setting: Setting, name: str, tmp_path: Path):
    policy, before = setting.policy(criteria(setting)[name]), live(setting, name)
    policy.save(tmp_path / "policy.json")
    after = generate(setting, Policy.load(tmp_path / "policy.json"))
    assert torch.equal(after.images, before.images)
    assert torch.equal(after.trace.depths, before.trace.depths)


@every_case
def test_skipped_work_is_not_executed(setting: Setting, name: str):
    pipe = pipe_for(setting.solver)
    policy, criterion = setting.policy(criteria(setting)[name]), criteria(setting)[name]
    steps: list[Work] = []
    with counting(Probe(pipe)) as work:
        steps.append(work.current)

        def next_step(pipe, index, time, shown):
            work.clear()
            steps.append(work.current)
            return shown

        trace = generate(setting, policy, callback_on_step_end=next_step).trace
    assert len(steps) == len(trace.times) + 1
    for index, seen in enumerate(steps[:-1]):
        depths, rows = trace.depths[index], trace.rows[index]
        tokens = 2 + 16
        assert seen.blocks == [tokens * int(rows[depths > layer].sum()) for layer in range(7)]
        assert seen.heads == [int(rows[depths == depth].sum()) for depth in trace.exits]
        reached = [int(rows[depths >= depth].sum()) for depth in trace.exits]
        assert seen.uncertainty == ([0] * len(reached) if isinstance(criterion, DepthTable) else reached)
        assert trace.measured[index].tolist() == seen.uncertainty
        assert trace.answered[index].tolist() == seen.heads


class Probe:
    """What `laws.counting` wants to know of a pipeline."""

    def __init__(self, pipe: EarlyExitPipeline):
        self.heads = pipe.exits
        blocks = getattr(pipe.transformer, model_spec_of(pipe.transformer).blocks)
        self.inners, self.num_layers = [block.attn for block in blocks], len(blocks)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("layout", GUIDANCE)
@pytest.mark.parametrize("solver", SOLVERS)
def test_generation_is_the_slow_reference(solver: str, layout: str, variant: str):
    """Against a loop that runs every block on every row and picks the answers afterwards, image by image."""
    setting, pipe = Setting(solver, layout), pipe_for(solver, variant)
    scores = generate(setting, setting.policy(Threshold(0.5), record_all=True), pipe=pipe).trace.scores
    threshold = float(scores.quantile(0.7))
    output = generate(setting, setting.policy(Threshold(threshold)), pipe=pipe)
    images, depths = reference(pipe, GUIDANCE[layout], threshold, apart=layout == "separate")
    assert len(depths.unique()) >= 3
    assert torch.equal(output.trace.depths.long(), depths)
    torch.testing.assert_close(output.images, images, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def reference(pipe: EarlyExitPipeline, guidance: float, threshold: float, *, apart: bool) -> tuple[Tensor, Tensor]:
    labels = torch.tensor(labels_of(list(range(COUNT))))
    noise = [torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(100 + image)) for image in range(COUNT)]
    scheduler, rows_per_sample = pipe.scheduler, 2 if guidance > 1 else 1
    scheduler.set_timesteps(STEPS)
    latents, depths = torch.cat(noise) * scheduler.init_noise_sigma, []
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, time)
        classes = [labels, torch.full_like(labels, NULL_CLASS)][:rows_per_sample]
        seen = [_depths_and_answers(pipe, scaled, time, label) for label in classes]
        scores = torch.stack([score for score, _ in seen])  # (branches, K + 1, B)
        if not apart:
            scores = scores.amin(0, keepdim=True).expand_as(scores)
        chosen = (
            (scores > threshold).int().argmax(1)
        )  # (branches, B): the first exit above, the model itself being above always
        predictions = [
            torch.stack([answers[int(one)][image] for image, one in enumerate(chosen[branch])])
            for branch, (_, answers) in enumerate(seen)
        ]
        prediction = predictions[0]
        if guidance > 1:
            prediction = predictions[1] + guidance * (predictions[0] - predictions[1])
        places = torch.tensor([*pipe.exits.depths, 7])[chosen]  # (branches, B)
        depths.append(places.flatten() if apart else places[0])
        latents = scheduler.step(prediction, time, latents).prev_sample
    return (latents / 2 + 0.5).clamp(0, 1), torch.stack(depths)


def _depths_and_answers(pipe: EarlyExitPipeline, latents: Tensor, time: Tensor, labels: Tensor):
    output = pipe.transformer(latents, time.expand(COUNT), labels, output_hidden_states=True)
    context = {"timestep": time.expand(COUNT)}
    states = [output.hidden_states[depth] for depth in pipe.exits.depths]
    scores = [pipe.exits.confidence(exit, state, context) for exit, state in enumerate(states)]
    answers = [pipe.exits.answer(exit, state, context) for exit, state in enumerate(states)]
    if pipe.exits.space == "hidden":
        answers = [pipe.transformer.tail(answer) for answer in answers]
    return torch.stack([*scores, torch.full((COUNT,), torch.inf)]), [*answers, output.sample]


@pytest.mark.parametrize("layout", GUIDANCE)
@pytest.mark.parametrize("solver", SOLVERS)
def test_law_1_off_is_the_base_model(solver: str, layout: str):
    setting, pipe = Setting(solver, layout), pipe_for(solver)
    plain = generate(setting, None)
    assert plain.trace is None
    assert plain.report is None
    assert torch.equal(
        generate(setting, None, pipe=EarlyExitPipeline(pipe.transformer, pipe.scheduler)).images, plain.images
    )
    assert torch.equal(generate(setting, Policy()).images, plain.images)
    for policy in (setting.policy(Threshold(1.0)), setting.policy(Threshold(0.0), record_all=True)):
        output = generate(setting, policy)
        assert torch.equal(output.images, plain.images)
        assert (output.trace.depths == 7).all()
    images, _ = reference(pipe, GUIDANCE[layout], 2.0, apart=layout == "separate")
    torch.testing.assert_close(plain.images, images, rtol=1e-4, atol=1e-5)


def test_law_2_a_generation_leaves_the_transformer_as_it_was():
    pipe = pipe_for("ddim")
    attributes = [dict(module.__dict__) for module in pipe.transformer.modules()]
    generate(SETTINGS[0], Policy(Threshold(0.3)))
    for module, had in zip(pipe.transformer.modules(), attributes, strict=True):
        assert module.__dict__.keys() == had.keys()
        assert all(module.__dict__[name] is value for name, value in had.items())


def test_law_6_a_saved_pipeline_decides_the_same(tmp_path: Path):
    pipe, setting = pipe_for("ddim"), SETTINGS[0]
    before = live(setting, "threshold")
    pipe.save_pretrained(tmp_path)
    loaded = EarlyExitPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.exits, DenoisingExits)
    after = generate(setting, setting.policy(criteria(setting)["threshold"]), pipe=loaded)
    assert torch.equal(after.images, before.images)
    assert torch.equal(after.trace.depths, before.trace.depths)


def test_no_state_goes_from_one_generation_to_the_next():
    setting = SETTINGS[0]
    policy = setting.policy(criteria(setting)["patience-total"])
    first = generate(setting, policy)
    assert torch.equal(generate(setting, policy).images, first.images)
    one_step = generate(replace(setting, layout="single"), policy, [1])
    assert one_step.trace.depths.shape == (STEPS, 1)
