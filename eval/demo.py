"""The demo: the shipped checkpoint at full depth, at DeeDiff's operating points, and answering from memory; same seeds, one table.

python -m eval.demo            (or: make demo)

Writes demo/: full.png, one grid and one exit map per operating point, report.json. Needs no network and no data.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from statistics import median

from diffusers import ModelMixin

from ee_diffusion.checkpoints import checkpoint_path
from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.methods import per_step_error_threshold
from ee_diffusion.diffusion.pipelines.sampling import Generated, generate, joined
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.solver import local_error_gain
from ee_diffusion.metrics.figures import exit_map, image_grid, save_figure
from ee_diffusion.metrics.image import psnr
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import environment, markdown_table, write_json


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="demo", help="Where pictures and report.json go.")
    parser.add_argument("--count", type=int, default=32, help="Images.")
    parser.add_argument("--batch_size", type=int, default=16, help="Images per batch.")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="Classifier-free guidance.")
    parser.add_argument("--error", type=float, default=0.001, help="Error per step allowed to answers from memory.")
    return parser.parse_args()


Point = tuple[ModelMixin, Policy | None]  # exits, and when to take them


def points_of(pipeline: EarlyExitPipeline, folder: Path, options: argparse.Namespace) -> dict[str, Point]:
    """The full model, the policies that come with the checkpoint, and answers from memory."""
    found: dict[str, Point] = {"full": (pipeline.exits, None)}
    for path in sorted((folder / "policies").glob("*.json"), reverse=True):
        found[path.stem] = (pipeline.exits, Policy.load(path))
    if (folder / "cache").is_dir():
        memory = CachedOutputExits.from_pretrained(folder / "cache")
    else:
        memory = CachedOutputExits.for_pipeline(pipeline.transformer, pipeline.scheduler)
    sensitivity = local_error_gain(memory, pipeline.scheduler, options.num_inference_steps)
    return found | {"memory": (memory, per_step_error_threshold(options.error, local_gains=sensitivity))}


def draw(pipeline: EarlyExitPipeline, points: dict[str, Point], options: argparse.Namespace) -> dict[str, Generated]:
    """Every point over the same seeds; they take turns batch by batch, so that drift of the machine is shared."""
    count, size = options.count, options.batch_size
    chosen, labels = seeds("demo", count), balanced_labels(count, pipeline.transformer.config.null_class)
    call = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    generate(pipeline, chosen[:size], labels[:size], batch_size=size, **call | {"num_inference_steps": 2})  # warm-up
    parts: dict[str, list[Generated]] = {name: [] for name in points}
    for start in range(0, count, size):
        some = slice(start, start + size)
        place = {"batch_size": size, "first_id": start}
        for name, (exits, policy) in points.items():
            pipeline.exits = exits
            part = generate(pipeline, chosen[some], labels[some], exit_policy=policy, **place, **call)
            parts[name].append(part)
            last = start + len(chosen[some]) - 1
            print(f"  {name}: images {start} to {last} in {part.seconds[0]:.1f} s", flush=True)
    return {name: joined(several) for name, several in parts.items()}


def main() -> None:
    options, folder = flags(), checkpoint_path()
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    pipeline = EarlyExitPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    print(
        f"{options.count} images, {options.num_inference_steps} steps, guidance {options.guidance_scale}, {folder.name}"
    )
    drawn = draw(pipeline, points_of(pipeline, folder, options), options)

    full, num_layers, rows = drawn["full"], len(pipeline.transformer.transformer_blocks), []
    for name, generated in drawn.items():
        save_figure(image_grid(generated.images), output / f"{name}.png")
        row = {"policy": name, "executed blocks": num_layers, "wall-clock ratio": 1.0, "PSNR to full (dB)": None}
        if generated.trace is not None:
            save_figure(exit_map(generated.trace), output / f"{name}-exit-map.png")
            row["executed blocks"] = generated.trace.report().mean_executed
            row["wall-clock ratio"] = median(a / b for a, b in zip(generated.seconds, full.seconds, strict=True))
            row["PSNR to full (dB)"] = float(psnr(generated.images, full.images).mean())
        rows.append(row)
    reports = {name: asdict(g.trace.report()) for name, g in drawn.items() if g.trace is not None}
    write_json(
        output / "report.json",
        {"options": vars(options), "environment": environment(), "rows": rows, "reports": reports},
    )
    print(f"\n{markdown_table(rows, list(rows[0]))}")
    print(
        f"memory: `per_step_error_threshold({options.error}, ...)`, answers from the last full steps of an image where it trusts them."
    )
    print(
        f"wall-clock ratio: time of the policy over time of the full model, this machine, median over batches. Pictures are in {output}/"
    )


if __name__ == "__main__":
    run_script(main)
