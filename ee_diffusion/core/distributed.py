"""Several processes: decisions that the ranks of a group take together, and traces gathered from ranks that each had samples of their own.

Here: what the ranks say to each other. Not here: who stops (session.py), which group runs a model together (diffusion/hooks/parallel.py).
E samples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ee_diffusion.core.trace import Trace


@dataclass(frozen=True)
class JointDecision:
    """Ranks that run one model together, each on a part of its tokens or weights, and so must take the same decision on every sample.

    A rank that stops a sample alone would leave out collectives that the others wait in.

    group: their process group; None: all ranks.

    Raises:
        ValueError: no process group was initialised, or this rank is not in `group`.
    """

    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("a vote of ranks, but torch.distributed is not initialised: call init_process_group first")
        if dist.get_rank(self.group) < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the group it is to vote in")

    def least(self, scores: Tensor) -> Tensor:
        """scores (n,) of this rank -> (n,) the least safe of all ranks', the same on each; NaN where one of them says NaN."""
        nothing = scores.isnan()
        said = torch.stack([scores.masked_fill(nothing, 0.0), -nothing.to(scores.dtype)])  # (2, E)
        dist.all_reduce(said, op=dist.ReduceOp.MIN, group=self.group)
        return said[0].masked_fill(said[1] < 0, torch.nan)

    def require_alike(self, facts: str, device: torch.device) -> None:
        """Compare a text over the ranks.

        Raises:
            ValueError: on every rank, if one has another text than the others.
        """
        number = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:7], "big")
        least = torch.tensor([number, -number], dtype=torch.int64, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.group)
        if least.tolist() != [number, -number]:
            raise ValueError(
                f"the ranks that decide together begin different runs (another policy, batch, number of steps or model); here: {facts}"
            )


def gather_traces(
    trace: Trace | None, *, renumber: bool = False, group: dist.ProcessGroup | None = None
) -> Trace | None:
    """The traces of all ranks as one, in the order of the ranks, on every rank; for ranks that generate images of their own.

    trace: this rank's; None: it had nothing to do. renumber: give the samples the ids 0, 1, ... in that order, for ranks that each count
    from 0. group: default all ranks. In one process: the trace itself.

    Raises:
        ValueError: on every rank, if an id occurs twice (and `renumber` is False), or the traces are of different policies, steps or exits.
    """
    if not isinstance(trace, Trace | None):
        raise ValueError(f"trace={trace!r}, expected a Trace (attachment.trace) or None")
    traces: list[Trace | None] = [trace]
    if dist.is_available() and dist.is_initialized():
        traces = [None] * dist.get_world_size(group)
        dist.all_gather_object(traces, trace, group=group)
    there = [one for one in traces if one is not None]
    if not there:
        return None
    whole = Trace.concatenate(there)
    if renumber:
        return replace(whole, samples=torch.arange(len(whole.samples)))
    if len(whole.samples.unique()) < len(whole.samples):
        raise ValueError(
            f"sample ids {whole.samples.tolist()} occur on more than one rank; say renumber=True if each rank counts from 0"
        )
    return whole
