"""A U-ViT and its exits, fresh or from the folder of an earlier run, whose settings must then agree with the flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel


def check_agrees(what: str, found: Mapping, flags: Mapping) -> None:
    """Raises ValueError where a loaded part has other settings than the flags."""
    differ = [f"{name}: {found[name]!r}, the flags say {flags[name]!r}" for name in flags if found[name] != flags[name]]
    if differ:
        raise ValueError(f"the {what} of init_from has other settings: {'; '.join(differ)}")


def uvit_from(init_from: str | None, sizes: dict) -> UViTTransformer2DModel:
    """A U-ViT of these sizes in float32. Raises ValueError where that of `init_from` has others."""
    if not init_from:
        return UViTTransformer2DModel(**sizes)
    folder = {"pretrained_model_name_or_path": init_from, "subfolder": "transformer"}
    transformer = UViTTransformer2DModel.from_pretrained(**folder, torch_dtype=torch.float32)
    check_agrees("transformer", transformer.config, sizes)
    return transformer


def exits_from(
    init_from: str | None, transformer: UViTTransformer2DModel, depths: list[int] | None, *, variant: str
) -> DenoisingExits:
    """DeeDiff's exits; depths None: those of `init_from`, or after every block but the last.

    Raises:
        ValueError: the exits of `init_from` have other depths or another variant.
    """
    if init_from and (Path(init_from) / "exits").is_dir():
        exits = DenoisingExits.from_pretrained(init_from, subfolder="exits", torch_dtype=torch.float32)
        found = {"depths": list(exits.config.depths), "variant": exits.config.variant}
        check_agrees("exits", found, {"depths": list(depths or exits.config.depths), "variant": variant})
        return exits
    depths = tuple(depths or range(1, len(transformer.transformer_blocks)))
    return DenoisingExits.for_transformer(transformer, depths, variant, last_layer=variant == "released")
