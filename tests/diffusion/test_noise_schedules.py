"""Exits that know a noise schedule are refused under another one, wherever they meet a scheduler and before the model is asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler
from factories import NULL_CLASS, pipeline

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import Periodic
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.oracle import OracleExits
from ee_diffusion.diffusion.hooks.attach import attach_exits, detach_exits
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_estimator import collect_errors
from ee_diffusion.diffusion.step_cache.error_propagation import error_amplification
from ee_diffusion.diffusion.step_cache.recording import record
from ee_diffusion.diffusion.step_cache.solver import local_error_gain

CALL = {"num_inference_steps": 5, "guidance_scale": 2.0}
STATIC = Policy(schedule=Periodic(2, 2), exits=(0,))
OTHER = DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2")
KINDS = ("memory", "oracle")


def exits_named(kind: str, pipe: EarlyExitPipeline) -> CachedOutputExits | OracleExits:
    memory = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    if kind == "memory":
        return memory
    oracle = OracleExits(memory, pipe.transformer)
    oracle.labels = torch.tensor([0, NULL_CLASS])
    return oracle


@pytest.fixture(params=KINDS)
def pipe(request: pytest.FixtureRequest) -> EarlyExitPipeline:
    made = pipeline()
    made.exits = exits_named(request.param, made)
    return made


def test_the_pipeline_refuses_them(pipe: EarlyExitPipeline):
    pipe([0], exit_policy=STATIC, output_type="pt", **CALL)
    pipe.scheduler = OTHER
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(ValueError, match="know another noise schedule than this DDIMScheduler's"):
        pipe([0], exit_policy=STATIC, output_type="pt", **CALL)


def test_attaching_refuses_them(pipe: EarlyExitPipeline):
    exits, pipe.exits = pipe.exits, None
    for policy in (STATIC, None):
        attach_exits(pipe, exits, policy)
        detach_exits(pipe)
    pipe.scheduler = OTHER
    for policy in (STATIC, None):
        with pytest.raises(ValueError, match="know another noise schedule"):
            attach_exits(pipe, exits, policy)
    attach_exits(pipe.transformer, exits)  # no scheduler at hand


def in_turn() -> dict[str, Callable[[EarlyExitPipeline, CachedOutputExits], object]]:
    given = {"skip": 0.5, "states": "full", "generator": torch.Generator(), **CALL}
    return {
        "local_error_gain": lambda pipe, exits: local_error_gain(exits, pipe.scheduler, 5),
        "record": lambda pipe, exits: record(pipe, exits, [1], [0], **CALL),
        "collect_errors": lambda pipe, exits: collect_errors(pipe, exits, [0], **given),
        "error_amplification": lambda pipe, exits: error_amplification(
            pipe, exits, [0], every=1, generator=torch.Generator(), **CALL
        ),
    }


@pytest.mark.parametrize("name", in_turn())
def test_what_is_measured_and_fitted_with_them_refuses_them(name: str):
    pipe = pipeline()
    exits = exits_named("memory", pipe)
    pipe.scheduler = OTHER
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(ValueError, match="know another noise schedule"):
        in_turn()[name](pipe, exits)
