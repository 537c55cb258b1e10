"""From words to the text tokens that a U-ViT takes, through any text encoder of transformers.

Here: one function on a tokenizer and a model. Not here: loading them (the caller), guidance (text_to_image.py).
B prompts, M tokens of the longest, T text tokens of the U-ViT, V the encoder's width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MAX_LENGTH = (
    77  # tokens of a prompt that the encoder reads, or as many as it can; what is longer is cut, with a warning
)


@torch.no_grad()
def encode_prompts(tokenizer: Callable, text_encoder: nn.Module, prompts: Sequence[str], *, num_tokens: int) -> Tensor:
    """prompts (B,) -> (B, T, V) float32: `[mean over tokens of h, h_1, ..., h_(T-1)]`, zeros beyond the prompt's end.

    h: the encoder's last hidden states over the whole prompt, so the first T - 1 know of the rest. Each row is scaled to a root mean
    square of 1, whatever the encoder's own scale. Prompts of more than `MAX_LENGTH` tokens, or than the encoder has places for, are cut,
    their last special token kept; a warning says how many.

    Raises:
        ValueError: no prompts, a prompt that is no text, fewer than one token.
    """
    if not len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts {list(prompts)[:3]!r}, expected at least one, each a str")
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens}, expected at least 1")
    longest = min(
        MAX_LENGTH, tokenizer.model_max_length, getattr(text_encoder.config, "max_position_embeddings", MAX_LENGTH)
    )
    read = tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    _warn_of_cut(
        tokenizer, [prompts[row] for row in (read["attention_mask"].sum(1) == longest).nonzero()[:, 0]], longest
    )
    ids, mask = (read[name].to(text_encoder.device) for name in ("input_ids", "attention_mask"))
    states = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (B, M, V)
    states = states * mask[..., None]
    mean = states.sum(dim=1, keepdim=True) / mask.sum(dim=1)[:, None, None]  # (B, 1, V)
    tokens = torch.cat([mean, states], dim=1)[:, :num_tokens]  # (B, min(T, 1 + M), V)
    tokens = nn.functional.pad(tokens, (0, 0, 0, num_tokens - tokens.shape[1]))  # (B, T, V)
    scale = tokens.square().mean(dim=-1, keepdim=True).sqrt()
    return tokens / scale.clamp(min=1e-6)


def _warn_of_cut(tokenizer: Callable, prompts: Sequence[str], longest: int) -> None:
    """prompts: those that fill the encoder's places."""
    lengths = [len(ids) for ids in tokenizer(list(prompts))["input_ids"]] if prompts else []
    cut = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > longest]
    if cut:
        warnings.warn(
            f"{len(cut)} of the prompts are longer than the {longest} tokens that the text encoder reads and were cut, first: {cut[0]!r}",
            stacklevel=4,  # beyond no_grad's wrapper
        )


def encode_many(
    tokenizer: Callable, text_encoder: nn.Module, prompts: Sequence[str], *, num_tokens: int, batch_size: int
) -> Tensor:
    """`encode_prompts` in batches, kept on the CPU: (B, T, V) float32.

    Raises:
        ValueError: as `encode_prompts`; a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, expected at least 1")
    chunks = [prompts[first : first + batch_size] for first in range(0, max(1, len(prompts)), batch_size)]
    encoded = [encode_prompts(tokenizer, text_encoder, chunk, num_tokens=num_tokens).cpu() for chunk in chunks]
    return torch.cat(encoded)
