"""Train a U-ViT: model, noise schedule and objective from the settings, and what is drawn while it trains."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

from accelerate.utils import set_seed
from diffusers import DDPMScheduler

from ee_diffusion.diffusion.distillation.deediff_objective import DiffusionObjective
from ee_diffusion.diffusion.pipelines.sampling import classes_of, generate, sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.figures import exit_map, image_grid, save_figure
from ee_diffusion.training.config import ImageDataConfig, TrainConfig
from ee_diffusion.training.datasets import load_image_source
from ee_diffusion.training.loop import Trainer
from train.train_uvit import UViTConfig, ValidationConfig
from train.work.backbone import check_agrees, exits_from, uvit_from
from train.work.report import write_reports


def build_scheduler(config: UViTConfig) -> DDPMScheduler:
    noise = {name: getattr(config, name) for name in ("num_train_timesteps", "beta_schedule", "prediction_type")}
    if config.init_from and (Path(config.init_from) / "scheduler").is_dir():
        check_agrees("scheduler", DDPMScheduler.from_pretrained(config.init_from, subfolder="scheduler").config, noise)
    return DDPMScheduler(**noise)


def build_objective(config: UViTConfig, resolution: int) -> DiffusionObjective:
    sizes = {name: getattr(config, name) for name in ("patch_size", "num_layers", "num_attention_heads")}
    sizes |= {"sample_size": resolution, "attention_head_dim": config.attention_head_dim}
    rows = None if config.num_classes is None else config.num_classes + 1  # one for the null class
    sizes |= {"num_classes": rows, "null_class": config.num_classes}
    transformer = uvit_from(config.init_from, sizes)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    exits = None
    if config.mode != "backbone":
        exits = exits_from(config.init_from, transformer, config.exit_depths, variant=config.exit_variant)
    return DiffusionObjective(
        transformer,
        exits,
        build_scheduler(config),
        mode=config.mode,
        uncertainty_weight=config.uncertainty_weight,
        layerwise_weight=config.layerwise_weight,
        class_drop=config.class_drop if config.num_classes is not None else 0.0,
        snr_gamma=config.snr_gamma,
    )


def draw(step: int, objective: DiffusionObjective, config: ValidationConfig, *, folder: Path) -> None:
    """Write `step-N-full.png` and, with a threshold, `step-N-exits.png` and `step-N-exit-map.png` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = sampler("ddim", like=objective.scheduler)
    pipeline = EarlyExitPipeline(objective.transformer, scheduler, objective.exits)
    pipeline.set_progress_bar_config(disable=True)
    seeds, num_classes = range(config.validation_images), classes_of(pipeline, 1.0)
    labels = None if num_classes is None else [seed % num_classes for seed in seeds]
    call = {"num_inference_steps": config.validation_inference_steps, "batch_size": config.validation_images}
    if objective.transformer.config.null_class is not None:
        call["guidance_scale"] = config.validation_guidance_scale
    thresholds = {"full": None}
    if config.validation_threshold is not None:
        thresholds["exits"] = config.validation_threshold
    for name, threshold in thresholds.items():
        made = generate(pipeline, list(seeds), labels, exit_threshold=threshold, **call)
        save_figure(image_grid(made.images), folder / f"step-{step:06d}-{name}.png")
        if made.trace is not None:
            save_figure(exit_map(made.trace, title=f"step {step}"), folder / f"step-{step:06d}-exit-map.png")


def save(folder: Path, objective: DiffusionObjective) -> None:
    EarlyExitPipeline(objective.transformer, objective.scheduler, objective.exits).save_pretrained(folder)


def run(model: UViTConfig, data: ImageDataConfig, train: TrainConfig, validation: ValidationConfig) -> None:
    set_seed(train.seed)
    objective = build_objective(model, data.resolution)
    trainer = Trainer(
        objective,
        load_image_source(data, model.num_classes),
        train,
        save=save,
        validate=partial(draw, config=validation, folder=Path(train.output_dir) / "validation"),
        identity={name: value for name, value in asdict(model).items() if name != "gradient_checkpointing"},
    )
    report = asdict(trainer.fit())
    write_reports(report, model, data, train, validation)
    if trainer.accelerator.is_main_process:
        print(json.dumps(report))
