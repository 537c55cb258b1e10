"""What a run logs: means over the last steps, to a JSONL file beside the output and to accelerate's trackers.

Here: scalars and the throughput clock. Not here: checkpoints, the progress bar.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ee_diffusion.core.io import write_text

LOG_FILE = "log.jsonl"


class Clock:
    """Seconds spent in training steps: `pause` and `resume` leave out checkpoints and validation."""

    def __init__(self):
        self._before, self._since = 0.0, time.perf_counter()

    def set(self, seconds: float) -> None:
        """Go on, from now, at `seconds`: those of the run that is resumed."""
        self._before, self._since = seconds, time.perf_counter()

    def seconds(self) -> float:
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)

    def pause(self) -> None:
        self._before, self._since = self.seconds(), None

    def resume(self) -> None:
        self._before, self._since = self.seconds(), time.perf_counter()


class Journal:
    """Sums the scalars of each micro-step on the device and writes their means when asked: a host sync per line, none per step."""

    def __init__(self, directory: Path, accelerator: Accelerator, clock: Clock, *, samples_per_step: int):
        self.path, self.accelerator = directory / LOG_FILE, accelerator
        self.clock, self.samples_per_step = clock, samples_per_step
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._mark = (0, 0.0)  # step and seconds of the last line

    def begin(self, step: int) -> None:
        """Start at `step`; lines after it, which a resumed run will write again, are dropped."""
        self._mark = (step, self.clock.seconds())
        if not (self.accelerator.is_main_process and self.path.exists()):
            return
        numbered = [(_step_of(line), line) for line in self.path.read_text().splitlines()]
        kept = [line for number, line in numbered if number is not None and number <= step]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def add(self, terms: dict[str, Tensor]) -> None:
        """Take the scalars of one micro-step."""
        for name, term in terms.items():
            value = term.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def write(self, step: int, learning_rate: float) -> dict[str, float]:
        """Means over the steps since the last line and over ranks, and samples per second; to the log and the trackers.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        names = sorted(self._sums)
        values = torch.stack([self._sums[name] for name in names]) / self._count
        means = dict(zip(names, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True))  # host sync
        (since, then), now = self._mark, self.clock.seconds()
        rate = (step - since) * self.samples_per_step / (now - then)
        self._sums, self._count, self._mark = {}, 0, (step, now)
        scalars = means | {"lr": learning_rate, "samples_per_second": rate}
        line = {"step": step} | {name: float(f"{value:.6g}") for name, value in scalars.items()}
        if self.accelerator.is_main_process:
            known = {name: value if math.isfinite(value) else None for name, value in line.items()}  # JSON has no NaN
            with self.path.open("a") as log:
                log.write(json.dumps(known, allow_nan=False) + "\n")
        self.accelerator.log(scalars, step=step)
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the mean loss of steps {since + 1}..{step} is {means['loss']}; no checkpoint holds them"
            )
        return line


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return None  # a line cut by a kill
