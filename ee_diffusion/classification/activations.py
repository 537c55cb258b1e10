"""Inputs of exits for training and evaluation: from one forward of the model, or from hidden states stored before.

Here: batches cut by length, what exits on a frozen model look at, stored once. Not here: losses (methods/), metrics.
B samples, N tokens, D width, C classes, K exits, n texts of a store.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_diffusion.classification.attach import attach, recorded_states
from ee_diffusion.classification.exits import ClassifierHeads
from ee_diffusion.classification.token_pruning import TokenTrace
from ee_diffusion.core.exits import ExitInputs
from ee_diffusion.core.io import read_tensors, write_tensors
from ee_diffusion.core.policy import Policy

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


def split_by_length(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """The rows of a batch of padded texts in so many parts of similar length, each cut to its longest; images stay one part."""
    if parts == 1 or "attention_mask" not in batch:
        return [batch]
    lengths = batch["attention_mask"].sum(1)  # (B,)
    found = []
    for rows in lengths.argsort(stable=True).chunk(parts):
        longest = int(lengths[rows].max())
        cut = {name: value[rows] for name, value in batch.items()}
        texts = [name for name in INPUTS if name in cut]
        found.append(cut | {name: cut[name][:, :longest] for name in texts})
    return found


def exit_inputs_of(
    heads: ClassifierHeads, states: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
) -> Iterator[ExitInputs]:
    """The inputs of each exit: states (B, N, D) with the masks (B, N) of their tokens (None: all are there), one for each exit. What an
    exit carries is in the context of the next."""
    carried: dict[str, Tensor] = {}
    for exit, hidden in enumerate(states):
        mask = None if masks is None else masks[exit]
        context = carried if mask is None else carried | {"attention_mask": mask}
        inputs = ExitInputs(heads, exit, hidden, context)
        yield inputs
        carried = carried | inputs.carried


def masks_at(depths: Sequence[int], mask: Tensor | None, tokens: TokenTrace | None) -> list[Tensor | None]:
    """The mask (B, M) of the states at each depth: the batch's own, or that of the tokens left by a forward without exits."""
    if tokens is None:
        return [mask] * len(depths)
    return [tokens.keys[depth - 1] if depth else mask for depth in depths]


STORED = ("vectors", "own", "labels", "tokens")


@dataclass(frozen=True, eq=False)
class StoredStates:
    """What exits look at of a text's states at their depths, vectors (n, K, D): first tokens, or means; the model's own logits (n, C);
    labels (n,); tokens (n,); `origin`: the model, its pruning, the depths, the pooling and the data. Enough for exits with heads and judges
    of their own, on a model that stays as it is."""

    vectors: Tensor
    own: Tensor
    labels: Tensor
    tokens: Tensor
    origin: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, samples: Tensor) -> dict[str, Tensor]:
        return {name: getattr(self, name)[samples] for name in STORED}

    def save(self, path: str | os.PathLike) -> None:
        """Write to one safetensors file, whole or not at all."""
        write_tensors(path, {name: getattr(self, name) for name in STORED}, {"origin": self.origin})

    @classmethod
    def load(cls, path: str | os.PathLike, *, origin: str) -> StoredStates:
        """Read what `save` wrote.

        Raises:
            ValueError: no such store, or one of another model or other data than `origin`.
        """
        tensors, metadata = read_tensors(path, "store of states", names=STORED)
        if (written := metadata.get("origin")) != origin:
            raise ValueError(f"{path} holds states of {written!r}, expected {origin!r}")
        return cls(**tensors, origin=origin)


def fingerprint_of(heads: ClassifierHeads, pruning: tuple[float, ...] | None, data: str) -> str:
    """What stored states depend on: the model's weights, removed tokens, the exits' depths, the data set."""
    digest = 0
    for name, value in heads.model.state_dict().items():
        digest = zlib.crc32(value.cpu().contiguous().view(torch.uint8).numpy(), zlib.crc32(name.encode(), digest))
    exits = f"depths={heads.depths} pooling={heads.exits.pooling}"
    return f"{type(heads.model).__name__} crc32={digest:08x} pruning={pruning} {exits} of {data}"


@torch.no_grad()
def stored_states(
    heads: ClassifierHeads, batches: Iterable[dict[str, Tensor]], *, pruning: tuple[float, ...] | None, data: str
) -> StoredStates:
    """Run the model once over batches, in eval mode, and store what exits on it look at, in the order of the batches'
    `key`; `data` names the data set.

    Raises:
        ValueError: exits that go through the model's own pooler (head `shared`, judges that halt), no batches.
    """
    check_storable(heads)
    heads.model.eval()
    parts = []
    for batch in batches:
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        traces: list[TokenTrace] = []
        run = attach(heads.model, heads.exits, Policy(), pruning=pruning, token_traces=traces)
        with run, recorded_states(heads.model) as all_states:
            own = heads.model(**inputs).logits  # (B, C)
        states = [all_states[depth] for depth in heads.depths]
        masks = masks_at(heads.depths, inputs.get("attention_mask"), traces[0] if traces else None)
        seen = [heads.vector(one.hidden, one.context) for one in exit_inputs_of(heads, states, masks)]  # K of (B, D)
        kept = (torch.stack(seen, dim=1), own, batch["labels"], text_lengths(batch, all_states[0]), batch["key"])
        parts.append([value.cpu() for value in kept])
    if not parts:
        raise ValueError("no batches to store states of")
    *kept, keys = (torch.cat(part) for part in zip(*parts, strict=True))
    vectors, own, labels, tokens = (value[keys.argsort()] for value in kept)
    return StoredStates(vectors, own, labels, tokens, fingerprint_of(heads, pruning, data))


def check_storable(heads: ClassifierHeads) -> None:
    """Raise ValueError for exits that look at more of a state than the one vector that is stored."""
    exits = heads.exits
    judge = exits.judge_kind
    if exits.head == "shared" or (judge is not None and judge.looks_at == "pooled"):
        raise ValueError(
            f"head={exits.head!r}, judge={exits.judge!r}: these exits go through the model's own end, which stored vectors "
            "do not replace"
        )


def text_lengths(batch: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """(B,) tokens of each row, padding left out; of images the states' own number, hidden (B, N, D)."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(1)
    return torch.full((len(hidden),), hidden.shape[1], device=hidden.device)
