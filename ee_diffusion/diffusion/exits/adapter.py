"""Exits for any transformer of the family table: a small adapter before the model's own tail, and an uncertainty module, per exit.

Here: the modules, saved as one component. Not here: the heads of a U-ViT or DiT with a tail of their own (deediff.py), when to stop (core).
R rows, N tokens, D width, T width of the time embedding, K exits.
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
from ee_diffusion.diffusion.model_cards import card_of, write_card
from ee_diffusion.diffusion.model_specs import blocks_of, model_spec_of, width_of
from ee_diffusion.diffusion.models.uvit import timestep_embedding

TIME_WIDTH = 256


class Adapter(nn.Module):
    """`h + up(gelu(down(norm(h)) + time(e_t)))`; `up` begins at zero, so that an untrained adapter is the identity."""

    def __init__(self, hidden_dim: int, rank: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim, elementwise_affine=False)
        self.down = nn.Linear(hidden_dim, rank)
        self.time = nn.Linear(TIME_WIDTH, rank)
        self.up = nn.Linear(rank, hidden_dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        inside = self.down(self.norm(hidden)) + self.time(time)[:, None]  # (R, N, rank)
        return hidden + self.up(nn.functional.gelu(inside))


class AdapterExits(ModelMixin, ConfigMixin):
    """The exits of one transformer: for each depth an adapter, whose answer goes through the model's own tail, and an uncertainty module.

    Uncertainty: `u_i = sigmoid(w_i^T [L_i ; e_t] + b_i)` per image token, `confidence = 1 - mean u_i`. DeeDiff (arXiv 2309.17074, eq. 4)
    has p*p*C values per patch; here it is one, for classes whose tokens are no square patches of pixels.

    Args:
        depths: executed blocks at each exit, ascending, from 0 up to below the model's number of layers.
        hidden_dim, num_prefix_tokens, transformer_class: those of the transformer.
        rank: width inside the adapters; 0: none, an exit answers with the hidden states themselves (the truncated model).

    Raises:
        ValueError: depths not ascending, or a negative rank.
    """

    @register_to_config
    def __init__(
        self,
        depths: tuple[int, ...] = (1,),
        hidden_dim: int = 1152,
        rank: int = 0,
        num_prefix_tokens: int = 0,
        transformer_class: str = "DiTTransformer2DModel",
    ):
        super().__init__()
        require_depths(depths)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"rank={rank!r}, expected a whole number: 0 (no adapters) or more")
        self.depths, self.space = tuple(depths), _HIDDEN
        self.uncertainty_modules = nn.ModuleList(nn.Linear(hidden_dim + TIME_WIDTH, 1) for _ in depths)
        self.heads = nn.ModuleList(Adapter(hidden_dim, rank) for _ in (depths if rank else ()))

    @classmethod
    def for_transformer(cls, transformer: nn.Module, depths: tuple[int, ...], *, rank: int) -> AdapterExits:
        """Untrained exits that fit a transformer of the family table; they answer as the model truncated there.

        Raises:
            ValueError: an unknown class, an exit at or beyond the last block, a negative rank.
        """
        layers = len(blocks_of(transformer))
        require_depths(depths)
        if depths[-1] >= layers:
            raise ValueError(
                f"exits at depths {tuple(depths)}, expected below {layers}: depth {layers} is the model itself"
            )
        return cls(depths=tuple(depths), rank=rank, **_facts(transformer))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' `from_pretrained`, but a file of another model is a ValueError, not a warning."""
        return load_strictly(super().from_pretrained, cls.__name__, pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As diffusers' `save_pretrained`, with a model card beside the weights if there is none yet."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(save_directory, self.model_card())

    def model_card(self) -> str:
        """The text of a README.md for the Hub."""
        made_for = self.config.transformer_class
        return card_of(
            self, made_for=made_for, facts=f"width {self.config.hidden_dim}, adapter rank {self.config.rank}"
        )

    def check_fits(self, model: nn.Module) -> None:
        """Raises ValueError if these exits were made for another class or other sizes."""
        for name, fact in _facts(model).items():
            if self.config[name] != fact:
                raise ValueError(f"heads of another model: {name} is {self.config[name]}, the model's is {fact}")

    def context(self, timestep: Tensor) -> dict[str, Tensor]:
        """What all exits of one forward look at: timestep (R,) -> `timestep` and `time` (R, T), its embedding."""
        return {"timestep": timestep, "time": self._time({"timestep": timestep})}

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """hidden (R, N, D), context with `timestep` (R,) -> (R, N, D), for the model's own tail."""
        if not len(self.heads):
            return hidden
        return self.heads[exit](hidden, self._time(context))

    def confidence(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """hidden (R, N, D), context with `timestep` (R,) and, where text stands among the tokens, `image_tokens` (R, N) bool
        -> (R,) in [0, 1]; larger is safer: `1 - mean u_i` over the image tokens."""
        values = self._uncertainty(exit, hidden, context)  # (R, N)
        if "image_tokens" not in context:
            return 1 - values.mean(1)
        chosen = context["image_tokens"].to(values.dtype)
        return 1 - (values * chosen).sum(1) / chosen.sum(1)

    def uncertainty_map(self, exit: int, hidden: Tensor, timestep: Tensor) -> Tensor:
        """hidden (R, N, D), timestep (R,) -> u_i (R, N') in (0, 1), token by token (prefix tokens left out)."""
        return self._uncertainty(exit, hidden, {"timestep": timestep})

    def _uncertainty(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        linear, dim = self.uncertainty_modules[exit], self.config.hidden_dim
        # Linear([h ; e]) = Linear_h(h) + Linear_e(e): the same e for all tokens of a row is multiplied only once.
        for_time = nn.functional.linear(self._time(context), linear.weight[:, dim:], linear.bias)  # (R, 1)
        tokens = hidden[:, self.config.num_prefix_tokens :]
        return torch.sigmoid(nn.functional.linear(tokens, linear.weight[:, :dim])[..., 0] + for_time)

    def _time(self, context: Mapping[str, Tensor]) -> Tensor:
        if "time" in context:
            return context["time"]
        return timestep_embedding(context["timestep"], TIME_WIDTH).to(self.dtype)  # (R, T)


def _facts(transformer: nn.Module) -> dict[str, Any]:
    prefix = model_spec_of(transformer).prefix_tokens
    return {
        "hidden_dim": width_of(transformer),
        "num_prefix_tokens": 0 if prefix is None else getattr(transformer, prefix),
        "transformer_class": type(transformer).__name__,
    }


_HIDDEN: Space = "hidden"
