"""An oracle: exits whose certainty is their true error. For upper bounds in measurements, never for use: it runs the full model beside.

R rows, r running rows, C, H, W image.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from ee_diffusion.diffusion.exits.cached import CachedOutputExits


class OracleExits:
    """`exits` with `confidence = 1 - min(rms(clean image of the answer - clean image of the full model), 1)` at every exit.

    At every step where an exit is possible, a copy of the model says in full what it would have said, for all rows. `seconds` adds up what
    that took, to be taken off a measured time. `labels` (R,): the class of every row of the run that comes, set by whoever starts it (of
    an unconditional model None). It knows nothing of later steps: an upper bound for a rule that knows the error of this step, not for one
    that plans.
    """

    def __init__(self, exits: CachedOutputExits, transformer: nn.Module):
        self.exits, self.depths, self.space = exits, exits.depths, exits.space
        self._model = copy.deepcopy(transformer).eval()
        self.labels: Tensor | None = None
        self.seconds = 0.0

    def check_fits(self, model: nn.Module) -> None:
        """As the exits have it."""
        self.exits.check_fits(model)

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """As the exits have it."""
        self.exits.check_scheduler(scheduler)

    def context(self, timestep: Tensor) -> dict[str, Tensor]:
        """As the exits have it."""
        return self.exits.context(timestep)

    @torch.no_grad()
    def extrapolate(self, memory: Any, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """What the exits recall, with `asked` and `true` (R, C, H, W): the sample, and the clean image that the full model means.

        Raises:
            ValueError: labels of another number than rows.
        """
        labelled = self._model.config.num_classes is not None
        if labelled and (self.labels is None or len(self.labels) != len(sample)):
            came = None if self.labels is None else len(self.labels)
            raise ValueError(f"{came} labels for {len(sample)} rows, expected one each: set `labels` before a run")
        begun = seconds_on(sample.device)
        output = self._model(sample, timestep, self.labels).sample
        true = self.exits.clean_of(sample, output, timestep)
        self.seconds += seconds_on(sample.device) - begun
        return self.exits.extrapolate(memory, sample, timestep) | {"asked": sample, "true": true}

    def append(self, memory: Any, rows: Tensor, **facts: Any) -> Any:
        """As the exits have it."""
        return self.exits.append(memory, rows, **facts)

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """As the exits have it."""
        return self.exits.answer(exit, hidden, context)

    def confidence(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """(r,), from the truth; 0 where the exits themselves know nothing yet (their memory is not full)."""
        said = self.exits.confidence(exit, hidden, context)
        if bool((context["num_cached"] == 0).any()):
            return said
        answer = self.exits.answer(exit, hidden, context)
        missed = self.exits.clean_of(context["asked"], answer, context["timestep"]) - context["true"]
        error = missed.flatten(1).square().mean(1).sqrt().float()
        unknown = context["features"][:, 0].isnan()
        return torch.where(unknown, 0.0, 1 - error.clamp(max=1.0)).where(~said.isnan(), torch.nan)


def seconds_on(device: torch.device) -> float:
    """Seconds on the clock, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
