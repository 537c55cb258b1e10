"""Where the time of a sampling run goes, by cProfile: torch's operations, this package's Python, everything else.

python -m eval.hot_path --batch_size 1 --num_inference_steps 20 --output_dir runs/hot-path

One image under guidance without exits, with exits that are never taken, and with exits that are. Shares are of the profiled time, in which
the profiler makes every Python call dearer than it is: the package's shares are upper bounds. `largest`: its function with the most time of
its own, blocks of the model aside. Writes hot-path.json.
"""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from dataclasses import asdict, dataclass, field

import torch

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.methods import deediff
from ee_diffusion.diffusion.pipelines.sampling import classes_of
from ee_diffusion.metrics.splits import balanced_labels
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from eval.harness.options import SamplingOptions, command, parse, results_folder
from eval.harness.pipeline import load

MODEL = "diffusion/models/uvit.py"  # the model's own code: it runs without exits, too


@dataclass(frozen=True)
class HotPathOptions:
    """Which exits are taken."""

    thresholds: list[float] = field(default_factory=lambda: [0.0, 0.2], metadata={"help": "DeeDiff's, on u."})


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


def main() -> None:
    sampling, options = parse(SamplingOptions, HotPathOptions, description=__doc__)
    folder, pipeline = results_folder(sampling.output_dir), load(sampling)
    policies = {"no exits": None} | {f"deediff {value:g}": deediff(value) for value in options.thresholds}
    rows = [{"name": name} | profiled(pipeline, sampling, policy) for name, policy in policies.items()]
    settings = asdict(sampling) | asdict(options)
    report = {"command": command(), "settings": settings, "environment": environment(), "rows": rows}
    write_json(folder / "hot-path.json", report)
    print(markdown_table(rows))


if __name__ == "__main__":
    run_script(main)
