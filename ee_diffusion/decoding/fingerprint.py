"""A short name of a causal language model's weights: exits, policies and parts made for one model are refused by another."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel


def fingerprint_of(model: PreTrainedModel) -> str:
    """Class and the first eight numbers of every weight, 16 hexadecimal digits: different for any two models of which one was trained on.

    Read as bfloat16: a model loaded in bfloat16 has the name of its float32 original. One in float16 has a name of its own (rounded twice).
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, value in sorted(model.state_dict().items()):
        first = value.detach().flatten()[:8].to("cpu", torch.bfloat16).contiguous()
        digest.update(name.encode() + first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
