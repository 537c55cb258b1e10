"""Train a small text-to-image U-ViT, alone or with exits (DeeDiff), in the latent space of TAESD, with a frozen text encoder.

accelerate launch -m train.train_text_to_image --vae vae --text_encoder sentence-transformers/all-MiniLM-L6-v2 --output_dir runs/text
accelerate launch -m train.train_text_to_image --vae vae --text_encoder ... --mode joint --init_from runs/text --output_dir runs/text_exits

`--vae`: the two files of TAESD, or a diffusers folder. `--text_encoder`: a path or Hub name of any text encoder of transformers. Images
and captions are encoded once (latents/ in output_dir, or `--latents_dir`). Captions, not images, are split: `--validation_share` and
`--test_share` of the subjects never train. `--resume_from_checkpoint latest` continues after a stop or a kill.
Writes a pipeline folder (transformer/, scheduler/, exits/; the VAE and the text encoder stay where they are), log.jsonl, config.json and
report.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ee_diffusion.cli.errors import run_script
from ee_diffusion.training.config import CaptionConfig, ImageDataConfig, LatentConfig, TrainConfig
from train.launch import launch

DEFAULTS = {"image_size": 64, "part_size": 512, "train_data_files": ["emoji64/*.parquet"]}
DEFAULTS |= {"image_column": "image", "label_column": None, "resolution": 64, "random_flip": False}
DEFAULTS |= {"train_batch_size": 64, "learning_rate": 1.5e-3, "lr_scheduler": "constant_with_warmup"}
DEFAULTS |= {"lr_warmup_steps": 50, "adam_weight_decay": 0.01, "ema_decay": 0.998, "checkpointing_steps": 100}
DEFAULTS |= {"checkpoints_total_limit": 2}


@dataclass(frozen=True)
class TextToImageConfig:
    """The model and the objective.

    Raises:
        ValueError: an unknown mode, frozen without a backbone, fewer than one text token.
    """

    text_encoder: str | None = HfArg(default=None, help="Path or Hub name of a text encoder with its tokenizer.")
    mode: str = HfArg(default="backbone", help="backbone: the plain loss; joint: with exits; frozen: exits alone.")
    init_from: str | None = HfArg(default=None, help="Folder with transformer/ (and exits/) to start from.")
    num_layers: int = HfArg(default=7, help="Blocks, an odd number.")
    num_attention_heads: int = HfArg(default=2, help="Attention heads.")
    attention_head_dim: int = HfArg(default=64, help="Width of a head.")
    patch_size: int = HfArg(default=2, help="Latent pixels per patch side.")
    num_text_tokens: int = HfArg(default=4, help="Text tokens: the mean of the encoder's states and its first ones.")
    exit_depths: list[int] | None = HfArg(default=None, help="Executed blocks at each exit; none: all but the last.")
    uncertainty_weight: float = HfArg(default=0.05, help="lambda of DeeDiff eq. 8.")
    layerwise_weight: float = HfArg(default=0.1, help="beta of DeeDiff eq. 8.")
    caption_drop: float = HfArg(default=0.1, help="Probability that a caption becomes the empty one.")
    snr_gamma: float | None = HfArg(default=5.0, help="Weight min(SNR, gamma) / (SNR + 1); none: unweighted.")

    def __post_init__(self):
        if self.mode not in ("backbone", "joint", "frozen"):
            raise ValueError(f"mode={self.mode!r}, expected backbone, joint or frozen")
        if self.mode == "frozen" and not self.init_from:
            raise ValueError("mode='frozen' without init_from: frozen needs a trained backbone")
        if self.num_text_tokens < 1:
            raise ValueError(f"num_text_tokens={self.num_text_tokens}, expected at least 1")


def main() -> None:
    configs = (TextToImageConfig, LatentConfig, ImageDataConfig, CaptionConfig, TrainConfig)
    required = ("output_dir", "vae", "text_encoder")
    launch("train.work.text_to_image:run", __doc__, *configs, required=required, defaults=DEFAULTS)


if __name__ == "__main__":
    run_script(main)
