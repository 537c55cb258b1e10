"""The exit heads of one session: checked and packed once, and what they look at in a forward.

Not here: the forward itself (transformer_hook.py), the heads (diffusion/exits). R rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ee_diffusion.core.session import Session, StepSession
from ee_diffusion.diffusion.protocols import CachingHeads, DenoiserHeads, PackableHeads, PlanningHeads

COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SessionHeads:
    """Prepares heads for the sessions that run with them. `caching`: they extrapolate from the outputs of earlier steps."""

    def __init__(self, heads: DenoiserHeads, blocks: Sequence[nn.Module]):
        self._heads, self._blocks = heads, blocks
        self.caching = isinstance(heads, CachingHeads)  # evaluated once: a protocol's check is slow
        self._packable = isinstance(heads, PackableHeads)
        self._prepared: WeakKeyDictionary[Session, tuple[bool, DenoiserHeads]] = WeakKeyDictionary()

    def of(self, session: Session, sample: Tensor) -> DenoiserHeads:
        """The heads, once per session: checked, packed where no gradient needs their parameters, and told the schedule.

        Raises:
            ValueError: their device is not the sample's, or their dtype not the blocks'.
        """
        packable = self._packable and not torch.is_grad_enabled()
        if (known := self._prepared.get(session)) is not None and known[0] == packable:
            return known[1]
        weight = next(self._heads.parameters(), None) if isinstance(self._heads, nn.Module) else None
        if weight is not None and weight.device != sample.device:
            raise ValueError(
                f"the heads are on {weight.device}, the transformer runs on {sample.device}: move the heads"
            )
        if weight is not None and not self.caching:  # cached outputs have a dtype of their own
            self._check_dtype(weight.dtype, sample.device.type)
        heads = self._heads.packed() if packable else self._heads
        if session.policy.criterion is None and isinstance(heads, PlanningHeads):
            heads = heads.along(session.policy.schedule, num_steps=session.num_steps, num_layers=session.num_layers)
        self._prepared[session] = (packable, heads)
        return heads

    def context(self, heads: DenoiserHeads, step: StepSession, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """What the heads look at in this forward, tensors with leading R; nothing is computed that no exit needs."""
        if self.caching and step.may_exit:
            return heads.extrapolate(step.session.histories.get(step.call), sample, timestep)
        return heads.context(timestep) if step.measures else {"timestep": timestep}

    def append(self, step: StepSession, sample: Tensor, timestep: Tensor, model_output: Tensor) -> None:
        """Add the output of a forward to the history of the step's call of guidance."""
        histories = step.session.histories
        facts = {"sample": sample, "timestep": timestep, "output": model_output}
        histories[step.call] = self._heads.append(histories.get(step.call), step.rows, **facts)

    def _check_dtype(self, dtype: torch.dtype, device: str) -> None:
        """Heads take the blocks' outputs: one dtype, unless autocast converts or the weights are stored in a dtype of another kind."""
        found = next((weight.dtype for weight in self._blocks[0].parameters() if weight.dtype in COMPUTED_IN), dtype)
        if dtype != found and not torch.is_autocast_enabled(device):
            raise ValueError(
                f"the heads are in {dtype}, the transformer's blocks in {found}: give both one dtype, heads.to({found})"
            )
