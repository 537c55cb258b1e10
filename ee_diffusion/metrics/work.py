"""What was executed: rows x tokens that reached a module, counted by forward pre-hooks.

Hooks belong on a module *inside* a block (attention, first linear): on the block itself they fire even when the block is skipped.
R rows of a call, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class WorkCounter:
    """Counts the calls of modules and the rows x tokens of their input, while the context is open; leaves no hook behind.

        with WorkCounter({f"block {i}": block.attn for i, block in enumerate(model.transformer_blocks)}) as work:
            model(...)
        work.rows_times_tokens["block 3"]

    The input is the first positional tensor, else the first keyword tensor: (R, N, D) counts R rows of N tokens, (R, D) one token a row.
    The counts stay readable after the context closes, and start anew when it opens again.

    Raises:
        ValueError: no modules, one module under two names, or the context is already open; at a call: no tensor or another shape.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        if not modules:
            raise ValueError("no modules to watch, expected at least one")
        if len({id(module) for module in modules.values()}) < len(modules):
            raise ValueError(f"one module stands under two of the names {sorted(modules)}")
        self._modules = dict(modules)
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, list[tuple[int, int]]] = {}

    def __enter__(self) -> WorkCounter:
        if self._handles:
            raise ValueError("this WorkCounter is already counting")
        self._seen = {name: [] for name in self._modules}
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @property
    def seen(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Name -> (rows, tokens) of every call, in order."""
        return {name: tuple(calls) for name, calls in self._seen.items()}

    @property
    def calls(self) -> dict[str, int]:
        """Name -> number of calls."""
        return {name: len(calls) for name, calls in self._seen.items()}

    @property
    def rows(self) -> dict[str, int]:
        """Name -> rows over all calls."""
        return {name: sum(rows for rows, _ in calls) for name, calls in self._seen.items()}

    @property
    def rows_times_tokens(self) -> dict[str, int]:
        """Name -> rows x tokens over all calls."""
        return {name: sum(rows * tokens for rows, tokens in calls) for name, calls in self._seen.items()}

    def _hook(self, name: str):
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if tensor is None or tensor.ndim not in (2, 3):
                came = "no tensor" if tensor is None else tuple(tensor.shape)
                raise ValueError(f"the input of {name!r} is {came}, expected (R, N, D) or (R, D)")
            self._seen[name].append((tensor.shape[0], tensor.shape[1] if tensor.ndim == 3 else 1))

        return count
