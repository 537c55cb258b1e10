"""Captions through a frozen text encoder of transformers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from ee_diffusion.diffusion.pipelines.prompts import encode_many
from train.work.report import process_state

TEXTS_AT_ONCE = 64


def encode_texts(name: str, texts: list[str], *, num_tokens: int) -> Tensor:
    """texts -> (Q, num_tokens, V) float32. `name`: path or Hub name of the encoder and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    encoder = AutoModel.from_pretrained(name, dtype=torch.float32).to(process_state().device).eval()
    return encode_many(tokenizer, encoder, texts, num_tokens=num_tokens, batch_size=TEXTS_AT_ONCE)
