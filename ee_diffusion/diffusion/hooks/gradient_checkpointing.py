"""Exits under gradient checkpointing: what is computed again in the backward pass is a block alone, not which rows it ran on.

diffusers' transformers checkpoint whole modules, exits on them included: computed again after the forward, those would find no step that
goes on, and other rows. So the parent calls its blocks directly, and their own forwards are checkpointed on the rows they get.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ee_diffusion.core.patch import ForwardPatch

Checkpoint = Callable[..., Any]  # (module, *args) -> what the module returns for them


def checkpoint_of(transformer: nn.Module) -> Checkpoint | None:
    """What this transformer's next forward checkpoints its blocks with; None: it does not."""
    enabled = torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False)
    return transformer._gradient_checkpointing_func if enabled else None


@contextmanager
def blocks_called_directly(transformer: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within, the transformer does not checkpoint these blocks."""

    def direct(original: Checkpoint, module: nn.Module, *args: Any) -> Any:
        return module(*args) if module in blocks else original(module, *args)

    interception = ForwardPatch(transformer, direct, name="_gradient_checkpointing_func")
    try:
        yield
    finally:
        interception.restore()


def checkpointed(checkpoint: Checkpoint, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward, computed again in the backward pass."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(functools.partial(forward, **kwargs), *args)

    return run
