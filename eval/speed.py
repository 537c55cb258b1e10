"""The clock of one forward: overhead of exits that are attached but off, or on but never taken; and realised over ideal time.

python -m eval.speed --output_dir runs/speed

Overhead: the plain model, the model with exits attached but off, and on with a threshold that no score can pass (every uncertainty module
and every sync runs), decided at once and late, take turns; ratios of pairwise medians. Realised over ideal: rows of one batch leave at
different exits, by their own learned scores, at thresholds set on these very rows so that the mean depth is the one asked for. Ideal =
fixed part (embedding, tail) + for every executed block its own median time at its number of rows + uncertainty modules and heads at
theirs. A
part's time is taken where it runs, inside a whole forward of the plain model on that number of rows, in turns with the runs
(`ideal_ms`); and, beside it, alone in a loop, where its weights never leave the caches (`alone_ms`), which no model does.
Starting a run, deciding, syncs and the dropping of rows are
in the measured time only. Inputs are noise: time does not depend on content.
On Linux, MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 before the command keep freed memory in the process: without
them some forwards, of any candidate, pay for thousands of new pages, and others do not.
The same for what a user calls: the pipeline, one image under guidance (two rows), its start and its scheduler included.
Writes speed.json, part by part as they are measured, and at the end speed.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median

import torch
from torch import Tensor

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.io import write_text
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import value_for_budget
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline, EarlyExitPipelineOutput
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from ee_diffusion.metrics.timing import interleaved
from eval.forwards import Forward, Ideal
from eval.harness.options import SamplingOptions, command, flag, parse, results_folder
from eval.harness.pipeline import load


@dataclass(frozen=True)
class SpeedOptions:
    """How long to look."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 64], metadata={"help": "Rows per forward."})
    mean_depths: list[float] = field(default_factory=lambda: [0.75, 0.4], metadata={"help": "Fractions of the blocks."})
    repeats: int = flag("Counted runs of each candidate.", 9)
    steps: int = flag("Forwards of a run, under one session: what a generation does once is shared among them.", 10)


def overhead(pipeline: EarlyExitPipeline, rows: int, options: SpeedOptions, seed: int) -> dict:
    """Median of pairwise ratios to the plain model: attached but off, on but never exiting; a run of `options.steps` forwards each."""
    forward, steps = Forward(pipeline, rows, seed), options.steps

    def attached_off() -> None:
        with attach_exits(pipeline.transformer, pipeline.exits):
            forward.plain(steps)

    def never_exits(*, delayed: bool) -> None:
        with attach_exits(pipeline.transformer, pipeline.exits) as attachment:
            forward.under(attachment, Policy(Threshold(1.0), delayed=delayed), steps)

    candidates: dict[str, Callable[[], object]] = {
        "plain": lambda: forward.plain(steps),
        "off": attached_off,
        "never": partial(never_exits, delayed=False),
        "delayed": partial(never_exits, delayed=True),
    }
    timings = interleaved(candidates, repeats=options.repeats, warmup=2)
    ratios = {name: timings[name].ratio(timings["plain"]) for name in ("off", "never", "delayed")}
    return {"batch": rows, "plain_ms": 1e3 * timings["plain"].median / steps, **ratios}


def thresholds_for(scores: Tensor, depths: list[int], num_layers: int, fraction: float) -> tuple[float, ...]:
    """One threshold per exit from scores (K, R), so that the same share of the remaining rows leaves at each exit (as far as so many rows
    allow) and the mean depth is as asked."""

    def tried(share: float) -> tuple[float, tuple[float, ...]]:
        alive, found, total = torch.ones(scores.shape[1], dtype=torch.bool), [], 0.0
        for exit, depth in enumerate(depths):
            least = float(scores[exit][alive].quantile(1 - share)) if alive.any() else 1.0
            found.append(min(max(least, 0.0), 1.0))  # a score may be beyond by a rounding
            leaves = alive & (scores[exit] > found[-1])
            total += depth * int(leaves.sum())
            alive &= ~leaves
        return (total + num_layers * int(alive.sum())) / scores.shape[1] / num_layers, tuple(found)

    tries = [tried(share / 1000) for share in range(1001)]
    return min(tries, key=lambda one: abs(one[0] - fraction))[1]


def realised(pipeline: EarlyExitPipeline, rows: int, fraction: float, options: SpeedOptions, *, seed: int) -> dict:
    """Ideal over measured time at a mean depth, over several batches whose rows leave at different exits."""
    steps, plain, taken, best, alone, traces = options.steps, [], [], [], [], []
    forwards = [Forward(pipeline, rows, seed + 2 + batch) for batch in range(max(1, 16 // rows))]
    with attach_exits(pipeline.transformer, pipeline.exits) as attachment:
        seen = [forward.under(attachment, Policy(Threshold(1.0), record_all=True)) for forward in forwards]
    scores, num_layers = torch.cat([trace.scores[0] for trace in seen], dim=1), seen[0].planned.shape[1]
    policy = Policy(Threshold(thresholds_for(scores, seen[0].exits.tolist(), num_layers, fraction)))
    for forward in forwards:

        def exiting(forward: Forward = forward) -> None:
            with attach_exits(pipeline.transformer, pipeline.exits) as attachment:
                forward.under(attachment, policy, steps)

        with attach_exits(pipeline.transformer, pipeline.exits) as attachment:
            traces.append(forward.under(attachment, policy))
        ideal, repeats = Ideal(pipeline, traces[-1], forward), max(3, options.repeats // 3)
        candidates = {"plain": lambda forward=forward: forward.plain(steps), "exiting": exiting, "parts": ideal}
        timings = interleaved(candidates, repeats=repeats, warmup=1)
        plain.append(timings["plain"].median / steps)
        taken.append(timings["exiting"].median / steps)
        best.append(ideal.in_place(skip=1))
        alone.append(ideal.alone(repeats=repeats))
    depths = torch.cat([trace.depths[0] for trace in traces]).float()
    return {
        "batch": rows,
        "asked": fraction,
        "mean_depth": float(depths.mean()) / num_layers,
        "distinct_depths_per_batch": median(len(trace.depths[0].unique()) for trace in traces),
        "measured_ms": 1e3 * sum(taken) / len(taken),
        "ideal_ms": 1e3 * sum(best) / len(best),
        "realised_over_ideal": sum(best) / sum(taken),
        "alone_ms": 1e3 * sum(alone) / len(alone),
        "alone_over_measured": sum(alone) / sum(taken),
        "time_over_plain": sum(taken) / sum(plain),
    }


def whole_call(pipeline: EarlyExitPipeline, options: SpeedOptions, sampling: SamplingOptions) -> list[dict]:
    """The call of the pipeline for one image: off, on but never exiting, and at the mean depths that were asked for."""

    def drawn(policy: Policy | None) -> EarlyExitPipelineOutput:
        call = {"num_inference_steps": options.steps, "guidance_scale": sampling.guidance_scale, "output_type": "pt"}
        image = [0] if pipeline.transformer.config.num_classes else None
        return pipeline(image, exit_policy=policy, generator=torch.Generator().manual_seed(sampling.seed), **call)

    seen = drawn(Policy(Threshold(0.0), record_all=True)).trace
    policies = {"never": Policy(Threshold(1.0))}
    for fraction in options.mean_depths:
        rule = value_for_budget(seen, lambda value: Policy(Threshold(value)), budget=fraction, low=0.0, high=1.0)
        policies[f"{fraction} of the blocks"] = Policy(Threshold(rule.value))
    calls = {"off": partial(drawn, None)} | {name: partial(drawn, policy) for name, policy in policies.items()}
    timings = interleaved(calls, repeats=options.repeats, warmup=1)
    rows = 2 if sampling.guidance_scale > 1 else 1
    facts = {"rows": rows, "steps": options.steps}
    return [
        {
            "policy": name,
            **facts,
            "executed": 1.0 if name == "off" else drawn(policies[name]).report.fraction_executed,
            "call_ms": 1e3 * timings[name].median,
            "time_over_off": timings[name].ratio(timings["off"]),
        }
        for name in calls
    ]


def main() -> None:
    sampling, options = parse(SamplingOptions, SpeedOptions, description=__doc__)
    folder, pipeline = results_folder(sampling.output_dir), load(sampling)
    facts = {"command": command(), "settings": asdict(sampling) | asdict(options), "environment": environment()}
    found: dict[str, list[dict]] = {"overhead": [], "realised": []}

    def keep(part: str, *rows: dict) -> None:
        """What is measured is written at once: a run that is stopped loses no more than the part it was at."""
        found.setdefault(part, []).extend(rows)
        write_json(folder / "speed.json", facts | found)
        print(markdown_table(list(rows)), flush=True)

    for rows in options.batch_sizes:
        keep("overhead", overhead(pipeline, rows, options, sampling.seed))
        for fraction in options.mean_depths:
            keep("realised", realised(pipeline, rows, fraction, options, seed=sampling.seed))
    keep("pipeline", *whole_call(pipeline, options, sampling))
    text = "\n".join(markdown_table(part) for part in found.values())
    write_text(folder / "speed.md", text)
    print(text)


if __name__ == "__main__":
    run_script(main)
