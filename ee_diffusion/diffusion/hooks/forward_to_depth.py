"""One forward of a transformer of the table up to a depth: under exits, and with its later blocks taken out by hand.

Here: what checks compare. Not here: what they conclude (model_check.py, truncate.py).
R rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ee_diffusion.core.patch import ForwardPatch
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.hooks.block_runner import TEXT, Layer, layers_of
from ee_diffusion.diffusion.model_specs import blocks_of, model_spec_of


def answer_under(transformer: nn.Module, policy: Policy, arguments: Mapping[str, Any]) -> Tensor:
    """The output (R, ...) of one forward under a policy, a row an image, exits at every depth answering through the model's own tail.

    Raises:
        ValueError: as `attach_exits`; a forward that fails on fewer rows.
    """
    if not isinstance(arguments.get("hidden_states"), Tensor):
        raise ValueError(
            f"a forward of {sorted(arguments)}, expected its arguments by name, hidden_states (R, ...) among them"
        )
    exits = AdapterExits.for_transformer(transformer, tuple(range(len(blocks_of(transformer)))), rank=0)
    exits = exits.to(next(transformer.parameters())).eval()
    with attach_exits(transformer, exits) as attachment:
        rows = torch.arange(len(arguments["hidden_states"]))
        session = attachment.start(policy, rows=rows, num_steps=1)
        with attachment.use(session.step(0, 500.0)):
            return forward_of(transformer, arguments)


def forward_of(transformer: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """The output (R, ...) of one forward. Raises ValueError for one that fails."""
    try:
        return transformer(**arguments, return_dict=False)[0]
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(f"the forward of {type(transformer).__name__} on these rows fails: {error}") from error


@contextmanager
def passing(transformer: nn.Module, depth: int) -> Iterator[None]:
    """The blocks from `depth` on return what they get: the model without its later blocks."""
    family = model_spec_of(transformer)

    def pass_on(facts: Layer, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        image, text = streams(facts, args, kwargs)
        if not facts.text:
            return image
        return (text, image) if family.returns == "text, image" else (image, text)

    held = [
        ForwardPatch(block, functools.partial(pass_on, facts))
        for block, facts in list(zip(blocks_of(transformer), layers_of(transformer, family), strict=True))[depth:]
    ]
    try:
        yield
    finally:
        for one in held:
            one.restore()


def streams(facts: Layer, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What a block gets of image (or text and image) and of text."""
    given = dict(zip(facts.names, args, strict=False)) | dict(kwargs)
    return given[facts.names[0]], given.get(TEXT) if facts.text else None
