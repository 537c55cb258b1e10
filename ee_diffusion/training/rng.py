"""Random numbers as pure functions of a sample's key: a counter-based generator, so batch-mates, ranks and history do not matter.

Here: keys and draws. Not here: which sample comes when (order.py), what is drawn (datasets.py). B samples, S the shape of one sample.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """What a draw is for: draws of different streams are independent. Numbers are part of the checkpoint contract: only append."""

    POSITION = 0
    NOISE = 1
    TIMESTEP = 2
    LABEL_DROP = 3
    FLIP = 4
    STEP = 5
    EPOCH = 6


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift(words: Tensor, bits: int) -> Tensor:
    return (words >> bits) & ((1 << (64 - bits)) - 1)  # logical, where >> on int64 is arithmetic


def mix(words: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014, fig. 16): int64 (...) -> int64 (...), a bijection; overflow wraps."""
    words = (words ^ _shift(words, 30)) * _MIX[0]
    words = (words ^ _shift(words, 27)) * _MIX[1]
    return words ^ _shift(words, 31)


def sample_keys(positions: Tensor, seed: int) -> Tensor:
    """positions (B,) int64 in the endless stream of samples -> keys (B,) int64; equal only for equal (seed, position)."""
    return mix(mix(positions * _GOLDEN + int(Stream.POSITION)) ^ scalar_key(seed, Stream.POSITION, 0))


def scalar_key(seed: int, stream: Stream, number: int) -> int:
    """One int64 for (seed, stream, number): the seed of an epoch's permutation or of a step's global generator."""
    words = mix(torch.tensor([seed, int(stream) + 1, number], dtype=torch.int64) * _GOLDEN)
    return int(mix(words[0] + 3 * mix(words[1] + 5 * words[2])))


def _words(keys: Tensor, stream: Stream, count: int) -> Tensor:
    """keys (B,) -> (B, count) independent 64-bit words."""
    base = mix(keys + _signed((int(stream) + 1) * _MIX[0]))[:, None]
    counter = torch.arange(1, count + 1, device=keys.device) * _GOLDEN  # (count,)
    return mix(base + counter)


def uniforms(keys: Tensor, stream: Stream) -> Tensor:
    """keys (B,) int64 -> (B,) float32, uniform on the multiples of 2^-24 in [0, 1)."""
    return _shift(_words(keys, stream, 1)[:, 0], 40).float() * 2.0**-24


def normals(keys: Tensor, stream: Stream, shape: tuple[int, ...]) -> Tensor:
    """keys (B,) int64 -> (B, *shape) float32, standard normal (Box and Muller, 1958; two values from one 64-bit word; |z| < 6.8)."""
    size = math.prod(shape)
    words = _words(keys, stream, (size + 1) // 2)  # (B, size/2)
    radius = _shift(words, 32).float().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = (words & 0xFFFFFFFF).float().mul_(2 * math.pi * 2.0**-32)
    values = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)  # (B, size rounded up to even)
    return values[:, :size].reshape(-1, *shape)
