"""Fitting exits without data: the frozen model is its own teacher. Heads learn its prediction, uncertainty modules the gap to it.

Here: one forward from states to scalars, how far the exits are from the teacher. Not here: states (collect.py), loop (training/).
B samples of G rows, R = B * G rows, K exits, N tokens, D width, C, H, W prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from diffusers.utils import set_adapter_layers
from torch import Tensor, nn

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.exits import Space
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.diffusion.distillation import deediff_losses as losses
from ee_diffusion.diffusion.distillation.dataset import ROW_INPUTS, States
from ee_diffusion.diffusion.distillation.deediff_objective import deediff_terms
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.protocols import DenoiserHeads


class _Listener:
    """Heads that answer nobody: they keep the hidden states that heads at these depths would see."""

    space: Space = "hidden"

    def __init__(self, depths: tuple[int, ...]):
        self.depths = depths
        self.heard: list[Tensor] = []  # K of (R, N, D)

    def context(self, timestep: Tensor) -> dict[str, Tensor]:
        return {"timestep": timestep}

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        raise AssertionError("nobody leaves where every exit is only recorded")

    def confidence(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        self.heard.append(hidden)
        return torch.zeros(len(hidden), device=hidden.device)

    def check_fits(self, model: nn.Module) -> None:
        """Anything can be listened to."""


class _Prompter(_Listener):
    """Heads at depth 0 that answer with hidden states from elsewhere: no block runs, the model's own tail does the rest."""

    def __init__(self, hidden: Tensor):
        super().__init__((0,))
        self.hidden = hidden

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        return self.hidden


def observe(
    transformer: nn.Module, depths: tuple[int, ...], inputs: Mapping[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One full forward: inputs (R, ...) -> the model's prediction (R, C, H, W), bit for bit, and what heads at K depths see (R, N, D).

    Raises:
        ValueError: depths or a class that `attach_exits` does not know, exits attached already.
    """
    listener = _Listener(tuple(depths))
    prediction = _under(transformer, listener, Policy(Threshold(1.0), record_all=True), inputs)
    return prediction, listener.heard


def through_tail(transformer: nn.Module, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the model's own tail makes of hidden states (R, N, D) before it -> (R, C, H, W). No block runs; gradients pass.

    Raises:
        ValueError: as `observe`.
    """
    return _under(transformer, _Prompter(hidden), Policy(schedule=FixedDepth(0)), inputs)


def _under(transformer: nn.Module, heads: DenoiserHeads, policy: Policy, inputs: Mapping[str, Tensor]) -> Tensor:
    rows = torch.arange(len(inputs["hidden_states"]))
    with attach_exits(transformer, heads) as attachment:
        session = attachment.start(policy, rows=rows, num_steps=1)
        with attachment.use(session.step(0, 0.0)):
            return transformer(**inputs).sample


class DistillationObjective(nn.Module):
    """`L = lambda L_u + beta L_UAL` of DeeDiff (eq. 6 and 7, arXiv 2309.17074) with the full model's prediction in the place of the noise.

    So `u_i` estimates the gap `tanh |g_i - full|`. The backbone is frozen; with `adapted` its low-rank adapters (lora.py) train too, the
    teacher is the model without them, and `L_full = mean (full with adapters - full)^2` is added, so that full depth stays what it was.
    An uncertainty module of the last layer (`DenoisingExits(last_layer=True)`) stays as it is: that layer is the teacher here.

    Raises:
        ValueError: exits of another model, weights that are negative or all zero.
    """

    def __init__(
        self,
        transformer: nn.Module,
        exits: AdapterExits | DenoisingExits,
        *,
        uncertainty_weight: float,
        layerwise_weight: float,
        adapted: bool = False,
    ):
        super().__init__()
        weights = (uncertainty_weight, layerwise_weight)
        if not all(isinstance(one, int | float) and 0 <= one < math.inf for one in weights) or not any(weights):
            raise ValueError(f"weights {weights}, expected finite numbers of at least 0, one of them above")
        if not isinstance(exits, nn.Module):
            raise ValueError(f"exits={exits!r}, expected a module such as AdapterExits or DenoisingExits")
        exits.check_fits(transformer)
        self.transformer, self.exits, self.adapted = transformer, exits, adapted
        self.uncertainty_weight, self.layerwise_weight = weights
        if not adapted:
            transformer.requires_grad_(False)
        exits.requires_grad_(True)
        if exits.config.get("last_layer"):
            exits.uncertainty_modules[-1].requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> DistillationObjective:
        """The exits follow; the backbone stays in eval mode, for a teacher drops nothing."""
        super().train(mode)
        self.transformer.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: the transformer's inputs (B, G, ...), as States gives them. Returns scalars: `loss` and its terms."""
        inputs = rows_of(batch)
        teacher, prediction, hidden = self.both(inputs)
        answers, maps = self.exits_on(hidden, inputs)
        if maps.shape == answers.shape:
            uncertainty, layerwise = deediff_terms(self.exits, answers, maps, target=teacher)
        else:  # one value a token, not one a pixel
            uncertainty, layerwise = row_terms(answers, maps, target=teacher)
        terms = {"uncertainty": uncertainty, "layerwise": layerwise}
        loss = self.uncertainty_weight * uncertainty + self.layerwise_weight * layerwise
        if self.adapted:
            terms["full"] = (prediction.float() - teacher).square().mean()
            loss = loss + terms["full"]
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def both(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """inputs (R, ...) -> the teacher's prediction (R, C, H, W) in float32, that of the model as it is, and what the exits see of it."""
        with torch.set_grad_enabled(self.adapted and torch.is_grad_enabled()):
            prediction, hidden = observe(self.transformer, self.exits.depths, inputs)
        if not self.adapted:
            return prediction.float(), prediction, hidden
        set_adapter_layers(self.transformer, enabled=False)
        try:
            with torch.no_grad():
                return self.transformer(**inputs).sample.float(), prediction, hidden
        finally:
            set_adapter_layers(self.transformer, enabled=True)

    def exits_on(self, hidden: list[Tensor], inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """K hidden states (R, N, D) -> answers (K, R, C, H, W) and uncertainty (released variant: certainty) maps, of the same shape or
        with one value a token (K, R, N)."""
        exits, context = self.exits, {"timestep": inputs["timestep"]}
        answers = [exits.answer(exit, one, context) for exit, one in enumerate(hidden)]
        if exits.space == "hidden":
            answers = [through_tail(self.transformer, answer, inputs) for answer in answers]
        maps = [exits.uncertainty_map(exit, one, inputs["timestep"]) for exit, one in enumerate(hidden)]
        return torch.stack(answers), torch.stack(maps)


def row_terms(predictions: Tensor, maps: Tensor, *, target: Tensor) -> tuple[Tensor, Tensor]:
    """L_u and L_UAL row by row, for maps of any shape: predictions (K, R, C, H, W), maps (K, R, ...), target (R, C, H, W).

    Deviation from DeeDiff: `u_i` and its target are means over a row, not pixel by pixel.
    """
    predictions, said = predictions.float(), _per_row(maps.float())  # (K, R)
    gap, error = (
        _per_row(v) for v in (losses.uncertainty_target(predictions, target), (predictions - target).square())
    )
    return (said - gap).square().mean(1).sum(), ((1 - said.detach()) * error).mean(1).sum()


def rows_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's inputs in a batch, (B, G, ...) -> (R, ...).

    Raises:
        ValueError: no hidden_states or no timestep, one without rows, or inputs of different samples or rows.
    """
    inputs = {name: batch[name] for name in ROW_INPUTS if name in batch}
    if not {"hidden_states", "timestep"} <= inputs.keys() or inputs["timestep"].ndim != 2:
        came = {name: tuple(value.shape) for name, value in inputs.items()}
        raise ValueError(f"a batch of {came}, expected at least hidden_states and timestep, each (B, G, ...)")
    uneven = {name: tuple(value.shape) for name, value in inputs.items() if value.shape[:2] != inputs["timestep"].shape}
    if uneven:
        raise ValueError(
            f"{uneven} beside timesteps {tuple(inputs['timestep'].shape)}, expected the same (B, G) in all"
        )
    return {name: value.flatten(0, 1) for name, value in inputs.items()}


@dataclass(frozen=True, eq=False)
class ExitErrors:
    """How far K exits are from the full model on given states; every field (K,), means over rows and pixels.

    error: squared, of the exit's answer. tail_error: of the model's own tail at that depth, which needs no fit. gap: `tanh |answer -
    full|`; said: what the uncertainty module says it is. said_error: |said - gap| per row. rank_correlation: Spearman's, of said and gap
    over the images of one call, mean over calls and branches: 0 for a module that knows only depth and time; NaN below 3 images.
    """

    error: Tensor
    tail_error: Tensor
    gap: Tensor
    said: Tensor
    said_error: Tensor
    rank_correlation: Tensor

    def to_dict(self) -> dict[str, list[float | None]]:
        """Plain numbers; None for NaN."""
        values = {field.name: getattr(self, field.name).tolist() for field in fields(self)}
        return {name: [None if one != one else one for one in row] for name, row in values.items()}


@torch.no_grad()
def exit_errors(objective: DistillationObjective, states: States, *, batch_size: int) -> tuple[ExitErrors, float]:
    """The exits against the teacher on all samples of `states`, and the teacher's own mean square (error 1 relative to it: no answer).

    Raises:
        ValueError: a batch size below 1, or no States.
    """
    if not isinstance(states, States) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"states={type(states).__name__}, batch_size={batch_size!r}, expected States and at least 1")
    device = next(objective.exits.parameters()).device
    rows: list[dict[str, Tensor]] = []
    for samples in torch.arange(len(states)).split(batch_size):
        batch = {name: value.to(device) for name, value in states[samples].items()}
        rows.append(_row_errors(objective, rows_of(batch)))
    found = {name: torch.cat([one[name] for one in rows], dim=-1).double().cpu() for name in rows[0]}  # (K, T * J * G)
    means = {name: found[name].mean(1) for name in ("error", "tail_error", "gap", "said")}
    said, gap = (found[name].unflatten(1, states.shape) for name in ("said", "gap"))  # (K, T, J, G)
    errors = ExitErrors(
        **means,
        said_error=(found["said"] - found["gap"]).abs().mean(1),
        rank_correlation=_spearman(said.movedim(1, -1), gap.movedim(1, -1)).mean((1, 2)),
    )
    return errors, found["power"].mean().item()


def _row_errors(objective: DistillationObjective, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per row (K, R): errors, gaps and what was said; `power` (R,) of the teacher."""
    teacher, _, hidden = objective.both(inputs)
    answers, maps = objective.exits_on(hidden, inputs)
    tails = torch.stack([through_tail(objective.transformer, one, inputs) for one in hidden])
    released = objective.exits.config.get("variant") == "released"
    gaps = losses.uncertainty_target(answers.float(), teacher)
    return {
        "error": _per_row((answers.float() - teacher).square()),
        "tail_error": _per_row((tails.float() - teacher).square()),
        "gap": _per_row(gaps),
        "said": _per_row(1 - maps.float() if released else maps.float()),
        "power": teacher.square().flatten(1).mean(1),
    }


def _per_row(values: Tensor) -> Tensor:
    return values.flatten(2).mean(2)  # (K, R, C, H, W) -> (K, R)


def _spearman(one: Tensor, other: Tensor) -> Tensor:
    """Rank correlation over the last dimension (..., T) -> (...); NaN for T < 3. Ties are broken by position."""
    if one.shape[-1] < 3:
        return torch.full(one.shape[:-1], torch.nan, dtype=one.dtype)
    ranks = [values.argsort(-1).argsort(-1).double() for values in (one, other)]
    first, second = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    return (first * second).sum(-1) / (first.square().sum(-1) * second.square().sum(-1)).sqrt()
