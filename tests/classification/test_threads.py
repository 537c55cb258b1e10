"""One classifier in several threads: forwards under exits take turns, plain ones of the stock model are what they were."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from queue import Queue

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import LAYERS, batch_for, exits_for, model_named

from ee_diffusion.classification.attach import attach
from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.methods import fastbert
from ee_diffusion.classification.model_specs import model_spec_of


def started(call) -> Queue:
    """What a call gives or raises in another thread, when it is done."""
    found: Queue = Queue()

    def run():
        try:
            found.put(call())
        except Exception as error:
            found.put(error)

    threading.Thread(target=run, daemon=True).start()
    return found


@pytest.mark.parametrize("pruning", [None, (0.1,) * LAYERS], ids=["exits", "pruned"])
def test_two_threads_get_what_each_gets_alone(pruning: tuple[float, ...] | None):
    """One stops inside a layer, after its queries and keys."""
    model, batch = model_named("Bert"), batch_for("Bert")
    other = {key: value[:2] for key, value in batch.items()}
    classifier = EarlyExitClassifier.from_classifier(model, exits_for(model, head="pooled", judge="none"))
    reached, go_on = threading.Event(), threading.Event()

    def pause(*args):
        if not reached.is_set():
            reached.set()
            assert go_on.wait(timeout=20)

    @torch.no_grad()
    def answers(inputs):
        return classifier(**inputs).logits

    @torch.no_grad()
    def plainly():
        return model(**batch).logits

    stock = plainly()
    classifier.policy, classifier.pruning = fastbert(0.9), pruning
    expected = [answers(batch), answers(other)]
    assert not torch.equal(expected[0], stock)
    blocks = model_spec_of(model).blocks(model)
    handle = blocks[1].attention.output.dense.register_forward_pre_hook(pause)
    try:
        first = started(lambda: answers(batch))
        assert reached.wait(timeout=20)
        second, third = started(lambda: answers(other)), started(plainly)
        assert torch.equal(third.get(timeout=20), stock), "not touched, and not waiting"
        go_on.set()
        assert torch.equal(first.get(timeout=20), expected[0])
        assert torch.equal(second.get(timeout=20), expected[1])
    finally:
        go_on.set()
        handle.remove()
    assert not any("forward" in module.__dict__ for module in (model, *blocks))
    assert torch.equal(plainly(), stock)


def test_a_forward_that_fails_leaves_the_model_free():
    model, batch = model_named("Bert"), batch_for("Bert")
    exits = exits_for(model, head="pooled", judge="none")
    with pytest.raises(KeyboardInterrupt), attach(model, exits, fastbert(0.6)):
        raise KeyboardInterrupt
    assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.no_grad(), attach(model, exits, fastbert(0.6)) as traces:
        model(**batch)
        with pytest.raises(ValueError, match="by this thread already"), attach(model, exits, fastbert(0.6)):
            pass
    assert len(traces) == 1
