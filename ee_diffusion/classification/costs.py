"""What a classifier's parts cost: FLOPs from a formula that counts all tokens and the attention between them, per text.

Here: FLOPs (two per multiply-add; norms, softmax and activations are not counted). Not here: seconds.
n tokens of a text, D width, F inner width, C classes, K exits, A = K + 1 outputs, L layers, T texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ee_diffusion.classification.exits import ClassifierExits
from ee_diffusion.classification.model_specs import model_spec_of
from ee_diffusion.classification.token_pruning import TokenTrace, check_pruning
from ee_diffusion.core.scores import score_named
from ee_diffusion.core.trace import Trace


@dataclass(frozen=True)
class Costs:
    """FLOPs of one text of n tokens. block: one layer; judge: one score; tail: the model's own end; answer: an exit's head, nothing where
    the score is made of it, and the model's end too, where that runs on all rows whatever left (ModernBERT); first: what comes once, with
    the first layer (DeBERTa's convolution).
    """

    block: float
    answer: float
    judge: float
    tail: float
    first: float = 0.0

    def up_to(self, depths: tuple[int, ...], num_layers: int) -> Tensor:
        """Up to each output, the scores before it included, in parts of the model without exits -> (A,) float64."""
        whole = self.layers(num_layers) + self.tail
        paths = [self.layers(depth) + (exit + 1) * self.judge + self.answer for exit, depth in enumerate(depths)]
        return torch.tensor([*paths, whole + len(depths) * self.judge], dtype=torch.float64) / whole

    def layers(self, depth: int) -> float:
        """The first `depth` layers."""
        return depth * self.block + (self.first if depth else 0.0)


def block_flops(tokens: int, *, hidden_size: int, inner_size: int, kept: int | None = None, products: int = 2) -> float:
    """One layer on a text of n tokens: `8 n D^2 + 4 n^2 D + 2 p m D F`; m = `kept`, the tokens that reach the feed-forward part (None: n).

    Query, key, value and output projections; query-key and attention-value products; p = `products` of the feed-forward part, 2, where it
    is gated 3.
    """
    reached = tokens if kept is None else kept
    attention = 8 * tokens * hidden_size**2 + 4 * tokens**2 * hidden_size
    return float(attention + 2 * products * reached * hidden_size * inner_size)


def position_flops(model: nn.Module, tokens: int) -> float:
    """DeBERTa's relative positions in one layer: `2 n R D` for each product of content and position, R = 2 spans, and the projections of
    R positions, `2 R D^2` each (made once for a batch, counted for each text)."""
    config = model.config
    if not config.relative_attention:
        return 0.0
    span = config.position_buckets
    if span < 1:
        span = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    kinds = len(config.pos_att_type or ())
    projections = 2 if getattr(config, "share_att_key", False) else kinds
    width, reach = config.hidden_size, 2 * span
    return float(kinds * 2 * tokens * reach * width + projections * 2 * reach * width**2)


def saliency_flops(tokens: int, *, hidden_size: int) -> float:
    """The extra query-key product from which saliency is read: `2 n^2 D`; queries and keys are the layer's own."""
    return float(2 * tokens**2 * hidden_size)


def linear_flops(module: nn.Module) -> int:
    """The linear layers of a head or a judge on one vector: two for each weight."""
    return sum(2 * one.weight.numel() for one in module.modules() if isinstance(one, nn.Linear))


def costs_of(model: nn.Module, exits: ClassifierExits, tokens: int, *, score: str | None) -> Costs:
    """FLOPs for a text of so many tokens under a policy of `score` (None: no score). A score of the exit's logits costs the
    head, whose output then is there; `learned_confidence` and `confidence` cost what the exits' judge does.

    ModernBERT's local attention counts as the whole product, which is what eager and SDPA attention compute.

    Raises:
        ValueError: an unknown class or score, or no tokens.
    """
    if score is not None:
        score_named(score)
    if tokens < 1:
        raise ValueError(f"tokens={tokens}, expected at least 1")
    spec, config = model_spec_of(model), model.config
    width, labels = config.hidden_size, config.num_labels
    pool = 0 if spec.class_name.startswith("ViT") else 2 * width**2
    own = pool + 2 * width * labels
    answer = linear_flops(exits.heads[0]) if exits.heads else own
    kind, learned = exits.judge_kind, score in ("learned_confidence", "confidence")
    judge = (
        0
        if kind is None
        else {"vector": 0, "pooled": pool, "logits": answer}[kind.looks_at] + linear_flops(exits.judges[0])
    )
    measured = judge if learned else 0 if score is None else answer
    from_answer = kind is not None and kind.looks_at == "logits" if learned else score is not None
    block, first = _layer_flops(model, tokens)
    given = (0 if from_answer else answer) + (own if spec.tail_takes_all else 0)
    return Costs(block, float(given), float(measured), float(own), first)


def path_flops(
    model: nn.Module, exits: ClassifierExits, tokens: Tensor, *, score: str | None, pruned: TokenTrace | None = None
) -> Tensor:
    """FLOPs of each text up to each output, the scores before it included: tokens (T,) -> (T, A) float64.

    `pruned`: the tokens removed in a forward without early exits; None: all of them run. Padding is not counted.

    Raises:
        ValueError: as `costs_of`.
    """
    lengths, where = tokens.unique(return_inverse=True)
    each = [costs_of(model, exits, length, score=score) for length in lengths.tolist()]
    num_layers = model_spec_of(model).num_layers(model)
    if pruned is None:
        layers = torch.tensor([[one.first] + num_layers * [one.block] for one in each], dtype=torch.float64)[where]
    else:
        run = pruned_layers(model, pruned)  # (T, L)
        layers = torch.cat([torch.zeros_like(run[:, :1]), run], dim=1)
    upto = layers.cumsum(1)  # (T, 1 + L): before the first layer (what comes once included), after each
    upto[:, 0] = 0
    one = each[0]  # heads and judges see one vector, whatever the length
    found = [upto[:, depth] + (exit + 1) * one.judge + one.answer for exit, depth in enumerate(exits.depths)]
    return torch.stack([*found, upto[:, -1] + len(exits.depths) * one.judge + one.tail], dim=1)


def flops_of(trace: Trace, costs: Costs) -> Tensor:
    """What one forward cost each sample, (E,) float64: its layers, the scores measured on it, its exit head or the model's end."""
    if len(trace.times) != 1:
        raise ValueError(f"a trace of {len(trace.times)} steps, expected one forward")
    layers = trace.ran[0].double().sum(1)  # (E,)
    scores = (~trace.scores[0].isnan()).double().sum(0)  # (E,)
    early = trace.depths[0] < trace.planned.shape[1]  # (E,)
    end = torch.where(early, torch.tensor(costs.answer).double(), torch.tensor(costs.tail).double())
    return layers * costs.block + (layers > 0) * costs.first + scores * costs.judge + end


def pruned_flops(model: nn.Module, tokens: TokenTrace) -> Tensor:
    """What the layers cost each row when tokens are removed, saliency included, padding not -> (B,) float64.

    Raises:
        ValueError: an unknown class, or one whose tokens cannot be removed.
    """
    return pruned_layers(model, tokens).sum(1)


def pruned_layers(model: nn.Module, tokens: TokenTrace) -> Tensor:
    """As `pruned_flops`, for each layer -> (B, L) float64."""
    check_pruning(model, (0.0,) * tokens.fed.shape[1])
    width, inner = model.config.hidden_size, _inner_size(model)
    n, m, looked = tokens.attended.double(), tokens.fed.double(), tokens.looked.double()  # (B, L)
    attention = 8 * n * width**2 + 4 * n**2 * width
    return attention + 4 * m * width * inner + 2 * looked**2 * width


def _layer_flops(model: nn.Module, tokens: int) -> tuple[float, float]:
    """One layer, and what comes once with the first."""
    kind, config = model_spec_of(model).class_name, model.config
    gated = kind.startswith("ModernBert")
    sizes = {"hidden_size": config.hidden_size, "inner_size": _inner_size(model)}
    block = block_flops(tokens, **sizes, products=3 if gated else 2)
    if not kind.startswith("Deberta"):
        return block, 0.0
    taps = getattr(config, "conv_kernel_size", 0) / getattr(config, "conv_groups", 1)
    return block + position_flops(model, tokens), 2.0 * tokens * taps * config.hidden_size**2


def _inner_size(model: nn.Module) -> int:
    return model.config.hidden_dim if type(model).__name__.startswith("Distil") else model.config.intermediate_size
