"""A training run small enough to repeat hundreds of times: 64 random images 4x4, a denoiser of a few hundred weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ee_diffusion.training.config import TrainConfig
from ee_diffusion.training.datasets import ImageSource
from ee_diffusion.training.loop import Trainer, TrainReport


class TinyObjective(nn.Module):
    """Stands for a denoising objective: reads all that an ImageSource hands out; its loss is a mean over the batch."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Dropout(dropout), nn.Conv2d(8, 3, 3, padding=1)
        )
        self.classes = nn.Embedding(5, 3)
        self.fixed = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        level = batch["uniform"][:, None, None, None]
        labels = torch.where(batch["label_drop"] < 0.1, 4, batch["class_labels"])
        noisy = (1 - level) * batch["images"] + level * batch["noise"] + self.classes(labels)[:, :, None, None]
        error = (self.net(noisy) - batch["noise"]).square()
        return {"loss": error.mean(), "level": batch["uniform"].mean()}


def tiny_source(seed: int = 1) -> ImageSource:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (64, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return ImageSource(images, torch.randint(0, 4, (64,), generator=generator), random_flip=True)


def tiny_config(output_dir: Path, **changes) -> TrainConfig:
    config = TrainConfig(
        output_dir=str(output_dir),
        train_batch_size=4,
        max_train_steps=7,
        learning_rate=1e-2,
        lr_warmup_steps=2,
        ema_decay=0.9,
        logging_steps=2,
        checkpointing_steps=2,
    )
    return dataclasses.replace(config, **changes)


def save(folder: Path, objective: nn.Module) -> None:
    (folder / "model").mkdir()
    save_file(objective.state_dict(), folder / "model" / "weights.safetensors")


def tiny_trainer(output_dir: Path, *, dropout: float = 0.0, source: ImageSource | None = None, **changes) -> Trainer:
    torch.manual_seed(0)
    config = tiny_config(output_dir, **changes)
    return Trainer(TinyObjective(dropout), source or tiny_source(), config, save=save)


def run(output_dir: Path, **changes) -> TrainReport:
    return tiny_trainer(output_dir, **changes).fit()
