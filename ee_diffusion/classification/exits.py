"""Exits of a classifier: heads and learned judges, saved together; and the same beside their model, as the core calls them.

Here: the modules together. Not here: the kinds of heads and judges (method.py, methods/), when to stop (core), training (objective.py).
R rows, N tokens, D width, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ee_diffusion.classification.method import Judge
from ee_diffusion.classification.methods import head_named, judge_named
from ee_diffusion.classification.model_specs import ModelSpec, model_spec_of
from ee_diffusion.core.exits import ExitInputs, Space

POOLINGS = ("first", "mean")


class ClassifierExits(nn.Module):
    """The exits of one classifier: for each depth a head and, if wanted, a learned judge.

    Args:
        depths: executed layers at each exit, ascending, from 0 up to below the model's number of layers.
        head: `shared`: the model's own pooler and classifier answer at every exit (PALBERT); `pooled`: a `PooledHead` for each exit;
            `linear`: a `LinearHead` for each (JEI-DNN).
        judge: what says how safe an output is: `none`, `halting` (PALBERT), `linear_halting` (PonderNet), `correctness` (BERxiT) or
            `statistics` (JEI-DNN); a registered method may bring others. Each stands in the file of its paper, methods/.
        pooling: what heads and judges look at: `first`, the first token, as all the papers do; `mean`, the mean of a text's tokens in
            the place of the first. Lower layers of an encoder whose first token was not trained to say anything (all that were trained
            on the mean) tell by the mean alone.

    Raises:
        ValueError: depths not ascending, an unknown head, judge or pooling, a judge of class probabilities for a regression.
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
        head_kind, judge_kind = head_named(head), judge_named(judge)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}, expected one of {POOLINGS}")
        if judge_kind is not None and judge_kind.looks_at == "logits" and num_labels < 2:
            raise ValueError(f"judge={judge!r} looks at class probabilities, but num_labels={num_labels}")
        self.depths, self.hidden_size, self.num_labels = depths, hidden_size, num_labels
        self.head, self.judge, self.dropout, self.pooling = head, judge, dropout, pooling
        sizes, own = (hidden_size, num_labels, dropout), 0 if head_kind.build is None else len(depths)
        self.heads = nn.ModuleList(head_kind.build(*sizes) for _ in range(own))
        own = 0 if judge_kind is None else len(depths) if judge_kind.per_exit else 1
        self.judges = nn.ModuleList(judge_kind.build(hidden_size, dropout) for _ in range(own))

    @property
    def judge_kind(self) -> Judge | None:
        """What the learned judge is made of; None: there is none."""
        return judge_named(self.judge)

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
        """Untrained exits that fit a known classifier class, in its precision and on its device; depths None: after every layer but
        the last.

        Raises:
            ValueError: an unknown class, or depths that do not fit it.
        """
        spec = model_spec_of(model)
        chosen = tuple(range(1, spec.num_layers(model))) if depths is None else tuple(depths)
        sizes = (model.config.hidden_size, model.config.num_labels)
        exits = cls(chosen, *sizes, head=head, judge=judge, dropout=dropout, pooling=pooling)
        exits.check_fits(model)
        like = next(model.parameters())
        return exits.to(like.device, like.dtype)

    def check_fits(self, model: nn.Module) -> None:
        """Raises ValueError if these exits were made for another model's sizes."""
        spec = model_spec_of(model)
        found = {"hidden_size": model.config.hidden_size, "num_labels": model.config.num_labels}
        for name, size in found.items():
            if getattr(self, name) != size:
                raise ValueError(f"exits of another model: {name} is {getattr(self, name)}, the model's is {size}")
        layers = spec.num_layers(model)
        if self.depths[0] < spec.first_exit or self.depths[-1] >= layers:
            raise ValueError(
                f"exits at depths {self.depths}, a {spec.class_name} of {layers} layers takes {spec.first_exit}..{layers - 1}"
            )

    def settings(self) -> dict:
        """The arguments that make these exits anew, as plain values."""
        names = ("hidden_size", "num_labels", "head", "judge", "dropout", "pooling")
        return {"depths": list(self.depths), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True, eq=False)
class ClassifierHeads:
    """Exits and the model they sit on, as the core calls them (`JudgingHeads`). The output of an exit is its logits (R, C).

    `context` holds the `attention_mask` (R, N) of the hidden states, if they have one: after tokens were removed, of those that are left.
    """

    model: nn.Module
    exits: ClassifierExits
    space: Space = "output"

    @property
    def spec(self) -> ModelSpec:
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
            return self.spec.pool(self.model, self.vector(hidden, context)[:, None], None)
        return self.spec.pool(self.model, hidden, context.get("attention_mask"))

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
            return self.spec.classify(self.model, self.pool(hidden, context))
        return self.exits.heads[exit](self._own(self.vector(hidden, context)))

    def confidence(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """As `judge`, of a judge that looks at this exit alone. Raises ValueError for `halting`, which needs the exit before."""
        kind = self.exits.judge_kind
        if kind is not None and kind.carries:
            raise ValueError(
                f"the {kind.name} judge looks at the exit before: use the score 'learned_confidence', not 'confidence'"
            )
        return self.judge(ExitInputs(self, exit, hidden, context))

    def judge(self, inputs: ExitInputs) -> Tensor:
        """(R,) in (0, 1): lambda, the gate, or the probability of being right."""
        return self.judge_logits(inputs).sigmoid()

    def judge_logits(self, inputs: ExitInputs) -> Tensor:
        """What `judge` takes the sigmoid of, (R,). What a judge carries from exit to exit goes through `inputs.carried`.

        Raises:
            ValueError: exits without a judge.
        """
        kind = self.exits.judge_kind
        if kind is None:
            raise ValueError("these exits have no learned judge (judge='none'), but the policy's score needs one")
        judge = self.exits.judges[inputs.exit if kind.per_exit else 0]
        return judge(self._own(kind.features(self, inputs)))[:, 0]  # (R, F) -> (R,)

    def _own(self, values: Tensor) -> Tensor:
        """In the exits' precision: values may come in the model's, or in float32."""
        return values.to(next(self.exits.parameters()).dtype)
