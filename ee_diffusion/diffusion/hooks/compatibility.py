"""What exits do not combine with: active caches of diffusers, blocks managed by FSDP, block classes that nobody has looked at.

Here: refusals with their reasons. Not here: attaching (attach.py).
"""

from __future__ import annotations

import torch
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from ee_diffusion.diffusion.model_specs import ModelSpec

# Hooks of diffusers that answer from memory or skip blocks themselves (the names under which diffusers registers them).
CACHE_HOOKS = (
    "faster_cache",
    "fbc_",
    "layer_skip",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "smoothed_energy_guidance",
    "taylorseer",
    "text_kv_cache",
)


def require_attachable(transformer: nn.Module, family: ModelSpec) -> None:
    """Raises ValueError if exits cannot be attached to this transformer as it stands, and says what to do."""
    require_no_cache(transformer)
    for name in family.lists:
        for index, block in enumerate(getattr(transformer, name)):
            _require_known(block, f"{name}[{index}]", family)


def require_no_cache(transformer: nn.Module) -> None:
    """Raises ValueError if a cache of diffusers, or another hook that answers in the place of blocks, is on this transformer."""
    if isinstance(transformer, CacheMixin) and transformer.is_cache_enabled:
        raise ValueError(
            f"a cache is enabled on this {type(transformer).__name__}: it answers from earlier steps what exits decide anew; "
            "call disable_cache() first"
        )
    for name, module in transformer.named_modules():
        registry = module.__dict__.get("_diffusers_hook")
        caches = [hook for hook in (registry.hooks if registry else ()) if hook.startswith(CACHE_HOOKS)]
        if caches:
            raise ValueError(
                f"the diffusers hook {caches[0]!r} is on {name or 'the transformer'}; exits do not go with it: remove it"
            )


def perturbs_attention(transformer: nn.Module) -> bool:
    """Whether attention takes the rows of an image together (diffusers' processors for perturbed attention guidance)."""
    return any(type(module.__dict__.get("processor")).__name__.startswith("PAG") for module in transformer.modules())


def _require_known(block: nn.Module, place: str, family: ModelSpec) -> None:
    if _is_sharded(block):
        raise ValueError(
            f"{place} is managed by FSDP, which gathers its weights on every rank alike: ranks that skip different blocks would wait for "
            "each other for ever; attach to a model whose blocks are not sharded"
        )
    kind = type(block).__name__
    if family.block_classes and kind not in family.block_classes:
        raise ValueError(
            f"{place} is a {kind}; the table knows {', '.join(family.block_classes)} in {family.class_name}. "
            "For a class of your own write a row: register_model(Family(...))"
        )


def _is_sharded(block: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    return any(
        f"{kind.__module__}.{kind.__name__}".startswith("torch.distributed.fsdp") for kind in type(block).__mro__
    )
