"""A row of the family table held against a transformer of its class: what was written down, compared with what its forward does.

Here: the check. Not here: the facts (model_specs.py), what is done with them (block_runner.py).
R rows, N tokens, D width, L layers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ee_diffusion.core.criteria import DepthTable
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.rows import FEWER, ROWS, alike, apart, following, lengths_of
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.diffusion.hooks.block_runner import Layer, layers_of, signature_of
from ee_diffusion.diffusion.hooks.forward_to_depth import answer_under, forward_of, passing, streams
from ee_diffusion.diffusion.model_specs import ModelSpec, blocks_of, model_spec_of, width_of

Inputs = Callable[[list[int]], Mapping[str, Any]]


@dataclass(frozen=True)
class _Seen:
    """One call of a block: the shapes of image and text (None: none) that it got and returned, and the lengths of its other arguments,
    in tuples, lists and dicts, too."""

    image: torch.Size
    text: torch.Size | None
    returned: tuple[torch.Size | None, ...]
    lengths: dict[str, int]


@torch.no_grad()
def check_model(transformer: nn.Module, inputs: Inputs) -> None:
    """Hold a transformer's row of the family table against the transformer itself, which may be a tiny one with random weights.

    First by what its blocks get: every argument whose length follows the number of rows must be named by the row. Then by what comes
    out: exits that are attached and off change nothing, bit for bit; an exit after k blocks is the model with its first k blocks alone,
    bit for bit; an image in a batch whose rows stop at different depths is the image alone; blocks execute the rows that still go on and no
    others, counted in `inner`; detached, the model is as before.

    Not seen, since a transformer does not know its pipeline: `guidance`, `guided`, `time`, `turned`, `outputs`. `residuals` and `plain_if`
    are only looked up among the arguments.

    Args:
        inputs: rows -> the arguments of the transformer's forward for a batch of these rows (at most 6 of them), without those of
            `residuals` and `plain_if`. A row is always the same, whatever rows are beside it, and unlike every other one.

    Raises:
        ValueError: no such row of the table; a model in train mode or in half precision; whatever of the above does not hold, by name.
    """
    family = model_spec_of(transformer)
    check = _Check(transformer, family, layers_of(transformer, _checked_names(transformer, family)), inputs)
    check.arguments()
    check.answers()


class _Check:
    def __init__(self, transformer: nn.Module, family: ModelSpec, layers: list[Layer], inputs: Inputs):
        self.transformer, self.family, self.layers, self.inputs = transformer, family, layers, inputs
        self.name, self.blocks = family.class_name, blocks_of(transformer)

    def plain(self, rows: list[int]) -> Tensor:
        return forward_of(self.transformer, self.inputs(rows))

    def arguments(self) -> None:
        """Whether blocks take and return what the row says, and whether it names what follows the rows."""
        given = set(self.inputs(ROWS)) & {*self.family.residuals, *self.family.plain_if}
        if given:
            raise ValueError(f"{self.name}: inputs give {sorted(given)}, expected a forward without them")
        many, few = self._seen(ROWS), self._seen(FEWER)
        named = {*self.family.row_arguments, *self.family.earlier}
        for layer, (seen, fewer) in enumerate(zip(many, few, strict=True)):
            self._check_streams(layer, seen)
            unnamed = [one for one in following(seen.lengths, fewer.lengths) if one.split(".")[0] not in named]
            if unnamed and not self.family.keeps_exited_rows:
                raise ValueError(
                    f"{self.name}: the length of {unnamed[0]!r}, an argument of {type(self.blocks[layer]).__name__}, follows the number of "
                    f"rows, and row_arguments={self.family.row_arguments} do not name it (if they cannot be taken: keeps_exited_rows='why')"
                )

    def answers(self) -> None:
        """The properties that the table's own classes are tested for."""
        whole, num_layers = self.plain(ROWS), len(self.blocks)
        alone = {row: self.plain([row])[0] for row in ROWS}
        for row in ROWS:
            if not alike(alone[row], whole[row]):
                raise ValueError(
                    f"{self.name}: row {row} alone is {apart(alone[row], whole[row]):.2g} off from the row in a batch, without exits: does "
                    "inputs(rows) give a row the same arguments whatever rows are beside it?"
                )
        if any(alike(alone[row], alone[0]) for row in ROWS[1:]):
            raise ValueError(
                f"{self.name}: rows of inputs(rows) have the same output, expected rows that differ in every argument"
            )
        with passing(self.transformer, 0):
            if alike(self.plain(ROWS), whole):
                raise ValueError(f"{self.name}: its blocks change nothing (weights of zero?), expected random weights")
        self._off(whole)
        between = {0, 1, len(getattr(self.transformer, self.family.blocks)), num_layers // 2, num_layers - 1}
        for depth in sorted(between & set(range(num_layers))):
            self._exit_after(depth)
        self._mixed([num_layers, 1, num_layers - 1, 0, num_layers // 2, num_layers], alone)
        if not torch.equal(self.plain(ROWS), whole):
            raise ValueError(f"{self.name}: detached, it is not what it was before")

    def _off(self, whole: Tensor) -> None:
        output, _ = self._under(Policy(), ROWS)
        if not torch.equal(output, whole):
            raise ValueError(
                f"{self.name}: with exits attached that nobody takes it is {apart(output, whole):.2g} off from the model itself"
            )

    def _exit_after(self, depth: int) -> None:
        output, executed = self._under(Policy(schedule=FixedDepth(depth)), ROWS)
        with passing(self.transformer, depth):
            expected = self.plain(ROWS)
        if not torch.equal(output, expected):
            raise ValueError(
                f"{self.name}: an exit after {depth} blocks is {apart(output, expected):.2g} off from the model without its later blocks: "
                "are returns, concatenated, tail and tail_takes_all as the row says?"
            )
        self._check_work(executed, [len(ROWS) * (layer < depth) for layer in range(len(self.blocks))])

    def _mixed(self, depths: list[int], alone: dict[int, Tensor]) -> None:
        """A batch whose rows stop at these depths."""
        output, executed = self._under(Policy(DepthTable((tuple(depths),))), ROWS)
        for row, depth in zip(ROWS, depths, strict=True):
            expected = alone[row]
            if depth < len(self.blocks):
                with passing(self.transformer, depth):
                    expected = self.plain([row])[0]
            if not alike(output[row], expected):
                raise ValueError(
                    f"{self.name}: row {row} of a batch, which stops after {depth} of {len(self.blocks)} blocks, is "
                    f"{apart(output[row], expected):.2g} off from the row alone: are row_arguments={self.family.row_arguments}, "
                    f"earlier={sorted(self.family.earlier)}, residuals={self.family.residuals} all there are?"
                )
        going = [sum(depth > layer for depth in depths) for layer in range(len(self.blocks))]
        self._check_work(
            executed, [len(ROWS) * (rows > 0) for rows in going] if self.family.keeps_exited_rows else going
        )

    def _check_work(self, executed: list[int], expected: list[int]) -> None:
        if executed != expected:
            raise ValueError(
                f"{self.name}: {self.family.inner!r} of the blocks saw {executed} rows, expected {expected}"
            )

    def _under(self, policy: Policy, rows: list[int]) -> tuple[Tensor, list[int]]:
        """The output under a policy, a row an image, and how many rows each block's inner module saw."""
        executed = [0] * len(self.blocks)

        def count(layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            executed[layer] += len(args[0] if args else next(iter(kwargs.values())))

        handles = [
            block.get_submodule(self.family.inner).register_forward_pre_hook(
                functools.partial(count, layer), with_kwargs=True
            )
            for layer, block in enumerate(self.blocks)
        ]
        try:
            return answer_under(self.transformer, policy, self.inputs(rows)), executed
        finally:
            for handle in handles:
                handle.remove()

    def _seen(self, rows: list[int]) -> list[_Seen]:
        """What each block got and returned in a plain forward."""
        seen: dict[int, _Seen] = {}

        def keep(layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            bound = signature_of(type(module)).bind(module, *args, **kwargs).arguments
            image, text = streams(self.layers[layer], args, kwargs)
            parts = output if isinstance(output, tuple) else (output,)
            others = {name: one for name, one in list(bound.items())[1:] if one is not image and one is not text}
            seen[layer] = _Seen(
                image.shape,
                None if text is None else text.shape,
                tuple(None if part is None else part.shape for part in parts),
                dict(lengths_of(others)),
            )

        handles = [
            block.register_forward_hook(functools.partial(keep, layer), with_kwargs=True)
            for layer, block in enumerate(self.blocks)
        ]
        try:
            forward_of(self.transformer, self.inputs(rows))
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) < len(self.blocks):
            raise ValueError(f"{self.name}: only the blocks {sorted(seen)} of {len(self.blocks)} run in its forward")
        return [seen[layer] for layer in range(len(self.blocks))]

    def _check_streams(self, layer: int, seen: _Seen) -> None:
        width = width_of(self.transformer)
        if len(seen.image) != 3 or (seen.image[0], seen.image[2]) != (len(ROWS), width):
            raise ValueError(
                f"{self.name}: block {layer} gets {tuple(seen.image)} first, expected ({len(ROWS)}, N, {width})"
            )
        expected: tuple[torch.Size | None, ...] = (seen.image,)
        if self.layers[layer].text:
            if seen.text == seen.image:
                raise ValueError(
                    f"{self.name}: text and image have {seen.text[1]} tokens each, expected inputs that tell them apart"
                )
            last = layer + 1 == len(self.blocks) and None in seen.returned
            text = None if last else seen.text  # SD3's last block returns None for the text
            expected = (text, seen.image) if self.family.returns == "text, image" else (seen.image, text)
        if seen.returned != expected:
            raise ValueError(
                f"{self.name}: block {layer} returns {_words(seen.returned)}, expected {_words(expected)} "
                f"(returns={self.family.returns!r}, concatenated={self.family.concatenated})"
            )


def _checked_names(transformer: nn.Module, family: ModelSpec) -> ModelSpec:
    """The family, if everything that it names is there."""
    name = family.class_name
    parameter = next(transformer.parameters())
    if transformer.training or parameter.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} in {'train' if transformer.training else 'eval'} mode, {parameter.dtype}, expected eval, float32"
        )
    for lists in family.lists:
        if not isinstance(getattr(transformer, lists, None), nn.ModuleList):
            raise ValueError(f"{name} has no ModuleList {lists!r}")
    if not isinstance(getattr(transformer, family.tail, None), nn.Module):
        raise ValueError(f"{name} has no module {family.tail!r} (tail)")
    absent = [entry for entry in family.width if entry not in transformer.config]
    if absent:
        raise ValueError(f"{name} has no {absent} in its config (width)")
    kinds = {type(block): block for block in blocks_of(transformer)}
    for kind, block in kinds.items():
        try:
            block.get_submodule(family.inner)
        except AttributeError as error:
            raise ValueError(f"{kind.__name__} has no module {family.inner!r} (inner)") from error
    _check_known(kinds, {"row_arguments": family.row_arguments, "earlier": tuple(family.earlier)})
    _check_known([type(transformer)], {"residuals": family.residuals, "plain_if": family.plain_if})
    return family


def _check_known(kinds: Any, named: Mapping[str, tuple[str, ...]]) -> None:
    """Raises ValueError for names that are arguments of no forward of these classes."""
    parameters = [one for kind in kinds for one in signature_of(kind).parameters.values()]
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return
    known = {one.name for one in parameters}
    for field, names in named.items():
        unknown = [name for name in names if name not in known]
        if unknown:
            takes = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"{field} names {unknown}, which no forward of {takes} takes")


def _words(shapes: tuple[torch.Size | None, ...]) -> str:
    return " and ".join("None" if shape is None else str(tuple(shape)) for shape in shapes)
