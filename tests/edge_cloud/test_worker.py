"""Whose turn it is at the cloud: slices, batches, failing passes, rollbacks meanwhile, and a client that wants everything for itself."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from language import model_named
from split_parts import EXITS, manager, prompt, whole

grpc = pytest.importorskip("grpc", reason="needs the extra cloud")

from ee_diffusion.edge_cloud.sessions import ContextManager, Refused  # noqa: E402
from ee_diffusion.edge_cloud.worker import Metrics, Worker  # noqa: E402

WIDTH = 32


def states(row: int) -> torch.Tensor:
    """(N, D) the edge's states at the first exit for what the whole model said."""
    with torch.no_grad():
        ids = torch.tensor([whole(row)])[:, :-1]
        return model_named("llama").model(ids, output_hidden_states=True).hidden_states[EXITS[0]][0]


class Watched:
    """A worker whose passes are written down: (rows, most positions of a row) each; the first waits until `go` is set."""

    def __init__(self, *, batch: int = 16, slice: int = 64):
        self.cloud, self.passes, self.go = manager(), [], threading.Event()
        self.compute = self.cloud.compute
        self.cloud.compute = self._compute  # type: ignore[method-assign]
        self.worker = Worker(self.cloud, Metrics(), batch=batch, slice=slice)

    def _compute(self, rows):
        assert self.go.wait(timeout=20)
        self.passes.append((len(rows), max(len(row.states) for row in rows)))
        return self.compute(rows)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *exception: object) -> None:
        self.go.set()
        self.worker.stop()

    def session(self, row: int, count: int | None = None) -> str:
        """A session with the first `count` states of a row."""
        session = self.worker.open("a")
        self.worker.upload("a", session, 0, hidden=states(row)[:count])
        return session


def test_a_long_prompt_is_read_in_slices_and_says_the_same():
    length = len(states(0))
    with Watched(slice=2) as watched:
        asked = watched.worker.ask("a", watched.session(0), length - 1)
        watched.go.set()
        token, seconds = asked.result(timeout=20)
    assert token == whole(0)[-1]
    assert seconds > 0
    assert watched.passes == [(1, 2)] * (length // 2) + [(1, 1)] * (length % 2)


def test_nobody_waits_for_the_whole_prompt_of_another():
    """While a prompt of 60 positions is read in slices of 4, short questions are answered in between, and a second prompt takes turns."""
    with Watched(slice=4) as watched:
        long = [watched.worker.open("a") for _ in range(2)]
        for session in long:
            watched.worker.upload("a", session, 0, hidden=torch.zeros(60, WIDTH))
        order: list[str] = []
        asked = [watched.worker.ask("a", session, 59) for session in long]
        short = [watched.worker.ask("a", watched.session(3, 3), 2) for _ in range(3)]
        for name, futures in (("long", asked), ("short", short)):
            for future in futures:
                future.add_done_callback(lambda _, name=name: order.append(name))
        watched.go.set()
        for future in [*asked, *short]:
            future.result(timeout=20)
    assert order == ["short"] * 3 + ["long"] * 2
    assert (3, 3) in watched.passes[:2]  # all three in one pass, after no more than one slice
    assert watched.passes.count((1, 4)) == 2 * 14  # the last 8 positions of a prompt are short
    sizes = [rows for rows, _ in watched.passes if rows > 3]
    assert not sizes


def test_uploads_go_on_during_a_pass():
    with Watched() as watched:
        session, other = watched.session(0), watched.worker.open("a")
        asked = watched.worker.ask("a", session, len(states(0)) - 1)
        time.sleep(0.05)  # the pass has begun and stands
        assert watched.worker.upload("a", other, 0, hidden=states(1)) == len(states(1))
        assert not asked.done()
        watched.go.set()
        assert asked.result(timeout=20)[0] == whole(0)[-1]


def test_a_rollback_during_a_pass_is_not_undone_by_it():
    hidden, begun = states(0), prompt(0).shape[1]
    with Watched() as watched:
        session = watched.session(0)
        asked = watched.worker.ask("a", session, len(hidden) - 1)
        time.sleep(0.05)
        watched.worker.rollback("a", session, begun)
        watched.go.set()
        with pytest.raises(Refused, match="rolled back"):
            asked.result(timeout=20)
        watched.worker.upload("a", session, begun, hidden=hidden[begun:])
        assert watched.worker.ask("a", session, begun + 1).result(timeout=20)[0] == whole(0)[begun + 2]


def test_a_close_during_a_pass_frees_everything():
    with Watched() as watched:
        session = watched.session(0)
        asked = watched.worker.ask("a", session, len(states(0)) - 1)
        time.sleep(0.05)
        watched.worker.close("a", session)
        watched.go.set()
        asked.result(timeout=20)
        assert watched.worker.usage() == (0, 0)


def test_who_asks_for_what_a_rollback_dropped_hurts_nobody_else():
    """The state of that position is gone and so is its token: refused alone, the others of the batch get theirs."""
    with Watched() as watched:
        watched.go.set()
        bad, good = watched.session(0), watched.session(1)
        length = len(states(0))
        watched.worker.ask("a", bad, length - 1).result(timeout=20)
        watched.worker.rollback("a", bad, length - 2)
        with watched.worker.changed:  # both in one turn
            asked = watched.worker.ask("a", bad, length - 3), watched.worker.ask("a", good, len(states(1)) - 1)
        with pytest.raises(Refused, match="roll back further"):
            asked[0].result(timeout=20)
        assert asked[1].result(timeout=20)[0] == whole(1)[-1]


def test_a_row_that_makes_a_pass_fail_fails_alone(monkeypatch: pytest.MonkeyPatch):
    with Watched() as watched:
        bad, good = watched.session(3, 2), watched.session(1)
        compute = watched.compute

        def failing(rows):
            if any(row.context is watched.cloud.sessions[bad] for row in rows):
                raise RuntimeError("out of memory")
            return compute(rows)

        watched.compute = failing
        with watched.worker.changed:
            asked = watched.worker.ask("a", bad, 1), watched.worker.ask("a", good, len(states(1)) - 1)
        watched.go.set()
        with pytest.raises(Refused, match="the pass failed: RuntimeError"):
            asked[0].result(timeout=20)
        assert asked[1].result(timeout=20)[0] == whole(1)[-1]


def test_who_gave_up_is_forgotten_and_the_end_is_told():
    with Watched() as watched:
        session = watched.worker.open("a")
        waiting = watched.worker.ask("a", session, 3)
        assert waiting.cancel()
        kept = watched.worker.ask("a", session, 4)
        watched.worker.stop()
        assert kept.exception(timeout=20) is not None


def test_a_worker_needs_room_for_one():
    for wrong in ({"batch": 0, "slice": 1}, {"batch": 1, "slice": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            Worker(manager(), Metrics(), **wrong)
    assert isinstance(manager(), ContextManager)


@pytest.mark.parametrize("broken", ["take", "finish"])
def test_a_turn_that_fails_is_told_and_the_worker_lives_on(broken: str):
    with Watched() as watched:
        watched.go.set()
        session, last = watched.session(0), len(states(0)) - 1
        working = getattr(watched.cloud, broken)

        def failing(*args, **kwargs):
            setattr(watched.cloud, broken, working)
            raise RuntimeError("broken")

        setattr(watched.cloud, broken, failing)
        with pytest.raises(Refused, match="the server failed: RuntimeError"):
            watched.worker.ask("a", session, last).result(timeout=20)
        assert watched.worker.ask("a", watched.session(0), last).result(timeout=20)[0] == whole(0)[-1]


def test_two_questions_of_one_session_are_not_of_one_pass():
    with Watched() as watched:
        session, other = watched.session(3, 3), watched.session(3, 3)
        with watched.worker.changed:
            asked = [watched.worker.ask("a", one, 2) for one in (session, session, other)]
        watched.go.set()
        tokens = [future.result(timeout=20)[0] for future in asked]
    assert len(set(tokens)) == 1
    assert watched.passes[0] == (2, 3)
