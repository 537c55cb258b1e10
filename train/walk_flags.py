"""What the scripts that walk along trajectories ask of their flags alike. Not here: the flags, the walks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping


def check_walk(options: argparse.Namespace, least: Mapping[str, int], *, length: int) -> None:
    """`least`: flag -> the least number that it may be. `length`: predictions that memory holds.

    Raises:
        ValueError: a number too small, a run too short to put memory to the test, a skip outside [0, 1), a guidance that is not finite.
    """
    for name, low in (*least.items(), ("num_inference_steps", length + 2)):
        if getattr(options, name) < low:
            why = f": memory of {length} is first put to the test at step {low}" if low > 1 else ""
            raise ValueError(f"--{name} {getattr(options, name)}, expected at least {low}{why}")
    if not 0 <= options.skip < 1 or not math.isfinite(options.guidance_scale):
        raise ValueError(
            f"--skip {options.skip} --guidance_scale {options.guidance_scale}, expected a probability below 1 and a finite number"
        )
