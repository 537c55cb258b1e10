"""The laws of early exit: each one holds for every criterion, whatever drives the session. Used by tests/core and tests/diffusion.

1 off is the base model; 2 leaving restores it; 3 replay is the live run; 4 batch-mates do not matter; 5 a stricter threshold never
stops earlier; 6 save and load keep the decisions; 7 work said to be skipped is not executed. Here: what must hold. Not here: on what.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from factories import (
    CHANNELS,
    CRITERIA,
    IMAGES,
    LAYOUTS,
    SIZE,
    STEPS,
    Driver,
    Layout,
    Run,
    answer_at,
    base_outputs,
    criterion_named,
    driver_named,
    images_of,
    recorded,
    run,
    stricter,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ee_diffusion.core.criteria import Criterion, DepthTable, ErrorBudget, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay
from ee_diffusion.core.trace import Trace

NEAR = 1e-5  # a score this near to its threshold may fall on either side


def off_is_the_base_model(driver: Driver, layout: Layout) -> None:
    """Law 1: attached with nothing asked for, bit for bit; and a policy that never stops anybody."""
    before = base_outputs(driver, layout)
    with driver.ready():
        assert torch.equal(base_outputs(driver, layout), before)
    assert torch.equal(run(driver, Policy(), layout).outputs, before)
    never = run(driver, Policy(Threshold(1.0)), layout)
    assert torch.equal(never.outputs, before)
    assert (never.trace.depths == driver.num_layers).all()
    assert torch.equal(run(driver, Policy(Threshold(0.0), record_all=True), layout).outputs, before)


def leaving_restores(driver: Driver, policy: Policy, layout: Layout) -> None:
    """Law 2: after a run with exits the model is what it was: outputs, instance attributes, keys, hooks."""
    modules = list(driver.model.modules())
    before, keys = base_outputs(driver, layout), list(driver.model.state_dict())
    attributes = [dict(module.__dict__) for module in modules]
    run(driver, policy, layout)
    assert torch.equal(base_outputs(driver, layout), before)
    assert list(driver.model.state_dict()) == keys
    for module, had in zip(modules, attributes, strict=True):
        assert module.__dict__.keys() == had.keys()
        assert all(module.__dict__[name] is value for name, value in had.items())


def replay_is_the_live_run(live: Run, policy: Policy, everything: Trace) -> None:
    """Law 3: from the run's own trace; from a trace with all exits measured (the steps here do not depend on one another)."""
    assert torch.equal(replay(live.trace, policy), live.trace.depths)
    assert torch.equal(replay(everything, policy), live.trace.depths)
    other = Policy(Threshold(0.987654))
    with pytest.raises(ValueError, match="record_all"):
        replay(live.trace, other)
    replay(everything, other)


def batch_mates_do_not_matter(driver: Driver, policy: Policy, layout: Layout, together: Run) -> int:
    """Law 4: every image alone gives the same exits and the same answers. Returns the number of near cases left out."""
    near = 0
    for image in range(IMAGES):
        alone = run(driver, policy, layout, [image])
        columns = [image + IMAGES * branch for branch in range(layout.rows_per_sample)] if layout.apart else [image]
        depths = together.trace.depths[:, columns]  # (S, 1 or 2)
        differs = alone.trace.depths != depths
        if bool(differs.any()):
            assert not isinstance(policy.criterion, DepthTable)
            assert margin_of(together.trace, policy)[:, columns][differs].max() <= NEAR
            near += int(differs.sum())
            continue
        scores = together.trace.scores[:, :, columns]
        assert torch.equal(alone.trace.scores.isnan(), scores.isnan())
        torch.testing.assert_close(alone.trace.scores, scores, equal_nan=True, rtol=0, atol=NEAR)
        torch.testing.assert_close(alone.outputs, together.outputs[:, layout.places([image])], rtol=1e-4, atol=1e-4)
    if near:
        say_near(f"{near} in {policy.criterion}, {layout}")
    return near


def say_near(what: str) -> None:
    """Near cases are left out of law 4, so they stand in the summary of the tests, where what passing tests print does not."""
    warnings.warn(f"near cases of law 4: {what}", stacklevel=3)


def margin_of(trace: Trace, policy: Policy) -> Tensor:
    """(S, E): the smallest change of a sample's scores that changes its depth, found by replaying shifted scores."""
    least = torch.full(trace.depths.shape, torch.inf)
    for shift in (-NEAR, NEAR):
        values = {name: getattr(trace, name) for name in trace.__dataclass_fields__} | {"scores": trace.scores + shift}
        least[replay(Trace(**values), policy) != trace.depths] = NEAR
    return least


def stricter_never_stops_earlier(everything: Trace, criterion: Criterion, *, delayed: bool = False) -> None:
    """Law 5: on the same stored scores, and from the same state: what a budget does not spend at one step is there at the next."""
    num_layers = everything.planned.shape[1]
    same_state = slice(0, 1) if isinstance(criterion, ErrorBudget) else slice(None)  # steps
    before = replay(everything, Policy(criterion, delayed=delayed))[same_state]
    later = 0
    for other in stricter(criterion, num_layers):
        after = replay(everything, Policy(other, delayed=delayed))[same_state]
        assert (after >= before).all(), f"{other} stops earlier than {criterion}"
        later += int((after > before).sum())
    assert later > 0, "no stricter criterion changed anything: the law was not tried"


def save_and_load_keep_decisions(driver: Driver, policy: Policy, layout: Layout, live: Run, folder: Path) -> None:
    """Law 6: of the policy and of the trace (for the exits: `test_heads.py`)."""
    policy.save(folder / "policy.json")
    loaded = Policy.load(folder / "policy.json")
    assert loaded == policy
    again = run(driver, loaded, layout)
    assert torch.equal(again.outputs, live.outputs)
    live.trace.save(folder / "trace.safetensors")
    trace = Trace.load(folder / "trace.safetensors")
    assert (trace.policy, trace.recorded_all) == (live.trace.policy, live.trace.recorded_all)
    for name in ("samples", "rows", "times", "exits", "planned", "depths", "ran", "measured", "answered"):
        assert torch.equal(getattr(trace, name), getattr(live.trace, name)), name
    torch.testing.assert_close(trace.scores, live.trace.scores, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(replay(trace, loaded), live.trace.depths)
    assert sorted(path.name for path in folder.iterdir()) == ["policy.json", "trace.safetensors"]


def skipped_work_is_not_executed(driver: Driver, policy: Policy, layout: Layout) -> None:
    """Law 7: rows x tokens that reached a module inside each block, rows that reached each head and uncertainty module."""
    steps: list[Work] = []
    with counting(driver) as work:

        def each(step: int) -> None:
            work.clear()
            steps.append(work.current)

        trace = run(driver, policy, layout, each=each).trace
    for index, seen in enumerate(steps):
        measures = not isinstance(policy.criterion, DepthTable)
        step_work_is(driver, seen, trace, index, measures=measures, delayed=policy.delayed)


def step_work_is(
    driver: Driver, seen: Work, trace: Trace, index: int, *, measures: bool, delayed: bool = False
) -> None:
    """One step of law 7: what was counted is what the trace says, and no more than the decisions made necessary. Where they are late,
    nothing is measured of rows that leave there, nor at the last exit."""
    depths, rows = trace.depths[index], trace.rows[index]  # (E,)
    blocks = [int(trace.ran[index, :, layer].sum()) for layer in range(driver.num_layers)]
    assert seen.blocks == [count * driver.tokens for count in blocks]
    assert blocks == [int(rows[depths > layer].sum()) for layer in range(driver.num_layers)]
    exits = trace.exits.tolist()
    taken = [int(rows[depths == depth].sum()) for depth in exits]
    possible = [int(rows[depths >= depth + delayed].sum()) if measures else 0 for depth in exits]
    possible[-1] *= not delayed
    places = [driver.heads.depths.index(depth) for depth in exits]  # of the policy's exits among the heads
    assert trace.answered[index].tolist() == taken
    assert trace.measured[index].tolist() == possible
    assert [seen.heads[place] for place in places] == taken
    assert [seen.uncertainty[place] for place in places] == possible
    assert sum(seen.heads) == sum(taken)
    assert sum(seen.uncertainty) == sum(possible)


class Work:
    """What really ran in one step: rows x tokens inside each block, rows at each head and each uncertainty module."""

    def __init__(self, layers: int, exits: int):
        self.blocks, self.heads, self.uncertainty = [0] * layers, [0] * exits, [0] * exits


class Counter:
    """Hooks on a driver's modules; `clear()` begins a new step."""

    def __init__(self, driver: Driver):
        self.driver = driver
        self.clear()

    def clear(self) -> None:
        self.current = Work(self.driver.num_layers, len(self.driver.heads.depths))


class _LinearRows(TorchFunctionMode):
    """Counts the rows that are multiplied by the first columns of a layer's weight: an uncertainty module may use its weight in parts."""

    def __init__(self, counter: Counter):
        super().__init__()
        modules = counter.driver.heads.uncertainty_modules
        self.counter, self.places = counter, {module.weight.data_ptr(): exit for exit, module in enumerate(modules)}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and args[1].data_ptr() in self.places:
            self.counter.current.uncertainty[self.places[args[1].data_ptr()]] += len(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(driver: Driver) -> Iterator[Counter]:
    """Count the work of a driver. Heads without modules of their own (`released`) are counted by their `answer`."""
    counter, handles = Counter(driver), []

    def on_inner(layer: int):
        def hook(module, args, kwargs) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            counter.current.blocks[layer] += hidden.shape[0] * hidden.shape[1]

        return hook

    def on_head(exit: int):
        def hook(module, args) -> None:
            counter.current.heads[exit] += len(args[0])

        return hook

    for layer, inner in enumerate(driver.inners):
        handles.append(inner.register_forward_pre_hook(on_inner(layer), with_kwargs=True))
    for exit, head in enumerate(driver.heads.heads):
        handles.append(head.register_forward_pre_hook(on_head(exit)))
    patch = pytest.MonkeyPatch()
    if len(driver.heads.heads) == 0:
        original = driver.heads.answer

        def answer(exit, hidden, context):
            counter.current.heads[exit] += len(hidden)
            return original(exit, hidden, context)

        patch.setitem(driver.heads.__dict__, "answer", answer)
    try:
        with _LinearRows(counter):
            yield counter
    finally:
        patch.undo()
        for handle in handles:
            handle.remove()


def answers_are_those_of_truncated_models(driver: Driver, layout: Layout, live: Run) -> None:
    """Every row's output is what the model cut off at that row's depth answers, computed on the whole batch without any exit."""
    rows = layout.rows(IMAGES)
    for index in range(STEPS):
        inputs = images_of(list(range(IMAGES)), index, layout.rows_per_sample)
        depth_of_row = live.trace.depths[index][rows]  # (R,)
        for depth in depth_of_row.unique().tolist():
            chosen = depth_of_row == depth
            expected = answer_at(driver, depth, inputs)[chosen]
            torch.testing.assert_close(live.outputs[index][chosen], expected, rtol=1e-4, atol=1e-4)


def splits_the_batch(trace: Trace, num_layers: int) -> None:
    """The precondition of it all: at every step at least two distinct depths, somebody at full depth, somebody not."""
    for depths in trace.depths:
        assert len(depths.unique()) >= 2
        assert (depths == num_layers).any()


def image_shape(rows: int) -> tuple[int, ...]:
    """(R, C, H, W) of the tiny diffusion models."""
    return (rows, CHANNELS, SIZE, SIZE)


# --- cases: a driver, a layout and a criterion, by name


@dataclass(frozen=True)
class Case:
    """One cell of the table laws x drivers x layouts x criteria."""

    driver_name: str
    layout_name: str
    criterion_name: str
    delayed: bool = False

    def __str__(self) -> str:
        return f"{self.driver_name}-{self.layout_name}-{self.criterion_name}{'-delayed' if self.delayed else ''}"

    @property
    def driver(self) -> Driver:
        return driver_named(self.driver_name)

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.layout_name]

    @property
    def criterion(self) -> Criterion:
        return criterion_named(self.criterion_name, self.driver_name, self.layout_name)

    @property
    def policy(self) -> Policy:
        return Policy(self.criterion, delayed=self.delayed)

    @property
    def live(self) -> Run:
        return _live(self)

    @property
    def recorded(self) -> Trace:
        return recorded(self.driver_name, self.layout_name)


@functools.cache
def _live(case: Case) -> Run:
    return run(case.driver, case.policy, case.layout)


def cases(drivers: tuple[str, ...]) -> list[Case]:
    """Every criterion and every layout for some drivers; those that measure also with late decisions, on one layout of two rows each."""
    at_once = [Case(*names) for names in itertools.product(drivers, LAYOUTS, CRITERIA)]
    measuring = [name for name in CRITERIA if name != "planned"]
    return at_once + [
        Case(driver, "joint", name, delayed=True) for driver, name in itertools.product(drivers, measuring)
    ]


LAWS: dict[str, Callable[[Case, Path], object]] = {
    "splits": lambda case, folder: splits_the_batch(case.live.trace, case.driver.num_layers),
    "0-answers": lambda case, folder: answers_are_those_of_truncated_models(case.driver, case.layout, case.live),
    "2-leaving": lambda case, folder: leaving_restores(case.driver, case.policy, case.layout),
    "3-replay": lambda case, folder: replay_is_the_live_run(case.live, case.policy, case.recorded),
    "4-batch-mates": lambda case, folder: batch_mates_do_not_matter(case.driver, case.policy, case.layout, case.live),
    "5-stricter": lambda case, folder: stricter_never_stops_earlier(
        case.recorded, case.criterion, delayed=case.delayed
    ),
    "6-save-load": lambda case, folder: save_and_load_keep_decisions(
        case.driver, case.policy, case.layout, case.live, folder
    ),
    "7-work": lambda case, folder: skipped_work_is_not_executed(case.driver, case.policy, case.layout),
}
