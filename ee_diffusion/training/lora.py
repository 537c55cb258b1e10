"""Low-rank adapters by peft (an optional extra), for a model of any library: put in, and merged when saved. Not here: what they learn."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from transformers.utils import is_peft_available

if is_peft_available():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer


def add_lora(model: nn.Module, lists: Sequence[str], *, rank: int) -> nn.Module:
    """Put a low-rank adapter (alpha = rank) on every `nn.Linear` in the named lists of blocks, in place.

    The adapters alone require a gradient; fresh ones change nothing, bit for bit.

    Raises:
        ImportError: peft is not installed. ValueError: a rank below 1, adapters that are there already, no `nn.Linear` in the lists.
    """
    if not is_peft_available():
        raise ImportError("LoRA needs peft, which is not installed: pip install 'ee-diffusion[lora]'")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r}, expected a whole number, at least 1")
    if _adapters(model):
        raise ValueError(f"this {type(model).__name__} has adapters already; merge or unload them first")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name.startswith(tuple(f"{blocks}." for blocks in lists))]
    if not targets:
        raise ValueError(f"{', '.join(lists)} of {type(model).__name__} hold no nn.Linear, expected some to adapt")
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model)
    return model


def merged(model: nn.Module) -> nn.Module:
    """A copy without adapters whose weights hold what they learned; it needs no peft. Without adapters: the model itself."""
    if not _adapters(model):
        return model
    plain = copy.deepcopy(model)
    for name, layer in _adapters(plain).items():
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    plain.__dict__.pop("peft_config", None)
    return plain


def _adapters(model: nn.Module) -> dict[str, nn.Module]:
    if not is_peft_available():
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
