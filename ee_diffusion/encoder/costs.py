"""What a classifier's parts cost: FLOPs from a formula that counts all tokens and the attention between them, per text.

Here: FLOPs (two per multiply-add; norms, softmax and activations are not counted). Not here: seconds.
n tokens of a text, D width, F inner width, C classes, K exits, A = K + 1 answers, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ee_diffusion.core.scores import score_named
from ee_diffusion.core.trace import Trace
from ee_diffusion.encoder.exits import ClassifierExits
from ee_diffusion.encoder.families import family_of
from ee_diffusion.encoder.tokens import TokenTrace, check_pruning


@dataclass(frozen=True)
class Costs:
    """FLOPs of one text of n tokens. block: one layer; judge: one score; answer: an exit's answer, 0 where the score is made of it;
    tail: the model's own end."""

    block: float
    answer: float
    judge: float
    tail: float

    def up_to(self, depths: tuple[int, ...], num_layers: int) -> Tensor:
        """The whole way to each answer, the scores before it included, in parts of the model without exits -> (A,) float64."""
        whole = num_layers * self.block + self.tail
        ways = [depth * self.block + (exit + 1) * self.judge + self.answer for exit, depth in enumerate(depths)]
        return torch.tensor([*ways, whole + len(depths) * self.judge], dtype=torch.float64) / whole


def block_flops(tokens: int, *, hidden_size: int, inner_size: int, kept: int | None = None) -> float:
    """One layer on a text of n tokens: `8 n D^2 + 4 n^2 D + 4 m D F`; m = `kept`, the tokens that reach the feed-forward part (None: n).

    Query, key, value and output projections; query-key and attention-value products; the two feed-forward products.
    """
    reached = tokens if kept is None else kept
    attention = 8 * tokens * hidden_size**2 + 4 * tokens**2 * hidden_size
    return float(attention + 4 * reached * hidden_size * inner_size)


def saliency_flops(tokens: int, *, hidden_size: int) -> float:
    """The extra query and key projections and their product, from which saliency is read: `4 n D^2 + 2 n^2 D`."""
    return float(4 * tokens * hidden_size**2 + 2 * tokens**2 * hidden_size)


def costs_of(model: nn.Module, exits: ClassifierExits, tokens: int, *, score: str | None) -> Costs:
    """FLOPs for a text of so many tokens under a policy that looks at `score` (None: at nothing). A score made of the answer costs an
    answer, which then is there to be given; `judged` and `certainty` cost what the exits' judge does.

    Raises:
        ValueError: an unknown class or score, a gated feed-forward part (ModernBERT), or no tokens.
    """
    if score is not None:
        score_named(score)
    if tokens < 1:
        raise ValueError(f"tokens={tokens}, expected at least 1")
    family, config = family_of(model), model.config
    if family.class_name.startswith("ModernBert"):
        raise ValueError("ModernBERT's gated feed-forward part and local attention have another formula")
    width, labels = config.hidden_size, config.num_labels
    inner = _inner_size(model)
    pool = 0 if family.class_name.startswith("ViT") else 2 * width**2
    own = pool + 2 * width * labels
    answer = {"shared": own, "pooled": 2 * width**2 + 2 * width * labels, "linear": 2 * width * labels}[exits.head]
    judge = {
        "none": 0,
        "halting": pool + 3 * 2 * (2 * width) ** 2 + 2 * 2 * width,
        "linear_halting": pool + 2 * width,
        "correctness": 2 * width,
        "statistics": answer + 2 * 4,
    }[exits.judge]
    learned = score in ("judged", "certainty")
    measured = judge if learned else 0 if score is None else answer
    from_answer = exits.judge == "statistics" if learned else score is not None
    block = block_flops(tokens, hidden_size=width, inner_size=inner)
    return Costs(block, 0.0 if from_answer else float(answer), float(measured), float(own))


def flops_of(trace: Trace, costs: Costs) -> Tensor:
    """What one forward cost each element, (E,) float64: its layers, the scores measured on it, its answer or the model's end."""
    if len(trace.times) != 1:
        raise ValueError(f"a trace of {len(trace.times)} steps, expected one forward")
    layers = trace.ran[0].double().sum(1)  # (E,)
    scores = (~trace.scores[0].isnan()).double().sum(0)  # (E,)
    early = trace.depths[0] < trace.planned.shape[1]  # (E,)
    end = torch.where(early, torch.tensor(costs.answer).double(), torch.tensor(costs.tail).double())
    return layers * costs.block + scores * costs.judge + end


def pruned_flops(model: nn.Module, tokens: TokenTrace) -> Tensor:
    """What the layers cost each row when tokens are removed, saliency included, padding not -> (B,) float64.

    Raises:
        ValueError: an unknown class, or one whose tokens cannot be removed.
    """
    check_pruning(model, (0.0,) * tokens.fed.shape[1])
    width, inner = model.config.hidden_size, _inner_size(model)
    n, m = tokens.attended.double(), tokens.fed.double()  # (B, L)
    attention = 8 * n * width**2 + 4 * n**2 * width
    return (attention + 4 * m * width * inner + 4 * n * width**2 + 2 * n**2 * width).sum(1)


def _inner_size(model: nn.Module) -> int:
    return model.config.hidden_dim if type(model).__name__.startswith("Distil") else model.config.intermediate_size
