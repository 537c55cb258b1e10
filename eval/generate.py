"""Generate images from numbered seeds, on as many processes as accelerate starts, and keep what ran.

accelerate launch -m eval.generate --count 1000 --output_dir runs/samples --exit_threshold 0.1

Writes samples.safetensors (uint8 images, labels, seeds), trace.safetensors, grid.png, exit_map.png, config.json and report.json.
Image i gets the i-th seed of the split whatever the number of processes. `eval/metrics.py` takes it from there.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.io import write_tensors
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.methods import deediff
from ee_diffusion.diffusion.pipelines.sampling import Generated, classes_of, generate
from ee_diffusion.metrics.figures import exit_map, image_grid, save_figure
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import write_json
from eval.harness.options import SamplingOptions, flag, parse, results_folder
from eval.harness.pipeline import load


@dataclass(frozen=True)
class GenerateOptions:
    """Which images, and when they exit."""

    count: int = flag("Number of images.", 64)
    split: str = flag("Whose seeds: test, calibrate, fit or demo.", "test")
    exit_threshold: float | None = flag("DeeDiff's threshold on the mean uncertainty; none: off.")
    exit_policy: str | None = flag("A policy file (Policy.save) instead.")


def policy_of(options: GenerateOptions) -> Policy | None:
    if options.exit_policy is not None:
        return Policy.load(options.exit_policy)
    return None if options.exit_threshold is None else deediff(options.exit_threshold)


def write(folder: Path, parts: list[Generated], chosen: list[int], labels: list[int] | None, *, facts: dict) -> None:
    images = torch.cat([part.images for part in parts])
    pixels = (images * 255).round().to(torch.uint8)
    tensors = {"images": pixels, "seeds": torch.tensor(chosen)}
    write_tensors(
        folder / "samples.safetensors", tensors | ({} if labels is None else {"labels": torch.tensor(labels)})
    )
    save_figure(image_grid(images[:64]), folder / "grid.png")
    report = {"count": len(images), "seconds_generating": [sum(part.seconds) for part in parts]}
    if parts[0].trace is not None:
        trace = Trace.concatenate([part.trace for part in parts])
        trace.save(folder / "trace.safetensors")
        save_figure(exit_map(trace), folder / "exit_map.png")
        print(trace.report().summary())
        report["trace"] = asdict(trace.report())
    write_json(folder / "report.json", report | facts)


def main() -> None:
    sampling, options = parse(SamplingOptions, GenerateOptions, description=__doc__)
    folder = results_folder(sampling.output_dir)
    chosen, policy, state = (
        seeds(options.split, options.count),
        policy_of(options),
        PartialState(cpu=sampling.device == "cpu"),
    )
    pipeline = load(sampling)
    labels = balanced_labels(options.count, classes_of(pipeline, sampling.guidance_scale))
    begun = time.perf_counter()
    with state.split_between_processes(list(range(options.count))) as mine:
        part = mine and generate(
            pipeline,
            [chosen[i] for i in mine],
            None if labels is None else [labels[i] for i in mine],
            batch_size=sampling.batch_size,
            first_id=mine[0],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            exit_policy=policy,
        )
    parts = [part for part in gather_object([part]) if part]  # a rank without images has nothing to report
    if state.is_main_process:
        write_json(folder / "config.json", asdict(sampling) | asdict(options))
        write(
            folder,
            parts,
            chosen,
            labels,
            facts={"processes": state.num_processes, "seconds": time.perf_counter() - begun},
        )


if __name__ == "__main__":
    run_script(main)
