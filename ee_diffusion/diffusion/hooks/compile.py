"""Exits and torch.compile: a depth known before the forward becomes one whole graph; where scores decide, each block is compiled alone.

Here: what is compiled, and on how many rows a compiled block runs. Not here: who stops (core), rows on their way (block_runner.py).
R rows of the batch, r running rows, N tokens, D width, L layers.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from ee_diffusion.core.exits import ExitHeads
from ee_diffusion.core.patch import ForwardPatch
from ee_diffusion.core.session import StepSession
from ee_diffusion.diffusion.hooks.block_runner import TEXT, Layer
from ee_diffusion.diffusion.model_specs import ModelSpec


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


@torch.compiler.disable
def refuse_compiling_after_attaching() -> None:
    """Called where torch compiles, from outside, a forward whose exits are decided on the host (anew for each step, up to its limit).

    Raises:
        ValueError: always; where whole graphs are asked for, torch raises an error of its own with this function's name.
    """
    raise ValueError(
        "this transformer was compiled after exits were attached: detach, then attach to the compiled one, or attach with "
        "compile_options={}"
    )


def is_compiled(held: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether a transformer was compiled, by `torch.compile` (what it returned is held), `.compile()`, or its blocks alone."""
    inner = unwrapped(held)
    return held is not inner or any(one._compiled_call_impl is not None for one in (inner, *blocks))


class Compiler:
    """Compiled forwards of one transformer with its exits; made by `compiler_for`.

    A step whose depth is known (no criterion) runs as one graph per distinct depth, from the embedder to the tail, its exit within. Under a
    criterion the parent and the heads run as they are and every block is compiled alone, padded with copies of a running row to 1, 2, 4,
    8, ... rows: one graph per class of block and number of rows. Answers from memory (depth 0) run no block and are not compiled.

    Args:
        options: of `torch.compile`; `fullgraph=True` and `dynamic=False` unless they say otherwise.

    Raises:
        ValueError: options that are no mapping.
    """

    def __init__(self, heads: ExitHeads, family: ModelSpec, layers: list[Layer], options: Mapping[str, Any]):
        if not isinstance(options, Mapping):
            raise ValueError(f"compile_options={options!r}, expected options of torch.compile by name, such as {{}}")
        self.heads, self.family, self.layers = heads, family, layers
        self.options = {"fullgraph": True, "dynamic": False} | dict(options)
        self.plan: Plan | None = None  # while a whole graph runs
        self._wholes: dict[Plan, Callable[..., Any]] = {}
        self._forwards: dict[
            int, tuple[Callable, Callable]
        ] = {}  # place -> a forward, and what stands there in a graph
        self._blocks: dict[int, Callable[..., Any]] = {}  # number of rows -> what runs a block on them, compiled
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
        places: Sequence[ForwardPatch],
        *,
        given: tuple[dict[str, Any], dict[str, Tensor]],
        call: tuple[tuple, dict[str, Any]],
    ) -> tuple[Any, Tensor | None]:
        """One forward as one graph, and its record -> its output, the exit's answer.

        places: the blocks and the tail. given: the forward's arguments by name, what heads look at. call: args, kwargs."""
        arguments, self._context = given
        self._num_text = arguments[TEXT].shape[1] if self.family.concatenated else 0
        exits = step.session.heads_exits
        exit = (
            None if step.last in (None, len(self.layers)) else exits[step.last]
        )  # None: layers are left out in between
        plan = self.plan = Plan(tuple(step.layers), step.last, exit)
        if plan not in self._wholes:
            self._wholes[plan] = torch.compile(types.MethodType(_own(type(self)._traced), self), **self.options)
        try:
            with self._standing(places):
                function, owner = _apart(forward)
                output, answer = self._wholes[plan](function, (*owner, *call[0]), call[1])
        finally:
            self.plan, self._answer, self._context = None, None, {}
        _record(step, len(self.layers))
        return output, answer

    def block(self, layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward, compiled for each number of rows by itself."""

        def run(*args: Any, **kwargs: Any) -> Any:
            rows = len(args[0] if args else kwargs[self.layers[layer].names[0]])
            if rows not in self._blocks:
                self._blocks[rows] = torch.compile(_own(_run), **self.options)
            function, owner = _apart(original)
            return self._blocks[rows](function, (*owner, *args), kwargs)

        return run

    @contextmanager
    def _standing(self, places: Sequence[ForwardPatch]) -> Iterator[None]:
        """Within, blocks and tail have the same forwards as in every other run: to torch a new object would be a new graph."""
        before = [place.target.__dict__["forward"] for place in places]
        for index, place in enumerate(places):
            known = self._forwards.get(index)
            if known is None or known[0] != place.original:
                last = index == len(self.layers)
                ours = self._tail_in_graph if last else functools.partial(self._block_in_graph, index)
                known = self._forwards[index] = (place.original, functools.partial(ours, place.original))
            place.target.__dict__["forward"] = known[1]
        try:
            yield
        finally:
            for place, forward in zip(places, before, strict=True):
                place.target.__dict__["forward"] = forward

    def _traced(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Tensor | None]:
        output = forward(*args, **kwargs)
        return output, self._answer

    def _block_in_graph(self, layer: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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

    def _tail_in_graph(self, original: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        answered = self.plan.exit is not None and self.heads.space == "hidden"
        return original(self._answer if answered else hidden, *args, **kwargs)


# Graphs are dear: attaching the same exits to the same transformer again uses those that are there.
_COMPILERS: WeakKeyDictionary[nn.Module, Compiler] = WeakKeyDictionary()


def compiler_for(
    transformer: nn.Module, heads: ExitHeads, family: ModelSpec, *, layers: list[Layer], options: Mapping[str, Any]
) -> Compiler:
    """The compiler of this transformer with these exits and options; a new one for others. Raises ValueError as `Compiler` does."""
    made, known = Compiler(heads, family, layers, options), _COMPILERS.get(transformer)
    if known is None or known.heads is not heads or known.options != made.options or known.layers != layers:
        known = _COMPILERS[transformer] = made
    return known


def _run(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _apart(forward: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A bound method as its function and its object: each look-up makes a new method, and torch 2.6 guards on which one it is."""
    return (forward.__func__, (forward.__self__,)) if isinstance(forward, types.MethodType) else (forward, ())


def _own(function: types.FunctionType) -> types.FunctionType:
    """The same function with code of its own: torch counts graphs by code, and others must not use up the limit."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


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
