"""The clock: order of turns, ratios, tables of part times and the arithmetic of the ideal. A counter stands in for the wall clock."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from ee_diffusion.core.trace import Trace
from ee_diffusion.metrics import timing as clocks
from ee_diffusion.metrics.timing import (
    Places,
    Timing,
    executed_counts,
    ideal_seconds,
    interleaved,
    medians,
    part_times,
    realised,
    time_table,
)


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(clocks.time, "perf_counter", lambda: self.now)

    def takes(self, seconds: float, name: str = ""):
        def call() -> None:
            self.now += seconds
            self.log.append(name)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def timing(*seconds: float, device: str = "cpu") -> Timing:
    return Timing(seconds, device, "float32", 4, 2, 1)


def test_candidates_take_turns_and_each_round_begins_with_the_next(clock: Clock):
    calls = {name: clock.takes(1, name) for name in "abc"}
    interleaved(calls, repeats=3, warmup=1, device="cpu")
    assert "".join(clock.log) == "abc" + "bca" + "cab" + "abc"


def test_warm_up_is_not_counted(clock: Clock):
    costs = iter([100.0, 100.0, 1.0, 2.0, 3.0])

    def call() -> None:
        clock.now += next(costs)

    found = interleaved({"it": call}, repeats=3, warmup=2, device="cpu")["it"]
    assert found.seconds == (1.0, 2.0, 3.0)
    assert (found.median, found.min, found.max, found.warmup) == (2.0, 1.0, 3.0, 2)


def test_seconds_stay_in_the_order_of_the_rounds(clock: Clock):
    costs = {"a": iter([1.0, 2.0, 4.0]), "b": iter([10.0, 10.0, 40.0])}

    def call(name: str):
        def run() -> None:
            clock.now += next(costs[name])

        return run

    found = interleaved({name: call(name) for name in costs}, repeats=3, warmup=0, device="cpu")
    assert found["a"].seconds == (1.0, 2.0, 4.0)
    assert found["b"].ratio(found["a"]) == 10.0


def test_what_was_measured_is_on_record(clock: Clock):
    found = interleaved({"a": clock.takes(1)}, repeats=1, warmup=0, device="cpu", dtype=torch.bfloat16, batch=8)["a"]
    assert (found.device, found.dtype, found.batch, found.threads) == ("cpu", "bfloat16", 8, torch.get_num_threads())
    assert interleaved({"a": clock.takes(1)}, repeats=1, warmup=0)["a"].dtype is None


def test_the_ratio_is_the_median_of_pairs_not_the_ratio_of_medians():
    drifting, steady = timing(1.0, 2.0, 30.0), timing(1.0, 1.0, 10.0)
    assert drifting.ratio(steady) == 2.0
    assert timing(3.0, 1.0, 2.0).ratio(timing(1.0, 2.0, 3.0)) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="one `interleaved` call"):
        drifting.ratio(timing(1.0))
    with pytest.raises(ValueError, match="one `interleaved` call"):
        drifting.ratio(timing(1.0, 1.0, 1.0, device="cuda"))


def test_a_cuda_device_is_synchronised_around_every_run(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.log.append("sync"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    found = interleaved({"a": clock.takes(1, "a")}, repeats=2, warmup=0, device="cuda:0")["a"]
    assert clock.log == ["sync", "a", "sync"] * 2
    assert found.device == "cuda (Test GPU)"


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}, {"candidates": {}}])
def test_senseless_settings_are_refused(wrong: dict):
    settings = {"candidates": {"a": lambda: None}, "repeats": 1, "warmup": 0} | wrong
    with pytest.raises(ValueError, match="expected at least 1, 1, 0"):
        interleaved(settings.pop("candidates"), **settings)


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="expected cpu, cuda or mps"):
        interleaved({"a": lambda: None}, repeats=1, warmup=0, device="meta")


def test_part_times_measure_the_counts_asked_for_and_no_other(clock: Clock):
    prepared = []

    def prepare(rows: int):
        prepared.append(rows)
        return clock.takes(0.5 + rows)

    found = part_times(prepare, [7, 3, 7], repeats=3, warmup=1, known={5: 9.0, 3: 1.0})
    assert found == {3: 1.0, 5: 9.0, 7: 7.5}
    assert prepared == [7]
    with pytest.raises(ValueError, match="0 rows"):
        part_times(prepare, [0], repeats=1, warmup=0)


def trace_of(ran: torch.Tensor, measured: torch.Tensor, answered: torch.Tensor) -> Trace:
    steps, samples, layers = ran.shape
    zeros = torch.zeros(steps, samples)
    return Trace(
        samples=torch.arange(samples),
        rows=torch.ones(steps, samples, dtype=torch.long),
        times=torch.arange(steps),
        exits=torch.tensor([1]),
        planned=torch.ones(steps, layers, dtype=torch.bool),
        depths=zeros.long(),
        scores=zeros[:, None],
        ran=ran,
        measured=measured,
        answered=answered,
        policy={},
    )


def test_executed_counts_of_a_trace():
    ran = torch.tensor([[[2, 2, 0], [2, 0, 0]], [[2, 2, 2], [2, 0, 0]], [[2, 2, 0], [2, 0, 0]]])  # (S=3, E=2, L=3)
    found = executed_counts(trace_of(ran, torch.tensor([[4], [4], [3]]), torch.tensor([[2], [2], [0]])))
    blocks = {("block 0", 4): 3, ("block 1", 2): 3, ("block 2", 2): 1}
    assert found == Counter(blocks | {("score 0", 4): 2, ("score 0", 3): 1, ("head 0", 2): 2})


def test_ideal_time_of_a_trace_equals_a_slow_loop(clock: Clock):
    generator = torch.Generator().manual_seed(0)
    ran = torch.randint(0, 3, (4, 3, 5), generator=generator)
    measured, answered = (torch.randint(0, 4, (4, 1), generator=generator) for _ in range(2))
    executed = executed_counts(trace_of(ran, measured, answered))

    def cost(part: str, rows: int) -> float:
        return {"block": 1.0, "score": 0.1, "head": 0.2}[part.split()[0]] * (rows + 0.25) + 0.01 * int(part.split()[1])

    names = [f"block {layer}" for layer in range(5)] + ["score 0", "head 0"]
    prepare = {name: (lambda rows, name=name: clock.takes(cost(name, rows))) for name in names}
    table = time_table(prepare, executed, repeats=1, warmup=0)
    expected = 0.5
    for step in range(4):
        for layer in range(5):
            rows = sum(int(ran[step, sample, layer]) for sample in range(3))
            expected += cost(f"block {layer}", rows) if rows else 0.0
        for kind, counts in (("score 0", measured), ("head 0", answered)):
            rows = int(counts[step, 0])
            expected += cost(kind, rows) if rows else 0.0
    assert ideal_seconds(executed, table, 0.5) == pytest.approx(expected)
    assert set(table) == set(executed)


class Slow(nn.Module):
    """Takes its seconds in turn, and says how often it ran."""

    def __init__(self, clock: Clock, *seconds: float):
        super().__init__()
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def forward(self, value: int) -> int:
        self.clock.now += self.seconds[self.calls % len(self.seconds)]
        self.calls += 1
        return value + 1


def test_parts_in_their_places(clock: Clock):
    """A forward of 3 s before, modules of 10 and 20 s with 5 s between them that belong to nobody, 7 s after; two calls after the first."""
    first, second, seen = Slow(clock, 10.0), Slow(clock, 20.0), []

    def forward() -> None:
        clock.now += 3
        value = first(0)
        clock.now += 5
        second(value)
        clock.now += 7

    def asked(name: str, seconds: float):
        def call(output: int) -> None:
            seen.append((name, output))
            clock.now += seconds

        return call

    after = {"score": ("a", asked("score", 0.5)), "head": ("a", asked("head", 0.25)), "last": ("b", asked("last", 2.0))}
    places = Places({"a": first, "b": second}, after, before="embed", behind="tail", device="cpu")
    found = medians([places.round(forward) for _ in range(3)])
    assert found == {"embed": 3, "a": 10, "b": 20, "tail": 7, "score": 0.5, "head": 0.25, "last": 2.0}
    assert seen == [("score", 1), ("head", 1), ("last", 2)] * 3
    assert first.calls == 6, "without and with what comes after, three rounds each"
    assert not first._forward_hooks
    assert not first._forward_pre_hooks


def test_medians_of_rounds():
    rounds = [{"a": 1.0, "b": 5.0}, {"a": 9.0, "b": 6.0}, {"a": 2.0, "b": 0.0}]
    assert medians(rounds) == {"a": 2.0, "b": 5.0}


def test_a_module_that_did_not_run_once_has_no_place(clock: Clock):
    modules = {"a": Slow(clock, 1.0), "b": Slow(clock, 1.0)}
    places = Places(modules, {}, before="embed", behind="tail", device="cpu")
    for forward in (lambda: modules["a"](0), lambda: [modules[name](0) for name in "aab"], lambda: None):
        with pytest.raises(ValueError, match="expected each once"):
            places.round(forward)
    assert not modules["a"]._forward_hooks


def test_a_known_table_is_not_measured_again(clock: Clock):
    executed = {("block 0", 2): 3, ("block 0", 4): 1}
    table = time_table(
        {"block 0": lambda rows: clock.takes(rows)}, executed, repeats=1, warmup=0, known={("block 0", 2): 9.0}
    )
    assert table == {("block 0", 2): 9.0, ("block 0", 4): 4.0}
    with pytest.raises(ValueError, match="nothing is prepared for 'block 0'"):
        time_table({}, executed, repeats=1, warmup=0)


def test_ideal_seconds_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="no time for"):
        ideal_seconds({("block 0", 3): 1}, {("block 0", 4): 1.0}, 0.0)
    with pytest.raises(ValueError, match="negative"):
        ideal_seconds({}, {}, -1.0)
    assert ideal_seconds({("block 0", 3): 2}, {("block 0", 3): 1.5, ("block 0", 4): 7.0}, 0.25) == 3.25
    assert realised(0.9, 1.0) == 0.9
    with pytest.raises(ValueError, match="positive"):
        realised(0.0, 1.0)


@pytest.mark.gpu
def test_a_launch_alone_is_not_the_time_of_its_kernel():
    matrix = torch.randn(8192, 8192, device="cuda")
    found = interleaved({"it": lambda: matrix @ matrix}, repeats=3, warmup=2, dtype=matrix.dtype)["it"]
    assert found.median > 1e-3  # 1.1e12 floating point operations
    assert found.device.startswith("cuda (")
