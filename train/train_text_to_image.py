"""Train a small text-to-image U-ViT, alone or with exits (DeeDiff), in the latent space of TAESD, with a frozen text encoder.

accelerate launch -m train.train_text_to_image --vae vae --text_encoder sentence-transformers/all-MiniLM-L6-v2 --output_dir runs/text
accelerate launch -m train.train_text_to_image --vae vae --text_encoder ... --mode joint --init_from runs/text --output_dir runs/text_exits

`--vae`: the two files of TAESD, or a diffusers folder. `--text_encoder`: a path or Hub name of any text encoder of transformers. Images
and captions are encoded once (latents/ in output_dir, or `--latents_dir`). Captions, not images, are split: `--validation_share` and
`--test_share` of the subjects never train. `--resume_from_checkpoint latest` goes on after a stop or a kill.
Writes a pipeline folder (transformer/, scheduler/, exits/; the VAE and the text encoder stay where they are), log.jsonl, config.json and
report.json.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from diffusers import DDPMScheduler
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from ee_diffusion.cli.errors import run_script
from ee_diffusion.diffusion.distillation.deediff_objective import MODES, DiffusionObjective
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.latents import load_taesd
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel
from ee_diffusion.diffusion.pipelines.prompts import encode_many
from ee_diffusion.diffusion.pipelines.sampling import sampler
from ee_diffusion.diffusion.pipelines.text_to_image import EarlyExitTextPipeline
from ee_diffusion.training.captions import CaptionConfig, CaptionSource, load_captioned
from ee_diffusion.training.checkpointing import write_json
from ee_diffusion.training.config import ImageDataConfig, TrainConfig
from ee_diffusion.training.datasets import ImageSource, find_data_files
from ee_diffusion.training.loop import Trainer
from train.agreement import check_agrees, uvit_from
from train.encoding import Encoding, encoded_once, round_trip

TEXTS_AT_ONCE = 64
DEFAULTS = {
    "train_data_files": ["emoji64/*.parquet"],
    "image_column": "image",
    "label_column": None,
    "resolution": 64,
    "random_flip": False,
    "train_batch_size": 64,
    "learning_rate": 1.5e-3,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 50,
    "adam_weight_decay": 0.01,
    "ema_decay": 0.998,
    "checkpointing_steps": 100,
    "checkpoints_total_limit": 2,
}


def _flag(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TextConfig:
    """The model, its latents and texts, and the objective.

    Raises:
        ValueError: an unknown mode, frozen exits on a backbone from nowhere, sizes below 1.
    """

    vae: str | None = _flag("Folder of TAESD; a relative one is also looked up below $EE_DIFFUSION_DATA.")
    text_encoder: str | None = _flag("Path or Hub name of a text encoder of transformers with its tokenizer.")
    latents_dir: str | None = _flag("Where latents lie; none: latents/ in output_dir.")
    image_size: int = _flag("Pixels that images are enlarged to before they are encoded.", 64)
    part_size: int = _flag("Images per file of latents.", 512)
    encode_batch_size: int = _flag("Images per forward of the autoencoder.", 32)
    mode: str = _flag("backbone: the plain loss; joint: backbone and exits; frozen: only the exits train.", "backbone")
    init_from: str | None = _flag("Folder with transformer/ (and exits/, if any) to start from; none: from scratch.")
    num_layers: int = _flag("Blocks, an odd number.", 7)
    num_attention_heads: int = _flag("Attention heads.", 2)
    attention_head_dim: int = _flag("Width of a head.", 64)
    patch_size: int = _flag("Latent pixels per patch side.", 2)
    num_text_tokens: int = _flag("Text tokens: the mean of the encoder's states and its first ones.", 4)
    exit_depths: list[int] | None = _flag("Executed blocks at each exit; none: after every block but the last.")
    uncertainty_weight: float = _flag("lambda of DeeDiff eq. 8.", 0.05)
    layerwise_weight: float = _flag("beta of DeeDiff eq. 8.", 0.1)
    caption_drop: float = _flag("Probability that a caption becomes the empty one.", 0.1)
    snr_gamma: float | None = _flag("Weigh the loss by min(SNR, gamma) / (SNR + 1); none: unweighted.", 5.0)

    def __post_init__(self):
        if self.mode not in MODES or (self.mode == "frozen" and not self.init_from):
            raise ValueError(
                f"mode={self.mode!r}, init_from={self.init_from!r}, expected one of {MODES}; frozen needs a trained backbone"
            )
        if min(self.part_size, self.encode_batch_size, self.num_text_tokens) < 1:
            raise ValueError(
                f"part_size={self.part_size}, encode_batch_size={self.encode_batch_size}, "
                f"num_text_tokens={self.num_text_tokens}: expected at least 1 of each"
            )


def parse() -> tuple[TextConfig, ImageDataConfig, CaptionConfig, TrainConfig, bool]:
    """Flags over the defaults."""
    kinds = (TextConfig, ImageDataConfig, CaptionConfig, TrainConfig)
    parser = HfArgumentParser(kinds, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Print the resolved settings as JSON and exit."
    )
    parser.set_defaults(**DEFAULTS)
    model, data, captions, train, rest = parser.parse_args_into_dataclasses()
    if not rest.dry_run and not (train.output_dir and model.vae and model.text_encoder):
        raise ValueError(
            f"output_dir={train.output_dir!r}, vae={model.vae!r}, text_encoder={model.text_encoder!r}, expected all three"
        )
    return model, data, captions, train, rest.dry_run


def load_source(
    config: TextConfig, data: ImageDataConfig, captions: CaptionConfig, folder: Path
) -> tuple[CaptionSource, dict]:
    """Images and captions of the training split, encoded, and what that took."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # as the Trainer's Accelerator will find it
    vae = load_taesd(find_data_files(config.vae)[0]).to(state.device, memory_format=torch.channels_last)
    encoding = Encoding(
        size=config.image_size,
        part_size=config.part_size,
        batch_size=config.encode_batch_size,
        bf16=False,
        mirrored=data.random_flip,
    )
    every = load_captioned(data, captions)
    train = every.part("train")
    images = ImageSource(train.images, None, random_flip=False)
    where = Path(config.latents_dir or folder / "latents")
    latents, made_from, cost = encoded_once(encoding, images, vae, folder=where)
    cost |= round_trip(encoding, images.images, vae) | {"images_per_split": dict(Counter(every.splits))}
    distinct = sorted(set(train.captions))
    texts = encoded_texts(config, [*distinct, ""], state.device)
    places = torch.tensor([distinct.index(one) for one in train.captions]).repeat(2 if encoding.mirrored else 1)
    name = json.dumps(made_from | {"text_encoder": config.text_encoder, "captions": len(distinct)}, sort_keys=True)
    source = CaptionSource(
        latents, places, texts=texts[:-1], empty=texts[-1], caption_drop=config.caption_drop, name=name
    )
    return source, cost | {"captions": len(distinct)}


def encoded_texts(config: TextConfig, prompts: list[str], device: torch.device) -> torch.Tensor:
    """Prompts (Q, T, V), float16."""
    tokenizer = AutoTokenizer.from_pretrained(config.text_encoder)
    encoder = AutoModel.from_pretrained(config.text_encoder, dtype=torch.float32).to(device).eval()
    sizes = {"num_tokens": config.num_text_tokens, "batch_size": TEXTS_AT_ONCE}
    return encode_many(tokenizer, encoder, prompts, **sizes).half()


def build_transformer(config: TextConfig, text_dim: int) -> UViTTransformer2DModel:
    sizes = {
        "sample_size": config.image_size // 8,
        "patch_size": config.patch_size,
        "in_channels": 4,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.attention_head_dim,
        "text_dim": text_dim,
        "num_text_tokens": config.num_text_tokens,
    }
    return uvit_from(config.init_from, sizes)


def build_objective(config: TextConfig, text_dim: int) -> DiffusionObjective:
    """From scratch, or from `init_from`."""
    transformer = build_transformer(config, text_dim)
    return DiffusionObjective(
        transformer,
        build_exits(config, transformer),
        DDPMScheduler(prediction_type="v_prediction", clip_sample=False),
        mode=config.mode,
        uncertainty_weight=config.uncertainty_weight,
        layerwise_weight=config.layerwise_weight,
        class_drop=0.0,
        snr_gamma=config.snr_gamma,
    )


def build_exits(config: TextConfig, transformer: UViTTransformer2DModel) -> DenoisingExits | None:
    if config.mode == "backbone":
        return None
    if config.init_from and (Path(config.init_from) / "exits").is_dir():
        exits = DenoisingExits.from_pretrained(config.init_from, subfolder="exits", torch_dtype=torch.float32)
        depths = list(config.exit_depths or exits.config.depths)
        check_agrees("exits", {"depths": list(exits.config.depths)}, {"depths": depths})
        return exits
    depths = config.exit_depths or range(1, len(transformer.transformer_blocks))
    return DenoisingExits.for_transformer(transformer, tuple(depths), "paper")


def save(folder: Path, objective: DiffusionObjective) -> None:
    scheduler = sampler("ddim", like=objective.scheduler)
    EarlyExitTextPipeline(objective.transformer, scheduler, objective.exits).save_pretrained(folder)


def main() -> None:
    model, data, captions, train, dry_run = parse()
    resolved = asdict(model) | asdict(data) | asdict(captions) | asdict(train)
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return
    folder = Path(train.output_dir)
    source, cost = load_source(model, data, captions, folder)
    set_seed(train.seed)
    objective = build_objective(model, source.texts.shape[-1])
    places = {"latents_dir": None, "vae": None, "text_encoder": None}
    trainer = Trainer(objective, source, train, save=save, identity=asdict(model) | asdict(captions) | places)
    report = asdict(trainer.fit())
    if trainer.accelerator.is_main_process:
        write_json(folder / "config.json", resolved)
        machine = {"processes": trainer.accelerator.num_processes, "device": str(trainer.accelerator.device)}
        machine |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        write_json(folder / "report.json", {"data": cost, "train": report} | machine)
        print(json.dumps({"data": cost, "train": report}))


if __name__ == "__main__":
    run_script(main)
