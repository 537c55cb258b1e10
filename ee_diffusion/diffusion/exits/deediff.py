"""Exits of a denoiser: an output head and an uncertainty estimation module (UEM) per exit, saved as one component.

Here: the modules of DeeDiff (arXiv 2309.17074), as written and as released. Not here: when to stop (core), their training
(deediff_objective.py). R rows, X prefix tokens, P patches, N = X + P, D width, C channels, p patch size, K exits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ee_diffusion.core.exits import Space, require_depths
from ee_diffusion.diffusion.exits.loading import load_strictly
from ee_diffusion.diffusion.exits.packed import PackedExits
from ee_diffusion.diffusion.model_cards import card_of, write_card
from ee_diffusion.diffusion.model_specs import blocks_of, model_spec_of, width_of
from ee_diffusion.diffusion.models.uvit import timestep_embedding, unpatchify


class OutputHead(nn.Module):
    """g_i: LayerNorm, Linear(D -> p*p*C), unpatchify, 3x3 convolution; the shape of U-ViT's own tail."""

    def __init__(self, hidden_dim: int, patch_size: int, out_channels: int):
        super().__init__()
        self.patch_size, self.out_channels = patch_size, out_channels
        self.norm = nn.LayerNorm(hidden_dim)
        self.proj = nn.Linear(hidden_dim, patch_size**2 * out_channels)
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, patches: Tensor, size: int) -> Tensor:
        values = self.proj(self.norm(patches))  # (R, P, p*p*C)
        image = unpatchify(values, channels=self.out_channels, patch_size=self.patch_size, height=size, width=size)
        return self.conv(image)  # (R, C, H, W)


class DenoisingExits(ModelMixin, ConfigMixin):
    """The exits of one denoiser: for each depth an output head g_i and an uncertainty module.

    `variant="paper"` (DeeDiff eq. 4): `u_i = sigmoid(w_i^T [L_i ; timestep embedding] + b_i)` per pixel, own head g_i per exit,
    `confidence = 1 - mean u_i`. `variant="released"` (the authors' code, which differs): `sigmoid(w_i^T L_i + b_i)` on the *detached*
    patch tokens, no timestep, is a *certainty*; there is no own head: an exit answers through the model's own tail.

    Args:
        depths: executed blocks at each exit, ascending, from 0 up to below the model's number of layers.
        hidden_dim, patch_size, out_channels, sample_size, num_prefix_tokens: those of the denoiser.
        last_layer: one more uncertainty module, for what the last block leaves. The authors' code has it: their losses count the last block
            among the exits. In a run it decides nothing, since its answer is the model's own. Released variant only.

    Raises:
        ValueError: depths not ascending, an unknown variant, or `last_layer` with the paper's.
    """

    @register_to_config
    def __init__(
        self,
        depths: tuple[int, ...] = (1,),
        hidden_dim: int = 512,
        patch_size: int = 2,
        out_channels: int = 3,
        sample_size: int = 32,
        num_prefix_tokens: int = 1,
        variant: str = "paper",
        last_layer: bool = False,
    ):
        super().__init__()
        require_depths(depths)
        if variant not in ("paper", "released") or (last_layer and variant != "released"):
            raise ValueError(
                f"variant={variant!r}, last_layer={last_layer}, expected 'paper', or 'released' with or without the last layer"
            )
        self.depths = tuple(depths)
        # read at every exit of every step: plain attributes, since a config's look-ups are slow
        self.paper, self.hidden_dim, self.num_prefix_tokens = variant == "paper", hidden_dim, num_prefix_tokens
        self.space: Space = "output" if variant == "paper" else "hidden"
        width, values = hidden_dim * (2 if variant == "paper" else 1), patch_size**2 * out_channels
        self.uncertainty_modules = nn.ModuleList(nn.Linear(width, values) for _ in range(len(depths) + last_layer))
        heads = depths if variant == "paper" else ()
        self.heads = nn.ModuleList(OutputHead(hidden_dim, patch_size, out_channels) for _ in heads)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' `from_pretrained`, but a file of another model is a ValueError, not a warning."""
        return load_strictly(super().from_pretrained, cls.__name__, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def for_transformer(
        cls, transformer: ModelMixin, depths: tuple[int, ...], variant: str = "paper", *, last_layer: bool = False
    ) -> DenoisingExits:
        """Untrained exits that fit a transformer of the family table. last_layer: as the class has it.

        Raises:
            ValueError: an unknown class, or an exit at or beyond the last block.
        """
        layers = len(blocks_of(transformer))
        require_depths(depths)
        if depths[-1] >= layers:
            raise ValueError(
                f"exits at depths {tuple(depths)}, expected below {layers}: depth {layers} is the model itself"
            )
        return cls(depths=tuple(depths), variant=variant, last_layer=last_layer, **_sizes(transformer))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As diffusers' `save_pretrained`, with a model card beside the weights if there is none yet."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(save_directory, self.model_card())

    def model_card(self) -> str:
        """The text of a README.md for the Hub."""
        width, size = self.config.hidden_dim, self.config.sample_size
        return card_of(
            self, made_for=f"transformer of width {width} on {size} x {size} samples", facts=self.config.variant
        )

    def check_fits(self, model: nn.Module) -> None:
        """Raises ValueError if these exits were made for another model's sizes."""
        for name, size in _sizes(model).items():
            if self.config[name] != size:
                raise ValueError(f"heads of another model: {name} is {self.config[name]}, the model's is {size}")

    @torch.no_grad()
    def context(self, timestep: Tensor) -> dict[str, Tensor]:
        """What all exits of one forward look at: timestep (R,) -> `timestep`, and for the paper's UEM its embedding, `time` (R, D)."""
        if not self.paper:
            return {"timestep": timestep}
        return {"timestep": timestep, "time": timestep_embedding(timestep, self.hidden_dim).to(self.dtype)}

    @torch.no_grad()
    def packed(self) -> DenoisingExits | PackedExits:
        """Exits with the same answers and (to rounding) the same certainty, faster, for a run during which no weight changes.

        They know the weights as they are now. Itself where there is nothing to gain: the released variant, half precision, autocast.
        """
        weight = self.uncertainty_modules[0].weight  # `self.dtype` looks through all parameters
        if not self.paper or weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type):
            return self
        return PackedExits.of(
            self,
            list(self.uncertainty_modules),
            num_prefix_tokens=self.num_prefix_tokens,
            num_patches=(self.config.sample_size // self.config.patch_size) ** 2,
        )

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """hidden (R, N, D) -> the prediction (R, C, H, W) if `space` is output; else hidden itself, for the model's own tail."""
        if self.space == "hidden":
            return hidden
        return self.heads[exit](self._patches(hidden), self.config.sample_size)

    def confidence(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """hidden (R, N, D), context (with `timestep` (R,), best made by `context`) -> (R,) in [0, 1]; larger is safer.

        Mean over C, H, W of `uncertainty_map`.
        """
        said = self._uncertainty_logits(exit, hidden, context).sigmoid().mean((1, 2))  # (R,)
        return 1 - said if self.paper else said

    def uncertainty_map(self, exit: int, hidden: Tensor, timestep: Tensor) -> Tensor:
        """hidden (R, N, D), timestep (R,) -> (R, C, H, W) in (0, 1): u (paper) or the certainty (released), pixel by pixel.

        exit: 0..K-1, or K for the last layer's (`last_layer`).
        """
        config = self.config
        values = torch.sigmoid(self._uncertainty_logits(exit, hidden, {"timestep": timestep}))  # (R, P, p*p*C)
        size = config.sample_size
        return unpatchify(values, channels=config.out_channels, patch_size=config.patch_size, height=size, width=size)

    def _uncertainty_logits(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        linear, patches = self.uncertainty_modules[exit], self._patches(hidden)
        if not self.paper:
            return linear(patches.detach())  # (R, P, p*p*C)
        # Linear([h ; e]) = Linear_h(h) + Linear_e(e): the same e for all patches of a row is multiplied only once.
        for_hidden, for_time = linear.weight.split(self.hidden_dim, 1)  # (p*p*C, D) each
        time = (
            context["time"] if "time" in context else timestep_embedding(context["timestep"], self.hidden_dim)
        )  # (R, D)
        for_time = nn.functional.linear(time.to(patches.dtype), for_time, linear.bias)  # (R, p*p*C)
        return nn.functional.linear(patches, for_hidden).add_(for_time[:, None])

    def _patches(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.num_prefix_tokens :]  # (R, P, D)


def _sizes(transformer: ModelMixin) -> dict[str, int]:
    family, config = model_spec_of(transformer), transformer.config
    squares = all(isinstance(config.get(name), int) for name in ("patch_size", "sample_size"))
    if not squares or family.image_tokens is not None:
        raise ValueError(
            f"DenoisingExits answer in square patches of images of one size, which a {family.class_name} has not; use AdapterExits"
        )
    return {
        "hidden_dim": width_of(transformer),
        "patch_size": config.patch_size,
        "out_channels": transformer.out_channels,
        "sample_size": config.sample_size,
        "num_prefix_tokens": 0 if family.prefix_tokens is None else getattr(transformer, family.prefix_tokens),
    }
