"""A picture of what a text-to-image pipeline draws: one row for each setting (full depth, each policy), one column for each prompt.

python -m eval.prompt_grid --model runs/checkpoint --text_encoder sentence-transformers/all-MiniLM-L6-v2 --prompts prompts.txt --policies runs/checkpoint/policies --output grid.png

The same seed in every row of a column. `--real`: parquet files of images with captions, whose image of the same caption makes the first row.
"""  # noqa: E501  (a command is one line)

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.policy import Policy
from ee_diffusion.metrics.clip_score import read_prompts
from ee_diffusion.metrics.figures import save_figure
from ee_diffusion.metrics.splits import seeds
from ee_diffusion.training.captions import load_captioned
from ee_diffusion.training.config import CaptionConfig, ImageDataConfig
from eval.harness.options import flag, parse
from eval.harness.prompting import draw, load_text_pipeline


@dataclass(frozen=True)
class GridOptions:
    """What is drawn."""

    model: str | None = flag("Folder of a text-to-image pipeline.")
    text_encoder: str | None = flag("Path or Hub name of its text encoder, if the folder has none.")
    prompts: str | None = flag("File of prompts: .tsv, .csv or .txt.")
    prompt_column: str = flag("Column of the prompts in a .tsv or .csv.", "Prompt")
    count: int = flag("Use the first so many prompts.", 8)
    policies: str | None = flag("Folder of policy files, a row each; none: full depth alone.")
    real: str | None = flag("Parquet files of images with captions, for a row of real images.")
    num_inference_steps: int = flag("Denoising steps.", 25)
    guidance_scale: float = flag("Classifier-free guidance.", 3.0)
    output: str | None = flag("The PNG to write.")


def real_images(files: str, prompts: list[str]) -> Tensor:
    data = ImageDataConfig(train_data_files=[files], label_column=None, resolution=64, random_flip=False)
    every = load_captioned(data, CaptionConfig(skin_tones=True))
    return torch.stack([every.images[every.captions.index(prompt)] for prompt in prompts])


def picture(rows: dict[str, Tensor], prompts: list[str]) -> Figure:
    """rows: name -> images (n, 3, H, W) uint8, one for each prompt."""
    figure = Figure(figsize=(1.25 * len(prompts) + 0.6, 1.25 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), len(prompts), squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(name, fontsize=8)
    for axes, prompt in zip(grid[0], prompts, strict=True):
        axes.set_title("\n".join(textwrap.wrap(prompt, 18)), fontsize=7)
    return figure


def main() -> None:
    (options,) = parse(GridOptions, description=__doc__)
    if not (options.model and options.prompts and options.output):
        raise ValueError(
            f"model={options.model!r}, prompts={options.prompts!r}, output={options.output!r}, expected all"
        )
    prompts = read_prompts(options.prompts, column=options.prompt_column)[: options.count]
    pipeline = load_text_pipeline(options.model, text_encoder=options.text_encoder, device=torch.device("cpu"))
    call = {
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "batch_size": 8,
    }
    rows = {} if options.real is None else {"real": real_images(options.real, prompts)}
    rows["full depth"], _ = draw(pipeline, prompts, seeds("demo", len(prompts)), **call)
    for file in [] if options.policies is None else sorted(Path(options.policies).glob("*.json")):
        images, trace = draw(pipeline, prompts, seeds("demo", len(prompts)), exit_policy=Policy.load(file), **call)
        share = trace.report().fraction_executed
        rows[f"{share:.0%} of blocks"] = images
        print(f"{file.name}: {share:.3f} of the blocks")
    save_figure(picture(rows, prompts), options.output)


if __name__ == "__main__":
    run_script(main)
