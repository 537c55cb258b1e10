"""Low-rank adapters on the layers of a causal language model, by peft (an optional extra): put in, and merged when saved."""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from ee_diffusion.decoding.model_specs import model_spec_of

if is_peft_available():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer


def add_lora(model: PreTrainedModel, *, rank: int) -> PreTrainedModel:
    """Put a low-rank adapter (alpha = rank) on every linear layer of the decoder layers, in place; the adapters alone require a gradient.

    Fresh ones change nothing, bit for bit.

    Raises:
        ImportError: peft is not installed. ValueError: a rank below 1, an unknown class, layers without `nn.Linear`.
    """
    if not is_peft_available():
        raise ImportError("LoRA needs peft, which is not installed: pip install 'ee-diffusion[lora]'")
    if rank < 1:
        raise ValueError(f"rank={rank}, expected at least 1")
    layers = model_spec_of(model).layers
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    targets = [name for name in linear if name.startswith(f"{layers}.")]
    if not targets:
        raise ValueError(f"the layers of {type(model).__name__} hold no nn.Linear, expected some to adapt")
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model)
    return model


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without adapters whose weights hold what they learned; it needs no peft. Without adapters: the model itself."""
    if not is_peft_available() or not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return model
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            plain.set_submodule(name, module.get_base_layer())
    plain.__dict__.pop("peft_config", None)
    return plain
