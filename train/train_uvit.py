"""Train a U-ViT, alone or with exits (DeeDiff), on images.

accelerate launch --num_cpu_threads_per_process 2 -m train.train_uvit --preset cpu_backbone --output_dir runs/backbone
accelerate launch --num_cpu_threads_per_process 2 -m train.train_uvit --preset cpu_exits --init_from runs/backbone --output_dir runs/exits
(on a GPU: presets gpu_backbone and gpu_exits, no thread flag; on a CPU accelerate takes one thread by default)

Data: `--dataset_name`, `--train_data_dir` or `--train_data_files` (a preset's `cifar10/train-*.parquet` is looked up below
$EE_DIFFUSION_DATA). `--resume_from_checkpoint latest` continues after a stop or a kill; `--dry-run` prints the resolved settings.
Writes a pipeline folder (transformer/, scheduler/, exits/), log.jsonl, config.json, report.json; `--validation_steps`: validation/*.png.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ee_diffusion.cli.errors import run_script
from ee_diffusion.training.config import ImageDataConfig, TrainConfig
from train.launch import launch
from train.presets import PRESETS


@dataclass(frozen=True)
class UViTConfig:
    """The model and the objective. What `init_from` holds must agree with the flags.

    Raises:
        ValueError: an unknown mode or variant, a frozen backbone without `init_from`, exits or a variant without a use.
    """

    mode: str = HfArg(default="backbone", help="backbone: the plain loss; joint: with exits; frozen: exits alone.")
    init_from: str | None = HfArg(default=None, help="Folder with transformer/ (and exits/) to start from.")
    patch_size: int = HfArg(default=2, help="Pixels per patch side.")
    num_layers: int = HfArg(default=13, help="Blocks, an odd number.")
    num_attention_heads: int = HfArg(default=4, help="Attention heads.")
    attention_head_dim: int = HfArg(default=64, help="Width of a head.")
    num_classes: int | None = HfArg(default=None, help="Classes in the data (a null class is added); none: no classes.")
    gradient_checkpointing: bool = HfArg(default=False, help="Trade compute for memory.")
    exit_depths: list[int] | None = HfArg(default=None, help="Executed blocks at each exit; none: all but the last.")
    exit_variant: str = HfArg(default="paper", help="paper or released.")
    uncertainty_weight: float = HfArg(default=1.0, help="lambda of DeeDiff eq. 8.")
    layerwise_weight: float = HfArg(default=1.0, help="beta of DeeDiff eq. 8.")
    class_drop: float = HfArg(default=0.1, help="Probability that a label becomes the null class.")
    snr_gamma: float | None = HfArg(default=None, help="Weight min(SNR, gamma) / SNR; none: unweighted, as DeeDiff.")
    num_train_timesteps: int = HfArg(default=1000, help="Steps of the noise schedule.")
    beta_schedule: str = HfArg(default="linear", help="Its betas, as DDPMScheduler names them.")
    prediction_type: str = HfArg(default="epsilon", help="epsilon or v_prediction.")

    def __post_init__(self):
        if self.mode not in ("backbone", "joint", "frozen"):
            raise ValueError(f"mode={self.mode!r}, expected backbone, joint or frozen")
        if self.mode == "frozen" and not self.init_from:
            raise ValueError("mode='frozen' without init_from: expected the folder of a trained transformer")
        if self.mode == "backbone" and self.exit_depths:
            raise ValueError(f"mode='backbone' trains no exits, but exit_depths={self.exit_depths}")
        if self.exit_variant not in ("paper", "released"):
            raise ValueError(f"exit_variant={self.exit_variant!r}, expected paper or released")
        if not 0 <= self.class_drop <= 1:
            raise ValueError(f"class_drop={self.class_drop}, expected a probability")


@dataclass(frozen=True)
class ValidationConfig:
    """The images drawn every `validation_steps`."""

    validation_images: int = HfArg(default=16, help="How many, seeds 0, 1, ..., classes in turn.")
    validation_inference_steps: int = HfArg(default=25, help="DDIM steps.")
    validation_guidance_scale: float = HfArg(default=1.0, help="Classifier-free guidance; 1: none.")
    validation_threshold: float | None = HfArg(default=None, help="Draw with exits at this threshold, too, and a map.")


def main() -> None:
    configs = (UViTConfig, ImageDataConfig, TrainConfig, ValidationConfig)
    launch("train.work.uvit:run", __doc__, *configs, presets=PRESETS)


if __name__ == "__main__":
    run_script(main)
