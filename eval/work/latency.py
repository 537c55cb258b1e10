"""Overhead of exits, realised over ideal time, the whole call, and what exits cost in training. Flags: eval/latency.py.

A *part* is a block, a head, a score, the embedding or the tail (forwards.py). K exits, R rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import value_for_budget
from ee_diffusion.diffusion.distillation.deediff_objective import DiffusionObjective
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.pipelines.sampling import sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline, EarlyExitPipelineOutput
from ee_diffusion.metrics.tables import markdown_table, write_report
from ee_diffusion.metrics.timing import interleaved
from eval.harness.options import SamplingOptions, command, merged, results_folder
from eval.harness.pipeline import load
from eval.latency import ForwardOptions, TrainingOptions
from eval.work.forwards import Forward, Ideal

NOTE = (
    "`ideal_ms`: parts timed in their places, within a whole forward; `alone_ms`: each in a loop of its own; "
    "`time_over_off`: over the call without exits."
)


def run(sampling: SamplingOptions, options: ForwardOptions) -> None:
    folder, pipeline = results_folder(sampling.output_dir), load(sampling)
    facts = {"title": "The clock of one forward", "command": command(), "settings": merged(sampling, options)}
    found: dict[str, list[dict]] = {"overhead": [], "realised over ideal": [], "whole call, one image": []}

    def keep(part: str, *rows: dict) -> None:
        """What is measured is written at once: a run that is stopped loses no more than the part it was at."""
        found[part].extend(rows)
        write_report(folder / "report.json", **facts, tables=found, note=NOTE)
        print(markdown_table(list(rows)), flush=True)

    for rows in options.batch_sizes:
        keep("overhead", overhead(pipeline, rows, options, sampling.seed))
        for fraction in options.mean_depths:
            keep("realised over ideal", realised(pipeline, rows, fraction, options, seed=sampling.seed))
    keep("whole call, one image", *whole_call(pipeline, options, sampling))


def run_training(sampling: SamplingOptions, options: TrainingOptions) -> None:
    folder = results_folder(sampling.output_dir)
    text = write_report(
        folder / "report.json",
        title="What exits cost in training",
        command=command(),
        settings=merged(sampling, options),
        tables={"a step of AdamW": [training_cost(load(sampling), options, sampling.seed)]},
    )
    print(text)


def overhead(pipeline: EarlyExitPipeline, rows: int, options: ForwardOptions, seed: int) -> dict:
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


def realised(pipeline: EarlyExitPipeline, rows: int, fraction: float, options: ForwardOptions, *, seed: int) -> dict:
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


def whole_call(pipeline: EarlyExitPipeline, options: ForwardOptions, sampling: SamplingOptions) -> list[dict]:
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


def training_step(
    pipeline: EarlyExitPipeline, mode: str, batch: dict[str, Tensor], *, mixed_precision: str
) -> Callable[[], object]:
    """One optimizer step of a copy of the model, with or without exits."""
    transformer = copy.deepcopy(pipeline.transformer).float().train()
    exits = None if mode == "backbone" else copy.deepcopy(pipeline.exits).float().train()
    class_drop = 0.1 if transformer.config.null_class is not None else 0.0
    noise = sampler("ddpm", like=pipeline.scheduler)
    objective = DiffusionObjective(transformer, exits, noise, mode=mode, class_drop=class_drop)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-6, fused=True)
    device, half = transformer.device.type, mixed_precision == "bf16"

    def run() -> object:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = objective(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return run


def training_cost(pipeline: EarlyExitPipeline, options: TrainingOptions, seed: int) -> dict:
    """Median of pairwise ratios of a step with exits to one without."""
    forward, rows = Forward(pipeline, options.train_batch_size, seed), options.train_batch_size
    uniform = torch.linspace(0, 0.999, rows, device=forward.sample.device)
    images = forward.sample.float()
    batch = {"images": images, "noise": images.flip(0), "uniform": uniform, "label_drop": uniform.flip(0)}
    batch |= {} if forward.labels is None else {"class_labels": forward.labels}
    precision = {"mixed_precision": options.mixed_precision}
    steps = {mode: training_step(pipeline, mode, batch, **precision) for mode in ("backbone", "joint")}
    timings = interleaved(steps, repeats=options.repeats, warmup=1)
    found = {"batch": rows, "backbone_ms": 1e3 * timings["backbone"].median, "joint_ms": 1e3 * timings["joint"].median}
    return found | {"joint_over_backbone": timings["joint"].ratio(timings["backbone"])}
