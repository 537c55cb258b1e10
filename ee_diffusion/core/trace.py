"""What happened in a run and what it cost. A Trace holds everything, a Report condenses it.

S steps, E samples, K exits of the policy, L layers. What the policy *needed* (`needed`) is kept apart from what really *ran* (`ran`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from ee_diffusion.core.io import read_tensors, write_tensors
from ee_diffusion.core.saved_names import TRACE_NAMES, renamed, todays_names

# this one; before it, samples were called elements; before that, rows were (E,), every step's
_FORMATS = ("ee_diffusion.trace.3", "ee_diffusion.trace.2", "ee_diffusion.trace.1")
_TENSORS = ("samples", "rows", "times", "exits", "planned", "depths", "scores", "ran", "measured", "answered")


@dataclass(frozen=True)
class Beside:
    """Work of a call beside the forwards that a trace is of: the `name` of what it was, its `forwards`; rows x blocks that `ran`, of
    `blocks` without exits (0: they cannot be compared, or nobody counted)."""

    name: str
    forwards: int
    ran: int
    blocks: int


@dataclass(frozen=True, eq=False)
class Trace:
    """One run, step by step.

    samples (E,) ids; rows (S, E) rows per sample (guidance may end in mid-run); times (S,); exits (K,) depths; planned (S, L) layers
    that the schedule allowed;
    depths (S, E) blocks after which the sample's answer was taken (L: by the model's own tail; -1: absent from the step);
    scores (S, K, E), NaN where not measured;
    ran (S, E, L) rows of the sample that the layer was executed on; measured and answered (S, K) rows that a score and a head were
    evaluated on. `policy`: the policy as a dictionary; `recorded_all`: every exit was measured and nobody stopped.
    `calls`: forwards of each step, those after the first (a second call of guidance) following its depths; empty: one each.
    `keeps_exited_rows`: why rows that stopped were carried along; empty: they were dropped. `beside`: other work of the same call.
    """

    samples: Tensor
    rows: Tensor
    times: Tensor
    exits: Tensor
    planned: Tensor
    depths: Tensor
    scores: Tensor
    ran: Tensor
    measured: Tensor
    answered: Tensor
    policy: dict[str, Any]
    recorded_all: bool = False
    calls: tuple[int, ...] = ()
    keeps_exited_rows: str = ""
    beside: tuple[Beside, ...] = ()

    def __repr__(self) -> str:
        (steps, samples), layers = self.depths.shape, self.planned.shape[1]
        return f"Trace({steps} steps, {samples} samples, {layers} blocks, exits {self.exits.tolist()})"

    @property
    def needed(self) -> Tensor:
        """(S, E, L): whether the policy needed the layer for the sample: allowed by the schedule and below the sample's depth."""
        layers = torch.arange(self.planned.shape[1])
        return self.planned[:, None, :] & (layers < self.depths[:, :, None])

    @property
    def work(self) -> tuple[int, int]:
        """Rows x blocks that ran, and those of the same forwards without exits."""
        steps, _, layers = self.ran.shape
        calls = torch.tensor(self.calls or (1,) * steps)[:, None]  # (S, 1)
        return int(self.ran.sum()), layers * int((self.rows * (self.depths >= 0) * calls).sum())

    def save(self, path: str | os.PathLike) -> None:
        """Write to one safetensors file, whole or not at all. Raises as `io.write_whole`."""
        metadata = {
            "policy": json.dumps(self.policy),
            "recorded_all": json.dumps(self.recorded_all),
            "calls": json.dumps(self.calls),
            "keeps_exited_rows": json.dumps(self.keeps_exited_rows),
            "beside": json.dumps([astuple(one) for one in self.beside]),
            "format": _FORMATS[0],
        }
        write_tensors(path, {name: getattr(self, name) for name in _TENSORS}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Trace:
        """Read what `save` wrote.

        Raises:
            ValueError: a truncated file, or one that is no trace.
        """
        found, metadata = read_tensors(path, "trace", format=_FORMATS)
        try:
            found, metadata = renamed(found, TRACE_NAMES), renamed(metadata, TRACE_NAMES)
            if missing := [name for name in _TENSORS if name not in found]:
                raise ValueError(f"it lacks the tensors {missing}, it holds {sorted(found)}")
            tensors = {name: found[name] for name in _TENSORS}
            if metadata["format"] == _FORMATS[-1]:
                tensors["rows"] = tensors["rows"].expand(len(tensors["times"]), -1)
            facts: dict[str, Any] = tensors | {
                "policy": todays_names(json.loads(metadata["policy"])),
                "recorded_all": json.loads(metadata["recorded_all"]),
                "calls": tuple(json.loads(metadata.get("calls", "[]"))),
                "keeps_exited_rows": json.loads(metadata.get("keeps_exited_rows", '""')),
                "beside": tuple(Beside(*one) for one in json.loads(metadata.get("beside", "[]"))),
            }
            return cls(**facts)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a readable trace: {error}") from error

    @classmethod
    def concatenate(cls, traces: list[Trace]) -> Trace:
        """Join runs of the same policy over different samples (batches, ranks) into one.

        Raises:
            ValueError: nothing to join, or runs of different policies, steps or exits.
        """
        if not traces:
            raise ValueError("no traces to concatenate, expected at least one")
        first = traces[0]
        for other in traces[1:]:
            if (other.policy, other.times.tolist(), other.exits.tolist(), other.calls, other.keeps_exited_rows) != (
                first.policy,
                first.times.tolist(),
                first.exits.tolist(),
                first.calls,
                first.keeps_exited_rows,
            ) or not torch.equal(other.planned, first.planned):
                raise ValueError("traces of different policies, steps, exits or layers cannot be joined")
        joined = {
            name: torch.cat([getattr(trace, name) for trace in traces], dim=dim) for name, dim in _SAMPLE_DIMS.items()
        }
        counts = {
            name: torch.stack([getattr(trace, name) for trace in traces]).sum(0) for name in ("measured", "answered")
        }
        same = {
            name: getattr(first, name) for name in ("times", "exits", "planned", "policy", "calls", "keeps_exited_rows")
        }
        merged: dict[str, Any] = joined | counts | same
        beside = _summed(one for trace in traces for one in trace.beside)
        return cls(**merged, recorded_all=all(trace.recorded_all for trace in traces), beside=beside)

    def report(self) -> Report:
        """The run in a few numbers."""
        steps, _, layers = self.ran.shape
        calls = torch.tensor(self.calls or (1,) * steps)[:, None]  # (S, 1)
        blocks = self.ran.sum(2) / (self.rows.clamp(min=1) * calls)  # (S, E)
        present = self.depths >= 0  # (S, E)
        histogram = {int(depth): int((self.depths == depth).sum()) for depth in self.depths[present].unique()}
        each_step = [
            row[there] if there.any() else row.new_zeros(1) for row, there in zip(blocks, present, strict=True)
        ]
        return Report(
            num_steps=steps,
            num_samples=len(self.samples),
            num_layers=layers,
            mean_executed=blocks[present].mean().item(),
            mean_needed=self.needed.sum(2)[present].float().mean().item(),
            executed_per_step=tuple(row.mean().item() for row in each_step),
            spread_per_step=tuple(row.std(correction=0).item() for row in each_step),
            depth_histogram=histogram,
            measured_rows=int(self.measured.sum()),
            answered_rows=int(self.answered.sum()),
            followed_calls=sum(self.calls) - len(self.calls),
            keeps_exited_rows=self.keeps_exited_rows,
            beside=self.beside,
            call_fraction=self._call_fraction(),
        )

    def _call_fraction(self) -> float:
        ran, blocks = self.work
        whole = blocks + sum(one.blocks for one in self.beside)
        return (ran + sum(one.ran for one in self.beside)) / whole if whole else 1.0


def _summed(beside: Iterable[Beside]) -> tuple[Beside, ...]:
    """One for each name."""
    found: dict[str, Beside] = {}
    for one in beside:
        known = found.get(one.name, Beside(one.name, 0, 0, 0))
        counts = (known.forwards + one.forwards, known.ran + one.ran, known.blocks + one.blocks)
        found[one.name] = Beside(one.name, *counts)
    return tuple(found.values())


_SAMPLE_DIMS = {"samples": 0, "rows": 1, "depths": 1, "scores": 2, "ran": 1}


@dataclass(frozen=True)
class Report:
    """A trace condensed, over the samples that took part in a step.

    `mean_executed`: blocks that really ran per sample and step; `mean_needed`: blocks that the policy needed; `spread_per_step`:
    standard deviation over samples of the blocks executed at a step (0: every sample alike); `depth_histogram`: depth -> number of
    (step, sample) answers taken there; `measured_rows` and `answered_rows`: evaluations of scores and of exit heads;
    `followed_calls`: forwards that followed the depths of another one (second calls of guidance); `keeps_exited_rows`: why rows that
    stopped were carried along, empty: they were dropped; `beside`: other work of the same call; `call_fraction`: of all rows x blocks of
    the call, those beside included, the part that ran.
    """

    num_steps: int
    num_samples: int
    num_layers: int
    mean_executed: float
    mean_needed: float
    executed_per_step: tuple[float, ...]
    spread_per_step: tuple[float, ...]
    depth_histogram: dict[int, int]
    measured_rows: int
    answered_rows: int
    followed_calls: int = 0
    keeps_exited_rows: str = ""
    beside: tuple[Beside, ...] = ()
    call_fraction: float = 1.0

    @property
    def fraction_executed(self) -> float:
        """Executed blocks over all blocks, in [0, 1]."""
        return self.mean_executed / self.num_layers

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{self.num_samples} samples x {self.num_steps} steps, {self.num_layers} blocks",
            f"executed blocks per sample and step: {self.mean_executed:.2f} of {self.num_layers} ({100 * self.fraction_executed:.1f} %)",
        ]
        counted = [f"{one.forwards} of {one.name}" for one in self.beside if one.blocks]
        if counted:
            share = f"{100 * self.call_fraction:.1f} %"
            lines.append(f"of all blocks of the call: {share}, with the forwards beside: {', '.join(counted)}")
        others = [f"{one.forwards or 'any'} forwards of {one.name}" for one in self.beside if not one.blocks]
        if others:
            lines.append(f"not counted in that: {', '.join(others)}")
        if self.mean_executed >= self.num_layers:
            lines.append("nothing was skipped")
        if self.mean_executed - self.mean_needed > 1e-6:
            lines.append(f"needed by the policy: {self.mean_needed:.2f} (the difference ran without being needed)")
        if self.keeps_exited_rows:
            lines.append(f"rows that stopped were carried along, not dropped: {self.keeps_exited_rows}")
        if self.followed_calls:
            lines.append(f"{self.followed_calls} second calls of guidance followed the depths of the first")
        total = sum(self.depth_histogram.values())
        shares = ", ".join(
            f"{depth}: {100 * count / total:.1f} %" for depth, count in sorted(self.depth_histogram.items())
        )
        lines.append(f"answers by depth (of {self.num_layers}): {shares}")
        lines.append(
            f"rows a score was measured on: {self.measured_rows}; rows an exit head answered: {self.answered_rows}"
        )
        return "\n".join(lines)
