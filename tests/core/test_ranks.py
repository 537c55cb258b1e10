"""Two processes run the plain loop together: voted, they stop after the same block; without a vote, one waits for the other in vain."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from tree import ROOT

if not dist.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)


def two(folder: Path, how: str) -> list[dict]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests" / "core" / "ranks_loop.py")
    started = [
        subprocess.Popen([sys.executable, script, str(folder), str(rank), how], env=environment) for rank in range(2)
    ]
    try:
        for process in started:
            process.wait(timeout=90)
    finally:
        for process in started:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_voted_they_stop_together(tmp_path: Path):
    for rank in two(tmp_path, "joint_decision"):
        assert rank["depth"] == 3, "0.2 and 0.8, 0.9 and 0.3, 0.9 and 0.9 at a threshold of 0.5"
        assert rank["output"] == 8.0
        assert rank["scores"] == pytest.approx([0.2, 0.3, 0.9])


def test_the_control_waits_until_its_time_is_over(tmp_path: Path):
    """The first rank goes through a second block, alone; the other has stopped after one."""
    first, second = two(tmp_path, "alone")
    assert second["depth"] == 1
    assert second["output"] == 2.0
    assert math.isnan(second["scores"][1])
    assert "output" not in first
    assert first["error"]
