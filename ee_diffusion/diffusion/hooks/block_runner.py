"""BlockRunner: the rows of one forward on their way through the blocks of a diffusers transformer, up to its tail.

Here: which rows of which argument a block gets, and what its parent gets back. Not here: who stops (core), facts on classes
(model_specs.py). R rows of the batch, r running rows, N tokens, D width, L layers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ee_diffusion.core.active_batch import ActiveBatch
from ee_diffusion.core.rows import require_rows
from ee_diffusion.diffusion.hooks.gradient_checkpointing import Checkpoint, checkpointed
from ee_diffusion.diffusion.model_specs import ModelSpec

TEXT = "encoder_hidden_states"


@dataclass(frozen=True)
class Layer:
    """One block on the depth axis: the names of its arguments, whether it takes text and image as one sequence (concatenated), and
    whether it takes and returns text beside the image."""

    names: tuple[str, ...]
    concatenated: bool
    text: bool


def layers_of(transformer: nn.Module, family: ModelSpec) -> list[Layer]:
    """The layers of a transformer, in the order in which they run."""
    return [
        Layer(tuple(signature_of(type(block)).parameters)[1:], together, family.returns != "image" and not together)
        for name in family.lists
        for together in [name in family.concatenated]
        for block in getattr(transformer, name)
    ]


@functools.cache
def signature_of(kind: type) -> inspect.Signature:
    """The signature of a module class's forward, looked up once: that is slow."""
    return inspect.signature(kind.forward)


class BlockRunner:
    """One forward under one step session.

    Rows that stop are dropped: a block gets, and its parent gets back, the r running rows. Where the parent adds something to all rows
    between blocks (`ModelSpec.residuals`), it gets R rows back, those that stopped as they were. A frozen family's blocks run on all R
    rows.
    """

    def __init__(
        self,
        lane: ActiveBatch,
        family: ModelSpec,
        layers: list[Layer],
        arguments: Mapping[str, Any],
        *,
        rows_for: Callable[[int, int], int] | None = None,
        checkpoint: Checkpoint | None = None,
    ):
        """rows_for: (r, R) -> how many rows a block gets while r of R run, the first of them repeated; None: r. checkpoint: what blocks
        are called with, to be computed again in the backward pass."""
        self.lane, self.family, self.layers = lane, family, layers
        given = any(arguments.get(name) is not None for name in family.residuals)
        self.whole = bool(family.keeps_exited_rows) or given  # the parent holds R rows between blocks, not r
        self.num_text = arguments[TEXT].shape[1] if family.concatenated else 0
        self._rows_for, self._checkpoint = rows_for, checkpoint
        self.padded = 0  # rows x blocks that ran for no image
        self._rows_after: list[Tensor] = []  # rows that were running when block i returned
        self._taken: dict[
            int, tuple[Any, int, Any]
        ] = {}  # an argument's id -> itself, number of rows, its running rows

    def block(self, layer: int, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """One block: let rows leave, then run on the rest."""
        step, facts = self.lane.step, self.layers[layer]
        names = facts.names
        hidden = args[0] if args else kwargs[names[0]]
        text = _given(TEXT, names, args, kwargs) if facts.text else None
        if text is not None:
            self.num_text = text.shape[1]  # of this rank, where the tokens lie on several
        running_hidden, running_text = self._offer(facts, layer, hidden, text)
        self._rows_after.append(step.rows)
        if not step.runs(layer):
            return self._packed(layer, *((hidden, text) if self.whole else (running_hidden, running_text)))
        step.executed(layer)
        if self._checkpoint is not None:
            original = checkpointed(self._checkpoint, original)
        if (
            self.family.keeps_exited_rows or len(step.rows) == self.lane.num_rows
        ):  # all rows run: what the parent gave is theirs
            return original(*args, **kwargs)
        new = {names[0]: self._padded(running_hidden)} | ({} if text is None else {TEXT: self._padded(running_text)})
        output = original(*self._arguments(layer, names, args, new), **self._keywords(layer, kwargs, new))
        parts = (output,) if isinstance(output, Tensor) else tuple(part for part in output if part is not None)
        rows = len(new[names[0]])
        require_rows(parts, rows, class_name=self.family.class_name, row_arguments=self.family.row_arguments)
        output = self._unpadded(output)
        if not self.whole:
            return output
        new_hidden, new_text = self._unpacked(layer, output)
        return self._packed(layer, self._spread_over(hidden, new_hidden), self._spread_over(text, new_text))

    def to_tail(self, hidden: Tensor) -> Tensor:
        """What the last block left, (r or R, N, D) -> what the tail gets: every row's answer, or (space `output`) the running rows."""
        if self.lane.heads.space == "hidden":
            return self.lane.put_back(self.lane.running(hidden) if self.whole else hidden)  # (R, N, D)
        if self.whole or not self.family.tail_takes_all:
            return hidden
        return self.lane.spread(hidden)

    def answers(self, sample: Tensor) -> Tensor:
        """The tail's output (r or R, ...) -> (R, ...) with the answers of the rows that left; for heads in space `output`."""
        return self.lane.put_back(self.lane.running(sample) if self.whole or self.family.tail_takes_all else sample)

    def _padded(self, values: Tensor) -> Tensor:
        """values (r, ...) -> (rows_for(r, R), ...), the first row repeated."""
        missing = self._missing()
        return values if not missing else torch.cat([values, values[:1].expand(missing, *values.shape[1:])])

    def _unpadded(self, output: Any) -> Any:
        """What a block returned, without the rows that were repeated."""
        missing, rows = self._missing(), len(self.lane.step.rows)
        self.padded += missing
        if not missing:
            return output
        return output[:rows] if isinstance(output, Tensor) else tuple(None if o is None else o[:rows] for o in output)

    def _missing(self) -> int:
        rows = len(self.lane.step.rows)
        return 0 if self._rows_for is None else self._rows_for(rows, self.lane.num_rows) - rows

    def _offer(self, facts: Layer, layer: int, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Show the heads the image tokens; -> image (or text and image) and text of the rows that go on."""
        lane = self.lane
        if not (self.whole or facts.text or facts.concatenated):  # a stream of image tokens alone
            return lane.offer(layer, hidden), None
        before = lane.step.rows
        if self.whole:
            hidden, text = lane.running(hidden), None if text is None else lane.running(text)
        if not facts.concatenated:
            hidden = lane.offer(layer, hidden)  # (r, N, D)
        else:
            lane.offer(layer, hidden[:, self.num_text :])
            hidden = _those(hidden, before, lane.step.rows)
        return hidden, None if text is None else _those(text, before, lane.step.rows)

    def _arguments(self, layer: int, names: tuple[str, ...], args: tuple, new: dict[str, Any]) -> list[Any]:
        named = zip(names, args, strict=False)
        rest = args[len(names) :]  # swallowed by a block's *args
        return [*(new[name] if name in new else self._rows_of(layer, name, value) for name, value in named), *rest]

    def _keywords(self, layer: int, kwargs: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return {name: new[name] if name in new else self._rows_of(layer, name, value) for name, value in kwargs.items()}

    def _rows_of(self, layer: int, name: str, value: Any) -> Any:
        """The running rows of one argument, as the family table says; anything else is passed on as it is."""
        running = rows = self.lane.step.rows
        if len(rows) == self.lane.num_rows:
            return value
        if self._missing():
            rows = torch.cat([rows, rows[:1].expand(self._missing())])
        if name in self.family.row_arguments:
            if id(value) not in self._taken or self._taken[id(value)][1] != len(running):
                self._taken[id(value)] = (value, len(running), take_rows(value, rows, self.lane.num_rows, name=name))
            return self._taken[id(value)][2]
        source = self.family.earlier[name](layer, len(self.layers)) if name in self.family.earlier else None
        if source is None or value is None:
            return value
        held = self.lane.running(value) if self.whole else _those(value, self._rows_after[source], running)
        return self._padded(held)

    def _spread_over(self, whole: Tensor | None, values: Tensor | None) -> Tensor | None:
        """values (r, ...) in their places, the rows that stopped as in whole (R, ...)."""
        if values is None or len(values) == self.lane.num_rows:
            return values
        return whole.index_copy(0, self.lane.step.rows.to(whole.device), values)

    def _packed(self, layer: int, hidden: Tensor, text: Tensor | None) -> Any:
        """As the family's blocks return it."""
        if not self.layers[layer].text:
            return hidden
        return (text, hidden) if self.family.returns == "text, image" else (hidden, text)

    def _unpacked(self, layer: int, output: Any) -> tuple[Tensor, Tensor | None]:
        """What a block returned -> image, text."""
        if not self.layers[layer].text:
            return output, None
        return (output[1], output[0]) if self.family.returns == "text, image" else (output[0], output[1])


def take_rows(value: Any, rows: Tensor, num_rows: int, *, name: str) -> Any:
    """The rows (r,) of a row argument: a tensor (R, ...), (1, ...) or (m R, ...), that is, m stacks of all rows; or tensors in tuples,
    lists and dicts.

    Raises:
        ValueError: a tensor whose length is none of these: the argument is no row argument.
    """
    if isinstance(value, dict):
        return {key: take_rows(one, rows, num_rows, name=f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(take_rows(one, rows, num_rows, name=name) for one in value)
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) == 1:
        return value
    stacks, rest = divmod(len(value), num_rows)
    if rest:
        raise ValueError(
            f"the block argument {name!r} has {len(value)} entries, expected one for each of {num_rows} rows"
        )
    places = torch.cat([rows + num_rows * stack for stack in range(stacks)])
    return value.index_select(0, places.to(value.device))


def _given(name: str, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The argument of that name, by place or by keyword."""
    place = names.index(name)
    return args[place] if place < len(args) else kwargs[name]


def _those(values: Tensor, held: Tensor, rows: Tensor) -> Tensor:
    """values (len(held), ...) of the rows `held` (ascending) -> those of `rows`, which are among them."""
    if len(held) == len(rows):
        return values
    return values.index_select(0, torch.searchsorted(held, rows).to(values.device))
