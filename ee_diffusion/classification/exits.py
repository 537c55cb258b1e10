"""Exits of a classifier: answer heads and learned judges, saved together; and what they are in the eyes of the core, beside their model.

Here: modules and how they are asked. Not here: when to stop (core), training (objective.py).
R rows, N tokens, D width, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ee_diffusion.classification.model_specs import ModelSpec, model_spec_of
from ee_diffusion.core.exits import Space
from ee_diffusion.core.scores import ExitInputs

HEADS = ("shared", "pooled", "linear")
POOLINGS = ("first", "mean")
JUDGES = ("none", "halting", "linear_halting", "correctness", "statistics")


def answer_statistics(answer: Tensor) -> Tensor:
    """Four detached facts of the softmax p of logits (R, C) -> (R, 4): max p, H(p), margin of the two largest, H(p^2 / sum p^2).

    JEI-DNN (arXiv 2310.09163); entropies in nats.
    """
    logs = answer.detach().float().log_softmax(-1)
    sharper = (2 * logs).log_softmax(-1)  # p^2 / sum p^2
    top = logs.exp().topk(2, dim=-1).values  # (R, 2)
    entropy, sharper_entropy = (-(one.exp() * one).sum(-1) for one in (logs, sharper))
    return torch.stack([top[:, 0], entropy, top[:, 0] - top[:, 1], sharper_entropy], dim=-1)


class PooledHead(nn.Module):
    """Linear(D -> D), tanh, dropout, Linear(D -> C) on one vector of a text: the shape of BERT's own end."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float):
        super().__init__()
        self.pool = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(hidden_size, num_labels)

    def forward(self, vector: Tensor) -> Tensor:
        return self.classify(self.dropout(self.pool(vector).tanh()))  # (R, D) -> (R, C)


class LinearHead(nn.Module):
    """LayerNorm, Linear(D -> C) on one vector of a text (JEI-DNN's inference modules)."""

    def __init__(self, hidden_size: int, num_labels: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.classify = nn.Linear(hidden_size, num_labels)

    def forward(self, vector: Tensor) -> Tensor:
        return self.classify(self.norm(vector))  # (R, D) -> (R, C)


class ClassifierExits(nn.Module):
    """The exits of one classifier: for each depth an answer and, if asked for, one learned judge.

    Args:
        depths: executed layers at each exit, ascending, from 0 up to below the model's number of layers.
        head: `shared`: the model's own pooler and classifier answer at every exit (PALBERT); `pooled`: a `PooledHead` for each exit;
            `linear`: a `LinearHead` for each.
        judge: what says how safe an answer is: `none`; `halting`: PALBERT's Lambda layer, three times Linear and tanh of width 2D, then
            Linear, on `[z_i ; z_{i-1}]`, shared by all exits; `linear_halting`: PonderNet's single Linear on z_i, shared;
            `correctness`: BERxiT's Linear on the first token, shared; `statistics`: JEI-DNN's Linear(4 -> 1) on `answer_statistics`,
            one for each exit.
        pooling: what heads and judges look at: `first`, the first token, as all the papers do; `mean`, the mean of a text's tokens in
            the place of the first. Lower layers of an encoder whose first token was not trained to say anything (all that were trained
            on the mean) tell by the mean alone.

    Raises:
        ValueError: depths not ascending, an unknown head, judge or pooling, statistics of a regression.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        hidden_size: int,
        num_labels: int,
        *,
        head: str,
        judge: str,
        dropout: float = 0.1,
        pooling: str = "first",
    ):
        super().__init__()
        depths = tuple(depths)
        if not depths or list(depths) != sorted(set(depths)) or depths[0] < 0:
            raise ValueError(f"depths={depths}, expected ascending distinct numbers of layers, at least one")
        if head not in HEADS or judge not in JUDGES:
            raise ValueError(f"head={head!r} and judge={judge!r}, expected one of {HEADS} and one of {JUDGES}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}, expected one of {POOLINGS}")
        if judge == "statistics" and num_labels < 2:
            raise ValueError(f"judge='statistics' looks at class probabilities, but num_labels={num_labels}")
        self.depths, self.hidden_size, self.num_labels = depths, hidden_size, num_labels
        self.head, self.judge, self.dropout, self.pooling = head, judge, dropout, pooling
        own = depths if head != "shared" else ()
        self.heads = nn.ModuleList(
            PooledHead(hidden_size, num_labels, dropout) if head == "pooled" else LinearHead(hidden_size, num_labels)
            for _ in own
        )
        self.judges = nn.ModuleList(_judges(judge, hidden_size, len(depths), dropout))

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        depths: tuple[int, ...] | None = None,
        *,
        head: str,
        judge: str,
        dropout: float = 0.1,
        pooling: str = "first",
    ) -> ClassifierExits:
        """Untrained exits that fit a classifier of the family table, in its precision and on its device; depths None: after every layer but
        the last.

        Raises:
            ValueError: an unknown class, or depths that do not fit it.
        """
        family = model_spec_of(model)
        chosen = tuple(range(1, family.num_layers(model))) if depths is None else tuple(depths)
        sizes = (model.config.hidden_size, model.config.num_labels)
        exits = cls(chosen, *sizes, head=head, judge=judge, dropout=dropout, pooling=pooling)
        exits.check_fits(model)
        like = next(model.parameters())
        return exits.to(like.device, like.dtype)

    def check_fits(self, model: nn.Module) -> None:
        """Raises ValueError if these exits were made for another model's sizes."""
        family = model_spec_of(model)
        found = {"hidden_size": model.config.hidden_size, "num_labels": model.config.num_labels}
        for name, size in found.items():
            if getattr(self, name) != size:
                raise ValueError(f"exits of another model: {name} is {getattr(self, name)}, the model's is {size}")
        layers = family.num_layers(model)
        if self.depths[0] < family.first_exit or self.depths[-1] >= layers:
            raise ValueError(
                f"exits at depths {self.depths}, a {family.class_name} of {layers} layers takes {family.first_exit}..{layers - 1}"
            )

    def settings(self) -> dict:
        """The arguments that make these exits anew, as plain values."""
        names = ("hidden_size", "num_labels", "head", "judge", "dropout", "pooling")
        return {"depths": list(self.depths), **{name: getattr(self, name) for name in names}}


def _judges(kind: str, hidden_size: int, num_exits: int, dropout: float) -> list[nn.Module]:
    if kind == "halting":
        width = 2 * hidden_size
        layers = [module for _ in range(3) for module in (nn.Linear(width, width), nn.Tanh())]
        return [nn.Sequential(nn.Dropout(dropout), *layers, nn.Linear(width, 1))]
    if kind == "statistics":
        return [nn.Linear(4, 1) for _ in range(num_exits)]
    return [] if kind == "none" else [nn.Linear(hidden_size, 1)]


@dataclass(frozen=True, eq=False)
class ClassifierHeads:
    """Exits and the model they sit on, as the core asks them (`JudgingHeads`). An answer is the logits (R, C).

    `context` holds the `attention_mask` (R, N) of the hidden states, if they have one: after tokens were removed, of those that are left.
    """

    model: nn.Module
    exits: ClassifierExits
    space: Space = "output"

    @property
    def family(self) -> ModelSpec:
        return model_spec_of(self.model)

    @property
    def depths(self) -> tuple[int, ...]:
        return self.exits.depths

    def check_fits(self, model: nn.Module) -> None:
        """Raises ValueError if the exits are another model's."""
        self.exits.check_fits(model)

    def pool(self, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """z: what the model's own classifier would look at, hidden (R, N, D) -> (R, D); of `mean` exits, were the mean all there is."""
        if self.exits.pooling == "mean":
            return self.family.pool(self.model, self.vector(hidden, context)[:, None], None)
        return self.family.pool(self.model, hidden, context.get("attention_mask"))

    def vector(self, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """What the exits look at: hidden (R, N, D) -> (R, D), the first token or the mean of all that are no padding, summed in float32
        at least: in half precision long texts would overflow."""
        if self.exits.pooling == "first":
            return hidden[:, 0]
        mask = context.get("attention_mask")
        if mask is None:
            return hidden.mean(1)
        weights = mask.float()[:, :, None]  # (R, N, 1)
        return ((hidden * weights).sum(1) / weights.sum(1).clamp(min=1)).to(hidden.dtype)

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """hidden (R, N, D) -> logits (R, C)."""
        if self.exits.head == "shared":
            return self.family.classify(self.model, self.pool(hidden, context))
        return self.exits.heads[exit](self._own(self.vector(hidden, context)))

    def confidence(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """As `judge`, of a judge without a memory. Raises ValueError for `halting`, which has one: use the score 'learned_confidence'."""
        if self.exits.judge == "halting":
            raise ValueError(
                "the halting judge looks at the exit before: use the score 'learned_confidence', not 'confidence'"
            )
        return self.judge(ExitInputs(self, exit, hidden, context))

    def judge(self, observation: ExitInputs) -> Tensor:
        """(R,) in (0, 1): lambda, the gate, or the probability of being right."""
        return self.judge_logits(observation).sigmoid()

    def judge_logits(self, observation: ExitInputs) -> Tensor:
        """What `judge` takes the sigmoid of, (R,). z of the exit before goes from exit to exit in `observation.carried`.

        Raises:
            ValueError: exits without a judge.
        """
        judges, kind = self.exits.judges, self.exits.judge
        if kind == "none":
            raise ValueError("these exits have no learned judge (judge='none'), but the policy's score asks for one")
        if kind == "statistics":
            facts = answer_statistics(observation.answer)  # (R, 4)
            return judges[observation.exit](self._own(facts))[:, 0]
        if kind == "correctness":
            return judges[0](self._own(self.vector(observation.hidden, observation.context).detach()))[:, 0]
        pooled = self._own(self.pool(observation.hidden, observation.context))  # (R, D)
        if kind == "linear_halting":
            return judges[0](pooled)[:, 0]
        observation.carried["pooled"] = pooled
        before = observation.context.get("pooled", torch.zeros_like(pooled))
        return judges[0](torch.cat([pooled, before], dim=-1))[:, 0]  # (R, 2D) -> (R,)

    def _own(self, values: Tensor) -> Tensor:
        """In the exits' precision: what they are asked may come in the model's, or in float32."""
        return values.to(next(self.exits.parameters()).dtype)
