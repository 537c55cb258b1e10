"""What exits cost in training: a step (AdamW) with all exits and the joint loss over one of the same backbone without exits.

python -m eval.training_step --output_dir runs/training-step

Both take turns on the same batch of noise: time does not depend on content. Writes training-step.json.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ee_diffusion.cli.errors import run_script
from ee_diffusion.diffusion.distillation.deediff_objective import DiffusionObjective
from ee_diffusion.diffusion.pipelines.sampling import sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from ee_diffusion.metrics.timing import interleaved
from eval.forwards import Forward
from eval.harness.options import SamplingOptions, command, flag, parse, results_folder
from eval.harness.pipeline import load


@dataclass(frozen=True)
class TrainingOptions:
    """What a step is."""

    train_batch_size: int = flag("Samples of a step.", 64)
    mixed_precision: str = flag("bf16 (autocast) or no.", "no")
    repeats: int = flag("Counted steps of each.", 9)


def training_step(
    pipeline: EarlyExitPipeline, mode: str, batch: dict[str, Tensor], *, mixed_precision: str
) -> Callable[[], object]:
    """One optimiser step of a copy of the model, with or without exits."""
    transformer = copy.deepcopy(pipeline.transformer).float().train()
    exits = None if mode == "backbone" else copy.deepcopy(pipeline.exits).float().train()
    class_drop = 0.1 if transformer.config.null_class is not None else 0.0
    noise = sampler("ddpm", like=pipeline.scheduler)
    objective = DiffusionObjective(transformer, exits, noise, mode=mode, class_drop=class_drop)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-6, fused=True)
    device, half = transformer.device.type, mixed_precision == "bf16"

    def run() -> object:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = objective(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return run


def training_cost(pipeline: EarlyExitPipeline, options: TrainingOptions, seed: int) -> dict:
    """Median of pairwise ratios of a step with exits to one without."""
    forward, rows = Forward(pipeline, options.train_batch_size, seed), options.train_batch_size
    uniform = torch.linspace(0, 0.999, rows, device=forward.sample.device)
    images = forward.sample.float()
    batch = {"images": images, "noise": images.flip(0), "uniform": uniform, "label_drop": uniform.flip(0)}
    batch |= {} if forward.labels is None else {"class_labels": forward.labels}
    precision = {"mixed_precision": options.mixed_precision}
    steps = {mode: training_step(pipeline, mode, batch, **precision) for mode in ("backbone", "joint")}
    timings = interleaved(steps, repeats=options.repeats, warmup=1)
    found = {"batch": rows, "backbone_ms": 1e3 * timings["backbone"].median, "joint_ms": 1e3 * timings["joint"].median}
    return found | {"joint_over_backbone": timings["joint"].ratio(timings["backbone"])}


def main() -> None:
    sampling, options = parse(SamplingOptions, TrainingOptions, description=__doc__)
    if options.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision={options.mixed_precision!r}, expected 'no' or 'bf16'")
    folder = results_folder(sampling.output_dir)
    row = training_cost(load(sampling), options, sampling.seed)
    facts = {"command": command(), "settings": asdict(sampling) | asdict(options), "environment": environment()}
    write_json(folder / "training-step.json", facts | {"rows": [row]})
    print(markdown_table([row]))


if __name__ == "__main__":
    run_script(main)
