"""Four classes that the table does not hold, as a user would register them: right rows, tiny models, inputs in which every row differs."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from factories import randomise
from torch import nn

from ee_diffusion.diffusion.model_specs import ModelSpec

TEXT = 5
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}

RIGHT = {
    family.class_name: family
    for family in (
        ModelSpec(
            "ChromaTransformer2DModel",
            "transformer_blocks",
            single_blocks="single_transformer_blocks",
            returns="text, image",
            concatenated=("single_transformer_blocks",),
            row_arguments=("temb", "attention_mask", "joint_attention_kwargs"),
            residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
            guidance="calls",
            time=(1000.0, 0.0),
            inner="attn",
        ),
        ModelSpec(
            "AuraFlowTransformer2DModel",
            "joint_transformer_blocks",
            single_blocks="single_transformer_blocks",
            returns="text, image",
            concatenated=("single_transformer_blocks",),
            row_arguments=("temb",),
            time=(1000.0, 0.0),
            inner="attn",
            counts=("num_mmdit_layers", "num_single_dit_layers"),
        ),
        ModelSpec(
            "CogView4Transformer2DModel",
            "transformer_blocks",
            returns="image, text",
            row_arguments=("temb",),
            guidance="calls",
        ),
        ModelSpec(
            "MochiTransformer3DModel",
            "transformer_blocks",
            returns="image, text",
            row_arguments=("temb", "encoder_attention_mask"),
        ),
    )
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "ChromaTransformer2DModel": {
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 3,
        "joint_attention_dim": 6,
        "axes_dims_rope": (4, 4, 8),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    },
    "AuraFlowTransformer2DModel": {
        "sample_size": 8,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 3,
        "joint_attention_dim": 6,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 16,
    },
    "CogView4Transformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "text_embed_dim": 6,
        "time_embed_dim": 8,
        "condition_dim": 4,
        "sample_size": 8,
        "rope_axes_dim": (16, 16),
    },
    "MochiTransformer3DModel": {
        "in_channels": 4,
        "num_layers": 4,
        "pooled_projection_dim": 24,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
    },
}


def model_named(name: str) -> nn.Module:
    """A tiny model, its weights random."""
    model = getattr(diffusers, name)(**_HEADS, **_CONFIGS[name])
    return randomise(model, seed=2, gain=0.7).eval()


def inputs_of(name: str, rows: list[int]) -> dict[str, Any]:
    """The arguments of a forward on these rows; row i is always the same, whatever rows are beside it."""
    drawn = [torch.Generator().manual_seed(100 + row) for row in rows]

    def normal(*shape: int) -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=one) for one in drawn])

    times = torch.tensor([700.0 - 20 * row for row in rows])
    mask = torch.stack([(torch.arange(TEXT) < 2 + row % 4) for row in rows])
    if name == "ChromaTransformer2DModel":
        ids = {"txt_ids": torch.zeros(TEXT, 3), "img_ids": torch.arange(48.0).reshape(16, 3) % 4}
        mask = torch.cat([mask, torch.ones(len(rows), 16, dtype=torch.bool)], dim=1)
        values = {"hidden_states": normal(16, 4), "encoder_hidden_states": normal(TEXT, 6), "attention_mask": mask}
        return values | ids | {"timestep": times / 1000}
    if name == "MochiTransformer3DModel":
        values = {"hidden_states": normal(4, 2, 8, 8), "encoder_hidden_states": normal(TEXT, 16)}
        return values | {"timestep": times, "encoder_attention_mask": mask}
    values = {"hidden_states": normal(4, 8, 8), "encoder_hidden_states": normal(TEXT, 6)}
    if name == "AuraFlowTransformer2DModel":
        return values | {"timestep": times / 1000}
    sizes = torch.tensor([[64.0 + 8 * row, 64.0] for row in rows])
    return values | {"timestep": times, "original_size": sizes, "target_size": sizes, "crop_coords": 0 * sizes}
