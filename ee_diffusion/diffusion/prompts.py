"""From words to the text tokens that a U-ViT takes, through any text encoder of transformers.

Here: one function on a tokenizer and a model. Not here: loading them (the caller), guidance (text_pipeline.py).
B prompts, M tokens of the longest, T text tokens of the U-ViT, V the encoder's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MAX_LENGTH = 77  # tokens of a prompt that the encoder reads; what is longer is cut


@torch.no_grad()
def encode_prompts(tokenizer: Callable, text_encoder: nn.Module, prompts: Sequence[str], *, num_tokens: int) -> Tensor:
    """prompts (B,) -> (B, T, V) float32: `[mean over tokens of h, h_1, ..., h_(T-1)]`, zeros beyond the prompt's end.

    h: the encoder's last hidden states over the whole prompt, so the first T - 1 know of the rest. Each row is scaled to a root mean
    square of 1, whatever the encoder's own scale.

    Raises:
        ValueError: no prompts, a prompt that is no text, fewer than one token.
    """
    if not len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts {list(prompts)[:3]!r}, expected at least one, each a str")
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens}, expected at least 1")
    read = tokenizer(list(prompts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    ids, mask = (read[name].to(text_encoder.device) for name in ("input_ids", "attention_mask"))
    states = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (B, M, V)
    states = states * mask[..., None]
    mean = states.sum(dim=1, keepdim=True) / mask.sum(dim=1)[:, None, None]  # (B, 1, V)
    tokens = torch.cat([mean, states], dim=1)[:, :num_tokens]  # (B, min(T, 1 + M), V)
    tokens = nn.functional.pad(tokens, (0, 0, 0, num_tokens - tokens.shape[1]))  # (B, T, V)
    scale = tokens.square().mean(dim=-1, keepdim=True).sqrt()
    return tokens / scale.clamp(min=1e-6)


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
