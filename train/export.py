"""Turn a trained pipeline into a checkpoint to ship: half precision, small shards, and policies calibrated to budgets.

python -m train.export --model runs/exits --output_dir ee_diffusion/checkpoints/cifar10-uvit-cpu

The policies (policies/blocks-80.json, ...) are DeeDiff thresholds found by replay on calibration seeds, one for each share of the blocks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import value_for_budget
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.pipelines.sampling import classes_of, generate, use_sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import write_json


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Folder of a trained pipeline.")
    parser.add_argument("--output_dir", required=True, help="Where the checkpoint goes.")
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[0.8, 0.6], help="Shares of the blocks, a policy each."
    )
    parser.add_argument("--count", type=int, default=64, help="Calibration images.")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps while calibrating.")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="Guidance while calibrating.")
    parser.add_argument("--max_shard_size", default="14MB", help="Largest weight file.")
    return parser.parse_args()


def forget_origin(path: Path) -> None:
    """Drop the folder that the weights were loaded from: it means nothing elsewhere."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.pop("_name_or_path", None) is not None:
        write_json(path, values)


def write_policies(folder: Path, trace: Trace, budgets: list[float]) -> None:
    """policies/blocks-80.json, ...: for each share of the blocks the threshold that takes it when the trace is replayed."""
    (folder / "policies").mkdir(exist_ok=True)
    for budget in budgets:
        choice = value_for_budget(trace, lambda value: Policy(Threshold(value)), budget=budget, low=0.0, high=1.0)
        Policy(Threshold(choice.value)).save(folder / "policies" / f"blocks-{round(100 * budget)}.json")
        print(f"budget {budget}: certainty above {choice.value:.5f}; replayed share of blocks {choice.fraction:.3f}")


def main() -> None:
    options = flags()
    folder = Path(options.output_dir)
    pipeline = EarlyExitPipeline.from_pretrained(options.model)
    num_classes = classes_of(pipeline, options.guidance_scale)
    use_sampler(pipeline, "ddim")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(torch.float16).save_pretrained(folder, max_shard_size=options.max_shard_size)

    for path in folder.glob("**/*.json"):
        forget_origin(path)

    pipeline = EarlyExitPipeline.from_pretrained(folder)  # what users will load decides
    pipeline.set_progress_bar_config(disable=True)
    trace = generate(
        pipeline,
        seeds("calibrate", options.count),
        balanced_labels(options.count, num_classes),
        batch_size=min(64, options.count),
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        exit_policy=Policy(Threshold(1.0), record_all=True),
    ).trace
    write_policies(folder, trace, options.budgets)


if __name__ == "__main__":
    run_script(main)
