"""Where the time of a sampling run goes: torch's operations, this package's Python, everything else. Flags: eval/latency.py."""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter

import torch

from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.methods import deediff
from ee_diffusion.diffusion.pipelines.sampling import classes_of
from ee_diffusion.metrics.splits import balanced_labels
from ee_diffusion.metrics.tables import write_report
from eval.harness.options import SamplingOptions, command, merged, results_folder
from eval.harness.pipeline import load
from eval.latency import ProfileOptions

MODEL = "diffusion/models/uvit.py"  # the model's own code: it runs without exits, too


def run(sampling: SamplingOptions, options: ProfileOptions) -> None:
    folder, pipeline = results_folder(sampling.output_dir), load(sampling)
    policies = {"no exits": None} | {f"deediff {value:g}": deediff(value) for value in options.thresholds}
    rows = [{"name": name} | profiled(pipeline, sampling, policy) for name, policy in policies.items()]
    text = write_report(
        folder / "report.json",
        title="Where the time of a run goes",
        command=command(),
        settings=merged(sampling, options),
        tables={"shares of the profiled time": rows},
    )
    print(text)


def kind_of(file: str) -> str:
    """Whose code a profiled function is: cProfile calls what is compiled `~`."""
    if file == "~":
        return "operations"
    if "/ee_diffusion/" in file:
        return "model" if file.endswith(MODEL) else "exits"
    return next((name for name in ("torch", "diffusers") if f"/{name}/" in file), "other")


def shares(profile: cProfile.Profile) -> dict[str, float | str]:
    """Shares of the own time by whose code it is, and the largest of the exits' functions."""
    spent: Counter[str] = Counter()
    own: Counter[str] = Counter()
    for (file, _, name), (_, _, seconds, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        kind = kind_of(file)
        spent[kind] += seconds
        if kind == "exits":
            own[f"{file.split('/ee_diffusion/')[-1]}:{name}"] += seconds
    total = sum(spent.values())
    (name, seconds) = own.most_common(1)[0]
    kinds = ("operations", "model", "exits", "torch", "diffusers", "other")
    return {kind: spent[kind] / total for kind in kinds} | {"largest": name, "largest_share": seconds / total}


def profiled(pipeline, sampling: SamplingOptions, policy: Policy | None) -> dict[str, float | str]:
    """One call under the profiler, after one to warm up."""
    labels = balanced_labels(sampling.batch_size, classes_of(pipeline, sampling.guidance_scale))

    def call() -> None:
        pipeline(
            class_labels=labels,
            batch_size=1 if labels else sampling.batch_size,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            exit_policy=policy,
            generator=torch.Generator().manual_seed(sampling.seed),
            output_type="pt",
        )

    call()
    profile = cProfile.Profile()
    profile.runcall(call)
    return shares(profile)
