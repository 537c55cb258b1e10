"""Attach exits to a diffusers transformer: its blocks run on the rows that are still going, no forward is copied.

Here: the driver of step sessions for diffusers models. Not here: facts about classes (families.py), decisions (core).
R rows of the batch, r running rows, N tokens, D width, L layers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ee_diffusion.core.heads import ExitHeads
from ee_diffusion.core.intercept import Interception
from ee_diffusion.core.loop import Lane
from ee_diffusion.core.memory import Memory
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.session import Session, StepSession
from ee_diffusion.diffusion.families import Family, family_of


class DenoiserHeads(ExitHeads, Protocol):
    """What attaching needs of heads: those of the core, and what all exits of a forward share."""

    def context(self, timestep: Tensor) -> dict[str, Tensor]:
        """timestep (R,) -> tensors with leading R, `timestep` among them, for `certainty` and `answer`."""
        ...


@runtime_checkable
class RememberingHeads(DenoiserHeads, Protocol):
    """Heads that answer from what earlier steps of the run said."""

    def recall(self, memory: Memory | None, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """The context of a step: the session's memory (None: a run begins), sample (R, ...), timestep (R,) -> tensors with leading R."""
        ...

    def remember(
        self, memory: Memory | None, rows: Tensor, *, sample: Tensor, timestep: Tensor, output: Tensor
    ) -> Memory:
        """The memory after a step in which `rows` (r,) of the batch ran to the end."""
        ...


class Attachment:
    """Exits on a transformer. Outside `use(step)` the transformer computes exactly what it did before.

    A context manager: leaving it detaches. Made by `attach`.
    """

    def __init__(self, transformer: nn.Module, heads: DenoiserHeads, family: Family):
        self.transformer, self.heads, self.family = transformer, heads, family
        self.blocks = list(getattr(transformer, family.blocks))
        self._lane: Lane | None = None
        self._step: StepSession | None = None
        self._rows_after: list[Tensor] = []  # rows that were running when block i returned
        self._names = list(inspect.signature(type(self.blocks[0]).forward).parameters)[1:]
        self._timestep_place = list(inspect.signature(type(transformer).forward).parameters).index("timestep") - 1
        self._interceptions = [
            Interception(block, functools.partial(self._block, layer)) for layer, block in enumerate(self.blocks)
        ]
        self._interceptions.append(Interception(transformer, self._forward))

    def start(self, policy: Policy, *, rows: Tensor, num_steps: int, elements: Tensor | None = None) -> Session:
        """Begin a generation: `policy.start` with this transformer's layers, exits and device. Raises ValueError as it does."""
        return policy.start(
            len(self.blocks),
            self.heads.depths,
            rows=rows,
            num_steps=num_steps,
            elements=elements,
            device=next(self.transformer.parameters()).device,
        )

    @contextmanager
    def use(self, step: StepSession) -> Iterator[None]:
        """One forward of the transformer inside this context runs under the step session, and closes it."""
        self._step = step
        try:
            yield
        finally:
            self._step, self._lane = None, None
            self._rows_after = []

    def detach(self) -> None:
        """Restore the transformer as it was."""
        for interception in reversed(self._interceptions):
            interception.restore()
        self._interceptions = []
        del self.transformer.__dict__["_ee_attachment"]

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception) -> None:
        self.detach()

    def _forward(self, original, *args, **kwargs):
        """The transformer's forward: open a lane, let the parent run, put the answers back."""
        step = self._step
        if step is None:
            return original(*args, **kwargs)
        if self._lane is not None:
            raise ValueError(
                "a second forward under one step session: begin a step for each forward of the transformer"
            )
        sample = args[0] if args else kwargs["hidden_states"]
        timestep = args[self._timestep_place] if len(args) > self._timestep_place else kwargs["timestep"]
        expected = len(step.session.rows)
        if len(sample) != expected:
            raise ValueError(f"the transformer got {len(sample)} rows, the session was started for {expected}")
        if step.session.num_layers != len(self.blocks):
            raise ValueError(f"a session for {step.session.num_layers} blocks, the transformer has {len(self.blocks)}")
        step.session.require_open(step)
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        if len(timestep) not in (1, expected):
            raise ValueError(f"{len(timestep)} timesteps for {expected} rows, expected one or one a row")
        timestep = timestep.expand(expected)  # (R,)
        self._lane = Lane(step, self.heads, self._context(step, sample, timestep))
        output = original(*args, **kwargs)
        if self.heads.space == "output":
            if isinstance(output, tuple):
                output = (self._answers(output[0]), *output[1:])
            else:
                output.sample = self._answers(output.sample)
        if isinstance(self.heads, RememberingHeads) and not step.finished:
            said = output[0] if isinstance(output, tuple) else output.sample
            facts = {"sample": sample, "timestep": timestep, "output": said}
            step.session.memory = self.heads.remember(step.session.memory, step.rows, **facts)
        step.close()
        return output

    def _context(self, step: StepSession, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """What the heads look at in this forward, tensors with leading R; nothing is made that no exit will ask for."""
        if isinstance(self.heads, RememberingHeads) and step.may_exit:
            return self.heads.recall(step.session.memory, sample, timestep)
        return self.heads.context(timestep) if step.measures else {"timestep": timestep}

    def _answers(self, sample: Tensor) -> Tensor:
        """sample (r or R, C, H, W), the tail's output -> (R, C, H, W) with the answers of the rows that left."""
        return self._lane.put_back(self._lane.running(sample) if self.family.tail_takes_all else sample)

    def _block(self, layer: int, original, *args, **kwargs):
        """One block: let rows leave, then run on the rest."""
        lane = self._lane
        if lane is None:
            return original(*args, **kwargs)
        hidden, step = args[0] if args else kwargs[self._names[0]], lane.step
        hidden = lane.offer(layer, hidden)  # (r, N, D)
        if step.runs(layer):
            args, kwargs = self._arguments(layer, hidden, args, kwargs)
            hidden = original(*args, **kwargs)
            step.executed(layer)
        self._rows_after.append(step.rows)
        if layer == len(self.blocks) - 1:
            return self._to_tail(hidden)
        return hidden

    def _to_tail(self, hidden: Tensor) -> Tensor:
        if self.heads.space == "hidden":
            return self._lane.put_back(hidden)  # (R, N, D)
        return self._lane.spread(hidden) if self.family.tail_takes_all else hidden

    def _arguments(self, layer: int, hidden: Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The block's arguments for the running rows."""
        if not self._lane.answers:
            return (hidden, *args[1:]) if args else (), kwargs if args else kwargs | {self._names[0]: hidden}
        by_name = {name: self._rows_of(layer, name, value) for name, value in kwargs.items()}
        placed = tuple(self._rows_of(layer, name, value) for name, value in zip(self._names, args, strict=False))
        if args:
            return (hidden, *placed[1:]), by_name
        return (), by_name | {self._names[0]: hidden}

    def _rows_of(self, layer: int, name: str, value):
        """The running rows of one argument, as the family table says; anything else is passed on as it is."""
        if not isinstance(value, Tensor):
            return value
        if name in self.family.row_arguments:
            return self._lane.running(value) if len(value) == self._lane.num_rows else value  # one for all rows
        source = self.family.earlier[name](layer, len(self.blocks)) if name in self.family.earlier else None
        if source is None:
            return value
        then, now = self._rows_after[source], self._lane.step.rows
        if len(then) == len(now):
            return value
        return value.index_select(0, torch.searchsorted(then, now).to(value.device))


def attach(transformer: nn.Module, heads: DenoiserHeads) -> Attachment:
    """Attach exits to a diffusers transformer.

    Raises:
        ValueError: an unknown class, an attachment already there, heads of another model (depth or width).
    """
    family = family_of(transformer)
    if "_ee_attachment" in transformer.__dict__:
        raise ValueError(f"exits are attached to this {type(transformer).__name__} already; detach first")
    num_layers = len(getattr(transformer, family.blocks))
    if heads.depths[-1] >= num_layers:
        raise ValueError(
            f"heads with an exit at depth {heads.depths[-1]}, the model has {num_layers} blocks: heads of another model?"
        )
    heads.check_fits(transformer)
    attachment = Attachment(transformer, heads, family)
    transformer.__dict__["_ee_attachment"] = attachment
    return attachment


def detach(transformer: nn.Module) -> None:
    """Remove what `attach` did.

    Raises:
        ValueError: nothing is attached.
    """
    if "_ee_attachment" not in transformer.__dict__:
        raise ValueError(f"no exits are attached to this {type(transformer).__name__}")
    transformer.__dict__["_ee_attachment"].detach()
