"""The loop over denoising steps of the project's own pipelines, with blocks that stop per image and per step.

Here: from noise to what the last step leaves. Not here: a pipeline's arguments and pictures (uvit.py, text_to_image.py), attaching.
B images, R = B rows, or 2B under guidance (conditional rows first), C, H, W image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.session import Session
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.guidance import guided, is_guided, prepare_model_input
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.hooks.transformer_hook import TransformerHook
from ee_diffusion.diffusion.step_cache.run_setup import setup_here, warn_of_setup


def denoise(
    pipeline: DiffusionPipeline,
    policy: Policy,
    times: Tensor,
    *,
    latents: Tensor,
    conditions: Mapping[str, Tensor],
    guidance_scale: float,
    image_ids: Tensor | None,
    step_arguments: Mapping[str, Any],
    on_step_end: Callable | None,
    on_step_end_inputs: tuple[str, ...],
) -> tuple[Tensor, Trace | None]:
    """Noise (B, C, H, W) -> what the last step leaves, and the trace, None if the policy is off.

    `conditions`: the transformer's arguments by name, a row each (R, ...). `on_step_end`: a user's `callback_on_step_end`, which may
    replace the latents.

    Raises:
        ValueError: image_ids under a policy whose branches are apart; NaN uncertainty, after the step it occurred in.
    """
    if not policy.is_off:
        facts = {"guidance_scale": float(guidance_scale), "shape": tuple(latents.shape[1:])}
        warn_of_setup(pipeline.exits, setup_here(pipeline, pipeline.exits, times.tolist(), **facts))
    with _exits_on(pipeline, policy) as attachment:
        rows = _rows(policy, len(latents), guided=is_guided(guidance_scale), image_ids=image_ids)
        session = (
            None if attachment is None else attachment.start(policy, rows=rows, num_steps=len(times), samples=image_ids)
        )
        with pipeline.progress_bar(total=len(times)) as progress:
            for index, time in enumerate(times):
                call = {"guidance_scale": guidance_scale, "dtype": pipeline.transformer.dtype}
                inputs = prepare_model_input(pipeline.scheduler, latents, time, **call)  # (R, C, H, W)
                with _step(attachment, session, index, time):
                    timestep = time.to(inputs.device).expand(len(inputs))  # (R,)
                    prediction = pipeline.transformer(inputs, timestep, **conditions).sample
                prediction = guided(prediction, guidance_scale)  # (B, C, H, W)
                latents = pipeline.scheduler.step(prediction, time, latents, **step_arguments).prev_sample
                if on_step_end is not None:
                    shown = {name: {"latents": latents}[name] for name in on_step_end_inputs}
                    latents = on_step_end(pipeline, index, time, shown).pop("latents", latents)
                progress.update()
    return latents, None if session is None else session.trace()


@contextmanager
def _exits_on(pipeline: DiffusionPipeline, policy: Policy) -> Iterator[TransformerHook | None]:
    if policy.is_off:
        yield None
        return
    with attach_exits(pipeline.transformer, pipeline.exits) as attachment:
        yield attachment


@contextmanager
def _step(attachment: TransformerHook | None, session: Session | None, index: int, time: Tensor) -> Iterator[None]:
    if attachment is None or session is None:
        yield
        return
    with attachment.use(session.step(index, float(time))):
        yield


def _rows(policy: Policy, count: int, *, guided: bool, image_ids: Tensor | None) -> Tensor:
    """The sample of every row (R,)."""
    apart = guided and policy.cfg_exit == "separate"
    if apart and image_ids is not None:
        raise ValueError(
            "image_ids name images; under a policy with cfg_exit='separate' the branches of an image are separate samples"
        )
    return torch.arange(2 * count) if apart else torch.arange(count).repeat(2 if guided else 1)
