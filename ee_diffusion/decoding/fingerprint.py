"""A short name of a causal language model's weights: exits, policies and parts made for one model are refused by another."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel


def fingerprint_of(model: PreTrainedModel) -> str:
    """Class, vectors (norms and biases) and the first rows of the LM head, 16 hexadecimal digits.

    Small, and different in any two trained models. Read as bfloat16: a model loaded in bfloat16 has the name of its float32 original.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    chosen = {name: value for name, value in model.state_dict().items() if value.ndim == 1}
    chosen["head"] = model.get_output_embeddings().weight[:8]
    for name in sorted(chosen):
        value = chosen[name].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(name.encode() + value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
