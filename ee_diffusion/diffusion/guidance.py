"""What a model is asked at a step and what guidance makes of its answer: one place, so that fits and gains see what the pipelines run.

B images, R rows: 2B under guidance (conditional first), B without; C, H, W image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import SchedulerMixin
from torch import Tensor


def is_guided(scale: float) -> bool:
    """Whether a run at this guidance scale has unconditional rows; up to 1 its answer is the conditional one."""
    return scale > 1


def asked_of(
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


def row_labels(
    class_labels: Sequence[int] | None, null_class: int | None, *, guidance_scale: float, device: torch.device
) -> Tensor | None:
    """The class of every row (R,); None of an unconditional model."""
    if class_labels is None:
        return None
    null = [null_class] * len(class_labels) if is_guided(guidance_scale) else []
    return torch.tensor([*class_labels, *null], device=device)
