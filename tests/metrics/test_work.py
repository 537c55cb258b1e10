"""Rows x tokens that reach a module, and hooks that leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ee_diffusion.metrics.work import WorkCounter


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.skipped = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if self.skipped else self.inner(input=tokens)


def test_rows_times_tokens_of_every_call():
    blocks = [Block(), Block()]
    with WorkCounter({f"block {i}": block.inner for i, block in enumerate(blocks)}) as work:
        blocks[0](torch.zeros(5, 7, 4))
        blocks[0](torch.zeros(2, 3, 4))
        blocks[1](torch.zeros(6, 4))
    assert work.seen == {"block 0": ((5, 7), (2, 3)), "block 1": ((6, 1),)}
    assert work.calls == {"block 0": 2, "block 1": 1}
    assert work.rows == {"block 0": 7, "block 1": 6}
    assert work.rows_times_tokens == {"block 0": 5 * 7 + 2 * 3, "block 1": 6}


def test_a_skipped_block_counts_nothing_inside_though_a_hook_on_the_block_fires():
    block = Block()
    block.skipped = True
    with WorkCounter({"inside": block.inner, "itself": block}) as work:
        block(torch.zeros(5, 7, 4))
    assert work.rows_times_tokens == {"inside": 0, "itself": 35}


def test_the_first_tensor_counts_positional_before_keyword():
    class Takes(nn.Module):
        def forward(self, flag, tokens, *, other):
            return tokens

    module = Takes()
    with WorkCounter({"it": module}) as work:
        module(True, torch.zeros(2, 3, 4), other=torch.zeros(9, 9, 9))
        module(True, tokens=torch.zeros(5, 3, 4), other=torch.zeros(9, 9, 9))
    assert work.seen["it"] == ((2, 3), (5, 3))


def test_hooks_are_gone_afterwards_even_after_an_exception():
    block = Block()
    work = WorkCounter({"it": block.inner})
    with pytest.raises(RuntimeError), work:
        block(torch.zeros(5, 7, 3))
    assert not block.inner._forward_pre_hooks
    assert work.calls == {"it": 1}
    with work:
        block(torch.zeros(5, 7, 4))
    block(torch.zeros(5, 7, 4))
    assert work.seen == {"it": ((5, 7),)}
    assert not block.inner._forward_pre_hooks


def test_counting_changes_no_output():
    block, tokens = Block(), torch.randn(2, 3, 4)
    plain = block(tokens)
    with WorkCounter({"it": block.inner}):
        assert torch.equal(block(tokens), plain)


def test_bad_use_is_refused():
    block = Block()
    with pytest.raises(ValueError, match="no modules"):
        WorkCounter({})
    with pytest.raises(ValueError, match="two of the names"):
        WorkCounter({"a": block, "b": block})
    work = WorkCounter({"it": block.inner})
    with work, pytest.raises(ValueError, match="already counting"), work:
        pass
    with work, pytest.raises(ValueError, match=r"\(2, 3, 4, 4\), expected \(R, N, D\)"):
        block(torch.zeros(2, 3, 4, 4))
    assert not block.inner._forward_pre_hooks
