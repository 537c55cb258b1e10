"""A transformer that several ranks run together: who votes on its exits, and what does not work then.

Here: what diffusers' parallel config says. Not here: the vote itself (core/distributed.py).
"""

from __future__ import annotations

from torch import nn

from ee_diffusion.core.distributed import JointDecision
from ee_diffusion.diffusion.protocols import DenoiserHeads


def vote_of(transformer: nn.Module) -> JointDecision | None:
    """The vote of the ranks that diffusers runs this transformer on (`enable_parallelism`, or `parallel_config` on loading); None: this
    process runs it alone."""
    config = getattr(transformer, "_parallel_config", None)  # models that are not of diffusers have none
    if config is None:
        return None
    if config.context_parallel_config is not None:
        return JointDecision(config.context_parallel_config._flattened_mesh.get_group())
    return JointDecision(config.tensor_parallel_config._mesh.get_group())


def require_parallel(transformer: nn.Module, blocks: list[nn.Module], heads: DenoiserHeads, *, compiled: bool) -> None:
    """Raises ValueError if these exits cannot run where the tokens lie on several ranks (context parallelism)."""
    config = getattr(transformer, "_parallel_config", None)
    if config is None or config.context_parallel_config is None:
        return
    kind = type(transformer).__name__
    if heads.space != "hidden":
        raise ValueError(
            f"heads that answer after the tail of a {kind} under context parallelism: a rank sees a part of the tokens there, its tail's "
            "output has all; use AdapterExits"
        )
    registry = blocks[0].__dict__.get("_diffusers_hook")
    if heads.depths[0] == 0 and registry is not None and any(name.startswith("cp_input") for name in registry.hooks):
        raise ValueError(
            f"an exit at depth 0 of a {kind} under context parallelism: its first block deals the tokens out to the ranks, before it they "
            "are not; use exits from depth 1 on"
        )
    if compiled:
        raise ValueError(
            f"a compiled {kind} with exits under context parallelism is not supported: attach without compiling"
        )
