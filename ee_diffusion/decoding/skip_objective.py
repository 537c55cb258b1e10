"""Fine-tuning a causal language model under a schedule: every token of the answer runs the layers that it would run in generation.

Here: the forward with the pattern, the loss. Not here: texts, the loop (training), adapters (lora.py).
B samples, N tokens, D width, L layers, S steps (places of the answer).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ee_diffusion.core.patch import ForwardPatch
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import Schedule
from ee_diffusion.decoding.exit_objective import answer_places
from ee_diffusion.decoding.model_specs import layers_of, model_spec_of


class SkippingForward:
    """A whole text at once, each position through its own layers. A context manager on a model; leaving it restores the model exactly.

    `runs` (B, N, L) bool. What a layer makes of a position that it does not run on is thrown away, so the position passes it by; its keys
    and values there come from the passing state, as in generation. Positions behind the last one that runs are not computed at all.
    """

    def __init__(self, model: PreTrainedModel, runs: Tensor):
        self.layers, self.family, self.runs = layers_of(model), model_spec_of(model), runs
        self._names = list(inspect.signature(type(self.layers[0]).forward).parameters)[1:]
        self._interceptions: list[ForwardPatch] = []

    def __enter__(self) -> SkippingForward:
        self._interceptions = [
            ForwardPatch(module, functools.partial(self._layer, layer)) for layer, module in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *exception) -> None:
        while self._interceptions:
            self._interceptions.pop().restore()

    def _layer(self, layer: int, original, *args, **kwargs) -> Tensor:
        named = dict(zip(self._names, args, strict=False)) | kwargs
        hidden = named.pop(self._names[0])  # (B, N, D)
        runs = self.runs[:, :, layer]  # (B, N)
        places = runs.any(0).nonzero()
        if not len(places):
            return hidden
        last = int(places[-1]) + 1  # the only host sync of a layer
        if last < hidden.shape[1]:
            of_rows = {name: _first(named[name], last) for name in self.family.row_arguments if name in named}
            named |= of_rows
        made = torch.where(runs[:, :last, None], original(hidden[:, :last], **named), hidden[:, :last])
        return torch.cat([made, hidden[:, last:]], dim=1)  # (B, N, D)


def _first(value, count: int):
    """The first positions of a layer's argument: a mask (B, 1, N, N), ids (B, N), rotary parts (B, N, d), or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(_first(one, count) for one in value)
    if not isinstance(value, Tensor):
        return value
    return value[..., :count, :count] if value.ndim == 4 else value[:, :count]


class SkipObjective(nn.Module):
    """The loss of a model on prompts with answers under the schedule of `policy`, as SkipDecode trains (arXiv 2307.02628, sec. 3.3).

    Prompts run at full depth; the t-th token of the answer (t = 0: the first one that is read) runs the layers of step t. The loss is the
    mean negative log-likelihood of the answers' tokens over a batch, or over all parts of a step (`units`). `num_steps`: the longest
    answer. Only weights that require a gradient train and are in checkpoints.

    With a `teacher`, a frozen model that runs every layer, the loss is `(1 - teacher_weight) NLL + teacher_weight KL(teacher || model)`
    over the same tokens (word-level distillation, Kim and Rush, arXiv 1606.07947, sec. 3.1, at temperature 1).

    Raises:
        ValueError: a policy with a criterion, or whose schedule does not fit the model or leaves out layer 0; a teacher of another
            vocabulary, a weight outside (0, 1].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        num_steps: int,
        teacher: PreTrainedModel | None = None,
        teacher_weight: float = 0.5,
    ):
        super().__init__()
        if policy.criterion is not None:
            raise ValueError(f"a policy with the criterion {policy.criterion}, expected a schedule alone")
        if not 0 < teacher_weight <= 1:
            raise ValueError(f"teacher_weight={teacher_weight}, expected within (0, 1]")
        if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"a teacher of {teacher.config.vocab_size} tokens for a model of {model.config.vocab_size}, expected as many"
            )
        num_layers = len(layers_of(model))
        policy.schedule.plans(num_steps=num_steps, num_layers=num_layers)
        table = schedule_table(policy.schedule, num_steps=num_steps, num_layers=num_layers)
        if not bool(table[:, 0].all()):
            raise ValueError("the schedule leaves out layer 0, which generation needs at every token; keep it in")
        self.register_buffer("table", table, persistent=False)  # (S, L)
        self.off = policy.is_off
        self._model = [model]  # in a list: frozen weights stay out of checkpoints
        self._teacher = [] if teacher is None else [teacher.eval().requires_grad_(False)]
        self.teacher_weight = teacher_weight
        self.trained = nn.ParameterList(weight for weight in model.parameters() if weight.requires_grad)

    @property
    def model(self) -> PreTrainedModel:
        return self._model[0]

    def train(self, mode: bool = True) -> SkipObjective:
        self._model[0].train(mode)
        return super().train(mode)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """batch: `input_ids`, `attention_mask` (B, N, padded on the right), `prompt_length` (B,). Scalars: `loss`, `accuracy` (the share of
        the answers' tokens that are the best ones), `depth` (mean layers of an answer's token that is read); with a teacher `teacher_gap`,
        the divergence from it. `units`, if it is there: what sums are divided by in the place of the batch's own."""
        ids, mask, lengths = batch["input_ids"], batch["attention_mask"], batch["prompt_length"]
        runs = self.pattern(mask, lengths)  # (B, N, L)
        says = answer_places(mask, lengths)  # (B, N - 1)
        logits = _exact(
            self.head(self.states(ids, runs)[:, :-1][says])
        )  # (m, V): the LM head is a good part of the cost
        labels = ids[:, 1:][says]  # (m,)
        said, read = batch.get("units", self.units(batch)).to(logits.dtype)
        ran = runs[:, :-1][read_places(mask, lengths)].sum()
        terms = {
            "loss": nn.functional.cross_entropy(logits, labels, reduction="sum") / said,
            "accuracy": (logits.argmax(-1) == labels).sum() / said,
            "depth": torch.where(read > 0, ran / read, self.table[0].sum()),
        }
        if self._teacher:
            gap, weight = self.teacher_gap(logits, ids, says) / said, self.teacher_weight
            terms |= {"loss": (1 - weight) * terms["loss"] + weight * gap, "teacher_gap": gap}
        return terms

    @staticmethod
    def units(batch: Mapping[str, Tensor]) -> Tensor:
        """(2,) the answers' tokens of a batch: those that are said, those that are read."""
        mask, lengths = batch["attention_mask"], batch["prompt_length"]
        return torch.stack([answer_places(mask, lengths).sum(), read_places(mask, lengths).sum()])

    def teacher_gap(self, logits: Tensor, ids: Tensor, says: Tensor) -> Tensor:
        """KL(teacher || model) of the next token, summed over the places `says` (B, N - 1) whose logits are (m, V)."""
        teacher = self._teacher[0]
        with torch.no_grad():
            hidden = teacher.base_model(ids, use_cache=False).last_hidden_state[:, :-1][says]  # (m, D)
            known = _exact(teacher.get_output_embeddings()(hidden)).log_softmax(-1)  # (m, V)
        own = logits.log_softmax(-1)
        return nn.functional.kl_div(own, known, log_target=True, reduction="sum")

    def pattern(self, mask: Tensor, prompt_length: Tensor) -> Tensor:
        """(B, N, L) bool: which layers each position runs; padding runs none."""
        steps = torch.arange(mask.shape[1], device=mask.device) - prompt_length[:, None]  # (B, N)
        runs = self.table[steps.clamp(0, len(self.table) - 1)]  # (B, N, L)
        return (runs | (steps < 0)[:, :, None]) & mask.bool()[:, :, None]

    @property
    def head(self) -> nn.Module:
        """The model's LM head, (D) -> (V)."""
        return self.model.get_output_embeddings()

    def states(self, ids: Tensor, runs: Tensor) -> Tensor:
        """ids (B, N) padded on the right, runs (B, N, L) -> (B, N, D), what the LM head reads. No mask is needed: nothing looks to the
        right."""
        with contextlib.nullcontext() if self.off else SkippingForward(self.model, runs):
            return self.model.base_model(ids, use_cache=False).last_hidden_state


def read_places(mask: Tensor, prompt_length: Tensor) -> Tensor:
    """(B, N - 1) bool: the positions of the answer whose next token is of it, too: those that generation reads; as `answer_places`."""
    return answer_places(mask, prompt_length + 1)


def _exact(logits: Tensor) -> Tensor:
    """Logits in float32 or better, so that sums over many tokens are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def schedule_table(schedule: Schedule, *, num_steps: int, num_layers: int) -> Tensor:
    """(S, L) bool: the layers of each step."""
    rows = [schedule.layers(step, float(step), num_steps=num_steps, num_layers=num_layers) for step in range(num_steps)]
    return torch.tensor(rows)
