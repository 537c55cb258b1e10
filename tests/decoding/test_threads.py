"""One language model in several threads, and what happens around the end of a generation: answers are right, the model is restored."""

from __future__ import annotations

import functools
import threading
from queue import Queue

import pytest
import torch
from language import EXITS, Listener, alone, generate, model_named, new_tokens, plain, policy_named
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.model_specs import layers_of
from ee_diffusion.decoding.self_speculative import self_speculative_generate

NAME = "llama"
OFTEN = Policy(Threshold(0.02, "margin"), exits=(EXITS[1],))
WAYS = {
    "propagate": functools.partial(generate, policy=policy_named("softmax", NAME)),
    "recompute": functools.partial(generate, policy=OFTEN, exit_missing="recompute"),
    "lossless": functools.partial(
        plain, custom_generate=self_speculative_generate, exit_depth=4, draft_tokens=3, output_logits=False
    ),
}


def is_patched(model: PreTrainedModel) -> bool:
    return any("forward" in module.__dict__ for module in (model, *layers_of(model)))


class Pausing(BaseStreamer):
    """Stops the generation at a token, in the middle, until it is told to go on."""

    def __init__(self):
        self.heard, self.reached, self.go_on = 0, threading.Event(), threading.Event()

    def put(self, value):
        self.heard += 1
        if self.heard == 4:
            self.reached.set()
            assert self.go_on.wait(timeout=20)

    def end(self):
        pass


class Thread(threading.Thread):
    """A call whose result or error can be had."""

    def __init__(self, call):
        super().__init__(daemon=True)
        self.call, self.found = call, Queue()

    def run(self):
        try:
            self.found.put(self.call())
        except Exception as error:
            self.found.put(error)

    def result(self):
        found = self.found.get(timeout=20)
        if isinstance(found, Exception):
            raise found
        return found


@pytest.mark.parametrize("way, other", list(zip(WAYS, [*WAYS][1:] + [*WAYS][:1], strict=True)))
def test_two_threads_get_what_each_gets_alone(way: str, other: str):
    """One stops in mid-answer; plain calls of another thread are right meanwhile, and one with exits of another kind is right after it."""
    model, runs = model_named(NAME), (WAYS[way], WAYS[other])
    expected = [run(model, inputs=alone(row)).sequences for row, run in enumerate(runs)]
    stock = plain(model, alone(2)).sequences
    streamer = Pausing()
    first = Thread(lambda: runs[0](model, inputs=alone(0), exit_streamer=streamer))
    first.start()
    assert streamer.reached.wait(timeout=20)
    second = Thread(lambda: runs[1](model, inputs=alone(1)))
    try:
        assert torch.equal(Thread.result(started(lambda: plain(model, alone(2)))).sequences, stock)
        assert torch.equal(plain(model, alone(2)).sequences, stock)
        second.start()
        second.join(timeout=0.2)
        assert second.is_alive()  # it waits
    finally:
        streamer.go_on.set()
    assert torch.equal(first.result().sequences, expected[0])
    assert torch.equal(second.result().sequences, expected[1])
    assert not is_patched(model)
    assert torch.equal(plain(model, alone(2)).sequences, stock)


def started(call) -> Thread:
    thread = Thread(call)
    thread.start()
    return thread


@pytest.mark.parametrize("way", WAYS)
def test_many_threads(way: str):
    model, run = model_named(NAME), WAYS[way]
    expected = [run(model, inputs=alone(row)).sequences for row in range(4)]
    stock = [plain(model, alone(row)).sequences for row in range(4)]
    threads = [started(lambda row=row: run(model, inputs=alone(row))) for row in range(4)]
    plain_ones = [started(lambda row=row: plain(model, alone(row))) for row in range(4)]
    for row in range(4):
        assert torch.equal(threads[row].result().sequences, expected[row])
        assert torch.equal(plain_ones[row].result().sequences, stock[row])
    assert not is_patched(model)


@pytest.mark.parametrize("way", WAYS)
def test_the_streamers_end_comes_when_the_model_is_restored(way: str):
    """Whoever hears the end sends the next request: it finds the model as it was."""
    model, run = model_named(NAME), WAYS[way]
    stock, after = plain(model, alone(1)).sequences, []

    class Next(Listener):
        def end(self):
            super().end()
            after.append((is_patched(model), plain(model, alone(1)).sequences, run(model, inputs=alone(0)).sequences))

    listener = Next()
    out = run(model, inputs=alone(0), exit_streamer=listener)
    assert [token for tokens in listener.heard for token in tokens] == out.sequences[0].tolist()
    assert listener.done == 1
    ((patched, plainly, again),) = after
    assert not patched
    assert torch.equal(plainly, stock)
    assert torch.equal(again, out.sequences)


@pytest.mark.parametrize("way", WAYS)
def test_a_generation_within_a_generation_is_refused(way: str):
    model, run = model_named(NAME), WAYS[way]

    class Asking(LogitsProcessor):
        def __call__(self, input_ids, scores):
            run(model, inputs=alone(0))
            return scores

    with pytest.raises(ValueError, match="by this thread already"):
        run(model, inputs=alone(0), logits_processor=LogitsProcessorList([Asking()]))
    assert not is_patched(model)
    assert len(new_tokens(generate(model, policy_named("softmax", NAME), alone(0)))) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_processor_may_ask_the_model_itself(way: str):
    """In the same thread, in mid-generation: it gets the whole model."""
    model, run, found = model_named(NAME), WAYS[way], []
    expected = model(alone(2)["input_ids"]).logits

    class Asking(LogitsProcessor):
        def __call__(self, input_ids, scores):
            found.append(model(alone(2)["input_ids"]).logits)
            return scores

    out = run(model, inputs=alone(0), logits_processor=LogitsProcessorList([Asking()]))
    assert torch.equal(out.sequences, run(model, inputs=alone(0)).sequences)
    assert len(found) > 2
    assert all(torch.equal(logits, expected) for logits in found)
