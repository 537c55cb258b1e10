"""Forwards replaced for one thread: others are served as before, wait for their turn, and every forward is restored."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from ee_diffusion.core.patch import patched

X = torch.ones(1, 2)


def doubled(original, *args):
    return 2 * original(*args)


def in_thread(call) -> list:
    """What a call gives in another thread, within ten seconds."""
    found: list = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(timeout=10)
    return found


@torch.no_grad()
def test_it_is_for_the_calls_of_its_thread():
    module = nn.Linear(2, 2)
    before = module(X)
    with patched([(module, doubled)]):
        assert torch.equal(module(X), 2 * before)
        (other,) = in_thread(lambda: module(X).detach())
        assert torch.equal(other, before)
    assert torch.equal(module(X), before)
    assert "forward" not in module.__dict__


def test_another_thread_waits_and_the_same_one_is_refused():
    module, order = nn.Linear(2, 2), []

    def second():
        with patched([(module, doubled)]):
            order.append("second")

    thread = threading.Thread(target=second, daemon=True)
    with patched([(module, doubled)]):
        thread.start()
        with (
            pytest.raises(ValueError, match="attached to this Linear by this thread already"),
            patched([(module, doubled)]),
        ):
            pass
        thread.join(timeout=0.2)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]
    assert "forward" not in module.__dict__


def test_every_forward_is_restored_whatever_fails():
    first, second, third = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(AttributeError), patched([(first, doubled), (object(), doubled)]):  # the second has no forward
        pass
    with pytest.raises(KeyboardInterrupt), patched([(first, doubled)]):
        raise KeyboardInterrupt
    assert "forward" not in first.__dict__
    theirs, expected = (lambda x: x), second(X)
    with (
        pytest.raises(RuntimeError, match="replaced by something else"),
        patched([(one, doubled) for one in (first, second, third)]),
    ):
        ours, second.forward = second.forward, theirs
    assert second.forward is theirs
    assert "forward" not in first.__dict__ | third.__dict__
    assert torch.equal(ours(X), expected), "what cannot be taken out does nothing more"
    with patched([(first, doubled)]):  # and the modules are free again
        pass
