"""Train a U-ViT, alone or with exits (DeeDiff), on images.

accelerate launch --num_cpu_threads_per_process 2 -m train.train_uvit --preset cpu_backbone --output_dir runs/backbone
accelerate launch --num_cpu_threads_per_process 2 -m train.train_uvit --preset cpu_exits --init_from runs/backbone --output_dir runs/exits
(on a GPU: presets gpu_backbone and gpu_exits, no thread flag; on a CPU accelerate takes one thread unless told otherwise)

Data: `--dataset_name`, `--train_data_dir` or `--train_data_files` (a preset's `cifar10/train-*.parquet` is looked up below
$EE_DIFFUSION_DATA). `--resume_from_checkpoint latest` goes on after a stop or a kill; `--dry-run` prints the resolved settings.
Writes a pipeline folder (transformer/, scheduler/, exits/), log.jsonl, config.json, report.json; `--validation_steps`: validation/*.png.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from transformers import HfArgumentParser

from ee_diffusion.cli.errors import run_script
from ee_diffusion.diffusion.distillation.deediff_objective import DiffusionObjective
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.training.checkpointing import write_json
from ee_diffusion.training.config import ImageDataConfig, TrainConfig
from ee_diffusion.training.datasets import load_image_source
from ee_diffusion.training.loop import Trainer
from train.agreement import check_agrees, uvit_from
from train.presets import PRESETS, UViTConfig, ValidationConfig
from train.validation import draw


def parse() -> tuple[UViTConfig, ImageDataConfig, TrainConfig, ValidationConfig, bool]:
    """Flags over the preset over the defaults."""
    kinds = (UViTConfig, ImageDataConfig, TrainConfig, ValidationConfig)
    parser = HfArgumentParser(kinds, description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), help="Named settings (train/presets.py); flags win.")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Print the resolved settings as JSON and exit."
    )
    preset = parser.parse_known_args()[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    *configs, rest = parser.parse_args_into_dataclasses()
    return *configs, rest.dry_run


def build_transformer(config: UViTConfig, resolution: int) -> UViTTransformer2DModel:
    sizes = {
        "sample_size": resolution,
        "patch_size": config.patch_size,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.attention_head_dim,
        "num_classes": None if config.num_classes is None else config.num_classes + 1,
        "null_class": config.num_classes,
    }
    return uvit_from(config.init_from, sizes)


def build_scheduler(config: UViTConfig) -> DDPMScheduler:
    noise = {name: getattr(config, name) for name in ("num_train_timesteps", "beta_schedule", "prediction_type")}
    if config.init_from and (Path(config.init_from) / "scheduler").is_dir():
        check_agrees("scheduler", DDPMScheduler.from_pretrained(config.init_from, subfolder="scheduler").config, noise)
    return DDPMScheduler(**noise)


def build_exits(config: UViTConfig, transformer: UViTTransformer2DModel) -> DenoisingExits | None:
    if config.mode == "backbone":
        return None
    if config.init_from and (Path(config.init_from) / "exits").is_dir():
        exits = DenoisingExits.from_pretrained(config.init_from, subfolder="exits", torch_dtype=torch.float32)
        asked = {"depths": list(config.exit_depths or exits.config.depths), "variant": config.exit_variant}
        check_agrees("exits", {"depths": list(exits.config.depths), "variant": exits.config.variant}, asked)
        return exits
    depths = config.exit_depths or range(1, len(transformer.transformer_blocks))
    released = config.exit_variant == "released"
    return DenoisingExits.for_transformer(transformer, tuple(depths), config.exit_variant, last_layer=released)


def build_objective(config: UViTConfig, resolution: int) -> DiffusionObjective:
    transformer = build_transformer(config, resolution)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return DiffusionObjective(
        transformer,
        build_exits(config, transformer),
        build_scheduler(config),
        mode=config.mode,
        uncertainty_weight=config.uncertainty_weight,
        layerwise_weight=config.layerwise_weight,
        class_drop=config.class_drop if config.num_classes is not None else 0.0,
        snr_gamma=config.snr_gamma,
    )


def save(folder: Path, objective: DiffusionObjective) -> None:
    EarlyExitPipeline(objective.transformer, objective.scheduler, objective.exits).save_pretrained(folder)


def main() -> None:
    model, data, train, validation, dry_run = parse()
    resolved = asdict(model) | asdict(data) | asdict(train) | asdict(validation)
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return
    if not train.output_dir:
        raise ValueError(f"output_dir={train.output_dir!r}, expected the folder to write to")
    set_seed(train.seed)
    objective = build_objective(model, data.resolution)
    source = load_image_source(data, model.num_classes)
    directory = Path(train.output_dir)
    trainer = Trainer(
        objective,
        source,
        train,
        save=save,
        validate=partial(draw, config=validation, folder=directory / "validation"),
        identity={name: value for name, value in asdict(model).items() if name != "gradient_checkpointing"},
    )
    report = asdict(trainer.fit())
    if trainer.accelerator.is_main_process:
        cuda = torch.cuda.is_available()
        device = (
            torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        )
        machine = {"device": device, "processes": trainer.accelerator.num_processes, "torch": torch.__version__}
        write_json(directory / "config.json", resolved)
        write_json(directory / "report.json", report | machine)
        print(json.dumps(report))


if __name__ == "__main__":
    run_script(main)
