"""FLOPs of what is really executed, counted by torch's own counter: matrix products and attention, on every device.

Here: attention on a CPU, which that counter leaves out. Not here: formulas of models. B rows, H heads, N and M tokens, d width of a head.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *rest, out_shape=None, **more) -> int:
    """Queries (B, H, N, d) times keys (B, H, M, d), and the weights times the values: `4 B H N M d`."""
    rows, heads, tokens, width = query
    return 4 * rows * heads * tokens * key[2] * width


def counting_flops() -> FlopCounterMode:
    """A context manager; `get_total_flops()` of it afterwards. Of this thread alone; contexts may nest, each counts all within."""
    return FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention})
