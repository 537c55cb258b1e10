"""What the U-ViT script looks at while it trains: grids of images at fixed seeds and, with exits and a threshold, the map of its exits."""

from __future__ import annotations

from pathlib import Path

from ee_diffusion.diffusion.distillation.deediff_objective import DiffusionObjective
from ee_diffusion.diffusion.pipelines.sampling import classes_of, generate, sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.figures import exit_map, image_grid, save_figure
from train.presets import ValidationConfig


def draw(step: int, objective: DiffusionObjective, config: ValidationConfig, *, folder: Path) -> None:
    """Write `step-N-full.png` and, with a threshold, `step-N-exits.png` and `step-N-exit-map.png` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = sampler("ddim", like=objective.scheduler)
    pipeline = EarlyExitPipeline(objective.transformer, scheduler, objective.exits)
    pipeline.set_progress_bar_config(disable=True)
    null_class = objective.transformer.config.null_class
    seeds = range(config.validation_images)
    num_classes = classes_of(pipeline, 1.0)
    labels = None if num_classes is None else [seed % num_classes for seed in seeds]
    call = {"num_inference_steps": config.validation_inference_steps, "batch_size": config.validation_images}
    if null_class is not None:
        call["guidance_scale"] = config.validation_guidance_scale
    thresholds = {"full": None} | (
        {} if config.validation_threshold is None else {"exits": config.validation_threshold}
    )
    for name, threshold in thresholds.items():
        made = generate(pipeline, list(seeds), labels, exit_threshold=threshold, **call)
        save_figure(image_grid(made.images), folder / f"step-{step:06d}-{name}.png")
        if made.trace is not None:
            save_figure(exit_map(made.trace, title=f"step {step}"), folder / f"step-{step:06d}-exit-map.png")
