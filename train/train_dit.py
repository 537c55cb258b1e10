"""Train a small class-conditional DiT on images in the latent space of TAESD, and write it as a stock `DiTPipeline` folder.

accelerate launch -m train.train_dit --vae vae --train_data_files 'cifar10/train-*.parquet' --output_dir runs/dit

`--vae`: the two files of TAESD, or a diffusers folder. Images are enlarged to `--image_size` and encoded once, in parts (latents/ in
output_dir), mirrored as well unless `--no_random_flip`. `--resume_from_checkpoint latest` goes on after a stop or a kill.
`DiTPipeline` takes 1000 for "no class", so the model has 1000 classes of which the data uses the first. Writes the pipeline folder,
log.jsonl, config.json and report.json with the PSNR of the round trip through the autoencoder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from diffusers import AutoencoderTiny, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from transformers import HfArgumentParser

from ee_diffusion.cli.errors import run_script
from ee_diffusion.diffusion.distillation.deediff_objective import DiffusionObjective, forbid_label_drop
from ee_diffusion.diffusion.latents import load_taesd
from ee_diffusion.diffusion.pipelines.sampling import sampler
from ee_diffusion.training.checkpointing import write_json
from ee_diffusion.training.config import ImageDataConfig, TrainConfig
from ee_diffusion.training.datasets import find_data_files, load_image_source
from ee_diffusion.training.loop import Trainer
from ee_diffusion.training.sources import LatentSource
from train.encoding import Encoding, encoded_once, round_trip

NULL_CLASS = 1000  # what DiTPipeline takes for "no class"
DEFAULTS = {
    "train_data_files": ["cifar10/train-*.parquet"],
    "image_column": "img",
    "label_column": "label",
    "resolution": 32,
    "train_batch_size": 256,
    "learning_rate": 4e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 500,
    "adam_weight_decay": 0.0,
    "ema_decay": 0.999,
}


def _flag(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DiTConfig:
    """The model, its latents and the objective.

    Raises:
        ValueError: a size that fits no latents, a number of classes that DiTPipeline cannot name, a drop that is no probability.
    """

    vae: str | None = _flag("Folder of TAESD; a relative one is also looked up below $EE_DIFFUSION_DATA.")
    latents_dir: str | None = _flag("Where latents lie; none: latents/ in output_dir.")
    image_size: int = _flag("Pixels that images are enlarged to before they are encoded.", 128)
    part_size: int = _flag("Images per file of latents.", 2048)
    encode_batch_size: int = _flag("Images per forward of the autoencoder.", 32)
    encode_bf16: bool = _flag("Encode under bfloat16 autocast.", False)
    num_classes: int = _flag("Classes in the data.", 10)
    num_layers: int = _flag("Blocks.", 12)
    num_attention_heads: int = _flag("Attention heads.", 6)
    attention_head_dim: int = _flag("Width of a head.", 64)
    patch_size: int = _flag("Latent pixels per patch side.", 2)
    class_drop: float = _flag("Probability that a label becomes the null class.", 0.1)
    snr_gamma: float | None = _flag("Weigh the loss by min(SNR, gamma) / SNR; none: unweighted.", 5.0)

    def __post_init__(self):
        if self.image_size < 8 * self.patch_size or self.image_size % (8 * self.patch_size):
            raise ValueError(f"image_size={self.image_size}, expected a multiple of {8 * self.patch_size}")
        if not 1 <= self.num_classes <= NULL_CLASS:
            raise ValueError(f"num_classes={self.num_classes}, expected 1..{NULL_CLASS}")
        if min(self.part_size, self.encode_batch_size) < 1 or not 0 <= self.class_drop <= 1:
            raise ValueError(
                f"part_size={self.part_size}, encode_batch_size={self.encode_batch_size}, class_drop={self.class_drop}: "
                "expected at least 1, at least 1, a probability"
            )


def parse() -> tuple[DiTConfig, ImageDataConfig, TrainConfig, bool]:
    """Flags over the defaults."""
    parser = HfArgumentParser((DiTConfig, ImageDataConfig, TrainConfig), description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Print the resolved settings as JSON and exit."
    )
    parser.set_defaults(**DEFAULTS)
    model, data, train, rest = parser.parse_args_into_dataclasses()
    if not rest.dry_run and not (train.output_dir and model.vae):
        raise ValueError(
            f"output_dir={train.output_dir!r}, vae={model.vae!r}, expected a folder to write to and one to read"
        )
    return model, data, train, rest.dry_run


def encoding_of(config: DiTConfig, data: ImageDataConfig) -> Encoding:
    return Encoding(
        size=config.image_size,
        part_size=config.part_size,
        batch_size=config.encode_batch_size,
        bf16=config.encode_bf16,
        mirrored=data.random_flip,
    )


def build_transformer(config: DiTConfig) -> DiTTransformer2DModel:
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=4,
        out_channels=4,
        num_layers=config.num_layers,
        attention_bias=True,
        sample_size=config.image_size // 8,
        patch_size=config.patch_size,
        num_embeds_ada_norm=NULL_CLASS,
    )
    # Every block begins as the identity and the prediction as zero (DiT, arXiv 2212.09748, sec. 3.2: adaLN-Zero).
    zeroed = [block.norm1.linear for block in transformer.transformer_blocks] + [
        transformer.proj_out_1,
        transformer.proj_out_2,
    ]
    for linear in zeroed:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return forbid_label_drop(transformer)


def save(folder: Path, objective: DiffusionObjective, vae: AutoencoderTiny) -> None:
    scheduler = sampler("ddim", like=objective.scheduler, clip_sample=False)
    DiTPipeline(objective.transformer, vae, scheduler).save_pretrained(folder)


def main() -> None:
    model, data, train, dry_run = parse()
    resolved = asdict(model) | asdict(data) | asdict(train)
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # as the Trainer's Accelerator will find it
    folder = Path(train.output_dir)
    vae = load_taesd(find_data_files(model.vae)[0]).to(state.device, memory_format=torch.channels_last)
    source = load_image_source(data, model.num_classes)
    where = Path(model.latents_dir or folder / "latents")
    encoding = encoding_of(model, data)
    latents, made_from, cost = encoded_once(encoding, source, vae, folder=where)
    cost |= round_trip(encoding, source.images, vae)
    labels = source.labels.repeat(2 if encoding.mirrored else 1)
    latents = LatentSource(latents, labels, json.dumps(made_from, sort_keys=True))
    set_seed(train.seed)
    scheduler = DDPMScheduler(clip_sample=False)
    objective = DiffusionObjective(
        build_transformer(model),
        None,
        scheduler,
        mode="backbone",
        class_drop=model.class_drop,
        snr_gamma=model.snr_gamma,
    )
    trainer = Trainer(
        objective, latents, train, save=partial(save, vae=vae), identity=asdict(model) | {"latents_dir": None}
    )
    report = asdict(trainer.fit())
    if state.is_main_process:
        write_json(folder / "config.json", resolved)
        machine = {"processes": state.num_processes, "device": str(state.device), "torch": torch.__version__}
        write_json(folder / "report.json", {"latents": cost, "train": report} | machine)
        print(json.dumps({"latents": cost, "train": report}))


if __name__ == "__main__":
    run_script(main)
