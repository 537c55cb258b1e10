"""Late decisions: a score decides at the exit after its own. What is asked, who leaves where, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from factories import LAYOUTS, criterion_named, driver_named, recorded, run

from ee_diffusion.core.criteria import DepthTable, Patience, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.core.scores import pending_scores
from ee_diffusion.core.session import Session, StepSession, begin


def session_of(policy: Policy, rows=(0, 1, 2), num_steps: int = 1) -> Session:
    return begin(policy, 5, (0, 2, 4), rows=torch.tensor(rows), num_steps=num_steps)


def never(exit: int) -> None:
    raise AssertionError("nothing was to be measured here")


def saying(*scores: float):
    return lambda exit: torch.tensor(scores)


def at(step: StepSession, depth: int, *scores: float):
    """Offer, then look: as a lane does. Without scores nothing may be measured."""
    left = step.offer(depth, never)
    step.look(depth, saying(*scores) if scores else never)
    return left


def test_a_decision_by_hand():
    """Two images of two rows and one of one: each leaves one exit after the one where its score was high enough."""
    session = session_of(Policy(Threshold(0.5), delayed=True), rows=(0, 1, 0, 2, 1))
    step = session.step(0, 7.0)
    assert at(step, 0, 0.9, 0.9, 0.1, 0.6, 0.7) is None, "nobody has been measured yet"
    assert at(step, 1) is None, "no exit there"
    left = at(step, 2, 0.8, 0.9)  # rows 0 and 2 are left: what was measured of the others is gone with them
    assert (left.exit, left.leave, left.keep, left.rows) == (1, [1, 3, 4], [0, 2], [1, 3, 4])
    left = at(step, 4)  # the last exit: nobody would decide on it
    assert (left.exit, left.leave, left.rows) == (2, [0, 1], [0, 2])
    step.close()
    trace = session.trace()
    assert trace.depths.tolist() == [[4, 2, 2]]
    assert trace.measured.tolist() == [[5, 2, 0]]
    expected = torch.tensor([[[0.1, 0.7, 0.6], [0.8, math.nan, math.nan], [math.nan] * 3]])
    torch.testing.assert_close(trace.scores, expected, equal_nan=True)


def test_thresholds_are_those_of_the_exit_that_was_measured():
    step = session_of(Policy(Threshold((0.5, 0.9, 0.0)), delayed=True)).step(0, 0.0)
    at(step, 0, 0.4, 0.6, 0.4)
    assert at(step, 2, 0.8, 0.95).rows == [1]
    assert at(step, 4).rows == [2], "above 0.9, the threshold of the exit at depth 2"


@pytest.mark.parametrize("criterion", ["threshold", "threshold-per-exit", "patience-consecutive", "cumulative", "gate"])
def test_everybody_leaves_one_exit_later(criterion: str):
    everything = recorded("plain-output", "joint")
    rule, exits = criterion_named(criterion, "plain-output", "joint"), [*everything.exits.tolist(), 6]
    at_once, delayed = replay(everything, Policy(rule)), replay(everything, Policy(rule, delayed=True))
    following = dict(zip(exits, [*exits[1:], 6], strict=True))
    assert delayed.tolist() == [[following[depth] for depth in row] for row in at_once.tolist()]
    assert not torch.equal(delayed, at_once)


def test_nothing_is_measured_where_the_next_exit_is_everybodys_end():
    session = session_of(Policy(Threshold(0.5), FixedDepth(2), delayed=True))
    step = session.step(0, 0.0)
    assert at(step, 0) is None
    assert at(step, 2).rows == [0, 1, 2]
    assert at(step, 4) is None
    step.close()
    assert session.trace().measured.tolist() == [[0, 0, 0]]


def test_scores_do_not_outlive_their_step():
    session = session_of(Policy(Threshold(0.5), exits=(0, 4), delayed=True), num_steps=2)
    step = session.step(0, 1.0)
    at(step, 0, 0.9, 0.9, 0.9)
    step.close()
    step = session.step(1, 0.0)
    assert at(step, 0, 0.1, 0.1, 0.1) is None
    assert at(step, 4) is None


def test_a_nan_stops_nobody_and_raises_after_the_step():
    session = session_of(Policy(Threshold(0.5), delayed=True))
    step = session.step(0, 0.0)
    at(step, 0, math.nan, 0.9, 0.1)
    assert at(step, 2, 0.1, 0.1).rows == [1]
    assert at(step, 4) is None
    with pytest.raises(ValueError, match=r"NaN score at step 0 after depths \[0\]"):
        step.close()


def test_a_second_call_follows_and_asks_nothing():
    session = session_of(Policy(Threshold(0.5), delayed=True))
    step = session.step(0, 0.0)
    at(step, 0, 0.9, 0.1, 0.1)
    at(step, 2, 0.1, 0.1)
    at(step, 4)
    step.close()
    second = session.follow()
    assert at(second, 0) is None
    assert at(second, 2).rows == [0]
    second.close()


def test_recording_measures_every_exit_at_once():
    policy = Policy(Threshold(0.5), delayed=True, record_all=True)
    session = session_of(policy)
    step = session.step(0, 0.0)
    for depth in (0, 2, 4):
        assert step.offer(depth, saying(0.9, 0.1, 0.6)) is None
        step.look(depth, never)
    step.close()
    trace = session.trace()
    assert trace.measured.tolist() == [[3, 3, 3]]
    assert replay(trace, Policy(Threshold(0.5), delayed=True)).tolist() == [[2, 5, 2]]


def test_a_policy_says_in_its_file_that_it_is_late(tmp_path):
    policy = Policy(Threshold(0.5), exits=(1, 3), delayed=True)
    policy.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy
    assert policy.to_dict() != Policy(Threshold(0.5), exits=(1, 3)).to_dict()
    assert "delayed" not in Policy(Threshold(0.5)).to_dict(), "files of before are files of now"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Policy(delayed=True), "delayed=True with nothing to measure"),
        (lambda: Policy(DepthTable(((1,),)), delayed=True), "delayed=True with nothing to measure"),
        (lambda: Policy(Threshold(0.5), delayed=1), r"Policy\.delayed=1, expected True or False"),
        (
            lambda: Policy(Threshold(0.5), exits=(2,), delayed=True),
            r"delayed=True with exits at \(2,\), expected two or more",
        ),
        (
            lambda: begin(Policy(Threshold(0.5), delayed=True), 5, (2,), rows=torch.tensor([0]), num_steps=1),
            r"delayed=True with exits at \(2,\), expected two or more",
        ),
    ],
)
def test_refused(make, said: str):
    with pytest.raises(ValueError, match=said):
        make()


def test_scores_made_of_answers_are_counted_and_what_they_carry_is_there_at_the_next_exit():
    """PABEE's: whether the class is that of the exit before. Live, it is what a run with all exits measured says."""
    driver, layout = driver_named("plain-output"), LAYOUTS["joint"]
    rule = Patience(0.5, 1, score="agreement")
    everything = run(driver, Policy(rule, record_all=True), layout).trace
    delayed = run(driver, Policy(rule, delayed=True), layout).trace
    assert torch.equal(replay(everything, Policy(rule, delayed=True)), delayed.depths)
    assert len(delayed.depths.unique()) > 1
    left = torch.stack(
        [((delayed.depths == depth) * delayed.rows).sum(1) for depth in delayed.exits.tolist()], dim=1
    )  # (S, K) rows
    assert torch.equal(delayed.answered, delayed.measured + left)


def test_on_a_cpu_scores_are_where_they_are():
    scores = torch.tensor([0.25, 0.5])
    arriving = pending_scores(scores, [0, 1], 3, overlapping=True)
    assert (arriving.read(), arriving.ready, arriving.values is scores) == ([0.25, 0.5], None, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_before_the_score_is_read():
    """With synchronisation made an error: sending and the work behind it pass, a plain `tolist` does not."""
    scores = torch.rand(7, device="cuda")
    wanted, matrix = scores.tolist(), torch.rand(2048, 2048, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            scores.tolist()
        arriving = pending_scores(scores, list(range(7)), 0, overlapping=True)
        scores.zero_()  # what the device does later does not reach what was sent
        matrix @ matrix
        assert arriving.read() == wanted
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_late_and_at_once_give_the_same_answers_at_the_same_depths():
    """A plain driver, end to end: a late policy's outputs are those of the plan of its depths."""
    driver, layout = driver_named("plain-hidden"), LAYOUTS["single"]
    rule = criterion_named("threshold", "plain-hidden", "single")
    delayed = run(driver, Policy(rule, delayed=True), layout)
    depths = tuple(tuple(row) for row in delayed.trace.depths.tolist())
    planned = run(driver, Policy(DepthTable(depths)), layout)
    torch.testing.assert_close(delayed.outputs, planned.outputs, rtol=1e-4, atol=1e-4)
    assert len(delayed.trace.depths.unique()) > 1
