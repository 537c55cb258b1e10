"""Exits and torch.compile: a depth known before the forward becomes one whole graph; where scores decide, each block is compiled alone.

Here: what is compiled, and on how many rows a compiled block runs. Not here: who stops (core), rows on their way (passage.py).
R rows of the batch, r running rows, N tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from ee_diffusion.core.heads import ExitHeads
from ee_diffusion.core.session import StepSession
from ee_diffusion.diffusion.families import Family
from ee_diffusion.diffusion.passage import TEXT, Layer

# How many graphs torch keeps of one function; its name changed in 2.7.
_LIMIT = "recompile_limit" if "recompile_limit" in dir(torch._dynamo.config) else "cache_size_limit"


@dataclass(frozen=True)
class Plan:
    """What one whole graph is made for: the layers that run, and the exit (among the heads) at which all rows leave; None: none."""

    layers: tuple[bool, ...]
    depth: int | None
    exit: int | None


def bucket(rows: int, num_rows: int) -> int:
    """Rows on which a compiled block runs while `rows` of `num_rows` go on: the next of 1, 2, 4, 8, ..., at most the whole batch."""
    return min(1 << (rows - 1).bit_length(), num_rows) if rows else 0


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside what `torch.compile(module)` returned; any other module is itself."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module


class Compiler:
    """Compiled forwards of one attachment.

    A step whose depth is known (no criterion) runs as one graph per distinct depth, from the embedder to the tail, its exit within. Under a
    criterion the parent and the heads run as they are and every block is compiled alone, padded with copies of a running row to 1, 2, 4,
    8, ... rows: one graph per class of block and number of rows. Answers from memory (depth 0) run no block and are not compiled.

    Args:
        options: of `torch.compile`; `fullgraph=True` and `dynamic=False` unless they say otherwise.

    Raises:
        ValueError: options that are no mapping.
    """

    def __init__(self, heads: ExitHeads, family: Family, layers: list[Layer], options: Mapping[str, Any]):
        if not isinstance(options, Mapping):
            raise ValueError(f"compile_options={options!r}, expected options of torch.compile by name, such as {{}}")
        self.heads, self.family, self.layers = heads, family, layers
        self.options = {"fullgraph": True, "dynamic": False} | dict(options)
        self.plan: Plan | None = None  # while a whole graph runs
        self.padded = 0  # rows x blocks that ran for no image
        self._whole = torch.compile(self._traced, **self.options)
        self._plans: set[Plan] = set()
        self._blocks: dict[int, tuple[Callable, Callable]] = {}  # layer -> a forward, and it compiled
        self._context: dict[str, Tensor] = {}
        self._num_text = 0
        self._answer: Tensor | None = None

    def takes(self, step: StepSession) -> bool:
        """Whether a step is known before it begins, and runs a block."""
        return step.session.policy.criterion is None and step.last != 0

    def whole(
        self,
        step: StepSession,
        forward: Callable[..., Any],
        given: tuple[dict[str, Any], dict[str, Tensor]],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Tensor | None]:
        """One forward as one graph, and its record; given: its arguments by name, what heads look at -> its output, the exit's answer.

        Raises:
            ValueError: more distinct depths than torch keeps graphs for.
        """
        arguments, self._context = given
        self._num_text = arguments[TEXT].shape[1] if self.family.concatenated else 0
        exits = step.session.heads_exits
        exit = (
            None if step.last in (None, len(self.layers)) else exits[step.last]
        )  # None: layers are left out in between
        plan = Plan(tuple(step.layers), step.last, exit)
        limit = _graph_limit()
        if len(self._plans | {plan}) > limit:
            raise ValueError(
                f"more than {limit} distinct depths, each a graph of its own: use fewer, or raise torch._dynamo.config.{_LIMIT}"
            )
        self._plans.add(plan)
        self.plan = plan
        try:
            output, answer = self._whole(forward, args, kwargs)
        finally:
            self.plan, self._answer, self._context = None, None, {}
        _record(step, len(self.layers))
        return output, answer

    def block(self, layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward, compiled."""
        known = self._blocks.get(layer)
        if known is None or known[0] != original:
            known = self._blocks[layer] = (original, torch.compile(original, **self.options))
        return known[1]

    def _traced(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Tensor | None]:
        output = forward(*args, **kwargs)
        return output, self._answer

    def block_in_graph(self, layer: int, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """A block within a whole graph: the exit at its depth answers, layers that do not run pass their input on."""
        plan, facts = self.plan, self.layers[layer]
        hidden = args[0] if args else kwargs[facts.names[0]]
        if plan.exit is not None and layer == plan.depth:
            tokens = hidden[:, self._num_text :] if facts.concatenated else hidden
            self._answer = self.heads.answer(plan.exit, tokens, self._context)
        if plan.layers[layer]:
            return original(*args, **kwargs)
        if self.family.returns == "image" or facts.concatenated:
            return hidden
        place = facts.names.index(TEXT)
        text = args[place] if place < len(args) else kwargs[TEXT]
        return (text, hidden) if self.family.returns == "text, image" else (hidden, text)

    def tail_in_graph(self, hidden: Tensor) -> Tensor:
        """What the tail gets within a whole graph."""
        return self._answer if self.plan.exit is not None and self.heads.space == "hidden" else hidden


def _graph_limit() -> int:
    return getattr(torch._dynamo.config, _LIMIT)


def _record(step: StepSession, num_layers: int) -> None:
    """Tell the step session what its graph did."""
    for layer in range(num_layers):
        departure = step.offer(layer, _measured_nothing)
        if departure is not None:
            step.answer_evaluated(layer, len(departure.leave))
        if step.runs(layer):
            step.executed(layer)


def _measured_nothing(exit: int) -> Tensor | None:
    raise AssertionError("a depth that is known needs no score")
