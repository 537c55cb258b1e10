"""Honest wall clock: candidates that take turns, and the ideal time that skipped work would leave.

Here: `interleaved`, Timing, times of parts (alone, or in their places), `ideal_seconds`. Not here: which modules a model's parts are
(eval/), FLOPs. S steps, E samples, L layers, K exits. A *part* is a name such as "block 3"; its time depends on the number of rows.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from ee_diffusion.core.trace import Trace


@dataclass(frozen=True)
class Timing:
    """Seconds of every counted run, in the order of the rounds, and under what they were taken. `dtype` and `batch`: None if not said."""

    seconds: tuple[float, ...]
    device: str
    dtype: str | None
    batch: int | None
    threads: int
    warmup: int

    @property
    def median(self) -> float:
        """Median of the runs, in seconds."""
        return median(self.seconds)

    @property
    def min(self) -> float:
        """The fastest run, in seconds."""
        return min(self.seconds)

    @property
    def max(self) -> float:
        """The slowest run, in seconds."""
        return max(self.seconds)

    def ratio(self, other: Timing) -> float:
        """Median over rounds of `self / other`: both runs of a round saw the same state of the machine.

        Raises:
            ValueError: another number of rounds, device or number of threads.
        """
        mine, theirs = (len(self.seconds), self.device, self.threads), (len(other.seconds), other.device, other.threads)
        if mine != theirs:
            raise ValueError(
                f"runs, device, threads are {mine} and {theirs}, expected timings of one `interleaved` call"
            )
        return median(left / right for left, right in zip(self.seconds, other.seconds, strict=True))


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    batch: int | None = None,
) -> dict[str, Timing]:
    """Time candidates in turns, each round beginning with the next one, so that all share the machine's drift.

    `warmup` rounds run first and are not counted. The device is synchronised before and after every run; None: the accelerator that is
    in use in this process, else the CPU. `dtype` and `batch` are facts for the record.

    Raises:
        ValueError: no candidates, repeats below 1, warmup below 0.
    """
    if not candidates or repeats < 1 or warmup < 0:
        raise ValueError(f"{len(candidates)} candidates, repeats={repeats}, warmup={warmup}, expected at least 1, 1, 0")
    place = torch.device(device) if device is not None else _device_in_use()
    names, seconds = list(candidates), {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = _timed(candidates[name], place)
            if turn >= warmup:
                seconds[name].append(elapsed)
    said = None if dtype is None else str(dtype).removeprefix("torch.")
    return {
        name: Timing(tuple(runs), describe(place), said, batch, torch.get_num_threads(), warmup)
        for name, runs in seconds.items()
    }


def describe(device: torch.device) -> str:
    """The device by name: 'cpu', 'cuda (NVIDIA ...)'."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def part_times(
    prepare: Callable[[int], Callable[[], object]],
    counts: Iterable[int],
    *,
    repeats: int,
    warmup: int,
    known: Mapping[int, float] | None = None,
    device: torch.device | str | None = None,
) -> dict[int, float]:
    """Median seconds of one part (a block) at each of the given numbers of rows; counts in `known` are not measured again.

    `prepare(rows)` gives a call that runs the part on so many rows. The missing counts take turns.

    Raises:
        ValueError: a count below 1.
    """
    times = dict(known or {})
    missing = sorted({count for count in counts if count not in times})
    if missing and missing[0] < 1:
        raise ValueError(f"a part on {missing[0]} rows, expected at least 1")
    if missing:
        calls = {str(count): prepare(count) for count in missing}
        timings = interleaved(calls, repeats=repeats, warmup=warmup, device=device)
        times |= {count: timings[str(count)].median for count in missing}
    return times


class Places:
    """Times of a model's parts where they run: inside a whole forward, whose other parts have the caches before and after them.

    modules: part -> module, in the order in which they run. after: part -> (a name of `modules`, call); `call(output)` runs on the
    output of that module as soon as it has returned, on the clock of that part alone. before, behind: names of what a forward does before
    the first module and after the last. What lies between two modules belongs to no part: bookkeeping there never counts as ideal.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        after: Mapping[str, tuple[str, Callable[[Any], object]]],
        *,
        before: str,
        behind: str,
        device: torch.device | str,
    ):
        self.modules, self.after, self.before, self.behind = modules, after, before, behind
        self.device = torch.device(device)

    def round(self, forward: Callable[[], object]) -> dict[str, float]:
        """Seconds of every part, once: two forwards, one as it is, in which all but `after` is timed, and one with the calls of `after`, in
        which those are. For rounds that take turns with something else.

        Raises:
            ValueError: a module that did not run exactly once.
        """
        found = self._forward(forward, {})
        extra = self._forward(forward, self.after)
        return found | {part: extra[part] for part in self.after}

    def _forward(
        self, forward: Callable[[], object], after: Mapping[str, tuple[str, Callable[[Any], object]]]
    ) -> dict[str, float]:
        marks: list[tuple[str, float]] = []  # (what begins or ends, when)
        spent: dict[str, float] = {}

        def begins(name: str) -> None:
            marks.append((name, self._now()))

        def ends(name: str, output: Any) -> None:
            marks.append((name, self._now()))
            for part in (part for part, (place, _) in after.items() if place == name):
                begun = self._now()
                after[part][1](output)
                spent[part] = self._now() - begun

        handles = []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: begins(name)))
            handles.append(module.register_forward_hook(lambda _, args, output, name=name: ends(name, output)))
        try:
            start = self._now()
            forward()
            end = self._now()
        finally:
            for handle in handles:
                handle.remove()
        names, moments = [name for name, _ in marks[::2]], [moment for _, moment in marks]
        if names != list(self.modules) or len(marks) != 2 * len(names):
            raise ValueError(f"modules ran as {names}, expected each once: {list(self.modules)}")
        spent |= {name: moments[2 * i + 1] - moments[2 * i] for i, name in enumerate(names)}
        return spent | {self.before: moments[0] - start, self.behind: end - moments[-1]}

    def _now(self) -> float:
        _synchronise(self.device)
        return time.perf_counter()


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of every part over rounds that all hold the same parts."""
    return {part: median(one[part] for one in rounds) for part in rounds[0]}


def executed_counts(trace: Trace) -> Counter[tuple[str, int]]:
    """(part, rows) -> how often it ran, for a run whose samples were one batch.

    Parts are "block l", and by the policy's exits "score k" and "head k". Parts that ran on no row are absent.
    """
    counts: Counter[tuple[str, int]] = Counter()
    kinds = {"block": trace.ran.sum(dim=1), "score": trace.measured, "head": trace.answered}  # (S, L), (S, K), (S, K)
    for kind, rows in kinds.items():
        for step in rows.tolist():
            counts.update((f"{kind} {index}", count) for index, count in enumerate(step) if count > 0)
    return counts


def time_table(
    prepare: Mapping[str, Callable[[int], Callable[[], object]]],
    executed: Mapping[tuple[str, int], int],
    *,
    repeats: int,
    warmup: int,
    known: Mapping[tuple[str, int], float] | None = None,
    device: torch.device | str | None = None,
) -> dict[tuple[str, int], float]:
    """Median seconds of every executed (part, rows); what `known` holds is not measured again.

    `prepare[part](rows)` gives a call that runs the part on so many rows.

    Raises:
        ValueError: a part that nothing is prepared for.
    """
    table = dict(known or {})
    for part in sorted({name for name, _ in executed}):
        counts = [rows for name, rows in executed if name == part]
        if part not in prepare:
            raise ValueError(f"nothing is prepared for {part!r}, expected one of {sorted(prepare)}")
        before = {rows: seconds for (name, rows), seconds in table.items() if name == part}
        found = part_times(prepare[part], counts, repeats=repeats, warmup=warmup, known=before, device=device)
        table |= {(part, rows): seconds for rows, seconds in found.items()}
    return table


def ideal_seconds(
    executed: Mapping[tuple[str, int], int], table: Mapping[tuple[str, int], float], fixed: float
) -> float:
    """`fixed + sum over executed (part, rows) of times executed * the part's own median seconds at that number of rows`.

    `fixed`: measured seconds of what always runs (embedding, tail, scheduler). Parts: blocks, exit heads and uncertainty modules.

    Raises:
        ValueError: an executed (part, rows) that the table lacks, a negative time or count.
    """
    missing = sorted(key for key in executed if key not in table)
    if missing:
        raise ValueError(f"no time for {missing[0]} and {len(missing) - 1} others: measure every executed (part, rows)")
    if fixed < 0 or any(count < 0 or table[key] < 0 for key, count in executed.items()):
        raise ValueError("negative time or count")
    return fixed + sum(count * table[key] for key, count in executed.items())


def realised(ideal: float, measured: float) -> float:
    """`ideal / measured`: 1 if nothing but the executed parts takes time.

    Raises:
        ValueError: a time that is not positive.
    """
    if ideal <= 0 or measured <= 0:
        raise ValueError(f"ideal={ideal}, measured={measured}, expected positive seconds")
    return ideal / measured


def _device_in_use() -> torch.device:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    begun = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - begun


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        raise ValueError(f"device {device}, expected cpu, cuda or mps")
