"""Train the image tower that scores whether an image shows its caption, against a frozen text encoder, on training captions alone.

accelerate launch -m train.train_retrieval_tower --text_encoder sentence-transformers/all-MiniLM-L6-v2 --output_dir runs/tower

The split is that of train_text_to_image: give both the same shares and seed. Writes tower.safetensors, log.jsonl, config.json and
report.json; `eval/retrieval.py` uses it. `--resume_from_checkpoint latest` continues after a stop or a kill.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ee_diffusion.cli.errors import run_script
from ee_diffusion.training.config import CaptionConfig, ImageDataConfig, TrainConfig
from train.launch import launch

DEFAULTS = {"train_data_files": ["emoji64/*.parquet"], "image_column": "image", "label_column": None}
DEFAULTS |= {"resolution": 64, "random_flip": False, "train_batch_size": 128, "max_train_steps": 1200}
DEFAULTS |= {"learning_rate": 2e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 50, "adam_weight_decay": 0.05}
DEFAULTS |= {"ema_decay": 0.99, "checkpointing_steps": 200, "checkpoints_total_limit": 1}


@dataclass(frozen=True)
class TowerConfig:
    """The tower."""

    text_encoder: str | None = HfArg(default=None, help="Path or Hub name of a text encoder with its tokenizer.")
    widths: list[int] = HfArg(default_factory=lambda: [32, 64, 128, 256], help="Channels of its stages, each halved.")


def main() -> None:
    configs = (TowerConfig, ImageDataConfig, CaptionConfig, TrainConfig)
    needs = {"required": ("output_dir", "text_encoder"), "defaults": DEFAULTS}
    launch("train.work.retrieval_tower:run", __doc__, *configs, **needs)


if __name__ == "__main__":
    run_script(main)
