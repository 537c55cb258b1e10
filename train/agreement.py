"""What training scripts share that start from a folder: flags must not say something else than what is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel


def check_agrees(what: str, found: Mapping, asked: Mapping) -> None:
    """Refuse flags that say something else than what was loaded."""
    differ = [f"{name}: {found[name]!r}, the flags say {asked[name]!r}" for name in asked if found[name] != asked[name]]
    if differ:
        raise ValueError(f"the {what} of init_from has other settings: {'; '.join(differ)}")


def uvit_from(init_from: str | None, sizes: dict) -> UViTTransformer2DModel:
    """A U-ViT of these sizes: from scratch, or init_from's, in float32. Raises ValueError if that has others."""
    if not init_from:
        return UViTTransformer2DModel(**sizes)
    folder = {"pretrained_model_name_or_path": init_from, "subfolder": "transformer"}
    transformer = UViTTransformer2DModel.from_pretrained(**folder, torch_dtype=torch.float32)
    check_agrees("transformer", transformer.config, sizes)
    return transformer
