"""Hidden states as bytes on the wire, and back. Sizes are exact: N positions x D x bytes of the kind, int8: N x (D + 4), a scale a token.

N positions, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


def payload_bytes(count: int, width: int, *, kind: str) -> int:
    """Bytes of `count` positions of width D. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"encoding {kind!r}, expected one of {sorted(KINDS)}")
    return count * (width * KINDS[kind].itemsize + (4 if kind == "int8" else 0))


def encode(hidden: Tensor, *, kind: str) -> bytes:
    """hidden (N, D) -> its bytes. int8: per token `q = round(h / s)`, `s = max |h| / 127` as float32 in front of all tokens.

    Raises:
        ValueError: an unknown kind; hidden states that are not finite, or too large for float16 (bfloat16 or int8 take them).
    """
    payload_bytes(0, 0, kind=kind)
    hidden = hidden.detach().float().cpu()
    if not bool(hidden.isfinite().all()):
        raise ValueError("hidden states hold NaN or infinity, expected finite numbers")
    if kind == "int8":
        scale = hidden.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127  # (N, 1)
        return scale.numpy().tobytes() + (hidden / scale).round().to(torch.int8).numpy().tobytes()
    if overflows(hidden, kind=kind):
        raise ValueError(f"a hidden state of {float(hidden.abs().max()):.3g} overflows {kind}: use bfloat16 or int8")
    return hidden.to(KINDS[kind]).contiguous().view(torch.uint8).numpy().tobytes()


def overflows(hidden: Tensor, *, kind: str) -> bool:
    """Whether finite states are too large for an encoding; int8 has a scale, nothing is."""
    return kind != "int8" and not bool(hidden.float().to(KINDS[kind]).isfinite().all())


def decode(payload: bytes, count: int, width: int, *, kind: str) -> Tensor:
    """What `encode` made -> (N, D) float32.

    Raises:
        ValueError: another number of bytes than N positions need; numbers that are not finite.
    """
    expected = payload_bytes(count, width, kind=kind)
    if count < 1 or len(payload) != expected:
        raise ValueError(f"{len(payload)} bytes, expected {expected}: {count} positions of width {width} in {kind}")
    if kind == "int8":
        scale = torch.frombuffer(bytearray(payload[: 4 * count]), dtype=torch.float32)[:, None]  # (N, 1)
        hidden = torch.frombuffer(bytearray(payload[4 * count :]), dtype=torch.int8).view(count, width) * scale
    else:
        hidden = torch.frombuffer(bytearray(payload), dtype=KINDS[kind]).view(count, width).float()
    if not bool(hidden.isfinite().all()):
        raise ValueError("hidden states hold NaN or infinity, expected finite numbers")
    return hidden
