"""Attention backends: one function that switches them and says which modules really did.

Here: switching and the proof. Not here: kernels (diffusers, xformers).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.utils import is_xformers_available
from torch import nn

from ee_diffusion.diffusion.hooks.attach import transformer_of

XFORMERS = "xformers"
_PROBE = (1, 8, 2, 64)  # (R, N, heads, D) of an attention that is tried before a backend is trusted


@dataclass(frozen=True)
class AttentionSwitch:
    """`switched` attention modules use `backend` now; `kept` (class of processor -> number) do not, for diffusers gives them no way to."""

    backend: str | None
    switched: int
    kept: dict[str, int]


def set_attention(target: nn.Module | DiffusionPipeline, backend: str | None) -> AttentionSwitch:
    """Switch the attention of a transformer (or of a pipeline's), and only that; None: back to how it was made.

    diffusers' `set_attention_backend` does nothing, in silence, on the processors of DiT, PixArt, SD3, Sana and HunyuanDiT, and changes a
    setting of the whole process; here modules are counted, and the process stays as it is. For `xformers` those processors are exchanged,
    where diffusers has one (not for Sana and HunyuanDiT).

    Raises:
        ValueError: an unknown backend, one that does not run here (missing package, no GPU), or one that reaches no module of this model.
    """
    transformer = transformer_of(target)
    modules = [module for module in transformer.modules() if getattr(module, "processor", None) is not None]
    if backend is not None:
        _require_usable(backend, transformer)
    with _process_untouched():
        _switch(transformer, modules, backend)
    reached = [module for module in modules if _is_on(module, backend)]
    kept = Counter(type(module.processor).__name__ for module in modules if module not in reached)
    if not reached:
        _switch(transformer, modules, None)
        raise ValueError(
            f"attention backend {backend!r} reaches none of the {len(modules)} attention modules of this {type(transformer).__name__} "
            f"({dict(kept)}): they do not go through diffusers' dispatch"
        )
    return AttentionSwitch(backend, len(reached), dict(kept))


def _switch(transformer: nn.Module, modules: list[nn.Module], backend: str | None) -> None:
    if backend is None:
        transformer.reset_attention_backend()
    else:
        transformer.set_attention_backend(backend)
    for module in modules:
        exchangeable = getattr(module, "set_use_memory_efficient_attention_xformers", None)
        wanted, there = backend == XFORMERS, type(module.processor).__name__.startswith("XFormers")
        classic = type(module.processor).__name__ in ("AttnProcessor2_0", "JointAttnProcessor2_0")
        if exchangeable is not None and ((wanted and classic) or (there and not wanted)):
            exchangeable(wanted)


def _is_on(module: nn.Module, backend: str | None) -> bool:
    processor = module.processor
    exchanged = type(processor).__name__.startswith("XFormers")
    chosen = getattr(processor, "_attention_backend", None)
    if backend is None:
        return chosen is None and not exchanged
    if backend == "native" and chosen is None and not exchanged and type(processor).__name__.endswith("2_0"):
        return True  # torch's own attention is written into it
    return (exchanged and backend == XFORMERS) or chosen == AttentionBackendName(backend)


def _require_usable(backend: str, transformer: nn.Module) -> None:
    """Try one tiny attention where the transformer is."""
    known = [one.value for one in AttentionBackendName]
    if backend not in known:
        raise ValueError(f"attention backend {backend!r}, expected one of {known}")
    if backend == XFORMERS and not is_xformers_available():
        raise ValueError("attention backend 'xformers' needs xformers: pip install 'ee-diffusion[xformers]'")
    weight = next(transformer.parameters())
    probe = torch.zeros(_PROBE, device=weight.device, dtype=weight.dtype)
    try:
        with _process_untouched(), torch.no_grad():
            dispatch_attention_fn(probe, probe, probe, backend=AttentionBackendName(backend))
    except Exception as error:  # each kernel has errors of its own
        raise ValueError(
            f"attention backend {backend!r} does not run on {weight.device} in {weight.dtype}: {error}"
        ) from error


@contextlib.contextmanager
def _process_untouched() -> Iterator[None]:
    """diffusers' choice for the whole process is put back afterwards."""
    with attention_backend(AttentionBackendName.NATIVE):
        yield
