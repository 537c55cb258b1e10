"""Who draws in the journey of a stock DiT: its flags, its exits, one call of the pipeline for every kind of candidate.

Here: flags and drawing. Not here: candidates, controls and the report (journey.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch
from diffusers import DiTPipeline
from torch.nn.functional import interpolate

from ee_diffusion.core.criteria import DepthTable
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.pipelines.sampling import Generated
from ee_diffusion.diffusion.protocols import DenoiserHeads
from ee_diffusion.diffusion.step_cache.fit import fit_schedules
from ee_diffusion.metrics.splits import balanced_labels, seeds
from eval.harness.baselines_dit import db_cache
from eval.harness.interleave import Candidate, Draw
from eval.harness.options import flag


@dataclass(frozen=True)
class JourneyOptions:
    """Which model, which exits, how many images.

    Raises:
        ValueError: a folder that is not given, a number out of range.
    """

    model: str | None = flag("Folder of a stock DiTPipeline.")
    exits: str | None = flag("Folder of exits fitted to it.")
    fit_report: str | None = flag("report.json of that fit, to be quoted; none: left out.")
    output_dir: str | None = flag("Where results go.")
    num_classes: int = flag("Classes that are drawn, the first of the model's.", 10)
    num_inference_steps: int = flag("Denoising steps.", 50)
    guidance_scale: float = flag("Classifier-free guidance.", 3.0)
    batch_size: int = flag("Images per call.", 16)
    count: int = flag("Test images.", 64)
    calibration_count: int = flag("Calibration images.", 32)
    budget: float = flag("Fraction of the blocks to aim at.", 0.6)
    errors: list[float] = field(
        default_factory=lambda: [0.01], metadata={"help": "Answers from memory: errors allowed per step."}
    )
    period: int = flag("Answers from memory: period of the fixed cache.", 2)
    shares: list[float] = field(
        default_factory=list,
        metadata={"help": "Fitted memory: searched schedules in which it answers these shares of the steps."},
    )
    fit_count: int = flag("Images that memory is fitted to, drawn in full.", 16)
    fewer: list[int] = field(
        default_factory=list, metadata={"help": "Numbers of steps of the full model, for the curve."}
    )
    judged_size: int = flag("Pixels that images are reduced to before they are judged.", 32)
    db_cache: list[float] = field(
        default_factory=list, metadata={"help": "Thresholds of cache-dit's DBCache, with and without TaylorSeer."}
    )
    seed: int = flag("Seed of the random controls.", 0)

    def __post_init__(self):
        for name in ("model", "exits", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}, expected a folder")
        for name in (
            "num_classes",
            "num_inference_steps",
            "batch_size",
            "count",
            "calibration_count",
            "period",
            "fit_count",
            "judged_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget={self.budget}, expected a fraction of the blocks in (0, 1]")
        if not all(0 < share < 1 for share in self.shares):
            raise ValueError(f"shares={self.shares}, expected numbers between 0 and 1")
        if not all(1 <= steps < self.num_inference_steps for steps in self.fewer):
            raise ValueError(f"fewer={self.fewer}, expected numbers of steps from 1 to {self.num_inference_steps - 1}")


def load_exits(folder: str) -> AdapterExits | DenoisingExits:
    """Exits of the class that their config names. Raises ValueError for another one."""
    kinds = {kind.__name__: kind for kind in (AdapterExits, DenoisingExits)}
    name = AdapterExits.load_config(folder)["_class_name"]
    if name not in kinds:
        raise ValueError(f"{folder} holds {name}, expected one of {sorted(kinds)}")
    return kinds[name].from_pretrained(folder).eval()


def drawer(pipe: DiTPipeline, options: JourneyOptions, heads: dict[str, DenoiserHeads]) -> Draw:
    """Draws batches with the stock pipeline, its call as ever; exits are attached around it. heads: by what `exits_of` says."""

    def draw(candidate: Candidate, chosen: list[int], labels: list[int], first: int) -> Generated:
        call = {
            "class_labels": labels,
            "generator": [torch.Generator().manual_seed(seed) for seed in chosen],
            "num_inference_steps": candidate.steps,
            "guidance_scale": options.guidance_scale,
            "output_type": "np",
        }
        begun, ended = time.perf_counter(), None
        if candidate.kind.startswith("db_cache"):
            order = int(candidate.kind.endswith("taylor"))
            with db_cache(pipe, candidate.budget, num_steps=candidate.steps, taylor_order=order) as cached:
                begun = time.perf_counter()
                images, trace = cached(**call).images, None
                ended = time.perf_counter()
        elif candidate.policy is None:
            images, trace = pipe(**call).images, None
        else:
            exits = heads[exits_of(candidate)]
            with attach_exits(pipe, exits, _slice(candidate.policy, first, len(chosen))) as attachment:
                images, trace = pipe(**call).images, attachment.trace
            ids = torch.arange(first, first + len(chosen))
            trace = replace(trace, samples=ids, policy=candidate.policy.to_dict())
        seconds = (ended or time.perf_counter()) - begun
        small = interpolate(torch.from_numpy(images).permute(0, 3, 1, 2), size=(options.judged_size,) * 2, mode="area")
        return Generated(small.contiguous(), trace, (seconds,))

    return draw


def exits_of(candidate: Candidate) -> str:
    """Which exits a candidate with a policy draws with: `fit_exits`, unfitted `memory`, or what was fitted: `together`, or `fitted` for
    answers that are weighed each by itself."""
    if candidate.policy.exits != (0,):
        return "fit_exits"
    return next((name for name in ("together", "fitted") if candidate.kind.endswith(name)), "memory")


def fitted_memory(pipe: DiTPipeline, options: JourneyOptions) -> tuple[CachedOutputExits, dict[int, Policy]]:
    """Memory fitted to this solver, number of steps and guidance, and the searched schedules, by their number of full steps."""
    chosen, labels = seeds("fit", options.fit_count), balanced_labels(options.fit_count, options.num_classes)

    def call() -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in chosen]
        settings = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
        pipe(labels, generator=generators, output_type="np", **settings)

    return fit_schedules(pipe, call)


def each_by_itself(exits: CachedOutputExits) -> CachedOutputExits:
    """The same fit without what misses are worth: the control of answers that are weighed together."""
    made = CachedOutputExits.from_config(exits.config, joint=None).to(exits.alphas_cumprod.device)
    made.load_state_dict(
        {name: value for name, value in exits.state_dict().items() if name != "prediction.error_weights"}
    )
    return made.eval()


def _slice(policy: Policy, first: int, count: int) -> Policy:
    """A plan for all images, cut to one batch of them."""
    if not isinstance(policy.criterion, DepthTable):
        return policy
    return replace(policy, criterion=DepthTable(tuple(line[first : first + count] for line in policy.criterion.depths)))
