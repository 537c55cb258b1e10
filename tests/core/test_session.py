"""Sessions: steps in order, rows and samples kept apart, NaN raises after the step and keeps the trace."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from ee_diffusion.core.criteria import DepthTable, ErrorBudget, ExitPoint, Patience, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.core.session import Session, begin


def session_of(policy: Policy, rows=(0, 1, 2), num_steps: int = 2, **more) -> Session:
    return begin(policy, 5, (0, 2, 4), rows=torch.tensor(rows), num_steps=num_steps, **more)


def never(exit: int) -> None:
    raise AssertionError("nothing was to be measured here")


def test_steps_come_in_order_and_are_closed():
    session = session_of(Policy())
    with pytest.raises(ValueError, match="nothing to trace"):
        session.trace()
    with pytest.raises(ValueError, match="step 1 of 2, expected step 0"):
        session.step(1, 0.0)
    first = session.step(0, 9.0)
    with pytest.raises(ValueError, match="with the one before closed"):
        session.step(1, 0.0)
    first.close()
    with pytest.raises(ValueError, match="step 0 is closed"):
        first.close()
    with pytest.raises(ValueError, match="step 0 of 2, expected step 1"):
        session.step(0, 0.0)
    session.step(1, 3.0).close()
    with pytest.raises(ValueError, match="step 2 of 2"):
        session.step(2, 0.0)
    assert session.trace().times.tolist() == [9.0, 3.0]


def test_a_decision_by_hand():
    """Two images of two rows each and one of one; who leaves, who stays, what was counted."""
    session = session_of(Policy(Threshold(0.5)), rows=(0, 1, 0, 2, 1), num_steps=1)
    step = session.step(0, 7.0)
    asked = []

    def measure(scores):
        def at(exit: int) -> torch.Tensor:
            asked.append(exit)
            return torch.tensor(scores)

        return at

    assert step.offer(1, never) is None  # no exit there
    left = step.offer(0, measure([0.9, 0.9, 0.1, 0.6, 0.7]))  # scores of images: .1, .7, .6
    assert (left.exit, left.leave, left.keep, left.rows) == (0, [1, 3, 4], [0, 2], [1, 3, 4])
    assert step.rows.tolist() == [0, 2]
    assert (step.runs(0), step.finished) == (True, False)
    for layer in (0, 1):
        step.executed(layer)
    assert step.offer(2, measure([0.5, 0.9])) is None  # not above
    for layer in (2, 3):
        step.executed(layer)
    left = step.offer(4, measure([0.9, 0.8]))
    assert (left.exit, left.leave, left.keep, left.rows) == (2, [0, 1], [], [0, 2])
    assert step.finished
    assert not step.runs(4)
    step.close()
    trace = session.trace()
    assert asked == [0, 1, 2]
    assert trace.depths.tolist() == [[4, 0, 0]]
    assert trace.ran[0].tolist() == [[2, 2, 2, 2, 0], [0] * 5, [0] * 5]
    assert trace.measured.tolist() == [[5, 2, 2]]
    assert trace.rows.tolist() == [[2, 2, 1]]
    expected = torch.tensor([[[0.1, 0.7, 0.6], [0.5, torch.nan, torch.nan], [0.8, torch.nan, torch.nan]]])
    torch.testing.assert_close(trace.scores, expected, equal_nan=True)


def test_a_departed_row_never_comes_back_in_another_order():
    session = session_of(Policy(Threshold(0.5)), rows=(0, 1, 2, 3), num_steps=1)
    step = session.step(0, 0.0)
    step.offer(0, lambda exit: torch.tensor([0.0, 0.9, 0.0, 0.0]))
    left = step.offer(2, lambda exit: torch.tensor([0.0, 0.9, 0.0]))  # the second of rows 0, 2, 3
    assert (left.leave, left.rows) == ([1], [2])
    left = step.offer(4, lambda exit: torch.tensor([0.0, 0.9]))
    assert (left.leave, left.rows, step.rows.tolist()) == ([1], [3], [0])


def test_a_schedule_stops_everybody_without_a_score():
    session = session_of(Policy(Threshold(0.5), FixedDepth(2)), num_steps=1)
    step = session.step(0, 0.0)
    step.offer(0, lambda exit: torch.tensor([0.9, 0.0, 0.0]))
    left = step.offer(2, never)
    assert left.rows == [1, 2]
    assert step.offer(4, never) is None
    step.close()
    assert session.trace().depths.tolist() == [[0, 2, 2]]
    assert session.trace().measured.tolist() == [[3, 0, 0]]


def test_nothing_is_measured_where_nobody_can_stop():
    for policy in (Policy(), Policy(schedule=FixedDepth(4)), Policy(Threshold(0.5), exits=())):
        step = session_of(policy).step(0, 0.0)
        for depth in (0, 2):
            assert step.offer(depth, never) is None


def test_a_subset_of_the_exits_names_the_right_heads():
    session = session_of(Policy(Threshold((0.5,)), exits=(4,)), num_steps=1)
    step = session.step(0, 0.0)
    assert step.offer(0, never) is None
    asked = []
    left = step.offer(4, lambda exit: asked.append(exit) or torch.ones(3))
    step.answer_evaluated(4, 3)
    step.close()
    assert (asked, left.exit) == ([2], 2)
    trace = session.trace()
    assert (trace.exits.tolist(), trace.measured.tolist(), trace.answered.tolist()) == ([4], [[3]], [[3]])


def test_state_belongs_to_a_step():
    session = session_of(Policy(Patience(0.5, 2)), rows=(0,))
    for index in range(2):
        step = session.step(index, 0.0)
        assert step.offer(0, lambda exit: torch.ones(1)) is None, "a crossing of the step before does not count"
        assert step.offer(2, lambda exit: torch.ones(1)) is not None
        step.close()


def test_what_a_step_spent_is_missing_at_the_next():
    """Sample 0 spends 0.4 of a budget of 0.5 at step 0 and cannot afford it again; sample 1 has spent nothing."""
    session = session_of(Policy(ErrorBudget(0.5, (1.0, 1.0), 1.0), exits=(0,)), rows=(0, 1))
    for index, scores in enumerate(([0.6, 0.2], [0.6, 0.6])):
        step = session.step(index, 0.0)
        step.offer(0, lambda exit, scores=scores: torch.tensor(scores))
        step.close()
    assert session.trace().depths.tolist() == [[0, 5], [5, 0]]


@pytest.mark.parametrize("rows", [(0, 1, 2), (0, 1, 2, 0, 1, 2)])
def test_nan_stops_nobody_and_raises_after_the_step(rows):
    session = session_of(Policy(Threshold(0.0)), rows=rows)
    step = session.step(0, 0.0)
    scores = torch.ones(len(rows))
    scores[-2] = torch.nan
    left = step.offer(0, lambda exit: scores)
    assert 1 not in [rows[row] for row in left.rows]
    step.offer(2, lambda exit: torch.full((len(rows) // 3,), torch.nan))
    step.offer(4, lambda exit: torch.full((len(rows) // 3,), torch.nan))
    with pytest.raises(ValueError, match=r"NaN score at step 0 after depths \[0, 2, 4\]"):
        step.close()
    trace = session.trace()
    assert trace.depths.tolist() == [[0, 5, 0]]
    assert session.step(1, 0.0).index == 1, "the session can go on"


def test_nan_of_those_that_left_is_no_complaint():
    session = session_of(Policy(Threshold(0.5)), num_steps=1)
    step = session.step(0, 0.0)
    step.offer(0, lambda exit: torch.tensor([0.9, 0.1, 0.1]))
    step.offer(2, lambda exit: torch.tensor([0.9, 0.1]))
    step.close()
    assert session.trace().scores.isnan().sum() == 4


def test_plans_measure_nothing_and_raise_nothing():
    session = session_of(Policy(DepthTable(((2, 0, 5),))), num_steps=1)
    step = session.step(0, 0.0)
    for depth in (0, 2, 4):
        step.offer(depth, lambda exit: None)
    step.close()
    assert session.trace().depths.tolist() == [[2, 0, 5]]
    assert session.trace().measured.sum() == 0


def test_ids_of_samples_go_to_the_plan():
    plan = Policy(DepthTable(((0, 2, 4, 5),)))
    session = session_of(plan, num_steps=1, samples=torch.tensor([3, 1, 0]))
    step = session.step(0, 0.0)
    for depth in (0, 2, 4):
        step.offer(depth, lambda exit: None)
    step.close()
    assert session.trace().depths.tolist() == [[5, 2, 0]]
    assert session.trace().samples.tolist() == [3, 1, 0]
    with pytest.raises(ValueError, match="column"):
        session_of(plan, num_steps=1, samples=torch.tensor([3, 1, 9])).step(0, 0.0)


def test_as_many_rows_left_as_there_are_images():
    """Half the images of a guided batch have left: the rows that go on are as many as the images, but not one of each."""
    session = session_of(Policy(Threshold(0.5)), rows=(0, 1, 2, 3, 0, 1, 2, 3), num_steps=1)
    step = session.step(0, 0.0)
    step.offer(0, lambda exit: torch.tensor([0.9, 0.1, 0.9, 0.1] * 2))
    assert step.rows.tolist() == [1, 3, 5, 7]
    left = step.offer(2, lambda exit: torch.tensor([0.1, 0.8, 0.9, 0.7]))  # images 1, 3, 1, 3
    assert left.rows == [3, 7]
    expected = torch.tensor([torch.nan, 0.1, torch.nan, 0.7])
    step.close()
    torch.testing.assert_close(session.trace().scores[0, 1], expected, equal_nan=True)


def test_a_decision_knows_its_place():
    seen = []

    @dataclass(frozen=True)
    class Watching(Threshold):
        def floor(self, where):
            return None

        def decide(self, score, where, state):
            seen.append(where)
            return super().decide(score, where, state)

    session = session_of(Policy(Watching(1.0), exits=(2, 4)))
    for index, time in enumerate((7.5, 2.5)):
        step = session.step(index, time)
        for depth in range(5):
            step.offer(depth, lambda exit: torch.zeros(3))
        step.close()
    assert seen == [
        ExitPoint(0, 2, 7.5, 2, 0),
        ExitPoint(0, 2, 7.5, 4, 1),
        ExitPoint(1, 2, 2.5, 2, 0),
        ExitPoint(1, 2, 2.5, 4, 1),
    ]


def test_no_decision_is_asked_for_at_or_below_the_floor():
    asked = []

    @dataclass(frozen=True)
    class Counting(Threshold):
        def decide(self, score, where, state):
            asked.append(where.depth)
            return super().decide(score, where, state)

    step = session_of(Policy(Counting((0.9, 0.5, 0.2))), rows=(0, 1, 1), num_steps=1).step(0, 0.0)
    for depth in (0, 2, 4):
        step.offer(depth, lambda exit: torch.tensor([0.5, 0.6, 0.1]))  # of samples: 0.5, 0.1
    step.close()
    assert (asked, step.depths.tolist()) == ([4], [4, 5])


def test_thresholds_of_a_step_are_used_at_that_step():
    session = session_of(Policy(Threshold(((0.9, 0.9, 0.3), (0.9, 0.1, 0.9)))))
    for index in range(2):
        step = session.step(index, 0.0)
        for depth in (0, 2, 4):
            step.offer(depth, lambda exit: torch.full((3,), 0.5))
        step.close()
    assert session.trace().depths.tolist() == [[4] * 3, [2] * 3]


def test_record_all_measures_everything_and_stops_nobody():
    session = session_of(Policy(Threshold(0.0), record_all=True), num_steps=1)
    step = session.step(0, 0.0)
    for depth in (0, 2, 4):
        assert step.offer(depth, lambda exit: torch.ones(3)) is None
    step.close()
    trace = session.trace()
    assert trace.recorded_all
    assert (trace.depths.tolist(), trace.scores.sum()) == ([[5, 5, 5]], 9)


def test_a_sample_that_is_absent_takes_no_part():
    policy = Policy(Threshold(0.5), exits=(2,))
    session = session_of(policy, rows=(0, 1, 0, 2, 1))
    with pytest.raises(ValueError, match=r"absent is \(2,\), expected \(3,\)"):
        session.step(0, 1.0, absent=torch.zeros(2, dtype=torch.bool))
    step = session.step(0, 1.0, absent=torch.tensor([True, False, False]))
    assert step.rows.tolist() == [1, 3, 4]
    left = step.offer(2, lambda exit: torch.tensor([0.9, 0.1, 0.8]))
    assert (left.leave, left.rows) == ([0, 2], [1, 4])
    step.executed(3)
    step.close()
    session.step(1, 0.0, absent=torch.tensor([True, True, True])).close()
    trace = session.trace()
    assert trace.depths.tolist() == [[-1, 2, 5], [-1, -1, -1]]
    assert trace.ran[0].tolist() == [[0] * 5, [0] * 5, [0, 0, 0, 1, 0]]
    assert trace.scores[0, 0].isnan().tolist() == [True, False, False]
    assert not trace.needed[:, 0].any()
    assert torch.equal(replay(trace, policy), trace.depths)
    report = trace.report()
    assert (report.mean_executed, report.mean_needed, report.executed_per_step) == (0.5, 3.5, (0.5, 0.0))
    assert report.depth_histogram == {2: 1, 5: 1}


def test_nobody_is_absent_is_as_if_nothing_was_said():
    session = session_of(Policy())
    step = session.step(0, 1.0, absent=torch.zeros(3, dtype=torch.bool))
    assert (len(step.rows), step.depths.tolist()) == (3, [5, 5, 5])


def test_a_following_forward_leaves_where_the_first_left_and_adds_its_work():
    """Two forwards of one step, by hand: the second measures nothing, and state, depths and scores are the first's."""
    session = session_of(Policy(Patience(0.5, 1)), rows=(0, 1, 2), num_steps=1)
    with pytest.raises(ValueError, match="needs a step that was closed"):
        session.follow()
    step = session.step(0, 7.0)
    with pytest.raises(ValueError, match="none that is going on"):
        session.follow()
    scores = {0: torch.tensor([0.9, 0.1, 0.2]), 1: torch.tensor([0.3, 0.8])}

    def drive(step, measure):
        leaving = []
        for depth in range(5):
            left = step.offer(depth, measure)
            leaving += [] if left is None else [(depth, left.rows)]
            if left is not None:
                step.answer_evaluated(depth, len(left.rows))
            if step.runs(depth):
                step.executed(depth)
        step.close()
        return leaving

    assert drive(step, lambda exit: scores.get(exit, torch.tensor([0.4]))) == [(0, [0]), (2, [2])]
    state = session.state
    follower = session.follow()
    assert not follower.measures
    assert drive(follower, never) == [(0, [0]), (2, [2])]
    assert session.state is state
    trace = session.trace()
    assert trace.calls == (2,)
    assert trace.ran[0].tolist() == [[0] * 5, [2] * 5, [2, 2, 0, 0, 0]]
    assert (trace.measured.tolist(), trace.answered.tolist()) == ([[3, 2, 1]], [[2, 2, 0]])
    report = trace.report()
    assert report.mean_executed == pytest.approx(7 / 3)
    assert report.mean_needed == pytest.approx(7 / 3)
    assert "1 second calls of guidance followed" in report.summary()


def test_rows_that_are_carried_along_count_as_executed():
    session = session_of(Policy(schedule=FixedDepth(2)), keeps_exited_rows="a reason")
    step = session.step(0, 1.0)
    step.executed(0)
    step.close()
    mixed = session_of(Policy(DepthTable(((0, 5, 5),))), num_steps=1, keeps_exited_rows="a reason")
    step = mixed.step(0, 1.0)
    step.offer(0, lambda exit: None)
    step.executed(0)
    step.close()
    assert mixed.trace().ran[0, :, 0].tolist() == [1, 1, 1]
    assert mixed.trace().keeps_exited_rows == "a reason"
    assert "carried along, not dropped: a reason" in mixed.trace().report().summary()
