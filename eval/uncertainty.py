"""What the uncertainty modules know: within a timestep, does u rank the images by their true error?

python -m eval.uncertainty --output_dir runs/uncertainty --data_files cifar10/test-*.parquet

Held-out images are noised to each of several timesteps. Per exit and timestep: the rank correlation (Spearman) over images of u with the
true error of that exit (mean squared, against the true noise, and against the full model's answer), and how much of the variance of the
error a sample-independent number per (exit, timestep) leaves. A constant has rank correlation 0 by construction: that is the control.
Also the rank correlation over everything pooled, which a table of constants would reach nearly as well, beside that table's own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.io import write_text
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.splits import HELD_OUT
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from ee_diffusion.training.config import ImageDataConfig
from ee_diffusion.training.datasets import load_image_source
from eval.harness.options import SamplingOptions, flag, parse, results_folder
from eval.harness.pipeline import load


@dataclass(frozen=True)
class UncertaintyOptions:
    """Which images, at which noise."""

    data_files: str = flag("Parquet files of held-out images.", "cifar10/test-*.parquet")
    image_column: str = flag("Column of the images.", "img")
    label_column: str = flag("Column of the labels.", "label")
    count: int = flag("Held-out images.", 512)
    timesteps: int = flag("Timesteps, evenly spread.", 10)


def observe(
    pipeline: EarlyExitPipeline, images: Tensor, labels: Tensor | None, time: int, *, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """images (n, C, H, W) in [-1, 1] at one timestep -> u, error to the noise, error to the full model; each (K, n)."""
    transformer, exits = pipeline.transformer, pipeline.exits
    generator = torch.Generator().manual_seed(seed + time)
    noise = torch.randn(images.shape, generator=generator).to(transformer.device)
    times = torch.full((len(images),), time, device=transformer.device)
    images, labels = (None if one is None else one.to(transformer.device) for one in (images, labels))
    noisy = pipeline.scheduler.add_noise(images, noise, times)
    with torch.no_grad():
        output = transformer(noisy.to(transformer.dtype), times, labels, output_hidden_states=True)
        said, to_noise, to_full = [], [], []
        for exit, depth in enumerate(exits.depths):
            hidden, context = output.hidden_states[depth], {"timestep": times}
            answer = exits.answer(exit, hidden, context)
            answer = transformer.tail(answer) if exits.space == "hidden" else answer
            said.append(1 - exits.confidence(exit, hidden, context).float())
            to_noise.append((answer - noise).float().square().flatten(1).mean(1))
            to_full.append((answer - output.sample).float().square().flatten(1).mean(1))
    return torch.stack(said), torch.stack(to_noise), torch.stack(to_full)


def held_out(options: UncertaintyOptions, num_classes: int | None, *, size: int) -> tuple[Tensor, Tensor | None]:
    """The first `count` images of the held-out test positions: (n, C, H, W) in [-1, 1], H = W = size, and labels (n,), None of an
    unconditional model.

    Raises:
        ValueError: fewer images than there are positions asked for; as `load_image_source`.
    """
    source = load_image_source(
        ImageDataConfig(
            train_data_files=[options.data_files],
            image_column=options.image_column,
            label_column=options.label_column,
            resolution=size,
            random_flip=False,
        ),
        num_classes,
    )
    positions = torch.tensor(list(HELD_OUT["test"][: options.count]))
    if len(source.images) <= positions[-1]:
        raise ValueError(
            f"{options.data_files} hold {len(source.images)} images, expected more than {positions[-1]}: those from {positions[0]} on are "
            "held out"
        )
    batch = source.batch(positions, positions)
    return batch["images"], batch.get("class_labels")


def table(said: Tensor, error: Tensor, times: list[int], depths: tuple[int, ...]) -> list[dict]:
    """said and error (T, K, n) -> a row per exit: rank correlation within each timestep."""
    rows = []
    for exit, depth in enumerate(depths):
        within = [float(spearman_corrcoef(said[t, exit], error[t, exit])) for t in range(len(times))]
        constant = error[:, exit].mean(1, keepdim=True).expand_as(error[:, exit])
        rows.append(
            {
                "depth": depth,
                "mean_within": sum(within) / len(within),
                "pooled": float(spearman_corrcoef(said[:, exit].flatten(), error[:, exit].flatten())),
                "pooled_constant": float(spearman_corrcoef(constant.flatten(), error[:, exit].flatten())),
                **{f"t={time}": value for time, value in zip(times, within, strict=True)},
            }
        )
    return rows


def main() -> None:
    sampling, options = parse(SamplingOptions, UncertaintyOptions, description=__doc__)
    folder, pipeline = results_folder(sampling.output_dir), load(sampling)
    config = pipeline.transformer.config
    images, labels = held_out(options, config.num_classes, size=config.sample_size)
    total = pipeline.scheduler.config.num_train_timesteps
    times = [round((i + 0.5) * total / options.timesteps) for i in range(options.timesteps)]
    seen = [observe(pipeline, images, labels, time, seed=sampling.seed) for time in times]
    said, to_noise, to_full = (torch.stack(part).cpu() for part in zip(*seen, strict=True))  # (T, K, n)
    rows = {
        "noise": table(said, to_noise, times, pipeline.exits.depths),
        "full": table(said, to_full, times, pipeline.exits.depths),
    }
    spread = {
        "u": said.std(2).tolist(),
        "u_mean": said.mean(2).tolist(),
        "error_to_noise_mean": to_noise.mean(2).tolist(),
    }
    facts = {"settings": asdict(sampling) | asdict(options), "environment": environment(), "times": times}
    write_json(folder / "uncertainty.json", facts | {"rows": rows, "spread": spread})
    text = "".join(
        f"Rank correlation of u with the error to the {name}\n\n{markdown_table(part, list(part[0]))}\n"
        for name, part in rows.items()
    )
    write_text(folder / "uncertainty.md", text)
    print(text)


if __name__ == "__main__":
    run_script(main)
