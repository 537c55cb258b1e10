"""Tiny classifiers of every known class, real classes with fixed random weights, and texts of different lengths."""

from __future__ import annotations

import copy
import functools
import json

import torch
import transformers
from torch import Tensor, nn

from ee_diffusion.classification.exits import ClassifierExits

LAYERS, WIDTH, CLASSES, WORDS, ROWS, TOKENS = 4, 16, 3, 50, 6, 9
_TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": WORDS,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
_DISTIL = {
    "dim": WIDTH,
    "n_layers": LAYERS,
    "n_heads": 2,
    "hidden_dim": 24,
    "vocab_size": WORDS,
    "max_position_embeddings": 16,
}
_DEBERTA = {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3}
_MODERN = {"classifier_pooling": "mean", "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
CONFIGS = {
    "Bert": _TEXT,
    "Roberta": _TEXT | {"max_position_embeddings": 18},
    "Albert": _TEXT | {"embedding_size": 8},
    "DistilBert": _DISTIL,
    "DebertaV2": _TEXT | _DEBERTA,
    "ModernBert": _TEXT | _MODERN | _IDS,
    "ViT": {
        k: v
        for k, v in _TEXT.items()
        if k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    | {"image_size": 8, "patch_size": 4},
}
NAMES = tuple(CONFIGS)


def class_name(name: str) -> str:
    return f"{name}For{'Image' if name == 'ViT' else 'Sequence'}Classification"


def model_named(name: str, *, num_labels: int = CLASSES, **changes) -> nn.Module:
    """A fresh tiny classifier in eval mode, its weights large enough that layers matter."""
    return copy.deepcopy(_built(name, num_labels, json.dumps(changes)))


@functools.cache
def _built(name: str, num_labels: int, changed: str) -> nn.Module:
    changes = json.loads(changed)
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name] | {"num_labels": num_labels} | changes)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = getattr(transformers, class_name(name))(config)
        widen(model)
    return model.eval()


def widen(module: nn.Module) -> None:
    """Draw the linear layers anew with a spread that makes answers differ between rows and depths."""
    for one in module.modules():
        if isinstance(one, nn.Linear):
            nn.init.normal_(one.weight, std=1.5 / one.in_features**0.5)
            if one.bias is not None:
                nn.init.normal_(one.bias, std=0.2)


def exits_for(
    model: nn.Module,
    depths: tuple[int, ...] | None = None,
    *,
    head: str,
    judge: str,
    seed: int = 11,
    pooling: str = "first",
) -> ClassifierExits:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        exits = ClassifierExits.for_model(model, depths, head=head, judge=judge, pooling=pooling)
        widen(exits)
    return exits.eval()


@functools.cache
def _drawn() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, WORDS, (ROWS, TOKENS), generator=generator)
    lengths = torch.tensor([9, 4, 7, 9, 5, 6])
    return tokens, lengths, torch.randn(ROWS, 3, 8, 8, generator=generator)


def batch_for(name: str, rows: list[int] | None = None) -> dict[str, Tensor]:
    """Padded texts (or images) of rows 0..ROWS-1; alone a row is cut to its own length."""
    tokens, lengths, images = _drawn()
    chosen = list(range(ROWS)) if rows is None else rows
    if name == "ViT":
        return {"pixel_values": images[chosen]}
    longest = int(lengths[chosen].max())
    mask = (torch.arange(longest) < lengths[chosen, None]).long()
    return {"input_ids": tokens[chosen][:, :longest] * mask, "attention_mask": mask}
