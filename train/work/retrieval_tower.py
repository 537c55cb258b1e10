"""Train the image tower on images and the sentence embeddings of their captions."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from accelerate.utils import set_seed

from ee_diffusion.metrics.retrieval import ImageTower, MatchingObjective, save_tower
from ee_diffusion.training.captions import CaptionTable, load_captioned
from ee_diffusion.training.config import CaptionConfig, ImageDataConfig, TrainConfig
from ee_diffusion.training.loop import Trainer
from ee_diffusion.training.sources import TableSource
from train.train_retrieval_tower import TowerConfig
from train.work.report import write_reports
from train.work.text_encoder import encode_texts


def run(config: TowerConfig, data: ImageDataConfig, captions: CaptionConfig, train: TrainConfig) -> None:
    every = load_captioned(data, captions)
    part = every.part("train")
    distinct, places = part.distinct()
    texts = encode_texts(config.text_encoder, distinct, num_tokens=1)[:, 0]  # (Q, V)
    table = CaptionTable(part.images, places, texts)
    set_seed(train.seed)
    tower = ImageTower(texts.shape[1], tuple(config.widths), texts.mean(dim=0))
    facts = asdict(captions) | {"text_encoder": Path(config.text_encoder).name, "images": len(part.images)}
    facts |= {"captions": len(distinct), "steps": train.max_train_steps, "batch_size": train.train_batch_size}
    trainer = Trainer(
        MatchingObjective(tower),
        TableSource(table, f"{len(table)} images, {len(distinct)} captions"),
        train,
        save=lambda folder, objective: save_tower(folder / "tower.safetensors", objective.tower, facts),
        identity=asdict(config) | asdict(captions) | {"text_encoder": None},
    )
    report = asdict(trainer.fit())
    split = {"images_per_split": dict(Counter(every.splits)), "captions": len(distinct)}
    write_reports(split | {"train": report}, config, data, captions, train)
    if trainer.accelerator.is_main_process:
        print(json.dumps(report))
