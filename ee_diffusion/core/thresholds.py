"""Thresholds: one number, one per exit (K,), or one per step and exit (S, K). Here: reading, checking. Not here: rules (criteria.py).

K exits of the policy, S steps.
"""

from __future__ import annotations

from ee_diffusion.core.scores import score_named

Thresholds = float | tuple[float, ...] | tuple[tuple[float, ...], ...]


def threshold_at(thresholds: Thresholds, step: int, exit: int) -> float:
    """The number that holds at a step and an exit."""
    if not isinstance(thresholds, tuple):
        return thresholds
    row = thresholds[step] if isinstance(thresholds[0], tuple) else thresholds
    return row[exit]


def check_range(thresholds: Thresholds, name: str) -> None:
    """Raises ValueError for no numbers, rows of several lengths, or numbers outside the range of the score of that name."""
    score = score_named(name)
    rows = thresholds if isinstance(thresholds, tuple) else (thresholds,)
    lengths = {len(row) if isinstance(row, tuple) else 1 for row in rows}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"thresholds in rows of lengths {sorted(lengths)}, expected one number, one per exit, or one per step and exit"
        )
    for value in (value for row in rows for value in (row if isinstance(row, tuple) else (row,))):
        if not score.low <= value <= score.high:
            raise ValueError(f"threshold {value} is outside [{score.low}, {score.high}], the range of score {name!r}")


def check_lengths(thresholds: Thresholds, num_steps: int, num_exits: int) -> None:
    """Raises ValueError for tuples that do not fit S steps and K exits."""
    if not isinstance(thresholds, tuple):
        return
    rows = [row for row in thresholds if isinstance(row, tuple)]
    if rows and len(thresholds) != num_steps:
        raise ValueError(f"thresholds for {len(thresholds)} steps, this run has {num_steps}")
    for length in {len(row) for row in rows} or {len(thresholds)}:
        if length != num_exits:
            raise ValueError(f"{length} thresholds, expected one for each of {num_exits} exits")
