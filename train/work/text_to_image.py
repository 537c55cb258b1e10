"""Train a text-to-image U-ViT: captions and images encoded once, the model and its exits, the pipeline folder."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from accelerate.utils import set_seed
from diffusers import DDPMScheduler

from ee_diffusion.diffusion.distillation.deediff_objective import DiffusionObjective
from ee_diffusion.diffusion.latents import round_trip
from ee_diffusion.diffusion.pipelines.sampling import sampler
from ee_diffusion.diffusion.pipelines.text_to_image import EarlyExitTextPipeline
from ee_diffusion.training.captions import CaptionSource, load_captioned
from ee_diffusion.training.config import CaptionConfig, ImageDataConfig, LatentConfig, TrainConfig
from ee_diffusion.training.datasets import ImageSource
from ee_diffusion.training.loop import Trainer
from train.train_text_to_image import TextToImageConfig
from train.work.backbone import exits_from, uvit_from
from train.work.latents import encoded_once, load_vae
from train.work.report import write_reports
from train.work.text_encoder import encode_texts


def load_source(
    config: TextToImageConfig, latents: LatentConfig, data: ImageDataConfig, captions: CaptionConfig, *, folder: Path
) -> tuple[CaptionSource, dict]:
    """Images and captions of the training split, encoded, and what that took."""
    vae, every = load_vae(latents), load_captioned(data, captions)
    train = every.part("train")
    images = ImageSource(train.images, None, random_flip=False)
    encoded, made_from, cost = encoded_once(latents, images, vae, folder=folder, mirrored=data.random_flip)
    cost |= round_trip(vae, images.images, latents.image_size, batch_size=latents.encode_batch_size)
    distinct, places = train.distinct()
    cost |= {"images_per_split": dict(Counter(every.splits)), "captions": len(distinct)}
    texts = encode_texts(config.text_encoder, [*distinct, ""], num_tokens=config.num_text_tokens)  # (Q + 1, T, V)
    name = json.dumps(made_from | {"text_encoder": config.text_encoder, "captions": len(distinct)}, sort_keys=True)
    source = CaptionSource(
        encoded,
        places.repeat(2 if data.random_flip else 1),
        texts=texts[:-1].half(),
        empty=texts[-1].half(),
        caption_drop=config.caption_drop,
        name=name,
    )
    return source, cost


def build_objective(config: TextToImageConfig, image_size: int, text_dim: int) -> DiffusionObjective:
    names = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "num_text_tokens")
    sizes = {name: getattr(config, name) for name in names}
    sizes |= {"sample_size": image_size // 8, "in_channels": 4, "text_dim": text_dim}
    transformer, exits = uvit_from(config.init_from, sizes), None
    if config.mode != "backbone":
        exits = exits_from(config.init_from, transformer, config.exit_depths, variant="paper")
    return DiffusionObjective(
        transformer,
        exits,
        DDPMScheduler(prediction_type="v_prediction", clip_sample=False),
        mode=config.mode,
        uncertainty_weight=config.uncertainty_weight,
        layerwise_weight=config.layerwise_weight,
        class_drop=0.0,
        snr_gamma=config.snr_gamma,
    )


def save(folder: Path, objective: DiffusionObjective) -> None:
    scheduler = sampler("ddim", like=objective.scheduler)
    EarlyExitTextPipeline(objective.transformer, scheduler, objective.exits).save_pretrained(folder)


def run(
    model: TextToImageConfig,
    latents: LatentConfig,
    data: ImageDataConfig,
    captions: CaptionConfig,
    train: TrainConfig,
) -> None:
    folder = Path(latents.latents_dir or Path(train.output_dir) / "latents")
    source, cost = load_source(model, latents, data, captions, folder=folder)
    set_seed(train.seed)
    objective = build_objective(model, latents.image_size, source.texts.shape[-1])
    places = {"latents_dir": None, "vae": None, "text_encoder": None}
    identity = asdict(model) | asdict(latents) | asdict(captions) | places
    trainer = Trainer(objective, source, train, save=save, identity=identity)
    report = {"data": cost, "train": asdict(trainer.fit())}
    write_reports(report, model, latents, data, captions, train)
    if trainer.accelerator.is_main_process:
        print(json.dumps(report))
