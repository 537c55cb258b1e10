"""One of two ranks in the plain loop, blocks whose every call is a collective. usage: ranks_loop.py FOLDER RANK VOTE"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ee_diffusion.core.active_batch import run_blocks
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.distributed import JointDecision
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.session import begin

SAID = ((0.2, 0.9, 0.9), (0.8, 0.3, 0.9))  # what each rank's exits would say
SECONDS = 4


class Heads:
    """Exits after 1, 2, 3 blocks."""

    depths, space = (1, 2, 3), "hidden"

    def __init__(self, rank: int):
        self.said = SAID[rank]

    def answer(self, exit, hidden, context):
        return hidden

    def confidence(self, exit, hidden, context):
        return torch.full((len(hidden),), self.said[exit])


def block(hidden: torch.Tensor) -> torch.Tensor:
    """The sum over ranks: it waits for all of them."""
    whole = hidden.clone()
    dist.all_reduce(whole)
    return whole


def main() -> None:
    folder, rank, voted = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "joint_decision"
    wait = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=wait)
    policy, rows = Policy(Threshold(0.5)), torch.arange(1)
    session = begin(policy, 4, Heads.depths, rows=rows, num_steps=1, joint_decision=JointDecision() if voted else None)
    hidden, found = torch.ones(1, 1, 1), {}
    try:
        output = run_blocks([block] * 4, hidden, session.step(0, 1.0), heads=Heads(rank), tail=lambda hidden: hidden)
        trace = session.trace()
        found = {"output": output.item(), "depth": trace.depths.item(), "scores": trace.scores.flatten().tolist()}
    except RuntimeError as error:
        found = {"error": str(error)}
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
