"""Does a certified policy keep its promise? Calibrate again and again on real losses of live runs, and count how often it does not.

python -m eval.guarantee --output_dir runs/guarantee --count 400 --cap 0.02 --risks 0.1 0.2 0.3 --delta 0.1

Every candidate draws every image of a pool once, live (`budgeted` answers from memory, the safest first). Then, many times: draw a few
images to calibrate on, choose by learn-then-test, by conformal risk control, and naively (the boldest whose mean on those images keeps
to the risk: the control that promises nothing); the true risk is the mean over the pool. Writes guarantee.json, guarantee.md
and losses.safetensors, which says what it was drawn under: with --losses another promise can be looked at on the same losses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from ee_diffusion.checkpoints import checkpoint_path
from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.io import write_tensors, write_text
from ee_diffusion.core.risk_control import certified, in_expectation
from ee_diffusion.diffusion.calibration.live import live_losses
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.fingerprint import made_for_of
from ee_diffusion.diffusion.methods import accumulated_error_budget
from ee_diffusion.diffusion.pipelines.sampling import classes_of
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.solver import local_error_gain
from ee_diffusion.metrics.image import relative_squared_error
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from eval.harness.options import SamplingOptions, flag, parse, results_folder
from eval.harness.pipeline import load

DRAWN_UNDER = "drawn_under"  # in the metadata of losses.safetensors, as JSON


@dataclass(frozen=True)
class GuaranteeOptions:
    """The pool, the candidates, the promise.

    Raises:
        ValueError: numbers out of range, values that do not ascend.
    """

    count: int = flag("Images of the pool.", 400)
    calibration_count: int = flag("Images of one calibration; the pool should be 20 times as large.", 20)
    resamplings: int = flag("Calibrations.", 400)
    memory: str | None = flag("Folder of exits that remember; none: those of the package's checkpoint.")
    values: list[float] = field(
        default_factory=lambda: [0.002, 0.004, 0.008, 0.016, 0.032],
        metadata={"help": "Budgets of accumulated error, the safest first."},
    )
    decay: float = flag("How much of the accumulated error a step leaves.", 0.7)
    cap: float | None = flag("Relative squared error that counts as loss 1.")
    risks: list[float] = field(
        default_factory=list, metadata={"help": "Targets: the largest expected loss, one or more."}
    )
    losses: str | None = flag(
        "losses.safetensors of an earlier run with the same pool and candidates: nothing is drawn."
    )
    delta: float | None = flag("How often it may be missed.")

    def __post_init__(self):
        ascending = all(a < b for a, b in zip(self.values, self.values[1:], strict=False))
        if not self.values or not ascending or not all(0 < value < math.inf for value in self.values):
            raise ValueError(f"values={self.values}, expected positive numbers, ascending: the safest first")
        for name, value in (*(("risks", risk) for risk in self.risks), ("delta", self.delta)):
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}={value}, expected a number between 0 and 1")
        if self.cap is not None and not 0 < self.cap < math.inf:
            raise ValueError(f"cap={self.cap}, expected a positive number")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay}, expected a number from 0 to 1")
        if self.resamplings < 1:
            raise ValueError(f"resamplings={self.resamplings}, expected at least 1")


def calibrations(
    losses: Tensor, options: GuaranteeOptions, *, risk: float, seed: int
) -> dict[str, list[tuple[int | None, float]]]:
    """losses (K, n) -> for each rule, of each resampling the choice and its true risk (0 if it chose none)."""
    generator = torch.Generator().manual_seed(seed)
    grown = losses.cummax(0).values
    rules: dict[str, tuple[Callable[[Tensor], int | None], Tensor]] = {
        "learn then test": (lambda own: _last(certified(own, risk=risk, delta=options.delta)), losses),
        "conformal risk control": (partial(in_expectation, risk=risk), grown),
        "naive mean": (lambda own: _last(own.mean(1) <= risk), losses),
    }
    found: dict[str, list[tuple[int | None, float]]] = {name: [] for name in rules}
    for _ in range(options.resamplings):
        own = torch.randperm(losses.shape[1], generator=generator)[: options.calibration_count]
        for name, (choose, learned_confidence) in rules.items():
            chosen = choose(losses[:, own])
            found[name].append((chosen, 0.0 if chosen is None else float(learned_confidence[chosen].mean())))
    return found


def _last(good: Tensor) -> int | None:
    places = good.nonzero()[:, 0]
    return int(places[-1]) if len(places) else None


def line(name: str, found: list[tuple[int | None, float]], costs: Tensor, *, risk: float) -> dict:
    missed = sum(true > risk for _, true in found)
    chosen = [choice for choice, _ in found if choice is not None]
    return {
        "risk": risk,
        "rule": name,
        "resamplings": len(found),
        "missed": missed / len(found),
        "mean true risk": sum(true for _, true in found) / len(found),
        "none certified": 1 - len(chosen) / len(found),
        "mean share of blocks": float(costs[chosen].mean()) if chosen else None,
    }


def prepared(sampling: SamplingOptions, options: GuaranteeOptions) -> EarlyExitPipeline:
    """The pipeline with the exits that remember. Raises ValueError for a model without a null class."""
    pipeline = load(sampling)
    classes_of(pipeline, sampling.guidance_scale)
    pipeline.exits = CachedOutputExits.from_pretrained(options.memory or checkpoint_path() / "cache").to(
        pipeline.device
    )
    return pipeline


def drawn_under(pipeline: EarlyExitPipeline, sampling: SamplingOptions, options: GuaranteeOptions) -> dict:
    """All that losses depend on: pool, candidates, cap, and what the pipeline is and is asked for."""
    call = {"num_inference_steps": sampling.num_inference_steps, "guidance_scale": sampling.guidance_scale}
    own = {name: getattr(options, name) for name in ("count", "values", "decay", "cap")}
    return own | dict(made_for_of(pipeline, **call))


def drawn(pipeline: EarlyExitPipeline, sampling: SamplingOptions, options: GuaranteeOptions) -> tuple[Tensor, Tensor]:
    """Losses (K, n) and costs (K,) of the candidates, live."""
    sensitivity = local_error_gain(pipeline.exits, pipeline.scheduler, sampling.num_inference_steps)
    live = live_losses(
        pipeline,
        [accumulated_error_budget(value, weights=sensitivity, decay=options.decay) for value in options.values],
        seeds("test", options.count),
        class_labels=balanced_labels(options.count, classes_of(pipeline, sampling.guidance_scale)),
        loss=lambda images, full: (relative_squared_error(images, full) / options.cap).clamp(max=1),
        batch_size=sampling.batch_size,
        progress=partial(tqdm, desc="candidates"),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
    )
    return live.losses, live.costs


def read(path: str, wanted: dict) -> tuple[Tensor, Tensor]:
    """Losses and costs of an earlier run. Raises ValueError if they were drawn under something else than `wanted`, or do not say."""
    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get(DRAWN_UNDER)
        if said is None:
            raise ValueError(
                f"{path} does not say what it was drawn under, expected a newer file: run once without --losses"
            )
        known = json.loads(said)
        differ = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
        if differ:
            told = "; ".join(f"{name} {known.get(name)}, expected {wanted.get(name)}" for name in differ)
            raise ValueError(f"{path} was drawn under {told}; or run without --losses")
        return file.get_tensor("losses"), file.get_tensor("costs")


def main() -> None:
    sampling, options = parse(SamplingOptions, GuaranteeOptions, description=__doc__)
    missing = [name for name in ("cap", "risks", "delta") if not getattr(options, name)]
    if missing or not 1 <= options.calibration_count < options.count:
        raise ValueError(
            f"missing {missing}, calibration_count={options.calibration_count} of {options.count}: expected all, and fewer than the pool"
        )
    folder = results_folder(sampling.output_dir)
    pipeline = prepared(sampling, options)
    under = drawn_under(pipeline, sampling, options)
    losses, costs = drawn(pipeline, sampling, options) if options.losses is None else read(options.losses, under)
    tensors = {"losses": losses, "costs": costs}
    write_tensors(folder / "losses.safetensors", tensors, {DRAWN_UNDER: json.dumps(under)})
    rows = [
        line(name, several, costs, risk=risk)
        for risk in options.risks
        for name, several in calibrations(losses, options, risk=risk, seed=sampling.seed).items()
    ]
    spread = math.sqrt(options.delta * (1 - options.delta) / options.resamplings)
    candidates = [
        {"budget": value, "share of blocks": cost, "mean loss": loss}
        for value, cost, loss in zip(options.values, costs.tolist(), losses.mean(1).tolist(), strict=True)
    ]
    facts = {
        "settings": asdict(sampling) | asdict(options),
        "environment": environment(),
        "allowed": options.delta + 2 * spread,
    }
    write_json(folder / "guarantee.json", facts | {"rows": rows, "candidates": candidates})
    text = markdown_table(candidates) + "\n" + markdown_table(rows)
    write_text(folder / "guarantee.md", text)
    print(text)


if __name__ == "__main__":
    run_script(main)
