"""Official checkpoints (`nnet_ema.pth`): of U-ViT (github.com/baofff/U-ViT) as `UViTTransformer2DModel`, and the exits of DeeDiff's authors
(github.com/Tangshengku/AdaDiff), which lie in one file with their U-ViT. Here: key conversion, sizes read off shapes.

D width, p patch size, C channels, L layers.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel

Source = str | os.PathLike | Mapping[str, Tensor]
UNCERTAINTY = "lte_classifer."  # as the authors spell it

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
    source: Source, *, num_attention_heads: int, null_class: int | None = None, num_text_tokens: int = 0
) -> UViTTransformer2DModel:
    """A U-ViT with the weights of an official checkpoint, or of one of DeeDiff's authors (its exits: `load_official_exits`).

    Args:
        source: a `.pth` or `.safetensors` file, or its state dict.
        num_attention_heads: cannot be read off shapes (U-ViT-S: 8, M: 12, L: 16, H: 16).
        null_class: the class row that was trained as "no class" (ImageNet: 1000); None: there is none.
        num_text_tokens: cannot be told from image tokens by shapes (77 for the text-to-image model, CLIP's length); 0: no text.

    Raises:
        ValueError: an unreadable file, keys that are missing or foreign, sizes that do not fit.
    """
    state = _state(source)
    sizes = _sizes(state, num_attention_heads, num_text_tokens)
    model = UViTTransformer2DModel(**sizes, null_class=null_class)
    _load(model, convert_keys(state), "U-ViT checkpoint")
    return model.eval()


def load_official_exits(source: Source, transformer: UViTTransformer2DModel) -> DenoisingExits:
    """The uncertainty modules (`lte_classifer.*`) of a checkpoint of DeeDiff's authors, as exits after every block of its U-ViT.

    For `methods.deediff_released`. source: as in `load_official`; transformer: what that loaded from the same file.

    Raises:
        ValueError: an unreadable file, one without uncertainty modules, or with other ones than a module for each block of the transformer.
    """
    layers = len(transformer.transformer_blocks)
    exits = DenoisingExits.for_transformer(transformer, tuple(range(1, layers)), "released", last_layer=True)
    named = {
        key.removeprefix(UNCERTAINTY): value for key, value in _state(source).items() if key.startswith(UNCERTAINTY)
    }
    if not named:
        raise ValueError(f"no {UNCERTAINTY}* among the keys: this checkpoint has no exits")
    found = {f"uncertainty_modules.{key.replace('.lte.', '.', 1)}": value for key, value in named.items()}
    _load(exits, found, f"checkpoint with exits after {layers} blocks")
    return exits.eval()


def _load(module: torch.nn.Module, state: Mapping[str, Tensor], called: str) -> None:
    """load_state_dict, where everything must fit."""
    expected = module.state_dict()
    missing, foreign = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = sorted(key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape)
    if missing or foreign or wrong:
        raise ValueError(
            f"not an official {called}: missing {missing[:4]}, foreign {foreign[:4]}, of another shape {wrong[:4]}"
        )
    module.load_state_dict(state)


def convert_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names -> ours; in-, mid- and out-blocks become one list. Exits (`lte_classifer.*`) are left out."""
    half = _half(state)
    return {_converted(key, half): value for key, value in state.items() if not key.startswith(UNCERTAINTY)}


def _converted(key: str, half: int) -> str:
    key = re.sub(r"^in_blocks\.(\d+)\.", lambda match: f"transformer_blocks.{int(match[1])}.", key)
    key = re.sub(r"^mid_block\.", f"transformer_blocks.{half}.", key)
    key = re.sub(r"^out_blocks\.(\d+)\.", lambda match: f"transformer_blocks.{half + 1 + int(match[1])}.", key)
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    return key


def _half(state: Mapping[str, Tensor]) -> int:
    return len({match[1] for key in state if (match := re.match(r"in_blocks\.(\d+)\.", key))})


def _sizes(state: Mapping[str, Tensor], heads: int, text_tokens: int) -> dict[str, Any]:
    needed = ("pos_embed", "patch_embed.proj.weight", "mid_block.mlp.fc1.weight")
    absent = [key for key in needed if key not in state]
    if absent:
        raise ValueError(f"not an official U-ViT checkpoint: missing {absent}")
    tokens, dim = state["pos_embed"].shape[1:]
    channels, patch = state["patch_embed.proj.weight"].shape[1:3]
    if heads < 1 or dim % heads:
        raise ValueError(f"num_attention_heads={heads} does not divide the width {dim}")
    classes = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None
    text = state["context_embed.weight"].shape[1] if "context_embed.weight" in state else None
    if (text is None) != (text_tokens == 0):
        holds = "no text" if text is None else "text, and shapes do not tell its tokens from those of the image"
        raise ValueError(
            f"num_text_tokens={text_tokens!r}, but this checkpoint takes {holds} (77 tokens where it is CLIP's)"
        )
    patches = tokens - 1 - (classes is not None) - text_tokens
    side = math.isqrt(max(0, patches))
    if text_tokens < 0 or side * side != patches or not side:
        raise ValueError(f"pos_embed has {tokens} tokens, {text_tokens} of text: {patches} patches form no square")
    return {
        "sample_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": 2 * _half(state) + 1,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "mlp_ratio": _ratio(state["mid_block.mlp.fc1.weight"].shape[0], dim),
        "num_classes": classes,
        "text_dim": text,
        "num_text_tokens": text_tokens,
        "qkv_bias": "mid_block.attn.qkv.bias" in state,
        "time_mlp": "time_embed.0.weight" in state,
        "final_conv": "final_layer.weight" in state,
        "long_skips": any(".skip_linear." in key for key in state) or _half(state) == 0,
    }


def _ratio(hidden: int, width: int) -> float:
    """A ratio with `int(width * ratio) == hidden`: in float64 `width * (hidden / width)` may fall just below hidden."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _state(source: Source) -> dict[str, Tensor]:
    return dict(source) if isinstance(source, Mapping) else _read(source)


def _read(path: str | os.PathLike) -> dict[str, Tensor]:
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
