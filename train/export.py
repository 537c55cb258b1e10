"""Turn a trained pipeline into a checkpoint to ship: half precision, small shards, and policies calibrated to budgets.

python -m train.export --model runs/exits --output_dir ee_diffusion/checkpoints/cifar10-uvit-cpu
python -m train.export --model runs/text_exits --vae vae --text_encoder sentence-transformers/all-MiniLM-L6-v2 --output_dir runs/checkpoint

The policies (policies/blocks-80.json, ...) are DeeDiff thresholds found by replay of a run on calibration seeds, one for each share of the
blocks. Of a text-to-image pipeline the autoencoder is written, too; its text encoder is not: it is large and public. Its run takes captions
of the validation split.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ee_diffusion.cli.errors import run_script
from train.launch import launch


@dataclass(frozen=True)
class ExportConfig:
    """What is exported, and the run that its policies are calibrated on.

    Raises:
        ValueError: an autoencoder without a text encoder, or the reverse; a number below 1; a share outside (0, 1].
    """

    model: str | None = HfArg(default=None, help="Folder of a trained pipeline with exits.")
    output_dir: str | None = HfArg(default=None, help="Where the checkpoint goes.")
    budgets: list[float] = HfArg(default_factory=lambda: [0.8, 0.6], help="Shares of the blocks, a policy each.")
    count: int = HfArg(default=64, help="Calibration images.")
    num_inference_steps: int | None = HfArg(default=None, help="Denoising steps; none: 50, 25 for text-to-image.")
    guidance_scale: float | None = HfArg(default=None, help="Guidance; none: 4.0, 3.0 for text-to-image.")
    batch_size: int = HfArg(default=32, help="Images per call.")
    max_shard_size: str = HfArg(default="14MB", help="Largest weight file.")
    vae: str | None = HfArg(default=None, help="Text-to-image: folder of TAESD.")
    text_encoder: str | None = HfArg(default=None, help="Text-to-image: path or Hub name of its text encoder.")
    data_files: str = HfArg(default="emoji64/*.parquet", help="Text-to-image: images with captions, as in training.")

    def __post_init__(self):
        if (self.vae is None) != (self.text_encoder is None):
            raise ValueError(f"vae={self.vae!r}, text_encoder={self.text_encoder!r}, expected both or neither")
        for name in ("count", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not all(0 < budget <= 1 for budget in self.budgets):
            raise ValueError(f"budgets={self.budgets}, expected shares of the blocks in (0, 1]")


def main() -> None:
    launch("train.work.export:run", __doc__, ExportConfig, required=("model", "output_dir"))


if __name__ == "__main__":
    run_script(main)
