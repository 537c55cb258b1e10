"""Interception: the forward is replaced on the instance alone and restored exactly, whatever stood there before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ee_diffusion.core.intercept import Interception


def doubled(original, *args):
    return 2 * original(*args)


def test_forward_is_replaced_and_restored():
    module, other, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.randn(3, 2)
    before, of_other, attributes, keys = module(x), other(x), dict(module.__dict__), list(module.state_dict())
    interception = Interception(module, doubled)
    assert torch.equal(module(x), 2 * before)
    assert torch.equal(other(x), of_other), "the class is not touched"
    assert list(module.state_dict()) == keys
    interception.restore()
    assert torch.equal(module(x), before)
    assert module.__dict__.keys() == attributes.keys()


def test_what_stood_in_the_instance_stands_there_again():
    module, x = nn.Linear(2, 2), torch.randn(3, 2)
    mine = lambda x: x + 1  # noqa: E731
    module.forward = mine
    interception = Interception(module, doubled)
    assert torch.equal(module(x), 2 * (x + 1))
    interception.restore()
    assert module.__dict__["forward"] is mine


def test_two_of_them_come_off_in_reverse_order_only():
    module, x = nn.Linear(2, 2), torch.randn(3, 2)
    before = module(x)
    first, second = Interception(module, doubled), Interception(module, doubled)
    torch.testing.assert_close(module(x), 4 * before)
    with pytest.raises(RuntimeError, match="replaced by something else after"):
        first.restore()
    second.restore()
    first.restore()
    assert torch.equal(module(x), before)


def test_any_method_of_any_object():
    class Pipeline:
        def bar(self, total: int) -> int:
            return total

    one = Pipeline()
    interception = Interception(one, doubled, name="bar")
    assert (one.bar(3), Pipeline().bar(3)) == (6, 3)
    interception.restore()
    assert one.bar(3) == 3
    assert one.__dict__ == {}
