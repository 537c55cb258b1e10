"""What training minimises: the denoising loss of a U-ViT and, with exits, DeeDiff's joint loss.

Here: one forward from a batch to scalars. Not here: data, draws, optimiser, loop (training/). B samples, K exits, C, H, W image.
"""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel, SchedulerMixin
from diffusers.models.embeddings import LabelEmbedding
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from ee_diffusion.diffusion.distillation import deediff_losses as losses
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel

MODES = ("backbone", "joint", "frozen")


def null_class_of(transformer: nn.Module) -> int | None:
    """The class that stands for "no class"; None: the transformer knows none."""
    config = transformer.config
    return config.num_embeds_ada_norm if isinstance(transformer, DiTTransformer2DModel) else config.get("null_class")


def num_classes_of(transformer: nn.Module) -> int | None:
    """How many classes there are to draw, the first ones: those before the null class, or all where there is none, or it is the first;
    None: the transformer is unconditional."""
    return null_class_of(transformer) or transformer.config.get("num_classes")


def forbid_label_drop(transformer: nn.Module) -> nn.Module:
    """A DiT in train mode drops labels by the global generator; here a draw belongs to its sample, so the objective alone drops them."""
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return transformer


def deediff_terms(
    exits: DenoisingExits, predictions: Tensor, maps: Tensor, *, target: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """L_u and the layer-wise loss of the exits' variant: predictions and maps (K, B, C, H, W), target (B, C, H, W), weights (B,)."""
    predictions, maps = predictions.float(), maps.float()
    if exits.config.get("variant") == "released":
        return (
            losses.released_uncertainty_loss(maps, predictions, target),
            losses.released_layerwise_loss(maps, predictions, target),
        )
    return (
        losses.uncertainty_loss(maps, predictions, target),
        losses.layerwise_loss(maps, predictions, target, weights=weights),
    )


class DiffusionObjective(nn.Module):
    """`L_all = L_simple + lambda L_u + beta L_UAL` (DeeDiff eq. 8, lambda = beta = 1) on one batch.

    mode `backbone`: L_simple alone, no exits. `joint`: everything trains. `frozen`: the backbone is fixed, exits alone train.

    Exits of variant "released" train by the authors' losses (`core.losses.released_*`), with the last block among the exits where they were
    made with `last_layer`. Deviation from their code: timesteps are
    the scheduler's 0..T-1, where theirs are continuous in pixel space (t * 999 of a variance-preserving SDE) and 1..1000 in latent space.

    Args:
        scheduler: a training scheduler with `add_noise` (DDPM); its `prediction_type` names the target.
        class_drop: probability that a label is replaced by the null class.
        snr_gamma: weigh L_simple, and L_UAL of the paper variant, by min(SNR, gamma) / SNR (Min-SNR, arXiv 2303.09556; for
            v_prediction / (SNR + 1)); None: unweighted, as DeeDiff.

    A `DiTTransformer2DModel` trains in mode `backbone` only; it must not drop labels itself (`forbid_label_drop`).

    Raises:
        ValueError: an unknown mode, exits missing or surplus for it, class_drop without a null class.
    """

    def __init__(
        self,
        transformer: UViTTransformer2DModel | DiTTransformer2DModel,
        exits: DenoisingExits | None,
        scheduler: SchedulerMixin,
        *,
        mode: str,
        uncertainty_weight: float = 1.0,
        layerwise_weight: float = 1.0,
        class_drop: float = 0.1,
        snr_gamma: float | None = None,
    ):
        super().__init__()
        if mode not in MODES or (exits is None) != (mode == "backbone"):
            raise ValueError(
                f"mode={mode!r} with exits={type(exits).__name__}, expected one of {MODES}; all but the first need exits"
            )
        is_dit = isinstance(transformer, DiTTransformer2DModel)
        if is_dit and mode != "backbone":
            raise ValueError(f"mode={mode!r} with a DiT, expected 'backbone': its exits are fitted by distillation")
        self.has_classes = is_dit or transformer.config.num_classes is not None
        self.null_class = null_class_of(transformer)
        if class_drop and self.has_classes and self.null_class is None:
            raise ValueError(f"class_drop={class_drop} needs a null_class in the transformer's config")
        self.transformer, self.exits, self.scheduler, self.mode = transformer, exits, scheduler, mode
        self._options = {} if exits is None else {"output_hidden_states": True}
        self.uncertainty_weight, self.layerwise_weight, self.class_drop = (
            uncertainty_weight,
            layerwise_weight,
            class_drop,
        )
        self.snr_gamma = snr_gamma
        transformer.requires_grad_(mode != "frozen")

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: `images` (B, C, H, W) in [-1, 1], `noise` alike, `uniform` (B,) in [0, 1); with classes `class_labels` (B,) and
        `label_drop` (B,) in [0, 1); with text `encoder_hidden_states`. Returns scalars: `loss` and its terms."""
        images, noise = batch["images"], batch["noise"]
        timestep = (batch["uniform"] * self.scheduler.config.num_train_timesteps).long()  # (B,)
        noisy = self.scheduler.add_noise(images, noise, timestep)
        with torch.set_grad_enabled(self.mode != "frozen" and torch.is_grad_enabled()):
            output = self.transformer(
                noisy,
                timestep,
                self._labels(batch),
                batch.get("encoder_hidden_states"),
                **self._options,
            )
        target = self._target(images, noise, timestep)
        weights = self._weights(timestep)  # (B,)
        simple = (weights * (output.sample.float() - target).square().flatten(1).mean(1)).mean()
        if self.exits is None:
            return {"loss": simple, "simple": simple.detach()}
        uncertainty, layerwise = self._exit_terms(output.hidden_states, timestep, target, weights)
        loss = self.uncertainty_weight * uncertainty + self.layerwise_weight * layerwise
        loss = loss if self.mode == "frozen" else simple + loss
        terms = {"simple": simple, "uncertainty": uncertainty, "layerwise": layerwise}
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def _exit_terms(
        self, hidden_states: tuple[Tensor, ...], timestep: Tensor, target: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        exits = self.exits
        states = [hidden_states[depth] for depth in exits.depths]
        if exits.config.get("last_layer"):
            states.append(hidden_states[-1])
        context = {"timestep": timestep}
        answers = [exits.answer(k, state, context) for k, state in enumerate(states)]
        answers = [self.transformer.tail(answer) for answer in answers] if exits.space == "hidden" else answers
        maps = torch.stack([exits.uncertainty_map(k, state, timestep) for k, state in enumerate(states)])
        return deediff_terms(exits, torch.stack(answers), maps, target=target, weights=weights)

    def _weights(self, timestep: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return torch.ones(len(timestep), device=timestep.device)
        snr = compute_snr(self.scheduler, timestep)  # (B,)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        return snr.clamp(max=self.snr_gamma) / (snr + 1 if velocity else snr)

    def _labels(self, batch: dict[str, Tensor]) -> Tensor | None:
        if not self.has_classes:
            return None
        dropped = batch["label_drop"] < self.class_drop
        return torch.where(dropped, self.null_class or 0, batch["class_labels"])  # (B,)

    def _target(self, images: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.scheduler.get_velocity(images, noise, timestep)
        raise ValueError(f"prediction_type={kind!r}, expected 'epsilon' or 'v_prediction'")
