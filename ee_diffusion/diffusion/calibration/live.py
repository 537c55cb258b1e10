"""Policies that were calibrated for one model: candidates run live, a bound on what they lose, and a mark of what they were made for.

Here: live runs and fingerprints. Not here: the bounds (core/risk_control.py), losses (measure). K candidates, the safest first; n images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.fingerprint import made_for_of
from ee_diffusion.diffusion.pipelines.sampling import generate
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Live:
    """`losses` (K, n) in [0, 1], `costs` (K,): mean share of the blocks executed."""

    losses: Tensor
    costs: Tensor


def live_losses(
    pipeline: EarlyExitPipeline,
    policies: Sequence[Policy],
    seeds: Sequence[int],
    *,
    class_labels: Sequence[int] | None,
    loss: Loss,
    batch_size: int,
    progress: Callable = lambda runs: runs,
    **call: Any,
) -> Live:
    """Every candidate on every seed, against the full model at equal seeds. A bolder exit changes every later state, so nothing is
    replayed. `loss(images, full)`: (n, C, H, W) twice -> (n,) in [0, 1]. `progress` gets K + 1 runs, the full model's first. `call` goes to
    the pipeline.

    Raises:
        ValueError: no policies, or one that is off (the full model runs anyway); losses outside [0, 1] or not one an image; as
            `generate`.
    """
    if not policies:
        raise ValueError("no policies, expected at least one candidate")
    off = [place for place, policy in enumerate(policies) if policy is None or policy.is_off]
    if off:
        raise ValueError(
            f"the policies at {off} are off, expected candidates with exits: the full model is run beside them"
        )
    full, losses, costs = None, [], []
    for policy in progress([None, *policies]):
        drawn = generate(pipeline, seeds, class_labels, batch_size=batch_size, exit_policy=policy, **call)
        if full is None:
            full = drawn.images
            continue
        own = loss(drawn.images, full)
        if own.shape != (len(seeds),):
            raise ValueError(f"losses {tuple(own.shape)}, expected one for each of {len(seeds)} images")
        losses.append(own)
        costs.append(drawn.trace.report().fraction_executed)
    found = torch.stack(losses)
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ValueError(f"losses from {float(found.min())} to {float(found.max())}, expected numbers in [0, 1]")
    return Live(found, torch.tensor(costs))


def marked(policy: Policy, pipeline: EarlyExitPipeline, *, num_inference_steps: int, guidance_scale: float) -> Policy:
    """The policy with a mark of this model and these settings: a pipeline refuses it with any other."""
    mark = made_for_of(pipeline, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    return replace(policy, made_for=mark)
