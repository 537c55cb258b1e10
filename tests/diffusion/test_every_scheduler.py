"""Every scheduler of the installed diffusers under `fit_schedules`: it works, or it is refused by its name with one that works."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import diffusers
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DiffusionPipeline, SchedulerMixin
from factories import pipeline
from tiny_pipelines import call_of, images_of, pipeline_named

from ee_diffusion import attach_exits, fit_schedules
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.step_cache.recording import record
from ee_diffusion.diffusion.step_cache.solver import local_error_gain

STEPS = 6
NAMED = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)  # at least one stands in a refusal
PIPELINES = (
    "pixart-sigma",
    "sd3",
    "cogvideox",
)  # one of variance-preserving schedulers, one of flow matching, one of frames
DRIVEN = {"CogVideoXDPMScheduler": "cogvideox", "FlowMatchEulerDiscreteScheduler": "sd3"}  # not by the first
WORK = {
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}
OPTIONAL = {"DPMSolverSDEScheduler", "LMSDiscreteScheduler"}  # work where their libraries are installed


def of_diffusers() -> list[type[SchedulerMixin]]:
    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
    kinds = [getattr(diffusers, name) for name in names]
    return [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, SchedulerMixin)]


def needs_more(kind: type[SchedulerMixin]) -> bool:
    """Made from other facts than a noise schedule (tokens, proteins): no pipeline around a denoiser of the table takes it."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return any(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters)


def with_scheduler(name: str, kind: type[SchedulerMixin]) -> tuple[DiffusionPipeline, Callable[[], torch.Tensor]]:
    pipe = pipeline_named(name)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)

    def call() -> torch.Tensor:
        torch.manual_seed(0)  # some draw their noise from there
        return images_of(pipe, call_of(name, [0], steps=STEPS))

    return pipe, call


def drives(call: Callable[[], object]) -> bool:
    """Whether the pipeline runs with the scheduler at all, without us."""
    try:
        call()
    except (AttributeError, TypeError, ValueError, RuntimeError, KeyError):
        return False
    return True


def test_those_that_work_are_there():
    assert {kind.__name__ for kind in of_diffusers()} >= WORK


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "kind", [kind for kind in of_diffusers() if not needs_more(kind)], ids=lambda kind: kind.__name__
)
def test_it_works_or_is_refused_by_name(kind: type[SchedulerMixin]):
    """On the pipeline that is meant for it; on one that cannot drive it, a pipeline that fails without us may fail the same way."""
    name = kind.__name__
    if name in WORK | OPTIONAL:
        pipe, call = with_scheduler(DRIVEN.get(name, "pixart-sigma"), kind)
        full = call()
        exits, policies = fit_schedules(pipe, call, every=STEPS)
        count = sorted(policies)[len(policies) // 2]
        with attach_exits(pipe, exits, policies[count]) as attachment:
            drawn = call()
            assert attachment.report.mean_executed < attachment.trace.planned.shape[1]
        assert bool(drawn.isfinite().all())
        assert torch.equal(call(), full)
        return
    for place in PIPELINES:
        pipe, call = with_scheduler(place, kind)
        with pytest.raises(ValueError, match=name) as refused:
            fit_schedules(pipe, call, every=STEPS)
        assert any(other in str(refused.value).split("expected")[-1] for other in NAMED), refused.value


@pytest.mark.parametrize("place", ["pixart-sigma", "sd3"])
def test_a_scheduler_that_the_pipeline_cannot_drive_is_named(place: str):
    pipe, call = with_scheduler(place, CogVideoXDPMScheduler)
    assert not drives(call)
    with pytest.raises(ValueError, match=r"cannot drive CogVideoXDPMScheduler .*timestep_back.* or DDIMScheduler"):
        fit_schedules(pipe, call)


def test_our_own_pipelines_refuse_a_step_that_wants_more():
    pipe = pipeline()
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    told = "CogVideoXDPMScheduler wants old_pred_original_sample, timestep_back too, .* such as DDIMScheduler"
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(ValueError, match=told):
        pipe([0], num_inference_steps=4)
    with pytest.raises(ValueError, match=told):
        record(pipe, exits, [1], [0], num_inference_steps=4, guidance_scale=1.0)


def test_a_sensitivity_is_that_of_a_step_with_its_history():
    """As CogVideoXPipeline calls its solver; the last step is of first order and lands on the clean image."""
    pipe = pipeline_named("cogvideox")
    solver = pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    exits = CachedOutputExits.for_pipeline(pipe.transformer, solver)
    found = local_error_gain(exits, solver, STEPS)
    assert found[-1] == pytest.approx(1.0, rel=0.01)
    solver.set_timesteps(STEPS)
    first, second = solver.timesteps[:2]
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def stepped(output: torch.Tensor, clean: torch.Tensor | None, time, back) -> tuple[torch.Tensor, torch.Tensor]:
        return solver.step(
            output, clean, time, back, zero, generator=torch.Generator().manual_seed(1), return_dict=False
        )

    clean = stepped(zero, None, first, None)[1]
    wrong = exits.output_of(zero, zero + 0.01, second.reshape(1))  # means a clean image that is off by 0.01
    moved = stepped(wrong, clean, second, first)[0] - stepped(zero, clean, second, first)[0]
    assert found[1] == pytest.approx(abs(moved.item()) / 0.01, rel=1e-3)
    assert found[1] != pytest.approx(
        local_error_gain(exits, CogVideoXDDIMScheduler.from_config(solver.config), STEPS)[1], rel=0.1
    )
