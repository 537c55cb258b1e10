"""Memory against slow float64 readings: polynomials through what each row remembers, and the error that their remainder promises."""

from __future__ import annotations

import math

import pytest
import torch

from ee_diffusion.core.history import OutputHistory


def filled(times: list[list[float]], length: int, trajectory) -> OutputHistory:
    """A memory of len(times) rows; row r was told `trajectory(r, t)` at each of its times, in that order."""
    memory = OutputHistory.empty(torch.zeros(len(times), 2, 3, dtype=torch.float64), length=length)
    for place in range(max(map(len, times))):
        rows = torch.tensor([row for row in range(len(times)) if place < len(times[row])])
        time = torch.tensor([times[row][place] for row in rows.tolist()], dtype=torch.float64)
        memory = memory.append(
            rows, torch.stack([trajectory(row, t) for row, t in zip(rows.tolist(), time, strict=True)]), time
        )
    return memory


def wave(row: int, time: torch.Tensor) -> torch.Tensor:
    return torch.sin(time / (3 + row) + torch.arange(6.0, dtype=torch.float64).reshape(2, 3))


def lagrange(points: list[tuple[float, torch.Tensor]], time: float) -> torch.Tensor:
    total = torch.zeros_like(points[0][1])
    for j, (t_j, value) in enumerate(points):
        total = total + value * math.prod((time - t_m) / (t_j - t_m) for m, (t_m, _) in enumerate(points) if m != j)
    return total


@pytest.mark.parametrize("length", [1, 2, 3])
def test_recall_is_the_polynomial_through_the_newest_values_of_each_row(length: int):
    times = [[9.0, 8.0, 6.5, 5.0], [9.0, 7.0], [9.0]]
    memory = filled(times, length, wave)
    assert memory.count.tolist() == [min(length, len(told)) for told in times]
    now = torch.tensor([4.0, 6.0, 8.5], dtype=torch.float64)
    for row, told in enumerate(times):
        points = [(t, wave(row, torch.tensor(t, dtype=torch.float64))) for t in told[-length:]]
        torch.testing.assert_close(memory.extrapolate(now)[row], lagrange(points, now[row].item()))
        assert memory.remainder(now)[row].item() == pytest.approx(
            math.prod(abs(now[row].item() - t) for t, _ in points)
        )


def test_rows_that_remember_nothing_recall_zeros_and_promise_nothing():
    memory = OutputHistory.empty(torch.ones(3, 2), length=2)
    now = torch.full((3,), 1.0, dtype=torch.float64)
    assert torch.equal(memory.extrapolate(now), torch.zeros(3, 2))
    assert memory.expected_error(now).isnan().all()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_expected_error_is_exact_where_the_next_derivative_is_constant(length: int):
    """A polynomial of degree `length` is missed by recall by its leading coefficient times the remainder."""

    def trajectory(row: int, time: torch.Tensor) -> torch.Tensor:
        return (1 + row) * time**length * torch.ones(2, 3, dtype=torch.float64) + time

    memory = filled([[9.0, 7.5, 7.0, 5.0], [9.0, 8.0, 6.0, 5.5]], length, trajectory)
    now = torch.tensor([3.0, 4.5], dtype=torch.float64)
    true = torch.stack([trajectory(row, t) for row, t in enumerate(now)])
    missed = (memory.extrapolate(now) - true).flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(memory.expected_error(now), missed)


def test_nothing_is_promised_before_recall_was_put_to_the_test():
    now = torch.full((1,), 5.0, dtype=torch.float64)
    assert filled([[9.0, 8.0]], 2, wave).expected_error(now).isnan().all()
    assert filled([[9.0, 8.0, 7.0]], 2, wave).expected_error(now).isfinite().all()


def test_a_second_answer_at_the_same_time_takes_the_place_of_the_first():
    memory = filled([[9.0, 8.0, 7.0]], 2, wave)
    again = memory.append(torch.tensor([0]), torch.full((1, 2, 3), 5.0, dtype=torch.float64), memory.times[:, 0])
    assert torch.equal(again.times, memory.times)
    assert (again.values[0, 0] == 5).all()
    assert torch.equal(again.values[0, 1], memory.values[0, 1])
    assert torch.equal(again.bend, memory.bend)


def test_remembering_leaves_what_was_passed_in_and_the_other_rows_alone():
    memory = filled([[9.0, 8.0], [9.0, 8.5]], 2, wave)
    copies = [tensor.clone() for tensor in (memory.values, memory.times)]
    after = memory.append(torch.tensor([1]), torch.zeros(1, 2, 3, dtype=torch.float64), torch.tensor([4.0]))
    assert all(torch.equal(a, b) for a, b in zip(copies, (memory.values, memory.times), strict=True))
    assert torch.equal(after.values[0], memory.values[0])
    assert after.times.tolist() == [[8.0, 9.0], [4.0, 8.5]]


def test_bad_input():
    with pytest.raises(ValueError, match="length 0, expected at least 1"):
        OutputHistory.empty(torch.zeros(2, 3), length=0)
    memory = OutputHistory.empty(torch.zeros(2, 3), length=2)
    with pytest.raises(ValueError, match=r"value \(1, 4\) and time \(1,\), expected \(1, 3\)"):
        memory.append(torch.tensor([0]), torch.zeros(1, 4), torch.zeros(1))
    with pytest.raises(ValueError, match="one time a row"):
        memory.append(torch.tensor([0, 1]), torch.zeros(2, 3), torch.zeros(1))
