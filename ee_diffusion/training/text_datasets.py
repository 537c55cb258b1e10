"""Labeled texts for the loop, as tokens in memory, padded to the longest of each batch.

Here: checking, padding. Not here: tokenizers (the caller brings one), order and keys (order.py, rng.py).
M texts in the set, B samples, N tokens of the longest text of a batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence

import datasets
import numpy as np
import torch
from torch import Tensor

from ee_diffusion.training.config import TextDataConfig
from ee_diffusion.training.datasets import Source, class_labels, read_table

Encode = Callable[[list[str]], list[list[int]]]


class TextSource(Source):
    """Texts as token ids with a label each.

    Args:
        tokens: token ids of each text. labels: (M,) int64 classes or float32 values. pad: the id that fills up.

    Raises:
        ValueError: no texts, a text without tokens, labels of another number or dtype.
    """

    def __init__(self, tokens: Sequence[Sequence[int]], labels: Tensor, *, pad: int):
        if not len(tokens) or labels.shape != (len(tokens),) or labels.dtype not in (torch.int64, torch.float32):
            raise ValueError(
                f"{len(tokens)} texts and labels {labels.dtype} {tuple(labels.shape)}, expected at least one text and "
                "int64 or float32 labels, one each"
            )
        empty = [index for index, ids in enumerate(tokens) if not len(ids)]
        if empty:
            raise ValueError(f"text {empty[0]} has no tokens ({len(empty)} such texts)")
        self.tokens = [torch.tensor(ids, dtype=torch.int64) for ids in tokens]
        self.labels, self.pad = labels, pad

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (B, N) int64, `labels` (B,), `key`."""
        batch = padded([self.tokens[index] for index in indices.tolist()], pad=self.pad)
        batch["labels"] = self.labels[indices]
        return {name: value.to(keys.device) for name, value in batch.items()} | {"key": keys}

    def fingerprint(self) -> str:
        digest = zlib.crc32(torch.cat(self.tokens).numpy())
        digest = zlib.crc32(self.labels.numpy(), digest)
        return f"{len(self)} texts crc32={digest:08x}"


def padded(tokens: list[Tensor], *, pad: int) -> dict[str, Tensor]:
    """Token ids of B texts -> `input_ids`, `attention_mask` (B, N) int64, filled up on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=pad)  # (B, N)
    lengths = torch.tensor([len(one) for one in tokens])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def once(source: Source, size: int, device: torch.device | str = "cpu") -> Iterator[dict[str, Tensor]]:
    """Every sample once in batches of `size` on a device, texts of like length together, so that little is padded; `key` is a sample's
    place."""
    lengths = torch.zeros(len(source))
    if isinstance(source, TextSource):
        lengths = torch.tensor([len(one) for one in source.tokens])
    for part in lengths.argsort(stable=True).split(size):
        yield source.batch(part, part.to(device))


def load_text_source(config: TextDataConfig, encode: Encode, *, num_labels: int, pad: int) -> TextSource:
    """Read, check and encode texts. `encode(texts)` gives token ids, already cut; num_labels 1: labels are values to regress on.

    Raises:
        ValueError: no files, no such columns, empty texts, labels out of range or of one class only, longer tokens than max_length.
    """
    if not config.text_files:
        raise ValueError(f"text_files={config.text_files}, expected at least one file")
    options = {"names": config.column_names, "header": None} if config.column_names else {}
    table = read_table(config.text_files, [*config.text_columns, config.text_label_column], **options)
    if config.folds is not None:
        table = table.select(_fold(len(table), config))
    if config.max_texts is not None:
        table = table.select(range(min(config.max_texts, len(table))))
    columns = [table[name] for name in config.text_columns]
    texts = [" ".join(str(part).strip() for part in parts if part is not None) for parts in zip(*columns, strict=True)]
    empty = [index for index, text in enumerate(texts) if not text.strip()]
    if empty:
        raise ValueError(f"row {empty[0]} has an empty text ({len(empty)} such rows of {len(texts)})")
    labels = _labels(table, config, num_labels)
    tokens = encode(texts)
    longest = max(map(len, tokens), default=0)
    if longest > config.max_length:
        raise ValueError(f"a text of {longest} tokens, expected at most max_length={config.max_length}")
    return TextSource(tokens, labels, pad=pad)


def _fold(count: int, config: TextDataConfig) -> list[int]:
    """Rows of the chosen part, in one shuffled order for every seed of a run, so that the first so many are a fair sample, too."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held_out = torch.arange(count) % config.folds == config.fold
    return order[held_out if config.held_out else ~held_out].tolist()


def _labels(table: datasets.Dataset, config: TextDataConfig, num_labels: int) -> Tensor:
    column = config.text_label_column
    if num_labels == 1:
        values = np.asarray(table.with_format("numpy")[column])
        if values.dtype.kind not in "iuf":
            raise ValueError(f"labels in column {column!r} are {values.dtype}, expected numbers")
        return torch.from_numpy(values.astype(np.float32))
    labels = class_labels(table, column, num_labels, first=config.first_label)
    if bool((labels == labels[0]).all()):
        raise ValueError(
            f"every label in column {column!r} is {int(labels[0]) + config.first_label}: one class is nothing to learn"
            + ("" if config.max_texts is None else f" (max_texts={config.max_texts} takes the first rows)")
        )
    return labels
