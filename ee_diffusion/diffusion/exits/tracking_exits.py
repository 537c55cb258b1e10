"""Exits that remember at any depth: what memory recalls, corrected by what the first blocks say now against what memory expected of them.

Here: the exits and their uncertainty. Not here: teaching them (tracking_fit.py), memory itself (cached.py, core/history.py).
R rows, r running rows, M remembered steps, K deeper exits, P patches, D width, V values a readout has for a patch, C, H, W image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ee_diffusion.core.exits import Space
from ee_diffusion.core.history import OutputHistory, weighted
from ee_diffusion.diffusion.exits.cached import FEATURES, CachedOutputExits, small_mlp
from ee_diffusion.diffusion.exits.deediff import DenoisingExits, OutputHead
from ee_diffusion.diffusion.exits.loading import load_strictly
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel, unpatchify

VARIANTS = ("learned", "residual")
GAUGED = FEATURES + 2  # those of memory, log rms of the innovation, log rms of how far the clean image moved


@dataclass(frozen=True, eq=False)
class Tracks:
    """The memory of a run: clean images (R, M, C, H, W), and of every deeper exit what it read, (R, M, K, P, V)."""

    clean: OutputHistory
    read: OutputHistory

    def regrouped(self, sources: Sequence[int | None]) -> Tracks:
        """As `OutputHistory.regrouped`: row i goes on from row `sources[i]`."""
        return Tracks(self.clean.regrouped(sources), self.read.regrouped(sources))


class Correction(nn.Module):
    """`rho W_2 (gelu(W_e e / rho + W_m m / mu + W_f f) (1 + W_g f))`: the innovation e (R, P, D) of rms rho and the last movement m of the
    clean image (R, P, V) of rms mu, row by row, told the features f (R, F) -> (R, P, V). 0 until it is trained."""

    def __init__(self, width: int, values: int, hidden_dim: int):
        super().__init__()
        self.innovation, self.movement = nn.Linear(width, hidden_dim), nn.Linear(values, hidden_dim, bias=False)
        self.shift, self.gain = nn.Linear(GAUGED, hidden_dim, bias=False), nn.Linear(GAUGED, hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, values)
        for zero in (self.gain.weight, self.out.weight, self.out.bias):
            nn.init.zeros_(zero)

    def forward(self, innovation: Tensor, movement: Tensor, features: Tensor) -> Tensor:
        """The correction in the innovation's dtype; the products are in that of the weights."""
        rho, mu, dtype = rms(innovation), rms(movement), self.out.weight.dtype  # (R, 1, 1)
        features, movement = features.to(dtype), (movement / mu).to(dtype)
        seen = self.innovation((innovation / rho).to(dtype)) + self.movement(movement) + self.shift(features)[:, None]
        return rho * self.out(nn.functional.gelu(seen) * (1 + self.gain(features)[:, None])).to(rho.dtype)


def rms(values: Tensor) -> Tensor:
    """Root mean square of each row, (R, P, V) -> (R, 1, 1)."""
    return values.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)


class TrackingExits(ModelMixin, ConfigMixin):
    """Depth 0 answers from memory (`CachedOutputExits`); a deeper exit d adds a correction to the recalled clean image.

    `z_d` is what exit d reads after d blocks, `z^_d` what follows for now from the z_d of the last full steps, as the clean image does.

    - `variant="residual"`: z_d is the clean image that the exit's own output head means, and the correction is `z_d - z^_d`: head
      output plus the remembered residual of the head.
    - `variant="learned"`: z_d are the patch tokens, and a small network makes the correction of the innovation `z_d - z^_d`, of how the
      recalled image moved last, and of the time (`Correction`).

    Uncertainty of a deeper exit: `u = exp(log e + MLP(memory's features, log rms of the innovation, log rms of the movement))`, the
    expected root mean square error of its clean image, as `CachedOutputExits` has it at depth 0.

    Raises:
        ValueError: depths not ascending from 1 on, an unknown variant, a length other than 2.
    """

    space: Space = "output"
    _keep_in_fp32_modules = ["alphas_cumprod", "gauge", "gauges", "trust"]

    @register_to_config
    def __init__(
        self,
        deeper: tuple[int, ...] = (1,),
        variant: str = "learned",
        width: int = 256,
        patch_size: int = 4,
        num_prefix_tokens: int = 1,
        hidden_dim: int = 128,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        in_channels: int = 3,
        sample_size: int = 32,
    ):
        super().__init__()
        if not deeper or list(deeper) != sorted(set(deeper)) or deeper[0] < 1:
            raise ValueError(f"deeper={tuple(deeper)}, expected ascending distinct numbers of blocks from 1 on")
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}, expected one of {VARIANTS}")
        self.depths = (0, *deeper)
        self.memory = CachedOutputExits(num_train_timesteps, prediction_type, in_channels, sample_size, length=2)
        values = patch_size**2 * in_channels
        self.corrections = nn.ModuleList(Correction(width, values, hidden_dim) for _ in deeper if variant == "learned")
        self.heads = nn.ModuleList(OutputHead(width, patch_size, in_channels) for _ in deeper if variant == "residual")
        self.gauges = nn.ModuleList(small_mlp(GAUGED, 32) for _ in deeper)

    @classmethod
    def for_pipeline(
        cls,
        transformer: UViTTransformer2DModel,
        scheduler: SchedulerMixin,
        *,
        deeper: tuple[int, ...],
        memory: CachedOutputExits | None = None,
        heads: DenoisingExits | None = None,
    ) -> TrackingExits:
        """Exits for a U-ViT. memory: fitted exits at depth 0 to begin with. heads: trained output heads; with them the variant is
        `residual`, without `learned`.

        Raises:
            ValueError: another class of model; memory of another noise schedule; heads without an exit at one of the depths; as
                `CachedOutputExits.for_pipeline`.
        """
        if not isinstance(transformer, UViTTransformer2DModel):
            raise ValueError(f"{type(transformer).__name__}, expected a UViTTransformer2DModel: its patches are known")
        known = CachedOutputExits.for_pipeline(transformer, scheduler) if memory is None else memory
        wrong = known.config.terms != "clean" or known.config.learned_trust or known.config.length != 2
        if wrong or known.config.course_steps:
            raise ValueError(f"memory {dict(known.config)}, expected the line through two clean images")
        known.check_scheduler(scheduler)
        missing = [] if heads is None else [depth for depth in deeper if depth not in heads.depths]
        if missing:
            raise ValueError(f"no output heads at depths {missing}, they are at {heads.depths}")
        made = cls(
            tuple(deeper),
            "learned" if heads is None else "residual",
            width=transformer.inner_dim,
            patch_size=transformer.config.patch_size,
            num_prefix_tokens=transformer.num_prefix_tokens,
            num_train_timesteps=known.config.num_train_timesteps,
            prediction_type=known.config.prediction_type,
            in_channels=known.config.in_channels,
            sample_size=known.config.sample_size,
        )
        made.memory.load_state_dict(known.state_dict())
        for place, depth in enumerate(deeper if heads is not None else ()):
            made.heads[place].load_state_dict(heads.heads[heads.depths.index(depth)].state_dict())
        made.check_fits(transformer)
        return made.to(transformer.device)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' `from_pretrained`, but a file of another model is a ValueError, not a warning."""
        return load_strictly(super().from_pretrained, cls.__name__, pretrained_model_name_or_path, **kwargs)

    @property
    def keeps(self) -> tuple[int, ...]:
        """The depths whose hidden states are remembered."""
        return self.depths[1:]

    def check_fits(self, model: nn.Module) -> None:
        """Raises ValueError if these exits were made for another model's sizes."""
        self.memory.check_fits(model)
        sizes = {"width": "inner_dim", "num_prefix_tokens": "num_prefix_tokens"}
        for name, own in sizes.items():
            if self.config[name] != getattr(model, own, None):
                raise ValueError(
                    f"exits of another model: {name} is {self.config[name]}, not {getattr(model, own, None)}"
                )

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """As `CachedOutputExits.check_scheduler`: another noise schedule than the one that is remembered under is a ValueError."""
        self.memory.check_scheduler(scheduler)

    def context(self, timestep: Tensor) -> dict[str, Tensor]:
        """Without a memory there is nothing but the time."""
        return {"timestep": timestep}

    @torch.no_grad()
    def recall(self, memory: Tracks | None, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """What `CachedOutputExits.recall` has, and for the deeper exits `sample`, `clean` (R, C, H, W), `moved` (R, P, V), the movement
        of the last two clean images, `lean` (R, M), and `read` (R, M, K, P, V), to be weighed with it where an exit is evaluated."""
        known = self.memory.recall(None if memory is None else memory.clean, sample, timestep)
        if memory is None:
            return known
        past, time = memory.clean, timestep.double()
        lean = past.weights(time, self.memory.trust_of(past.times, time))
        moved = self.patches_of(past.values[:, 0] - past.values[:, 1])
        return known | {
            "sample": sample,
            "clean": weighted(past.values, lean),
            "moved": moved,
            "lean": lean,
            "read": memory.read.values,
        }

    @torch.no_grad()
    def remember(
        self,
        memory: Tracks | None,
        rows: Tensor,
        *,
        sample: Tensor,
        timestep: Tensor,
        output: Tensor,
        hidden: Mapping[int, Tensor],
    ) -> Tracks:
        """The memory after `rows` (r,) of the batch ran to the end; `hidden`: depth -> their states (r, N, D)."""
        rows = rows.to(sample.device)
        own_sample, own_time = sample.index_select(0, rows), timestep.index_select(0, rows)
        read = torch.stack([self.read(k, hidden[d], own_sample, own_time) for k, d in enumerate(self.keeps)], 1)
        clean = None if memory is None else memory.clean
        clean = self.memory.remember(clean, rows, sample=sample, timestep=timestep, output=output)
        past = (
            OutputHistory.empty(read.new_zeros(len(sample), *read.shape[1:]), length=2)
            if memory is None
            else memory.read
        )
        return Tracks(clean, past.remember(rows, read, own_time.double()))

    def read(self, place: int, hidden: Tensor, sample: Tensor, timestep: Tensor) -> Tensor:
        """z of the deeper exit `place`: hidden (r, N, D) -> (r, P, V)."""
        patches = hidden[:, self.config.num_prefix_tokens :].float()  # (r, P, D)
        if self.config.variant == "learned":
            return patches
        said = self.heads[place](patches.to(self.heads[place].proj.weight.dtype), self.config.sample_size)
        return self.patches_of(self.memory.clean_of(sample, said, timestep).float())

    def innovation(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """`z - z^` of an exit below depth 0 (R, P, V)."""
        now = self.read(exit - 1, hidden, context["sample"], context["timestep"])
        return now - weighted(context["read"][:, :, exit - 1], context["lean"])

    def gauged(self, innovation: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """(R, F + 2) of a deeper exit."""
        sizes = torch.cat([rms(innovation), rms(context["moved"])], 1)[:, :, 0].log()  # (R, 2)
        return torch.cat([context["features"], sizes], 1).float()

    def corrected(self, exit: int, innovation: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """The clean image (R, C, H, W) that a deeper exit means."""
        if self.config.variant == "learned":
            features = self.gauged(innovation, context).nan_to_num(0.0)
            innovation = self.corrections[exit - 1](innovation, context["moved"], features)
        config, size = self.config, self.config.sample_size
        image = unpatchify(
            innovation, channels=config.in_channels, patch_size=config.patch_size, height=size, width=size
        )
        return context["clean"] + image

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """The output (R, C, H, W) that is recalled, or recalled and corrected.

        Raises:
            ValueError: a row that remembers nothing: its first step must be a full one.
        """
        recalled = self.memory.answer(0, hidden, context)
        if exit == 0:
            return recalled
        clean = self.corrected(exit, self.innovation(exit, hidden, context), context)
        return self.memory.output_of(context["sample"], clean, context["timestep"]).to(recalled.dtype)

    def confidence(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """`1 - min(u, 1)` of that exit (R,); 0 where memory is not full yet; NaN where what it remembers is not finite."""
        if exit == 0 or "read" not in context:
            return self.memory.confidence(0, hidden, context)
        innovation = self.innovation(exit, hidden, context)
        error = self.expected_error(exit, self.gauged(innovation, context))
        finite = innovation.flatten(1).isfinite().all(1)
        return torch.where(error.isnan(), 0.0, 1 - error.clamp(max=1.0)).where(finite, torch.nan)

    def expected_error(self, exit: int, features: Tensor) -> Tensor:
        """features of that exit (R, F) -> u (R,), root mean square error of its clean image; NaN where nothing is known."""
        if exit == 0:
            return self.memory.expected_error(features)
        gauge = self.gauges[exit - 1]
        return torch.exp(features[:, 0] + gauge(features.nan_to_num(0.0).to(gauge[0].weight.dtype))[:, 0])

    def patches_of(self, image: Tensor) -> Tensor:
        """(R, C, H, W) -> (R, P, V), the inverse of `unpatchify`."""
        size = self.config.patch_size
        grid = image.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (R, C, h, p, w, p)
        return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (R, P, p*p*C)
