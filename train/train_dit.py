"""Train a small class-conditional DiT on images in the latent space of TAESD, and write it as a stock `DiTPipeline` folder.

accelerate launch -m train.train_dit --vae vae --train_data_files 'cifar10/train-*.parquet' --output_dir runs/dit

`--vae`: the two files of TAESD, or a diffusers folder. Images are enlarged to `--image_size` and encoded once, into files (latents/ in
output_dir), mirrored as well unless `--no_random_flip`. `--resume_from_checkpoint latest` continues after a stop or a kill.
`DiTPipeline` takes 1000 for "no class", so the model has 1000 classes of which the data uses the first. Writes the pipeline folder,
log.jsonl, config.json and report.json with the PSNR of the round trip through the autoencoder.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ee_diffusion.cli.errors import run_script
from ee_diffusion.training.config import ImageDataConfig, LatentConfig, TrainConfig
from train.launch import launch

NULL_CLASS = 1000  # what DiTPipeline takes for "no class"
DEFAULTS = {"train_data_files": ["cifar10/train-*.parquet"], "image_column": "img", "label_column": "label"}
DEFAULTS |= {"resolution": 32, "train_batch_size": 256, "learning_rate": 4e-4, "lr_scheduler": "cosine"}
DEFAULTS |= {"lr_warmup_steps": 500, "adam_weight_decay": 0.0, "ema_decay": 0.999}


@dataclass(frozen=True)
class DiTConfig:
    """The model and the objective.

    Raises:
        ValueError: a number of classes that DiTPipeline cannot name, a drop that is no probability.
    """

    encode_bf16: bool = HfArg(default=False, help="Encode under bfloat16 autocast.")
    num_classes: int = HfArg(default=10, help="Classes in the data.")
    num_layers: int = HfArg(default=12, help="Blocks.")
    num_attention_heads: int = HfArg(default=6, help="Attention heads.")
    attention_head_dim: int = HfArg(default=64, help="Width of a head.")
    patch_size: int = HfArg(default=2, help="Latent pixels per patch side.")
    class_drop: float = HfArg(default=0.1, help="Probability that a label becomes the null class.")
    snr_gamma: float | None = HfArg(default=5.0, help="Weight min(SNR, gamma) / SNR; none: unweighted.")

    def __post_init__(self):
        if not 1 <= self.num_classes <= NULL_CLASS:
            raise ValueError(f"num_classes={self.num_classes}, expected 1..{NULL_CLASS}")
        if not 0 <= self.class_drop <= 1:
            raise ValueError(f"class_drop={self.class_drop}, expected a probability")


def check(model: DiTConfig, latents: LatentConfig, *_: object) -> None:
    if latents.image_size % (8 * model.patch_size):
        raise ValueError(f"image_size={latents.image_size}, expected a multiple of {8 * model.patch_size}")


def main() -> None:
    needs = {"required": ("output_dir", "vae"), "defaults": DEFAULTS, "check": check}
    launch("train.work.dit:run", __doc__, DiTConfig, LatentConfig, ImageDataConfig, TrainConfig, **needs)


if __name__ == "__main__":
    run_script(main)
