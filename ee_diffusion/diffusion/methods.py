"""Published methods as policies: one function each, naming the paper, its equation and every deviation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ee_diffusion.core.criteria import ErrorBudget, Patience, Threshold
from ee_diffusion.core.exits import require_depths
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import DepthPerStep, Periodic, PiecewiseDepth


def deediff(threshold: float, *, exits: tuple[int, ...] | None = None, delayed: bool = False) -> Policy:
    """DeeDiff as written (arXiv 2309.17074, sec. 3.4): answer at the first layer whose mean uncertainty `u_i,t < threshold`.

    threshold in [0, 1]; larger is bolder. Deviation: the mean is over the pixels of one image, never over the batch; under guidance the
    image's two rows leave together, the more uncertain one deciding. `delayed`: it answers an exit after that layer, and the host never
    waits for the device (see `Policy`).

    Raises:
        ValueError: threshold outside [0, 1]; late with a single exit.
    """
    if isinstance(threshold, bool) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}, expected a bound on the mean uncertainty in [0, 1]")
    return Policy(Threshold(1 - threshold), exits=exits, delayed=delayed)


def deediff_released(threshold: float, *, depths: tuple[int, ...], num_layers: int, patience: bool = True) -> Policy:
    """DeeDiff as the authors' code runs it: answer where the mean certainty is above `threshold` (0.92 on CIFAR-10).

    For exits with `variant="released"`. The conditional and the unconditional branch exit on their own. patience: among the in-blocks the
    first crossing does not exit, the second does, as their unconditional and class-conditional models have it; their text-to-image model
    exits at the first (False). Deviations: the mean is over one image, where the code's is over the batch (of one); after the last
    block nothing is decided, since both verdicts give the same answer.

    Raises:
        ValueError: threshold outside [0, 1], or depths that do not ascend.
    """
    require_depths(depths)
    crossings = tuple(2 if depth <= num_layers // 2 else 1 for depth in depths)
    criterion = Patience(threshold, crossings, consecutive=False) if patience else Threshold(threshold)
    return Policy(criterion, exits=depths, cfg_exit="separate")


def ase(depths: tuple[int, ...], *, num_train_timesteps: int = 1000) -> Policy:
    """ASE (ICML 2024): a fixed depth for each of `len(depths)` equal bins of time, from data to noise.

    Deviation: exits answer through the heads given, not through a jointly fine-tuned shared tail.

    Raises:
        ValueError: no depths.
    """
    if not depths:
        raise ValueError("depths is empty, expected one for each bin of time")
    if not num_train_timesteps > 0:
        raise ValueError(f"num_train_timesteps={num_train_timesteps}, expected a positive number")
    width = num_train_timesteps / len(depths)
    return Policy(schedule=PiecewiseDepth(tuple(width * (i + 1) for i in range(len(depths) - 1)), tuple(depths)))


def duodiff(depth: int, *, switch: float, num_layers: int) -> Policy:
    """DuoDiff (arXiv 2410.09633): `depth` blocks while the timestep is at least `switch`, the full model after.

    Deviation: the shallow network is the model's own first blocks with an exit head, not a second network.
    """
    return Policy(schedule=PiecewiseDepth((switch,), (num_layers, depth)))


def per_step_error_threshold(error: float, *, local_gains: Sequence[float]) -> Policy:
    """Take the cached output, per image, where it is expected to add at most `error` to the next sample: `local_gain_step * u <= error`.

    Ours, for `CachedOutputExits`. error: root mean square, data in [-1, 1]; larger is bolder. local_gains: one number per solver step, from
    `solver.local_error_gain`: what matters is the error of the step, not of the prediction. u is an estimate, of the worst of an image's
    rows and before guidance, which at scale g may carry up to 2 g - 1 times as much into the sample.

    Raises:
        ValueError: an error that is not positive, or no local gains.
    """
    if not error > 0 or not local_gains or not all(math.isfinite(gain) for gain in local_gains):
        raise ValueError(
            f"error={error} for {len(local_gains)} steps, expected a positive number and at least one step, all local gains finite"
        )
    lowest = [max(0.0, 1 - error / max(gain, error)) for gain in local_gains]
    return Policy(Threshold(tuple((least,) for least in lowest)), exits=(0,))


def accumulated_error_budget(budget: float, *, weights: tuple[float, ...], decay: float) -> Policy:
    """Cached outputs while the errors they are expected to add up to stay within a budget, image by image (ours).

    `a_t = decay a_{t-1} + w_t u_t` where the cached output is taken, `u_t` the expected error of the extrapolated clean image
    (`CachedOutputExits`); it is taken while `a_t <= budget`. `weights`: w_t for each step of the run, such as
    `error_propagation.error_weights` of a model and its solver.

    Raises:
        ValueError: a budget or weights that are not positive and finite, a decay outside [0, 1].
    """
    return Policy(ErrorBudget(budget, tuple(weights), decay), exits=(0,))


def periodic_cache(cache_interval: int, *, warmup_steps: int) -> Policy:
    """Compute every `cache_interval`-th step and take the cached output at the others, alike for all images (for `CachedOutputExits`).

    The control of `per_step_error_threshold`: a cache without uncertainty. warmup_steps: steps that are computed first, at least 1.

    Raises:
        ValueError: a cache_interval or warmup_steps below 1.
    """
    if warmup_steps < 1:
        raise ValueError(
            f"warmup_steps={warmup_steps}, expected at least 1: there is nothing cached before the first compute step"
        )
    return Policy(schedule=Periodic(cache_interval, warmup_steps), exits=(0,))


def static_cache_schedule(compute_steps: Sequence[int], *, num_steps: int, num_layers: int) -> Policy:
    """Compute the steps `compute_steps` and take the cached output at all others, alike for all images (ours): a static schedule, such as
    `schedule_search.search` finds.

    For `CachedOutputExits`. Nothing is measured and nothing decided while images are drawn.

    Raises:
        ValueError: compute steps that are not ascending places of the run, the first of them 0.
    """
    places = list(compute_steps)
    if not all(isinstance(place, int) for place in places):
        raise ValueError(f"compute_steps={tuple(compute_steps)}, expected places of steps, whole numbers")
    if places != sorted(set(places)) or not places or places[0] != 0 or places[-1] >= num_steps:
        raise ValueError(
            f"compute_steps={tuple(compute_steps)} of {num_steps}, expected ascending places below {num_steps}, the first of them 0"
        )
    depths = tuple(num_layers if step in set(places) else 0 for step in range(num_steps))
    return Policy(schedule=DepthPerStep(depths), exits=(0,))
