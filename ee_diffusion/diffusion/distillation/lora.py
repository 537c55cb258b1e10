"""Low-rank adapters on a frozen backbone, by peft (an optional extra): put in, switched off for the teacher, merged when saved.

Here: the adapters of the blocks. Not here: what they learn (objective.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import is_peft_available
from torch import nn

from ee_diffusion.diffusion.model_specs import model_spec_of

if is_peft_available():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

_MISSING = "LoRA needs peft, which is not installed: pip install 'ee-diffusion[lora]'"


def add_lora(transformer: nn.Module, *, rank: int) -> nn.Module:
    """Put a low-rank adapter (alpha = rank) on every linear layer in the blocks of a frozen transformer, in place.

    The adapters alone require a gradient; fresh ones change nothing, bit for bit.

    Raises:
        ImportError: peft is not installed. ValueError: a rank below 1, an unknown class, adapters that are there already.
    """
    if not is_peft_available():
        raise ImportError(_MISSING)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r}, expected a whole number, at least 1")
    if _layers(transformer):
        raise ValueError(f"this {type(transformer).__name__} has adapters already; merge or unload them first")
    lists = tuple(f"{name}." for name in model_spec_of(transformer).lists)
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name.startswith(lists)]
    transformer.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), transformer)
    return transformer


@contextmanager
def lora_off(transformer: nn.Module) -> Iterator[None]:
    """Within: the transformer as it was before `add_lora`. Without adapters nothing happens."""
    layers = _layers(transformer)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(transformer: nn.Module) -> nn.Module:
    """A copy without adapters whose weights hold what they learned; it needs no peft. Without adapters: the transformer itself."""
    if not _layers(transformer):
        return transformer
    plain = copy.deepcopy(transformer)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            plain.set_submodule(name, module.get_base_layer())
    plain.__dict__.pop("peft_config", None)
    return plain


def _layers(transformer: nn.Module) -> list:
    if not is_peft_available():
        return []
    return [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
