"""What training and looking see of a batch: the answers and judges of all exits, from one forward or from states stored before.

Here: batches cut by length, first tokens stored once for exits on a frozen model. Not here: losses (objective.py), figures.
B samples, N tokens, D width, C classes, K exits, A = K + 1 answers, n texts of a store.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.scores import Observation
from ee_diffusion.encoder.attach import attach, watching
from ee_diffusion.encoder.exits import ClassifierHeads

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


@dataclass(frozen=True, eq=False)
class Seen:
    """answers (A, B, C), the exits' and the model's own; judge logits (K, B) (None: no judge); labels (B,); tokens of the longest;
    kept: tokens that soft pruning left, mean over layers, and real: all of them (None: no soft pruning)."""

    answers: Tensor
    judge: Tensor | None
    labels: Tensor
    tokens: int
    kept: Tensor | None = None
    real: Tensor | None = None

    @staticmethod
    def joined(parts: Sequence[Seen]) -> Seen:
        """Parts of one batch as one."""
        first = parts[0]
        return Seen(
            torch.cat([part.answers for part in parts], dim=1),
            None if first.judge is None else torch.cat([part.judge for part in parts], dim=1),
            torch.cat([part.labels for part in parts]),
            max(part.tokens for part in parts),
            None if first.kept is None else sum(part.kept for part in parts),
            None if first.kept is None else sum(part.real for part in parts),
        )


def by_length(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """The rows of a batch of padded texts in so many parts of like length, each cut to its longest; images stay one part."""
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


def look_through(heads: ClassifierHeads, states: Sequence[Tensor], context: dict[str, Tensor]) -> Iterator[Observation]:
    """What each exit observes of states (B, N, D), one for each exit, what an exit carries handed on to the next."""
    for exit, hidden in enumerate(states):
        observation = Observation(heads, exit, hidden, context)
        yield observation
        context = context | observation.carried


@dataclass(frozen=True, eq=False)
class StoredStates:
    """First tokens' states at the exits' depths, first (n, K, D); the model's own answers (n, C); labels (n,); tokens (n,); `origin`: the
    model, its pruning, the depths and the data. Enough for exits that look at the first token alone, on a model that stays as it is."""

    first: Tensor
    own: Tensor
    labels: Tensor
    tokens: Tensor
    origin: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, samples: Tensor) -> dict[str, Tensor]:
        names = ("first", "own", "labels", "tokens")
        return {name: getattr(self, name)[samples] for name in names}

    def save(self, path: str | os.PathLike) -> None:
        """Write to one safetensors file, beside first, then renamed."""
        beside = Path(f"{path}.{os.getpid()}.tmp")
        beside.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).contiguous() for name in ("first", "own", "labels", "tokens")}
        save_file(tensors, beside, metadata={"origin": self.origin})
        os.replace(beside, path)

    @classmethod
    def load(cls, path: str | os.PathLike, *, origin: str) -> StoredStates:
        """Read what `save` wrote.

        Raises:
            ValueError: no such store, or one of another model or other data than `origin`.
        """
        try:
            with safe_open(path, framework="pt") as file:
                written = (file.metadata() or {}).get("origin")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} holds no stored states: {error}") from error
        if written != origin:
            raise ValueError(f"{path} holds states of {written!r}, expected {origin!r}")
        return cls(**tensors, origin=origin)


def origin_of(heads: ClassifierHeads, pruning: tuple[float, ...] | None, data: str) -> str:
    """What stored states depend on: the model's weights, removed tokens, the exits' depths, the data's own name."""
    digest = 0
    for name, value in heads.model.state_dict().items():
        digest = zlib.crc32(value.cpu().contiguous().view(torch.uint8).numpy(), zlib.crc32(name.encode(), digest))
    return f"{type(heads.model).__name__} crc32={digest:08x} pruning={pruning} depths={heads.depths} of {data}"


@torch.no_grad()
def stored_states(
    heads: ClassifierHeads, batches: Iterable[dict[str, Tensor]], *, pruning: tuple[float, ...] | None, data: str
) -> StoredStates:
    """Run the model once over batches, in eval mode, and keep what exits on it see, in the order of their `key`; `data` names them.

    Raises:
        ValueError: exits that look at more than the first token (head or halting judge through the model's own pooler), no batches.
    """
    check_storable(heads)
    heads.model.eval()
    parts = []
    for batch in batches:
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        with attach(heads.model, heads.exits, Policy(), pruning=pruning), watching(heads.model) as states:
            own = heads.model(**inputs).logits  # (B, C)
        first = torch.stack([states[depth][:, 0] for depth in heads.depths], dim=1)  # (B, K, D)
        kept = (first, own, batch["labels"], text_lengths(batch, states[0]), batch["key"])
        parts.append([value.cpu() for value in kept])
    if not parts:
        raise ValueError("no batches to store states of")
    *kept, keys = (torch.cat(part) for part in zip(*parts, strict=True))
    first, own, labels, tokens = (value[keys.argsort()] for value in kept)
    return StoredStates(first, own, labels, tokens, origin_of(heads, pruning, data))


def check_storable(heads: ClassifierHeads) -> None:
    """Raise ValueError for exits that see more of a state than its first token."""
    exits = heads.exits
    if exits.head == "shared" or exits.judge in ("halting", "linear_halting"):
        raise ValueError(
            f"head={exits.head!r}, judge={exits.judge!r}: these exits go through the model's own end, which stored first tokens "
            "do not replace"
        )


def text_lengths(batch: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """(B,) tokens of each row, padding left out; of images the states' own number, hidden (B, N, D)."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(1)
    return torch.full((len(hidden),), hidden.shape[1], device=hidden.device)
