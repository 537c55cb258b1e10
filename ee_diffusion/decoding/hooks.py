"""Exits on a causal language model during one generation: its layers run on the rows that are still going, no forward is copied.

Here: the driver of step sessions for decoding, and the keys and values of layers that did not run. Not here: the token loop
(generate.py), facts about classes (model_specs.py), decisions (core). A step is one decode forward: one new position for every sequence.
R rows of the batch (sequences), r running rows, D width, H heads, V vocabulary, L layers, S steps.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ee_diffusion.core.active_batch import ActiveBatch
from ee_diffusion.core.exits import ExitHeads
from ee_diffusion.core.patch import patched
from ee_diffusion.core.rows import require_rows
from ee_diffusion.core.schedules import last_steps
from ee_diffusion.core.session import Session
from ee_diffusion.decoding.kv_cache import Part, RowsOfCache, close_layer, write_position
from ee_diffusion.decoding.model_specs import layers_of, model_spec_of


class DecodingHook:
    """Drives a session through the decode forwards of a model. A context manager: leaving it restores the model exactly; meanwhile other
    threads that use exits on the model wait, and plain calls of theirs are what they were.

    `begin(absent)` arms the next forward; without it the model computes what it always did (the prompt's forward). Sequences that are
    absent say `padding` for certain.

    A layer that some later step may run gets keys and values for every row and position: from its own forward where it runs, else from
    the hidden state that passes it by (of a row that has left: the state it left with; CALM's state propagation). A layer that no later
    step runs is closed: its memory is freed, and it refuses new positions. Layer 0 always runs or is written: the model reads the
    sequence length from it. `propagated` (S, L): rows whose keys and values were computed without running the layer.
    """

    def __init__(self, model: PreTrainedModel, heads: ExitHeads, session: Session, *, padding: int = 0):
        self.model, self.heads, self.session, self.padding = model, heads, session, padding
        self.family, self.layers = model_spec_of(model), layers_of(model)
        self.last_use = _last_uses(session)
        self.propagated: list[list[int]] = []
        self._names = list(inspect.signature(type(self.layers[0]).forward).parameters)[1:]
        self._absent: Tensor
        self._armed = False
        self._lane: ActiveBatch | None = None
        self._left: list[tuple[Tensor, Tensor]] = []  # rows that left (q,), the hidden states they left with (q, 1, D)
        by_layer = [(module, functools.partial(self._layer, layer)) for layer, module in enumerate(self.layers)]
        self._patched = patched([*by_layer, (model, self._forward)])

    def __enter__(self) -> DecodingHook:
        self._patched.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._patched.__exit__(*exception)

    def begin(self, absent: Tensor) -> None:
        """The next forward is a step of the session; `absent` (R,) bool: sequences that have ended."""
        self._armed, self._absent = True, absent

    def _forward(self, original, *args, **kwargs):
        """The model's forward: open a step and a lane, let the model run, put the answers back."""
        if not self._armed:
            return original(*args, **kwargs)
        index = len(self.session.finished)
        step = self.session.step(index, float(index), absent=self._absent)
        self._lane, self._left, self._armed = ActiveBatch(step, self.heads, {}), [], False
        self.propagated.append([0] * len(self.layers))
        try:
            output = original(*args, **kwargs)
            logits = self._lane.put_back(output.logits[:, -1])  # (R, V)
            output.logits = certain(logits, self.padding, self._absent)[:, None]  # (R, 1, V)
        finally:
            self._lane = None
        step.close()
        return output

    def _layer(self, layer: int, original, *args, **kwargs):
        """One layer: let rows leave, run on the rest, see to the keys and values of everybody else."""
        lane = self._lane
        if lane is None:
            return original(*args, **kwargs)
        named = dict(zip(self._names, args, strict=False)) | kwargs
        hidden = named.pop(self._names[0])
        if layer == 0:
            hidden = lane.running(hidden)  # (r, 1, D)
        hidden = self._let_leave(lane, layer, hidden)
        if lane.step.index > self.last_use[layer]:
            assert not lane.step.layers[layer], "a layer that was dropped is to run again"
            close_layer(named[self.family.cache], layer)
        elif lane.step.runs(layer):
            lane.context["previous"] = hidden
            given, hidden = len(hidden), original(hidden, **self._arguments(lane, layer, named))
            names = {"class_name": self.family.class_name, "row_arguments": self.family.row_arguments}
            require_rows((hidden,), given, **names)
            lane.step.executed(layer)
        else:
            self._write(lane, layer, named, passing=hidden)
        return hidden

    def _let_leave(self, lane: ActiveBatch, layer: int, hidden: Tensor) -> Tensor:
        before = lane.step.rows
        staying = lane.offer(layer, hidden)
        if len(staying) < len(hidden):
            gone = ~torch.isin(before, lane.step.rows)
            self._left.append((before[gone].to(hidden.device), hidden[gone.to(hidden.device)]))
        return staying

    def _arguments(self, lane: ActiveBatch, layer: int, named: dict) -> dict:
        """The layer's arguments for the running rows. Everybody is running: as they came."""
        rows = lane.step.rows
        if len(rows) == lane.num_rows:
            return named
        there, cache = rows.to(self.session.device), named[self.family.cache]
        others = self._parts(layer, named, self._left)
        view = RowsOfCache(cache, there, num_rows=lane.num_rows, others=others)
        of_rows = {name: self._rows_of(named[name], there) for name in self.family.row_arguments if name in named}
        return named | of_rows | {self.family.cache: view}

    def _write(self, lane: ActiveBatch, layer: int, named: dict, *, passing: Tensor) -> None:
        """Keys and values of a layer that runs for nobody: of the rows that left and of the rows that pass it by."""
        parts = self._parts(layer, named, [*self._left, (lane.step.rows.to(passing.device), passing)])
        if not parts:  # nobody took part in this step
            kept = named[self.family.cache].layers[layer]
            parts = [(lane.step.rows[:0].to(kept.keys.device), kept.keys[:0, :, :1], kept.values[:0, :, :1])]
        write_position(named[self.family.cache], layer, parts, num_rows=lane.num_rows)

    def _parts(self, layer: int, named: dict, states: list[tuple[Tensor, Tensor]]) -> list[Part]:
        """Rows with their hidden states -> rows with their keys and values at this layer, in one call of its projections."""
        states = [(rows, hidden) for rows, hidden in states if len(rows)]
        if not states:
            return []
        rows = torch.cat([rows for rows, _ in states])  # (q,)
        hidden = torch.cat([hidden for _, hidden in states])  # (q, 1, D)
        rotary = self._rows_of(named.get("position_embeddings"), rows)
        self.propagated[-1][layer] += len(rows)
        return [(rows, *self.family.keys_values(self.layers[layer], hidden, rotary))]

    def _rows_of(self, value, rows: Tensor):
        """Some rows of an argument that is indexed by row: a tensor (R, ...), or one for all rows (1, ...), or a tuple of them."""
        if isinstance(value, tuple):
            return tuple(self._rows_of(one, rows) for one in value)
        shared = not isinstance(value, Tensor) or len(value) != len(self.session.rows)
        return value if shared else value.index_select(0, rows)


def _last_uses(session: Session) -> list[int]:
    """(L,) the last step that may run each layer, -1: none; layer 0 is in use to the end.

    Raises:
        ValueError: a schedule that leaves out layer 0.
    """
    schedule, run = session.policy.schedule, {"num_steps": session.num_steps, "num_layers": session.num_layers}
    if not all(layers[0] for layers in schedule.plans(**run)):
        raise ValueError(
            f"the schedule {schedule} leaves out layer 0 at some step: the model reads the sequence length from it; keep it in"
        )
    return [session.num_steps, *last_steps(schedule, **run)[1:]]


def certain(logits: Tensor, token: int, rows: Tensor) -> Tensor:
    """logits (R, V) with those rows (R,) bool sure of one token: probability 1."""
    if not bool(rows.any()):
        return logits
    sure = torch.full_like(
        logits[:1], -1e4
    )  # e^-10000 is 0; no infinity, for a processor may forbid that token or divide
    sure[:, token] = 0
    return torch.where(rows.to(logits.device)[:, None], sure, logits)


def running_modules(model: PreTrainedModel) -> list[nn.Module]:
    """One module inside each layer that every executed row passes and no other: hooks there count the work that was done."""
    return [layer.get_submodule(model_spec_of(model).inner) for layer in layers_of(model)]
