"""Turn a trained text-to-image pipeline into a checkpoint to ship: half precision, its autoencoder, policies calibrated on validation captions.

python -m train.export_text --model runs/text_exits --vae vae --text_encoder sentence-transformers/all-MiniLM-L6-v2 --output_dir runs/checkpoint

The text encoder is not written: it is large and public. The policies (policies/blocks-80.json, ...) are DeeDiff thresholds found by replay
of a run on captions of the validation split, one for each share of the blocks.
"""  # noqa: E501  (a command is one line)

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.latents import load_taesd
from ee_diffusion.diffusion.pipelines.text_to_image import EarlyExitTextPipeline
from ee_diffusion.metrics.splits import seeds
from ee_diffusion.training.captions import CaptionConfig, load_captioned
from ee_diffusion.training.config import ImageDataConfig
from ee_diffusion.training.datasets import find_data_files
from train.export import forget_origin, write_policies


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Folder of a trained pipeline with exits.")
    parser.add_argument("--vae", required=True, help="Folder of TAESD.")
    parser.add_argument(
        "--text_encoder", required=True, help="Path or Hub name of the text encoder it was trained with."
    )
    parser.add_argument("--data_files", default="emoji64/*.parquet", help="Images with captions, as in training.")
    parser.add_argument("--output_dir", required=True, help="Where the checkpoint goes.")
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[0.8, 0.6], help="Shares of the blocks, a policy each."
    )
    parser.add_argument("--count", type=int, default=64, help="Calibration images.")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="Denoising steps while calibrating.")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="Guidance while calibrating.")
    parser.add_argument("--batch_size", type=int, default=32, help="Images per call while calibrating.")
    return parser.parse_args()


def save(options: argparse.Namespace, folder: Path) -> None:
    pipeline = EarlyExitTextPipeline.from_pretrained(options.model, vae=load_taesd(find_data_files(options.vae)[0]))
    pipeline.to(torch.float16).save_pretrained(folder)
    for path in folder.glob("**/*.json"):
        forget_origin(path)


def recorded(options: argparse.Namespace, pipeline: EarlyExitTextPipeline) -> Trace:
    """A run at full depth on validation captions, all scores recorded."""
    data = ImageDataConfig(train_data_files=[options.data_files], label_column=None, resolution=64, random_flip=False)
    captions = sorted(set(load_captioned(data, CaptionConfig()).part("validation").captions))
    prompts, chosen, traces = (
        [captions[i % len(captions)] for i in range(options.count)],
        seeds("calibrate", options.count),
        [],
    )
    for first in range(0, options.count, options.batch_size):
        places = range(first, min(options.count, first + options.batch_size))
        output = pipeline(
            [prompts[place] for place in places],
            options.num_inference_steps,
            options.guidance_scale,
            generator=[torch.Generator().manual_seed(chosen[place]) for place in places],
            image_ids=torch.tensor(list(places)),
            output_type="latent",
            exit_policy=Policy(Threshold(1.0), record_all=True),
        )
        traces.append(output.trace)
    return Trace.concatenate(traces)


def main() -> None:
    options = flags()
    folder = Path(options.output_dir)
    save(options, folder)
    words = {
        "text_encoder": AutoModel.from_pretrained(options.text_encoder).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(options.text_encoder),
    }
    pipeline = EarlyExitTextPipeline.from_pretrained(folder, **words)  # what users will load decides
    pipeline.set_progress_bar_config(disable=True)
    write_policies(folder, recorded(options, pipeline), options.budgets)


if __name__ == "__main__":
    run_script(main)
