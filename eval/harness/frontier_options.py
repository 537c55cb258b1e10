"""The numbers of the frontier: how many images, which points of each curve. Not here: who they make take part (contenders.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from eval.harness.options import flag

WITHIN = {  # what each number of these lists may be
    "shares": (lambda x: 0 < x < 1, "between 0 and 1"),
    "noise_shares": (lambda x: 0 < x < 1, "between 0 and 1"),
    "fitted_shares": (lambda x: 0 < x < 1, "between 0 and 1"),
    "together_shares": (lambda x: 0 < x < 1, "between 0 and 1"),
    "fractions": (lambda x: 0 < x <= 1, "above 0, at most 1"),
    "thresholds": (lambda x: 0 < x <= 1, "above 0, at most 1"),
    **dict.fromkeys(
        ("errors", "budgets", "oracles", "first_block", "mag"),
        (lambda x: 0 < x < math.inf, "positive and finite"),
    ),
    "periods": (lambda x: x >= 1, "at least 1"),
    "taylor": (lambda x: x >= 1, "at least 1"),
    "taylor_second_order": (lambda x: x >= 1, "at least 1"),
}
COUNTS = ("count", "search_count", "gain_images", "gain_every")
PARTS = ("decay", "power", "search_power")


def _numbers(help: str, *values: float):
    return field(default_factory=lambda: list(values), metadata={"help": help})


@dataclass(frozen=True)
class FrontierOptions:
    """How many images, and which points of each curve.

    Raises:
        ValueError: numbers out of range, or twice in a list.
    """

    count: int = flag("Test images.", 128)
    clock_images: int | None = flag("Test images that times are measured on, whole batches; none: two batches.")
    memory: str | None = flag("Folder of fitted exits that remember (train/fit_step_cache.py); none: unfitted.")
    errors: list[float] = _numbers("`remembered`: errors allowed per step (rms, data in [-1, 1]).")
    budgets: list[float] = _numbers("`budgeted`: budgets of accumulated error; the model's gains are measured first.")
    shares: list[float] = _numbers("`searched`: shares of the steps that memory answers.", 0.64, 0.72)
    noise_shares: list[float] = _numbers("`searched noise`: the same where the noise is remembered.")
    fitted_shares: list[float] = _numbers(
        "`searched fitted`: the same with the best linear prediction of the noise.", 0.5, 0.64, 0.72, 0.8
    )
    together_shares: list[float] = _numbers(
        "`searched together`: the same, all answers of a run weighed together; the model's gains are measured first."
    )
    oracles: list[float] = _numbers("Errors allowed per step where the true error is known.")
    decay: float = flag("How much of the accumulated error a step leaves.", 0.7)
    power: float = flag("How far `budgeted` trusts the measured gains, 0 to 1.", 0.5)
    search_power: float = flag("How far the search trusts the measured gains, 0 to 1.", 1.0)
    search_count: int = flag("Images whose trajectories are searched (fitting seeds).", 16)
    gain_images: int = flag("Images on which gains are measured (fitting seeds).", 8)
    gain_every: int = flag("Gains are measured at every so many steps.", 4)
    periods: list[int] = field(default_factory=lambda: [2, 3], metadata={"help": "Periods of the fixed cache."})
    fractions: list[float] = _numbers("Fewer steps: fractions of the steps.", 0.5, 0.4, 0.3, 0.2)
    thresholds: list[float] = _numbers("DeeDiff's thresholds on u; none: leave it out.")
    first_block: list[float] = _numbers("Thresholds of diffusers' FirstBlockCache.")
    taylor: list[int] = field(default_factory=lambda: [3], metadata={"help": "Intervals of diffusers' TaylorSeer."})
    taylor_second_order: list[int] = field(
        default_factory=list, metadata={"help": "The same where it expands to the second order."}
    )
    mag: list[float] = _numbers("Thresholds of diffusers' MagCache.")
    controls: bool = flag("Static and random controls made of the traces of the policies that decide.", True)

    def __post_init__(self):
        for name, (fits, expected) in WITHIN.items():
            values = getattr(self, name)
            if not all(fits(value) for value in values) or len(set(values)) < len(values):
                raise ValueError(f"{name}={values}, expected numbers {expected}, each once")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        for name in PARTS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected a number from 0 to 1")
