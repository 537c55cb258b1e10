"""Token pruning: tokens that get little attention are removed between a layer's attention and its feed-forward part.

Magic Pyramid (arXiv 2111.00230), after Learned Token Pruning (arXiv 2107.00910). Here: saliency, soft and hard removal. Not here: which
rows run (attach.py). The first token is never removed; the others are gone for every later layer: rows are packed to the longest survivor.
B rows of the batch, r running rows, N tokens, M packed tokens, D width, H heads, L layers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ee_diffusion.classification.model_specs import model_spec_of

QUERIES = 128  # query positions whose attention is computed at once


@dataclass(frozen=True)
class Parts:
    """A block in two halves, and what its attention is made of.

    attend: (block, hidden (r, M, D), mask) -> (r, M, D) up to the feed-forward part; feed: (block, attended) -> (r, M, D);
    projections: block -> its query and key Linear; heads: block -> H.
    """

    attend: Callable[[nn.Module, Tensor, Tensor | None], Tensor]
    feed: Callable[[nn.Module, Tensor], Tensor]
    projections: Callable[[nn.Module], tuple[nn.Linear, nn.Linear]]
    heads: Callable[[nn.Module], int]


_BERT = Parts(
    attend=lambda block, hidden, mask: block.attention(hidden, mask)[0],
    feed=lambda block, attended: block.feed_forward_chunk(attended),
    projections=lambda block: (block.attention.self.query, block.attention.self.key),
    heads=lambda block: block.attention.self.num_attention_heads,
)
_ALBERT = Parts(
    attend=lambda block, hidden, mask: block.attention(hidden, mask)[0],
    feed=lambda block, attended: block.full_layer_layer_norm(block.ff_chunk(attended) + attended),
    projections=lambda block: (block.attention.query, block.attention.key),
    heads=lambda block: block.attention.num_attention_heads,
)
_DISTILBERT = Parts(
    attend=lambda block, hidden, mask: block.sa_layer_norm(block.attention(hidden, attention_mask=mask)[0] + hidden),
    feed=lambda block, attended: block.output_layer_norm(block.ffn(attended) + attended),
    projections=lambda block: (block.attention.q_lin, block.attention.k_lin),
    heads=lambda block: block.attention.config.n_heads,
)
# Class name of a block -> its parts. Positions must be in the embeddings: a packed token keeps its place only there.
PARTS: dict[str, Parts] = {
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "AlbertLayer": _ALBERT,
    "TransformerBlock": _DISTILBERT,
}


@dataclass(frozen=True, eq=False)
class TokenTrace:
    """What one forward did to tokens.

    attended and fed (B, L): tokens of the row that the layer's attention and its feed-forward part ran on, 0 where the row had left;
    looked (B, L): tokens whose saliency was computed, 0 where the threshold is 0; computed (L, 2): positions that attention and the
    feed-forward part really ran on, padding included; keys: of each layer that ran, where tokens of the running rows are after it (r, M)
    bool; empty where batches were joined.
    """

    attended: Tensor
    fed: Tensor
    looked: Tensor
    computed: Tensor
    keys: tuple[Tensor, ...] = ()


def check_prunable(model: nn.Module) -> None:
    """Raise ValueError if tokens of this class cannot be removed."""
    spec = model_spec_of(model)
    if spec.block not in PARTS:
        raise ValueError(f"tokens of a {spec.class_name} cannot be removed; known blocks: {sorted(PARTS)}")


def check_pruning(model: nn.Module, thresholds: tuple[float, ...]) -> None:
    """Raise ValueError if tokens of this class cannot be removed, or for thresholds of the wrong number or range."""
    check_prunable(model)
    layers = model_spec_of(model).num_layers(model)
    if len(thresholds) != layers:
        raise ValueError(f"{len(thresholds)} pruning thresholds, expected one for each of {layers} layers")
    wrong = [value for value in thresholds if not 0 <= value <= 1]
    if wrong:
        raise ValueError(f"pruning threshold {wrong[0]}, expected a mean attention probability in [0, 1]")


@contextmanager
def projected(block: nn.Module) -> Iterator[list[Tensor]]:
    """Within, the block runs once in this thread; yields a list that then holds its own queries and keys, (r, M, D) each."""
    modules = PARTS[type(block).__name__].projections(block)
    found: list[Tensor] = [torch.empty(0)] * len(modules)
    me = threading.get_ident()

    def keeping(place: int) -> Callable[..., None]:
        return lambda module, args, output: found.__setitem__(place, output) if threading.get_ident() == me else None

    handles = [one.register_forward_hook(keeping(place)) for place, one in enumerate(modules)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def saliency(query: Tensor, key: Tensor, keys: Tensor | None, *, heads: int) -> Tensor:
    """Attention paid to each token, mean over heads and over real query positions: a layer's queries and keys (r, M, D), keys (r, M)
    bool (None: no padding) -> (r, M).

    `s(x_j) = 1/(H n) sum_h sum_i A_h(i, j)`; sums to 1 over the real tokens, 0 for padding. One query-key product beside the layer's
    own, in pieces of query positions, so that it works with any attention.
    """
    rows, length, width = query.shape[0], query.shape[1], query.shape[2] // heads
    scaled = query * width**-0.5  # here it is small
    q = scaled.view(rows, length, heads, width).transpose(1, 2)  # (r, H, M, D/H)
    k = key.view(rows, length, heads, width).permute(0, 2, 3, 1)  # (r, H, D/H, M)
    closed = None if keys is None else ~keys[:, None, None]  # (r, 1, 1, M)
    paid = query.new_zeros(rows, length, dtype=torch.float32)
    for first in range(0, length, QUERIES):
        logits = (q[:, :, first : first + QUERIES] @ k).float()  # (r, H, q, M)
        if closed is not None:
            logits = logits.masked_fill(closed, -math.inf)
        attention = logits.softmax(-1)
        if keys is None:
            paid = paid + attention.sum((1, 2))
        else:
            real = keys[:, None, None, first : first + QUERIES].to(attention.dtype)  # (r, 1, 1, q)
            paid = paid + (real @ attention).sum((1, 2))
    return paid / (heads * (length if keys is None else keys.sum(1, keepdim=True).clamp(min=1)))


class ActiveTokens:
    """The tokens of one forward. Made by `attach` for each forward; drop-in for the blocks' own forward.

    Counts are the host's, as in the session: a layer that may remove costs one host sync, one whose threshold is 0 nothing, and texts of
    one length need no mask.
    """

    def __init__(self, thresholds: tuple[float, ...], mask: Tensor | None, *, rows: int):
        if mask is not None and not bool(mask[:, 0].all()):
            raise ValueError(
                "a text whose first token is masked (no tokens, or padding on the left): nothing is left to classify"
            )
        self.thresholds, self.mask, self.num_rows = thresholds, mask, rows
        self.keys: Tensor | None = None  # (r, M): where a token is, not padding
        self.lengths: list[int] = []  # (r,) tokens that are left
        self.rows: list[int] = []  # (r,) as places in the batch
        self.packed = False  # tokens were removed: the stock mask does not fit any more
        self.attended, self.fed = [[0] * rows for _ in thresholds], [[0] * rows for _ in thresholds]  # (L, B)
        self.computed = [(0, 0)] * len(thresholds)
        self.keys_after: list[Tensor] = []

    def layer(self, layer: int, block: nn.Module, hidden: Tensor, *, mask: Tensor | None, rows: list[int]) -> Tensor:
        """One layer on the running rows: hidden (r, M, D), the stock mask of these rows -> (r, M', D), M' the longest survivor's."""
        parts, padded = PARTS[type(block).__name__], hidden.shape[1]
        keys = self._keys(hidden, rows)  # (r, M)
        real = None if all(length == padded for length in self.lengths) else keys
        if self.packed:
            mask = None if real is None else _additive(keys, hidden.dtype)
        if self.thresholds[layer]:
            with projected(block) as found:
                attended = parts.attend(block, hidden, mask)
            keep = saliency(*found, real, heads=parts.heads(block)) >= self.thresholds[layer]  # (r, M), never padding
            keep[:, 0] = True
            lengths = keep.sum(1).tolist()  # (r,), the host sync of this layer
        else:  # no saliency is below 0: nothing to look at
            attended, keep, lengths = parts.attend(block, hidden, mask), keys, self.lengths
        for row, before, after in zip(rows, self.lengths, lengths, strict=True):
            self.attended[layer][row], self.fed[layer][row] = before, after
        longest = max(lengths)
        if longest < padded:
            order = (~keep).int().argsort(dim=1, stable=True)[:, :longest]  # (r, M'): survivors first, in their order
            attended = attended.gather(1, order[:, :, None].expand(-1, -1, hidden.shape[2]))
            keep = keep.gather(1, order)
        self.packed = self.packed or longest < padded or lengths != self.lengths
        self.keys, self.lengths = keep, lengths
        self.keys_after.append(keep)
        self.computed[layer] = (len(rows) * padded, len(rows) * longest)
        return parts.feed(block, attended)

    def _keys(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """(r, M) of the rows that run now; their lengths go with them."""
        if self.keys is None:
            whole = torch.ones(self.num_rows, hidden.shape[1]) if self.mask is None else self.mask
            self.keys = whole.bool().to(hidden.device)
            self.lengths, self.rows = self.keys.sum(1).tolist(), list(range(self.num_rows))
        if len(rows) != len(self.rows):
            before = {row: place for place, row in enumerate(self.rows)}
            places = [before[row] for row in rows]
            self.keys = self.keys.index_select(0, torch.tensor(places).to(hidden.device))
            self.lengths = [self.lengths[place] for place in places]
        self.rows = rows
        return self.keys

    def trace(self) -> TokenTrace:
        """What was done."""
        attended, fed = (torch.tensor(one, dtype=torch.int32).T.contiguous() for one in (self.attended, self.fed))
        looked = attended * (torch.tensor(self.thresholds) > 0)
        return TokenTrace(attended, fed, looked, torch.tensor(self.computed), tuple(self.keys_after))


def _additive(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """keys (r, M) bool -> (r, 1, 1, M): 0 where a token is, the lowest number elsewhere; every attention takes it."""
    return torch.zeros(keys.shape, dtype=dtype, device=keys.device).masked_fill(~keys, torch.finfo(dtype).min)[
        :, None, None
    ]
