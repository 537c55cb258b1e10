"""Train a DiT in the latent space of TAESD and write it as a stock pipeline."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderTiny, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

from ee_diffusion.diffusion.distillation.deediff_objective import DiffusionObjective, forbid_label_drop
from ee_diffusion.diffusion.latents import round_trip
from ee_diffusion.diffusion.pipelines.sampling import sampler
from ee_diffusion.training.config import ImageDataConfig, LatentConfig, TrainConfig
from ee_diffusion.training.datasets import load_image_source
from ee_diffusion.training.loop import Trainer
from ee_diffusion.training.sources import LatentSource
from train.train_dit import NULL_CLASS, DiTConfig
from train.work.latents import encoded_once, load_vae
from train.work.report import process_state, write_reports


def build_transformer(config: DiTConfig, image_size: int) -> DiTTransformer2DModel:
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=4,
        out_channels=4,
        num_layers=config.num_layers,
        attention_bias=True,
        sample_size=image_size // 8,
        patch_size=config.patch_size,
        num_embeds_ada_norm=NULL_CLASS,
    )
    # Every block begins as the identity and the prediction as zero (DiT, arXiv 2212.09748, sec. 3.2: adaLN-Zero).
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    for linear in (*modulations, transformer.proj_out_1, transformer.proj_out_2):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return forbid_label_drop(transformer)


def save(folder: Path, objective: DiffusionObjective, vae: AutoencoderTiny) -> None:
    scheduler = sampler("ddim", like=objective.scheduler, clip_sample=False)
    DiTPipeline(objective.transformer, vae, scheduler).save_pretrained(folder)


def run(model: DiTConfig, latents: LatentConfig, data: ImageDataConfig, train: TrainConfig) -> None:
    state = process_state()
    vae = load_vae(latents)
    images = load_image_source(data, model.num_classes)
    folder = Path(latents.latents_dir or Path(train.output_dir) / "latents")
    how = {"mirrored": data.random_flip, "bf16": model.encode_bf16}
    encoded, made_from, cost = encoded_once(latents, images, vae, folder=folder, **how)
    how = {"batch_size": latents.encode_batch_size, "bf16": model.encode_bf16}
    cost |= round_trip(vae, images.images, latents.image_size, **how)
    labels = images.labels.repeat(2 if data.random_flip else 1)
    source = LatentSource(encoded, labels, json.dumps(made_from, sort_keys=True))
    set_seed(train.seed)
    transformer, scheduler = build_transformer(model, latents.image_size), DDPMScheduler(clip_sample=False)
    weights = {"class_drop": model.class_drop, "snr_gamma": model.snr_gamma}
    objective = DiffusionObjective(transformer, None, scheduler, mode="backbone", **weights)
    identity = asdict(model) | asdict(latents) | {"latents_dir": None}
    trainer = Trainer(objective, source, train, save=partial(save, vae=vae), identity=identity)
    report = {"latents": cost, "train": asdict(trainer.fit())}
    write_reports(report, model, latents, data, train)
    if state.is_main_process:
        print(json.dumps(report))
