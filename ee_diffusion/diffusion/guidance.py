"""What a model is asked at a step and what guidance makes of its answer: one place, so that fits and gains see what the pipelines run.

B images, R rows: 2B under guidance (conditional first; stock pipelines: last), B without; C, H, W image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor


def is_guided(scale: float) -> bool:
    """Whether a run at this guidance scale has unconditional rows; up to 1 its answer is the conditional one."""
    return scale > 1


def prepare_model_input(
    scheduler: SchedulerMixin, latents: Tensor, time: Tensor, *, guidance_scale: float, dtype: torch.dtype
) -> Tensor:
    """The transformer's input (R, C, H, W), in its `dtype`, for latents (B, C, H, W) at a time of the scheduler."""
    rows = torch.cat([latents, latents]) if is_guided(guidance_scale) else latents  # (R, C, H, W)
    return scheduler.scale_model_input(rows, time).to(dtype)


def guided(answer: Tensor, guidance_scale: float) -> Tensor:
    """`u + scale (c - u)` of the two halves of an answer (R, ...) -> (B, ...); the answer itself (B, ...) without guidance."""
    if not is_guided(guidance_scale):
        return answer
    conditional, unconditional = answer.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def condition_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """What the rows (R, ...) of a forward with these arguments are asked: the text, or the class."""
    text = arguments.get("encoder_hidden_states")
    return arguments.get("class_labels") if text is None else text


def sources_of_rows(now: Tensor | None, before: Tensor | None, *, num_rows: int, num_images: int) -> list[int | None]:
    """For each of R rows, in stacks of all B images, the row of the forward before that was asked the same; None: none was.

    now (R, ...) and before (R', ...): what they were asked. Where two stacks were asked the same (perturbed attention guidance), the first
    that is left goes on from the first: pipelines put the perturbed one last.
    """
    if now is None or before is None:
        return [None] * num_rows
    old, sources = list(enumerate(before.split(num_images))), list[int | None]()
    for asked in now.split(num_images):
        same = next((place for place, one in old if torch.equal(one, asked)), None)
        old = [(place, one) for place, one in old if place != same]
        sources += [None if same is None else same * num_images + image for image in range(num_images)]
    return sources


def cfg_labels(
    class_labels: Sequence[int] | None, null_class: int | None, *, guidance_scale: float, device: torch.device
) -> Tensor | None:
    """The class of every row (R,); None of an unconditional model."""
    if class_labels is None:
        return None
    null = [null_class] * len(class_labels) if is_guided(guidance_scale) else []
    return torch.tensor([*class_labels, *null], device=device)
