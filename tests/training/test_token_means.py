"""A mean over tokens is one over all tokens of a step, however the step is split into processes and parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training.test_resume import process
from training.token_run import MASKED, RUNS, run

EXACT = {"soft": 1e-5, "turns": 1e-4}  # answers are judged in float32; the second runs in it


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest, relative to the norm of each gradient or scalar (of the keys' biases, whose gradient is 0 but for rounding, to a
    thousandth of the largest norm)."""
    assert one.keys() == other.keys()
    least = 1e-3 * max(float(value.norm()) for value in one.values())
    return max(float((one[name] - other[name]).norm() / one[name].norm().clamp(min=least)) for name in one)


@pytest.mark.parametrize("name", RUNS)
def test_parts_take_the_step_of_the_whole(name: str, tmp_path: Path):
    whole = run(name, tmp_path / "whole")
    for micro_steps in (2, 4):
        parts = run(name, tmp_path / str(micro_steps), micro_steps=micro_steps)
        assert difference(whole, parts) < EXACT.get(name, 1e-9)
    if name in MASKED:  # the mean of the parts' means is another
        assert difference(whole, run(name, tmp_path / "means", micro_steps=4, units=False)) > 1e-2


def test_the_loss_is_the_mean_over_all_tokens(tmp_path: Path):
    """Against the sum over each text alone, divided by all tokens."""
    objective, source = RUNS["skip"](1)
    total, tokens = torch.zeros(()), 0
    for text in range(4):
        batch = source.batch(torch.tensor([text]), torch.tensor([text]))
        count = int(objective.units(batch)[0])
        total, tokens = total + objective(batch)["loss"].detach() * count, tokens + count
    assert tokens == 1 + 9 + 3 + 6
    found = run("skip", tmp_path / "parts", micro_steps=2)
    assert float(found["mean loss"]) == pytest.approx(float(total / tokens), rel=1e-9)


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path: Path):
    process(
        "-m", "torch.distributed.run", "--nproc_per_node=2", str(Path(__file__).parent / "token_run.py"), str(tmp_path)
    )
    for name in RUNS:
        whole = run(name, tmp_path / name / "whole")
        assert difference(whole, load_file(tmp_path / name / "step.safetensors")) < EXACT.get(name, 1e-9)
