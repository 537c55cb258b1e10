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
    return Policy(criterion, exits=depths, guidance="apart")


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


def remembered(error: float, *, sensitivity: Sequence[float]) -> Policy:
    """Answer from memory, per image, where that is expected to add at most `error` to the next sample: `sensitivity_step * u <= error`.

    Ours, for `CachedOutputExits`. error: root mean square, data in [-1, 1]; larger is bolder. sensitivity: one number per solver step, from
    `solver.local_error_gain`: what matters is the error of the step, not of the prediction. u is an estimate, of the worst
    of an image's rows and before guidance, which at scale g may carry up to 2 g - 1 times as much into the sample.

    Raises:
        ValueError: an error that is not positive, or no sensitivities.
    """
    if not error > 0 or not sensitivity or not all(math.isfinite(weight) for weight in sensitivity):
        raise ValueError(
            f"error={error} for {len(sensitivity)} steps, expected a positive number and at least one step, all sensitivities finite"
        )
    lowest = [max(0.0, 1 - error / max(weight, error)) for weight in sensitivity]
    return Policy(Threshold(tuple((least,) for least in lowest)), exits=(0,))


def budgeted(budget: float, *, weights: tuple[float, ...], decay: float) -> Policy:
    """Answers from memory while the errors they are expected to add up to stay within a budget, image by image (ours).

    `a_t = decay a_{t-1} + w_t u_t` where memory answers, `u_t` the expected error of the recalled clean image (`CachedOutputExits`); memory
    answers while `a_t <= budget`. `weights`: w_t for each step of the run, such as `gains.influence` of a model and its solver.

    Raises:
        ValueError: a budget or weights that are not positive and finite, a decay outside [0, 1].
    """
    return Policy(ErrorBudget(budget, tuple(weights), decay), exits=(0,))


def periodic_cache(period: int, *, warm_up: int) -> Policy:
    """Every `period`-th step in full, the others from memory, alike for all images: the fixed-period cache (for `CachedOutputExits`).

    The control of `remembered`: memory without uncertainty. warm_up: full steps at the beginning, at least 1.

    Raises:
        ValueError: a period or warm_up below 1.
    """
    if warm_up < 1:
        raise ValueError(
            f"warm_up={warm_up}, expected at least 1: there is nothing to remember before the first full step"
        )
    return Policy(schedule=Periodic(period, warm_up), exits=(0,))


def searched(full: Sequence[int], *, num_steps: int, num_layers: int) -> Policy:
    """The steps `full` in full, all others from memory, alike for all images: a static schedule, such as `search.search` finds (ours).

    For `CachedOutputExits`. Nothing is measured and nothing decided while images are drawn.

    Raises:
        ValueError: full steps that are not ascending places of the run, the first of them 0.
    """
    places = list(full)
    if not all(isinstance(place, int) for place in places):
        raise ValueError(f"full steps {tuple(full)}, expected places of steps, whole numbers")
    if places != sorted(set(places)) or not places or places[0] != 0 or places[-1] >= num_steps:
        raise ValueError(
            f"full steps {tuple(full)} of {num_steps}, expected ascending places below {num_steps}, the first of them 0"
        )
    depths = tuple(num_layers if step in set(places) else 0 for step in range(num_steps))
    return Policy(schedule=DepthPerStep(depths), exits=(0,))
