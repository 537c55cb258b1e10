"""Fitting exits to a frozen causal language model: the states of a text at the exits' depths, and what the exits learn on them.

Here: reading states off the model, the loss, what the exits say on held-out states. Not here: texts, the loop (training).
B samples, N tokens, M states (one for each answer token that is to be said), K exits, D width, V vocabulary, C tokens looked at.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ee_diffusion.core.io import read_tensors, write_tensors
from ee_diffusion.decoding.heads import LearnedExits

TEACHERS = ("model", "labels")
LIKELY = 8  # tokens of each state that a loss over some tokens never leaves out
_FORMAT = "ee_diffusion.states.lm.2"
_PARTS = ("hidden", "final", "labels", "likely")


@dataclass(frozen=True)
class TokenStates:
    """What a frozen model makes of texts: `hidden` (M, K, D) at the exits' depths, `final` (M, D) before the LM head, `labels` (M,) the
    token that the text says next, `likely` (M, LIKELY) the model's own best tokens, best first. `name` says which model, texts, depths.
    """

    hidden: Tensor
    final: Tensor
    labels: Tensor
    likely: Tensor
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, samples: Tensor) -> dict[str, Tensor]:
        return {part: getattr(self, part)[samples] for part in _PARTS}

    def split(self, held_out: int) -> tuple[TokenStates, TokenStates]:
        """All but the last `held_out` states, and those. Raises ValueError if nothing is left of one of them."""
        if not 1 <= held_out < len(self):
            raise ValueError(f"held_out={held_out} of {len(self)} states, expected at least 1 and fewer than all")
        cut = len(self) - held_out
        parts = ((slice(0, cut), f"{self.name} first {cut}"), (slice(cut, None), f"{self.name} last {held_out}"))
        first, last = (TokenStates(*(getattr(self, part)[one] for part in _PARTS), name) for one, name in parts)
        return first, last

    def save(self, path: str | os.PathLike) -> None:
        """Write to one safetensors file, whole or not at all."""
        tensors = {part: getattr(self, part) for part in _PARTS}
        write_tensors(path, tensors, {"format": _FORMAT, "name": json.dumps(self.name)})

    @classmethod
    def load(cls, path: str | os.PathLike, *, name: str) -> TokenStates:
        """Read what `save` wrote. Raises ValueError for another file, or states of another name."""
        tensors, metadata = read_tensors(path, "store of states", names=_PARTS, format=_FORMAT)
        came = json.loads(metadata["name"])
        if came == name:
            return cls(**tensors, name=name)
        raise ValueError(f"{path} holds the states {came!r}, expected {name!r}: remove it to collect them anew")


@torch.no_grad()
def collect_states(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], depths: tuple[int, ...], *, name: str
) -> TokenStates:
    """Run the model on batches of `input_ids`, `attention_mask` (B, N, padded on the right) and `prompt_length` (B,).

    A state for each token of the answers: that of the position before it, which is to say it (the prompt's last token says the first).
    """
    hidden, final, labels, likely = [], [], [], []
    head = model.get_output_embeddings()
    for batch in batches:
        ids, mask = (batch[part].to(model.device) for part in ("input_ids", "attention_mask"))  # (B, N)
        out = model.base_model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        says = answer_places(mask, batch["prompt_length"].to(model.device))  # (B, N - 1)
        states = torch.stack([out.hidden_states[depth][:, :-1][says] for depth in depths], dim=1)  # (m, K, D)
        hidden.append(states.cpu())
        last = out.last_hidden_state[:, :-1][says]  # (m, D)
        final.append(last.cpu())
        labels.append(ids[:, 1:][says].cpu())
        likely.append(head(last).topk(min(LIKELY, head.out_features)).indices.cpu())
    return TokenStates(*(torch.cat(part) for part in (hidden, final, labels, likely)), name)


def answer_places(mask: Tensor, prompt_length: Tensor) -> Tensor:
    """(B, N - 1) bool: the positions whose next token is of the answer; mask (B, N) padded on the right, prompt_length (B,)."""
    places = torch.arange(mask.shape[1] - 1, device=mask.device)  # (N - 1,)
    return (places >= prompt_length[:, None] - 1) & mask[:, 1:].bool()


class ExitObjective(nn.Module):
    """The loss of `exits` on states of their frozen model.

    teacher "model": `KL(p_L || p_k)` of the model's own next-token distribution p_L and the exit's p_k; "labels": `-log p_k(next token)`.
    Certainties learn, by binary cross-entropy, whether the exit's best token is the full model's. The sum over exits of both, mean over
    states. The model gets no gradient; exits without adapters learn certainties alone.

    `sampled_tokens`: look at some tokens instead of all of V, which is most of the cost: those that are likely or next for any state of the
    batch, and so many others, drawn evenly; the drawn ones stand for all others, so that each counts (V - likely) / drawn times in a
    softmax's sum (sampled softmax: Bengio and Senecal, 2008; here with the same tokens for teacher and exit). "Best token" then
    means the best of those: certainties come out a little too sure, a last run over all tokens sets them right.

    Raises:
        ValueError: an unknown teacher; fewer than one sampled token; exits that are bound to no model or to another one.
    """

    def __init__(self, model: PreTrainedModel, exits: LearnedExits, *, teacher: str, sampled_tokens: int | None = None):
        super().__init__()
        if teacher not in TEACHERS:
            raise ValueError(f"teacher={teacher!r}, expected one of {TEACHERS}")
        if sampled_tokens is not None and sampled_tokens < 1:
            raise ValueError(f"sampled_tokens={sampled_tokens}, expected at least 1, or None: all tokens")
        exits.check_fits(model)
        self.exits, self.teacher, self.sampled_tokens = exits, teacher, sampled_tokens
        self._model = [model.requires_grad_(False)]  # in a list: not trained, not in checkpoints

    @property
    def head(self) -> nn.Linear:
        """The model's LM head, (D) -> (V)."""
        return self._model[0].get_output_embeddings()

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """batch: `hidden` (B, K, D), `final` (B, D), `labels` (B,), `likely` (B, LIKELY), and `key` (B,) where tokens are sampled.

        Scalars: `loss`, and `answer_d`, `sure_d`, `same_d` for each depth d: the answer's loss, the certainty's, and the share of best
        tokens that are the full model's."""
        if self.sampled_tokens is None:
            classes, shift, labels = None, None, batch["labels"]
        else:
            classes, shift = tokens_to_look_at(batch, self.head.out_features, self.sampled_tokens)  # (C,), (C,)
            labels = torch.searchsorted(classes, batch["labels"])
        with torch.no_grad():
            full = self._log_softmax(self._full(batch["final"], classes), shift)  # (B, C)
        best = batch["likely"][:, 0].contiguous()  # (B,)
        best = best if classes is None else torch.searchsorted(classes, best)
        terms: dict[str, Tensor] = {}
        for exit, depth in enumerate(self.exits.depths):
            hidden = batch["hidden"][:, exit, None]  # (B, 1, D)
            logits = self._said(exit, hidden, classes)  # (B, C)
            same = (logits.argmax(-1) == best).to(logits.dtype)  # (B,)
            said = self._log_softmax(logits, shift)
            if self.teacher == "model":
                terms[f"answer_{depth}"] = nn.functional.kl_div(said, full, reduction="batchmean", log_target=True)
            else:
                terms[f"answer_{depth}"] = nn.functional.nll_loss(said, labels)
            sure = self.exits.certainty_logits(exit, hidden)
            terms[f"sure_{depth}"] = nn.functional.binary_cross_entropy_with_logits(sure, same)
            terms[f"same_{depth}"] = same.mean()
        losses = [value for name, value in terms.items() if not name.startswith("same")]
        return {"loss": torch.stack(losses).sum(), **terms}

    def _full(self, final: Tensor, classes: Tensor | None) -> Tensor:
        if classes is None:
            return self.head(final)
        bias = None if self.head.bias is None else self.head.bias[classes]
        return nn.functional.linear(final, self.head.weight[classes], bias)

    def _said(self, exit: int, hidden: Tensor, classes: Tensor | None) -> Tensor:
        if classes is None:
            return self.exits.answer(exit, hidden, {})
        return self.exits.answer_among(exit, hidden, classes)

    def _log_softmax(self, logits: Tensor, shift: Tensor | None) -> Tensor:
        return (logits if shift is None else logits + shift).log_softmax(-1)


def tokens_to_look_at(batch: Mapping[str, Tensor], vocabulary: int, count: int) -> tuple[Tensor, Tensor]:
    """Tokens that stand for all: the `likely` (B, LIKELY), the next (`labels`, (B,)), and `count` others, drawn by the batch's `key`s.

    Returns them in order, (C,), and log how many tokens each of them stands for, (C,): 0, or log(others / drawn).
    """
    known = torch.cat([batch["likely"].flatten(), batch["labels"]]).unique()
    generator = torch.Generator().manual_seed(int(batch["key"].sum()) & ((1 << 63) - 1))
    order = torch.randperm(vocabulary, generator=generator).to(known.device)
    drawn = order[~torch.isin(order, known)][:count]
    classes, places = torch.cat([known, drawn]).sort()
    others = math.log((vocabulary - len(known)) / len(drawn)) if len(drawn) else 0.0
    shift = torch.tensor([0.0, others], device=known.device)[(places >= len(known)).long()]
    return classes, shift


@torch.no_grad()
def exit_table(objective: ExitObjective, states: TokenStates, *, batch_size: int) -> list[dict[str, float]]:
    """What the exits say on states, all tokens looked at: for each depth the answer's loss, the share of the full model's best tokens
    that it says, that share where its largest probability is above 0.9, and how often that is."""
    rows = [
        {"depth": float(depth), "loss": 0.0, "same": 0.0, "sure": 0.0, "same_if_sure": 0.0}
        for depth in objective.exits.depths
    ]
    device = next(objective.parameters()).device
    objective = ExitObjective(objective._model[0], objective.exits, teacher=objective.teacher)
    for places in torch.arange(len(states)).split(batch_size):
        batch = {name: value.to(device) for name, value in states[places].items()}
        terms = objective(batch)
        full = batch["likely"][:, 0]  # (B,)
        for exit, row in enumerate(rows):
            said = objective.exits.answer(exit, batch["hidden"][:, exit, None], {}).softmax(-1).max(-1)
            same, sure = said.indices == full, said.values > 0.9  # (B,)
            row["loss"] += float(terms[f"answer_{objective.exits.depths[exit]}"]) * len(places)
            row["same"] += float(same.sum())
            row["sure"] += float(sure.sum())
            row["same_if_sure"] += float((same & sure).sum())
    for row in rows:
        row["same_if_sure"] /= max(row["sure"], 1)
        row |= {name: row[name] / len(states) for name in ("loss", "same", "sure")}
    return rows
