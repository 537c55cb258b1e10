"""One tiny model of every row of the family table, with inputs in which every row differs. Used by test_families.py and test_stock.py.

Here: constructors and inputs. Not here: what must hold. R rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from factories import randomise, uvit
from torch import Tensor, nn

from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.model_specs import ModelSpec, blocks_of, model_spec_of

TEXT = 5  # text tokens


@dataclass(frozen=True)
class Tiny:
    """`config` of the class; `inputs`: argument -> shape of one row; `shared`: arguments that all rows share, as (arguments) -> value;
    `residuals`: argument -> (number, tokens) of ControlNet samples; `time`: from 0..999 to the class's timestep."""

    config: dict[str, Any]
    inputs: dict[str, tuple[int, ...]]
    shared: Callable[[], dict[str, Any]] = dict
    integers: dict[str, int] = field(default_factory=dict)  # argument -> number of classes
    masks: tuple[str, ...] = ()  # arguments (R, TEXT) that mask text tokens, every row another number
    residuals: dict[str, tuple[int, int]] = field(default_factory=dict)
    time: Callable[[Tensor], Tensor] = lambda time: time


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_FLUX_IDS = {"txt_ids": torch.zeros(TEXT, 3), "img_ids": torch.arange(48).reshape(16, 3) % 4}
_FLUX2_IDS = {"txt_ids": torch.zeros(TEXT, 4), "img_ids": torch.arange(64).reshape(16, 4) % 4}

TINY: dict[str, Tiny] = {
    "UViTTransformer2DModel": Tiny({}, {"hidden_states": (3, 8, 8)}, integers={"class_labels": 5}),
    "DiTTransformer2DModel": Tiny(
        _HEADS | {"in_channels": 4, "out_channels": 8, "num_layers": 5, "sample_size": 8, "num_embeds_ada_norm": 5},
        {"hidden_states": (4, 8, 8)},
        integers={"class_labels": 5},
    ),
    "PixArtTransformer2DModel": Tiny(
        _HEADS
        | {"in_channels": 4, "out_channels": 8, "num_layers": 5, "sample_size": 8, "cross_attention_dim": 16}
        | {"caption_channels": 6},
        {"hidden_states": (4, 8, 8), "encoder_hidden_states": (TEXT, 6)},
        shared=lambda: {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        masks=("encoder_attention_mask",),
    ),
    "SD3Transformer2DModel": Tiny(
        _HEADS
        | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 5, "joint_attention_dim": 6}
        | {"caption_projection_dim": 16, "pooled_projection_dim": 7, "pos_embed_max_size": 8, "qk_norm": "rms_norm"}
        | {"dual_attention_layers": (0, 1)},
        {"hidden_states": (4, 8, 8), "encoder_hidden_states": (TEXT, 6), "pooled_projections": (7,)},
        residuals={"block_controlnet_hidden_states": (5, 16)},
    ),
    "FluxTransformer2DModel": Tiny(
        {"in_channels": 4, "num_layers": 3, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"joint_attention_dim": 6, "pooled_projection_dim": 7, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
        {"hidden_states": (16, 4), "encoder_hidden_states": (TEXT, 6), "pooled_projections": (7,), "guidance": ()},
        shared=lambda: dict(_FLUX_IDS),
        residuals={"controlnet_block_samples": (3, 16), "controlnet_single_block_samples": (3, 16)},
        time=lambda time: time / 1000,
    ),
    "SanaTransformer2DModel": Tiny(
        _HEADS
        | {"in_channels": 4, "out_channels": 4, "num_layers": 5, "num_cross_attention_heads": 2}
        | {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 6, "sample_size": 4},
        {"hidden_states": (4, 4, 4), "encoder_hidden_states": (TEXT, 6)},
        masks=("encoder_attention_mask",),
        residuals={"controlnet_block_samples": (4, 16)},
    ),
    "HunyuanDiT2DModel": Tiny(
        _HEADS
        | {"in_channels": 4, "num_layers": 6, "sample_size": 8, "patch_size": 2, "hidden_size": 16, "text_len": TEXT}
        | {"text_len_t5": TEXT, "cross_attention_dim": 6, "cross_attention_dim_t5": 8, "pooled_projection_dim": 7}
        | {"use_style_cond_and_image_meta_size": False},
        {"hidden_states": (4, 8, 8), "encoder_hidden_states": (TEXT, 6), "encoder_hidden_states_t5": (TEXT, 8)},
        shared=lambda: {"image_rotary_emb": (torch.ones(16, 8), torch.zeros(16, 8))},
        masks=("text_embedding_mask", "text_embedding_mask_t5"),
        residuals={"controlnet_block_samples": (2, 16)},
    ),
    "WanTransformer3DModel": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 6}
        | {"freq_dim": 16, "ffn_dim": 32, "num_layers": 5, "rope_max_seq_len": 16},
        {"hidden_states": (4, 2, 4, 4), "encoder_hidden_states": (TEXT, 6)},
    ),
    "QwenImageTransformer2DModel": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "out_channels": 4, "num_layers": 5}
        | {"joint_attention_dim": 6, "axes_dims_rope": (4, 4, 8)},
        {"hidden_states": (16, 16), "encoder_hidden_states": (TEXT, 6)},
        shared=lambda: {"img_shapes": [(1, 4, 4)]},
        masks=("encoder_hidden_states_mask",),
        residuals={"controlnet_block_samples": (5, 16)},
        time=lambda time: time / 1000,
    ),
    "Flux2Transformer2DModel": Tiny(
        {"in_channels": 4, "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"joint_attention_dim": 6, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        {"hidden_states": (16, 4), "encoder_hidden_states": (TEXT, 6), "guidance": ()},
        shared=lambda: dict(_FLUX2_IDS),
        time=lambda time: time / 1000,
    ),
    "CogVideoXTransformer3DModel": Tiny(
        _HEADS
        | {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 6, "num_layers": 5}
        | {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": TEXT},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (TEXT, 6)},
    ),
    "LTXVideoTransformer3DModel": Tiny(
        _HEADS
        | {"in_channels": 4, "out_channels": 4, "num_layers": 5, "cross_attention_dim": 16, "caption_channels": 6},
        {"hidden_states": (16, 4), "encoder_hidden_states": (TEXT, 6)},
        shared=lambda: {"num_frames": 1, "height": 4, "width": 4},
        masks=("encoder_attention_mask",),
    ),
    "Lumina2Transformer2DModel": Tiny(
        {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 4, "num_refiner_layers": 1}
        | {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 4, 8)}
        | {"axes_lens": (16, 16, 16), "cap_feat_dim": 6},
        {"hidden_states": (4, 8, 8), "encoder_hidden_states": (TEXT, 6)},
        masks=("encoder_attention_mask",),
        time=lambda time: 1 - time / 1000,
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
        | {"num_single_layers": 3, "num_refiner_layers": 1, "text_embed_dim": 6, "pooled_projection_dim": 7}
        | {"rope_axes_dim": (4, 4, 4)},
        {"hidden_states": (4, 2, 8, 8), "encoder_hidden_states": (TEXT, 6), "pooled_projections": (7,), "guidance": ()},
        masks=("encoder_attention_mask",),
    ),
}


def model_named(name: str) -> nn.Module:
    """The tiny model of a family, its weights random."""
    if name == "UViTTransformer2DModel":
        return uvit()
    return randomise(getattr(diffusers, name)(**TINY[name].config), seed=2, gain=0.7).eval()


def exits_for(model: nn.Module, *, rank: int = 2) -> AdapterExits:
    """An exit at every depth; with a rank, adapters and uncertainty modules say something else for every row and depth."""
    exits = AdapterExits.for_transformer(model, tuple(range(len(blocks_of(model)))), rank=rank)
    return (randomise(exits, seed=3) if rank else exits).eval()


def inputs_of(name: str, rows: list[int], *, time: float = 700.0) -> dict[str, Any]:
    """The arguments of a forward on these rows; row i is always the same, whatever rows are beside it."""
    tiny, drawn = TINY[name], [torch.Generator().manual_seed(100 + row) for row in rows]
    made: dict[str, Any] = {
        argument: torch.stack([torch.randn(shape, generator=one) for one in drawn])
        for argument, shape in tiny.inputs.items()
    }
    for argument, classes in tiny.integers.items():
        made[argument] = torch.tensor([row % classes for row in rows])
    for argument in tiny.masks:
        made[argument] = torch.stack([(torch.arange(TEXT) < 2 + row % 4).long() for row in rows])
    made["timestep"] = tiny.time(torch.tensor([time - 20 * row for row in rows]))
    if name == "DiTTransformer2DModel":
        made["timestep"] = made["timestep"].long()
    return made | tiny.shared() | ({"img_shapes": [[(1, 4, 4)]] * len(rows)} if name.startswith("Qwen") else {})


def residuals_of(name: str, rows: list[int]) -> dict[str, list[Tensor]]:
    """ControlNet samples for these rows."""
    width, drawn = model_width(name), [torch.Generator().manual_seed(900 + row) for row in rows]
    return {
        argument: [torch.stack([torch.randn(tokens, width, generator=one) for one in drawn]) for _ in range(number)]
        for argument, (number, tokens) in TINY[name].residuals.items()
    }


def model_width(name: str) -> int:
    """D of a tiny model with residuals."""
    config = TINY[name].config
    return config["num_attention_heads"] * config["attention_head_dim"]


@torch.no_grad()
def forward(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """(R, ...) the model's output."""
    copied = {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}
    return model(**copied, return_dict=False)[0]


def inner_modules(model: nn.Module) -> list[nn.Module]:
    """The module inside each block whose input is counted."""
    family: ModelSpec = model_spec_of(model)
    return [getattr(block, family.inner) for name in family.lists for block in getattr(model, name)]


@contextmanager
def passing(model: nn.Module, depth: int) -> Iterator[None]:
    """The blocks from `depth` on return what they get."""
    family = model_spec_of(model)
    concatenated = [block for name in family.concatenated for block in getattr(model, name)]

    def pass_on(block: nn.Module, hidden_states: Tensor, encoder_hidden_states=None, *args, **kwargs):
        if family.returns == "image" or any(block is one for one in concatenated):
            return hidden_states
        pair = (encoder_hidden_states, hidden_states)
        return pair if family.returns == "text, image" else pair[::-1]

    left_out = blocks_of(model)[depth:]
    for block in left_out:
        block.__dict__["forward"] = functools.partial(pass_on, block)
    try:
        yield
    finally:
        for block in left_out:
            del block.__dict__["forward"]
