"""Prompts with answers for causal language models, as tokens in memory, padded on the right to the longest of each batch.

Here: reading, filling in templates, cutting, padding. Not here: tokenizers (the caller brings one), order and keys.
M texts in the set, B samples, N tokens of the longest text of a batch.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ee_diffusion.training.config import PromptDataConfig
from ee_diffusion.training.datasets import Source, read_table
from ee_diffusion.training.text_datasets import Encode, padded


class PromptSource(Source):
    """Token ids of prompts with their answers.

    Args:
        tokens: prompt and answer of each text, one after the other. prompt_lengths: tokens of each prompt. pad: the id that fills up.

    Raises:
        ValueError: no texts, a prompt or an answer without tokens.
    """

    def __init__(self, tokens: Sequence[Sequence[int]], prompt_lengths: Sequence[int], *, pad: int):
        if not len(tokens) or len(prompt_lengths) != len(tokens):
            raise ValueError(
                f"{len(tokens)} texts and {len(prompt_lengths)} prompt lengths, expected at least one text"
            )
        bad = [
            i for i, (ids, length) in enumerate(zip(tokens, prompt_lengths, strict=True)) if not 0 < length < len(ids)
        ]
        if bad:
            raise ValueError(f"text {bad[0]} has an empty prompt or answer ({len(bad)} such texts)")
        self.tokens = [torch.tensor(ids, dtype=torch.int64) for ids in tokens]
        self.prompt_lengths, self.pad = torch.tensor(prompt_lengths), pad

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (B, N) int64, `prompt_length` (B,), `key`."""
        batch = padded([self.tokens[index] for index in indices.tolist()], pad=self.pad)
        batch["prompt_length"] = self.prompt_lengths[indices]
        return {name: value.to(keys.device) for name, value in batch.items()} | {"key": keys}

    def fingerprint(self) -> str:
        digest = zlib.crc32(torch.cat(self.tokens).numpy())
        return f"{len(self)} prompts crc32={zlib.crc32(self.prompt_lengths.numpy(), digest):08x}"


def load_prompt_source(
    config: PromptDataConfig, *, encode_prompts: Encode, encode_answers: Encode, end: int, pad: int
) -> PromptSource:
    """Read, fill in, encode and cut. `end`: the token after every answer that was not cut; prompts that leave no room are left out.

    Raises:
        ValueError: no files, no such columns, nothing that fits into max_length, an answer without tokens.
    """
    if not config.text_files:
        raise ValueError(f"text_files={config.text_files}, expected at least one file")
    prompts, answers = [], []
    most = config.max_texts or [None] * len(config.text_files)
    for file, template, column, count in zip(
        config.text_files, config.prompt_templates, config.answer_columns, most, strict=True
    ):
        rows = _rows(file, template, column)
        if count is not None and count < len(rows):
            rows = [rows[place * len(rows) // count] for place in range(count)]
        prompts += [template.replace("\\n", "\n").format(**row) for row in rows]
        answers += [str(row[column]).strip() for row in rows]
    tokens, lengths = [], []
    for prompt, answer in zip(encode_prompts(prompts), encode_answers(answers), strict=True):
        if len(prompt) < config.max_length:
            tokens.append([*prompt, *answer, end][: config.max_length])
            lengths.append(len(prompt))
    if not tokens:
        raise ValueError(f"no prompt of {len(prompts)} is shorter than max_length={config.max_length} tokens")
    return PromptSource(tokens, lengths, pad=pad)


def _rows(pattern: str, template: str, answer: str) -> list[dict]:
    wanted = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None] + [answer]
    table = read_table([pattern], wanted)
    return [{name: "" if row[name] is None else row[name] for name in wanted} for row in table]
