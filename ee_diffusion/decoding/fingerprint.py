"""Names of a causal language model: exits, policies and parts made for one model are refused by another.

Here: what is read of a model, and that it is read once. Not here: who compares (heads.py, generate.py, edge_cloud/split.py).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

# Facts of a configuration that no answer to the same tokens depends on.
_BOOKKEEPING = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "tie_word_embeddings",
    "transformers_version",
    "use_cache",
}
_READ: WeakKeyDictionary[PreTrainedModel, tuple[Any, str]] = (
    WeakKeyDictionary()
)  # what it was when it was read, its name


def fingerprint_of(model: PreTrainedModel) -> str:
    """Class, configuration and every weight, 16 hexadecimal digits: different for any two models that answer differently.

    Read as bfloat16: a model loaded in bfloat16 has the name of its float32 original. One in float16 has a name of its own (rounded twice).
    The weights are read once for each model and again when they changed: where they lie, how often torch wrote to them, or one of their
    first eight numbers.
    """
    state = sorted(model.state_dict().items())
    config = config_facts(model.config)
    now = (config, tuple((name, _marks(value)) for name, value in state))
    known = _READ.get(model)
    if known is None or known[0] != now:
        digest = hashlib.sha256(f"{type(model).__name__} {config}".encode())
        for name, value in state:
            digest.update(name.encode())
            digest.update(_bytes(value.to(torch.bfloat16)))
        known = _READ[model] = (now, digest.hexdigest()[:16])
    return known[1]


def digest_of(model: PreTrainedModel) -> str:
    """sha256 of class, configuration and all bytes of the weights in the dtype that they have, hexadecimal."""
    digest = hashlib.sha256(f"{type(model).__name__} {config_facts(model.config)}".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def config_facts(config: PreTrainedConfig) -> str:
    """The configuration as JSON, without what no answer depends on: shapes, RoPE, epsilons, activations stay."""
    facts = {name: value for name, value in config.to_dict().items() if name not in _BOOKKEEPING}
    return json.dumps(facts, sort_keys=True, default=str)


def _marks(value: Tensor) -> tuple[object, ...]:
    """What changes when a weight does: where it lies, torch's count of writes to it, its first eight numbers."""
    written = 0 if value.is_inference() else value._version
    return value.data_ptr(), written, bytes(_bytes(value.detach().flatten()[:8].to(torch.bfloat16)))


def _bytes(value: Tensor) -> memoryview:
    return memoryview(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
