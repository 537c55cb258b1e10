"""Check a model spec against a classifier of its class: what is written down, compared with what its forward does.

Here: the check. Not here: the facts (model_specs.py), what is done with them (attach.py).
R rows, N tokens, D width, C classes, L layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ee_diffusion.classification.attach import attach
from ee_diffusion.classification.exits import ClassifierExits
from ee_diffusion.classification.model_specs import ModelSpec, model_spec_of
from ee_diffusion.core.criteria import DepthTable
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.rows import FEWER, ROWS, alike, apart, following, lengths_of

Inputs = Callable[[list[int]], Mapping[str, Any]]


@dataclass
class _Seen:
    """One forward: the logits (R, C), and of each call of a block its hidden states, what it returned, and its other arguments' lengths."""

    logits: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)
    lengths: list[dict[str, int]] = field(default_factory=list)


@torch.no_grad()
def check_model(model: nn.Module, inputs: Inputs) -> None:
    """Check the spec of a classifier's class against the classifier itself, which may be a tiny one with random weights.

    First what its blocks get and return: every argument whose length follows the number of rows must be named by the spec. Then what
    comes out: `pool` and `classify` give the model's logits; exits that are attached and off change nothing, bit for bit; a row in a
    batch whose rows stop at different depths is the row alone up to its depth; blocks execute only the rows that have not exited,
    counted in `inner`; detached, the model is as before.

    Args:
        inputs: rows -> the arguments of the model's forward for a batch of these rows (at most 6 of them). A row is always the same,
            whatever rows are beside it, and unlike every other one; texts are of different lengths, so that there is a mask.

    Raises:
        ValueError: an unknown class; a model in train mode or in half precision; whatever of the above does not hold, by name.
    """
    check = _Check(model, _checked_names(model), inputs)
    check.arguments()
    check.outputs()


class _Check:
    def __init__(self, model: nn.Module, spec: ModelSpec, inputs: Inputs):
        self.model, self.spec, self.inputs, self.name = model, spec, inputs, spec.class_name
        self.num_layers = spec.num_layers(model)
        self.first = [*inspect.signature(type(spec.blocks(model)[0]).forward).parameters][1]

    def arguments(self) -> None:
        """Whether blocks take and return what the row says, and whether it names what follows the rows."""
        many, few = self._seen(ROWS), self._seen(FEWER)
        for layer, (seen, fewer) in enumerate(zip(many.lengths, few.lengths, strict=True)):
            hidden, returned = many.hidden[layer], many.returned[layer]
            if self.spec.returns_tuple != isinstance(returned, tuple):
                kind = type(returned).__name__
                raise ValueError(
                    f"{self.name}: layer {layer} returns a {kind}, returns_tuple={self.spec.returns_tuple}"
                )
            found = returned[0] if self.spec.returns_tuple else returned
            if hidden.ndim != 3 or len(hidden) != len(ROWS) or found.shape != hidden.shape:
                raise ValueError(
                    f"{self.name}: layer {layer} gets {tuple(hidden.shape)} and returns {tuple(found.shape)}, expected ({len(ROWS)}, N, D)"
                )
            unnamed = [path for path in following(seen, fewer) if path.split(".")[0] not in self.spec.row_arguments]
            if unnamed:
                raise ValueError(
                    f"{self.name}: the length of {unnamed[0]!r}, an argument of {self.spec.block}, follows the number of rows, and "
                    f"row_arguments={self.spec.row_arguments} do not name it"
                )

    def outputs(self) -> None:
        """The properties that the table's own classes are tested for."""
        whole, alone = self._seen(ROWS), {row: self._seen([row]) for row in ROWS}
        for row in ROWS:
            if not alike(alone[row].logits[0], whole.logits[row]):
                raise ValueError(
                    f"{self.name}: row {row} alone is {apart(alone[row].logits[0], whole.logits[row]):.2g} off from the row in a batch, "
                    "without exits: does inputs(rows) give a row the same arguments whatever rows are beside it?"
                )
        if any(alike(alone[row].logits, alone[0].logits) for row in ROWS[1:]):
            raise ValueError(f"{self.name}: rows of inputs(rows) have the same logits, expected rows that differ")
        made = self._classified(whole.returned[-1][0] if self.spec.returns_tuple else whole.returned[-1], ROWS)
        if not alike(made, whole.logits):
            raise ValueError(
                f"{self.name}: pool and classify make logits that are {apart(made, whole.logits):.2g} off from the model's"
            )
        self._off(whole.logits)
        low, last = self.spec.first_exit, self.num_layers - 1
        middle = max(low, self.num_layers // 2)
        self._mixed([self.num_layers, max(low, 1), last, low, middle, self.num_layers], alone)
        if not torch.equal(self._seen(ROWS).logits, whole.logits):
            raise ValueError(f"{self.name}: detached, it is not what it was before")

    def _off(self, whole: Tensor) -> None:
        logits, _ = self._under(Policy())
        if not torch.equal(logits, whole):
            raise ValueError(
                f"{self.name}: with exits attached and off it is {apart(logits, whole):.2g} off from the model itself"
            )

    def _mixed(self, depths: list[int], alone: dict[int, _Seen]) -> None:
        """A batch whose rows stop at these depths."""
        logits, executed = self._under(Policy(DepthTable((tuple(depths),))))
        for row, depth in zip(ROWS, depths, strict=True):
            own = alone[row]
            expected = own.logits if depth == self.num_layers else self._classified(own.hidden[depth], [row])
            if not alike(logits[row], expected[0]):
                raise ValueError(
                    f"{self.name}: row {row} of a batch, which stops after {depth} of {self.num_layers} layers, is "
                    f"{apart(logits[row], expected[0]):.2g} off from the row alone: are row_arguments={self.spec.row_arguments}, "
                    f"first_exit={self.spec.first_exit}, tail_takes_all={self.spec.tail_takes_all} right?"
                )
        going = [sum(depth > layer for depth in depths) for layer in range(self.num_layers)]
        if executed != going:
            raise ValueError(f"{self.name}: {self.spec.inner!r} of the layers saw {executed} rows, expected {going}")

    def _classified(self, hidden: Tensor, rows: list[int]) -> Tensor:
        pooled = self.spec.pool(self.model, hidden, self.inputs(rows).get("attention_mask"))  # (R, D)
        return self.spec.classify(self.model, pooled)

    def _under(self, policy: Policy) -> tuple[Tensor, list[int]]:
        """The logits under a policy, and how many rows the inner module saw in each call of a block."""
        executed: list[int] = []

        def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            executed.append(len(args[0] if args else next(iter(kwargs.values()))))

        depths = tuple(range(self.spec.first_exit, self.num_layers))
        exits = ClassifierExits.for_model(self.model, depths, head="shared", judge="none").eval()
        inner = [block.get_submodule(self.spec.inner) for block in self.spec.blocks(self.model)]
        handles = [module.register_forward_pre_hook(count, with_kwargs=True) for module in inner]
        try:
            with attach(self.model, exits, policy):
                return self._forward(ROWS), executed
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, rows: list[int]) -> Tensor:
        try:
            return self.model(**self.inputs(rows)).logits
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"the forward of {self.name} on these rows fails: {error}") from error

    def _seen(self, rows: list[int]) -> _Seen:
        """What each call of a block got and returned in a plain forward."""
        seen = _Seen(torch.empty(0))

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            others = {name: one for name, one in [*bound.items()][1:] if name != self.first}
            others |= others.pop("kwargs", {})  # the forward's **kwargs
            seen.hidden.append(bound[self.first])
            seen.returned.append(output)
            seen.lengths.append(dict(lengths_of(others)))

        handles = [block.register_forward_hook(keep, with_kwargs=True) for block in self.spec.blocks(self.model)]
        try:
            seen.logits = self._forward(rows)
        finally:
            for handle in handles:
                handle.remove()
        if len(seen.hidden) != self.num_layers:
            raise ValueError(
                f"{self.name}: {self.spec.block} is called {len(seen.hidden)} times in a forward, expected {self.num_layers} "
                f"(num_hidden_layers, repeats={self.spec.repeats!r})"
            )
        return seen


def _checked_names(model: nn.Module) -> ModelSpec:
    """The spec, if everything that it names is there."""
    spec, parameter = model_spec_of(model), next(model.parameters())
    if model.training or parameter.dtype not in (torch.float32, torch.float64):
        mode = "train" if model.training else "eval"
        raise ValueError(f"{spec.class_name} in {mode} mode, {parameter.dtype}, expected eval, float32")
    blocks = spec.blocks(model)
    if not blocks:
        raise ValueError(f"{spec.class_name} has no module of class {spec.block!r} (block)")
    try:
        blocks[0].get_submodule(spec.inner)
    except AttributeError as error:
        raise ValueError(f"{spec.block} has no module {spec.inner!r} (inner)") from error
    return spec
