"""Train the image tower that judges whether an image shows its caption, against a frozen text encoder, on training captions alone.

accelerate launch -m train.train_retrieval_tower --text_encoder sentence-transformers/all-MiniLM-L6-v2 --output_dir runs/tower

The split is that of train/train_text_to_image.py: give both the same shares and seed. Writes tower.safetensors, log.jsonl, config.json and
report.json; `eval/retrieval.py` uses it. `--resume_from_checkpoint latest` goes on after a stop or a kill.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from ee_diffusion.cli.errors import run_script
from ee_diffusion.diffusion.pipelines.prompts import encode_many
from ee_diffusion.metrics.retrieval import ImageTower, MatchingObjective, save_tower
from ee_diffusion.training.captions import CaptionConfig, load_captioned
from ee_diffusion.training.checkpointing import write_json
from ee_diffusion.training.config import ImageDataConfig, TrainConfig
from ee_diffusion.training.loop import Trainer
from ee_diffusion.training.sources import TableSource

DEFAULTS = {
    "train_data_files": ["emoji64/*.parquet"],
    "image_column": "image",
    "label_column": None,
    "resolution": 64,
    "random_flip": False,
    "train_batch_size": 128,
    "max_train_steps": 1200,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 50,
    "adam_weight_decay": 0.05,
    "ema_decay": 0.99,
    "checkpointing_steps": 200,
    "checkpoints_total_limit": 1,
}


@dataclass(frozen=True)
class TowerConfig:
    """The tower."""

    text_encoder: str | None = field(
        default=None, metadata={"help": "Path or Hub name of a text encoder of transformers with its tokenizer."}
    )
    widths: list[int] = field(
        default_factory=lambda: [32, 64, 128, 256], metadata={"help": "Channels of its stages, each half as large."}
    )


class CaptionTable:
    """`images` (M, C, H, W) uint8, their captions as numbers (M,), sentence embeddings (Q, V)."""

    def __init__(self, images: Tensor, captions: Tensor, texts: Tensor):
        self.images, self.captions, self.texts = images, captions, texts

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, samples: Tensor) -> dict[str, Tensor]:
        captions = self.captions[samples]
        return {"images": self.images[samples], "captions": captions, "texts": self.texts[captions]}


def parse() -> tuple[TowerConfig, ImageDataConfig, CaptionConfig, TrainConfig, bool]:
    """Flags over the defaults."""
    kinds = (TowerConfig, ImageDataConfig, CaptionConfig, TrainConfig)
    parser = HfArgumentParser(kinds, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Print the resolved settings as JSON and exit."
    )
    parser.set_defaults(**DEFAULTS)
    *configs, rest = parser.parse_args_into_dataclasses()
    tower, train = configs[0], configs[-1]
    if not rest.dry_run and not (train.output_dir and tower.text_encoder):
        raise ValueError(f"output_dir={train.output_dir!r}, text_encoder={tower.text_encoder!r}, expected both")
    return *configs, rest.dry_run


def main() -> None:
    tower_config, data, caption_config, train, dry_run = parse()
    resolved = asdict(tower_config) | asdict(data) | asdict(caption_config) | asdict(train)
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return
    folder, state = Path(train.output_dir), PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    every = load_captioned(data, caption_config)
    part = every.part("train")
    distinct = sorted(set(part.captions))
    tokenizer = AutoTokenizer.from_pretrained(tower_config.text_encoder)
    encoder = AutoModel.from_pretrained(tower_config.text_encoder, dtype=torch.float32).to(state.device).eval()
    texts = encode_many(tokenizer, encoder, distinct, num_tokens=1, batch_size=64)[:, 0]  # (Q, V)
    table = CaptionTable(part.images, torch.tensor([distinct.index(one) for one in part.captions]), texts)
    set_seed(train.seed)
    tower = ImageTower(texts.shape[1], tuple(tower_config.widths), texts.mean(dim=0))
    facts = asdict(caption_config) | {"text_encoder": Path(tower_config.text_encoder).name, "images": len(part.images)}
    facts |= {"captions": len(distinct), "steps": train.max_train_steps, "batch_size": train.train_batch_size}
    trainer = Trainer(
        MatchingObjective(tower),
        TableSource(table, f"{len(table)} images, {len(distinct)} captions"),
        train,
        save=lambda to, objective: save_tower(to / "tower.safetensors", objective.tower, facts),
        identity=asdict(tower_config) | asdict(caption_config) | {"text_encoder": None},
    )
    report = asdict(trainer.fit())
    if trainer.accelerator.is_main_process:
        write_json(folder / "config.json", resolved)
        split = {"images_per_split": dict(Counter(every.splits)), "captions": len(distinct)}
        write_json(
            folder / "report.json", split | {"train": report, "device": str(state.device), "torch": torch.__version__}
        )
        print(json.dumps(report))


if __name__ == "__main__":
    run_script(main)
