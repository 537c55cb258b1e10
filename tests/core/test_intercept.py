"""ForwardPatch: the forward is replaced on the instance alone and restored exactly, whatever stood there before."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from ee_diffusion.core.patch import ForwardPatch, Uncopied, restore_all


def doubled(original, *args):
    return 2 * original(*args)


def test_forward_is_replaced_and_restored():
    module, other, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.randn(3, 2)
    before, of_other, attributes, keys = module(x), other(x), dict(module.__dict__), list(module.state_dict())
    interception = ForwardPatch(module, doubled)
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
    interception = ForwardPatch(module, doubled)
    assert torch.equal(module(x), 2 * (x + 1))
    interception.restore()
    assert module.__dict__["forward"] is mine


def test_two_of_them_come_off_in_reverse_order_only():
    module, x = nn.Linear(2, 2), torch.randn(3, 2)
    before = module(x)
    first, second = ForwardPatch(module, doubled), ForwardPatch(module, doubled)
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
    interception = ForwardPatch(one, doubled, name="bar")
    assert (one.bar(3), Pipeline().bar(3)) == (6, 3)
    assert inspect.signature(one.bar) == inspect.signature(Pipeline().bar)
    interception.restore()
    assert one.bar(3) == 3
    assert one.__dict__ == {}


def test_all_are_restored_or_none():
    module, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.randn(3, 2)
    ours = [ForwardPatch(layer, doubled) for layer in module]
    theirs = ForwardPatch(module[0], doubled)
    found = module(x)
    with pytest.raises(RuntimeError, match="replaced by something else after"):
        restore_all(ours)
    assert torch.equal(module(x), found)
    theirs.restore()
    restore_all(ours)
    assert [layer.__dict__.keys() & {"forward", "__reduce_ex__"} for layer in module] == [set(), set()]


COPIES = {"copied": copy.deepcopy, "pickled": lambda one: pickle.loads(pickle.dumps(one))}


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_a_copy_is_plain_and_the_original_is_not_touched(made):
    module, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.randn(3, 2)
    attributes = [set(one.__dict__) for one in module.modules()]
    plain = module(x)
    ours = [ForwardPatch(one, doubled) for one in (module, module[0])]
    ours.append(ForwardPatch(module, doubled, name="extra_repr"))
    twice = ForwardPatch(module, doubled)
    module.elsewhere = module[0].forward  # as an offload hook keeps it
    found, copied = module(x), made(module)
    assert torch.equal(copied(x), plain)
    plain_first = copied[0](x)
    assert torch.equal(copied.elsewhere(x), plain_first)
    assert copied.elsewhere.__self__ is copied[0]
    assert torch.equal(module(x), found)
    del module.elsewhere, copied.elsewhere
    assert [set(one.__dict__) for one in copied.modules()] == attributes
    again = ForwardPatch(copied[0], doubled)
    torch.testing.assert_close(copied[0](x), 2 * plain_first)
    again.restore()
    twice.restore()
    restore_all(ours)
    assert torch.equal(module(x), plain)
    assert [set(one.__dict__) for one in module.modules()] == attributes


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_a_copy_comes_without_our_hooks_and_with_theirs(made):
    module, x, heard = nn.Linear(2, 2), torch.randn(3, 2), []
    module.register_forward_hook(_twice)
    plain = module(x)
    handle = module.register_forward_hook(Uncopied(lambda *args: heard.append(1)), with_kwargs=True)
    elsewhere = made(module)
    interception = ForwardPatch(module, doubled)
    copied = made(module)
    assert torch.equal(copied(x), plain)
    assert torch.equal(elsewhere(x), plain)
    assert heard == []
    assert [len(copied._forward_hooks), len(copied._forward_hooks_with_kwargs)] == [1, 0]
    interception.restore()
    assert torch.equal(module(x), plain)
    assert heard == [1]
    handle.remove()


def _twice(module, args, output):
    return 2 * output
