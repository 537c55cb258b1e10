"""Official U-ViT checkpoints (github.com/baofff/U-ViT, `nnet_ema.pth`) as `UViTTransformer2DModel`: key conversion, sizes read off shapes.

D width, p patch size, C channels, X prefix tokens, L layers.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ee_diffusion.diffusion.uvit import UViTTransformer2DModel

_RENAMED = (
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^label_emb\.", "class_embed."),
    (r"^context_embed\.", "text_embed."),
    (r"^norm\.", "norm_out."),
    (r"^decoder_pred\.", "proj_out."),
    (r"^final_layer\.", "conv_out."),
    (r"\.attn\.qkv\.", ".attn.to_qkv."),
    (r"\.attn\.proj\.", ".attn.to_out."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
)


def load_official(
    source: str | os.PathLike | Mapping[str, Tensor], *, num_attention_heads: int, null_class: int | None = None
) -> UViTTransformer2DModel:
    """A U-ViT with the weights of an official checkpoint.

    Args:
        source: a `.pth` or `.safetensors` file, or its state dict.
        num_attention_heads: cannot be read off shapes (U-ViT-S: 8, M: 12, L: 16, H: 16).
        null_class: the class row that was trained as "no class" (ImageNet: 1000); None: there is none.

    Raises:
        ValueError: an unreadable file, keys that are missing or foreign, sizes that do not fit.
    """
    state = dict(source) if isinstance(source, Mapping) else _read(source)
    sizes = _sizes(state, num_attention_heads)
    model = UViTTransformer2DModel(**sizes, null_class=null_class)
    converted = convert_keys(state)
    expected = model.state_dict()
    missing, foreign = sorted(expected.keys() - converted.keys()), sorted(converted.keys() - expected.keys())
    wrong = [key for key in expected.keys() & converted.keys() if expected[key].shape != converted[key].shape]
    if missing or foreign or wrong:
        raise ValueError(
            f"not an official U-ViT checkpoint: missing {missing[:4]}, foreign {foreign[:4]}, of another shape {wrong[:4]}"
        )
    model.load_state_dict(converted)
    return model.eval()


def convert_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names -> ours; in-, mid- and out-blocks become one list."""
    half = _half(state)
    return {_converted(key, half): value for key, value in state.items()}


def _converted(key: str, half: int) -> str:
    key = re.sub(r"^in_blocks\.(\d+)\.", lambda match: f"transformer_blocks.{int(match[1])}.", key)
    key = re.sub(r"^mid_block\.", f"transformer_blocks.{half}.", key)
    key = re.sub(r"^out_blocks\.(\d+)\.", lambda match: f"transformer_blocks.{half + 1 + int(match[1])}.", key)
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    return key


def _half(state: Mapping[str, Tensor]) -> int:
    return len({match[1] for key in state if (match := re.match(r"in_blocks\.(\d+)\.", key))})


def _sizes(state: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    needed = ("pos_embed", "patch_embed.proj.weight", "mid_block.mlp.fc1.weight")
    absent = [key for key in needed if key not in state]
    if absent:
        raise ValueError(f"not an official U-ViT checkpoint: missing {absent}")
    tokens, dim = state["pos_embed"].shape[1:]
    channels, patch = state["patch_embed.proj.weight"].shape[1:3]
    if dim % heads:
        raise ValueError(f"num_attention_heads={heads} does not divide the width {dim}")
    classes = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None
    text = state["context_embed.weight"].shape[1] if "context_embed.weight" in state else None
    rest = tokens - 1 - (classes is not None)  # text tokens and patches; the patches form a square
    text_tokens = 77 if text is not None else 0  # CLIP's length, as the official text model has it
    side = isqrt(max(0, rest - text_tokens))
    if side * side != rest - text_tokens:
        raise ValueError(f"pos_embed has {tokens} tokens: {rest - text_tokens} patches form no square")
    return {
        "sample_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": 2 * _half(state) + 1,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "mlp_ratio": state["mid_block.mlp.fc1.weight"].shape[0] / dim,
        "num_classes": classes,
        "text_dim": text,
        "num_text_tokens": text_tokens,
        "qkv_bias": "mid_block.attn.qkv.bias" in state,
        "time_mlp": "time_embed.0.weight" in state,
        "final_conv": "final_layer.weight" in state,
    }


def _read(path: str | os.PathLike) -> dict[str, Tensor]:
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
