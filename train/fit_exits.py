"""Fit exits to a pretrained pipeline without any data: the frozen model is its own teacher, along its own trajectories.

accelerate launch -m train.fit_exits --model <pipeline folder> --labels 0 1 2 --guidance_scale 3.0 --output_dir runs/fit
then along the trajectories of the exited model:
accelerate launch -m train.fit_exits --model <pipeline folder> --guidance_scale 3.0 --trajectories exited --exit_threshold 0.1 \\
  --init_exits runs/fit/exits --output_dir runs/fit_exited

`--exit_variant adapter --adapter_rank 32`: small adapters before the model's own tail, for any class of the family table.
`--states fresh`: new trajectories for every batch (train_batch_size then counts trajectories); `--states dataset` with the data flags of
train_uvit.py: noised images instead. `--lora_rank 8`: the backbone adapts, too. `--resume_from_checkpoint latest` goes on after a kill.
Writes exits/ (the whole pipeline where it has a place for exits, or where it was adapted), config.json, report.json, log.jsonl.
"""

from __future__ import annotations

import json
import platform
import resource
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from diffusers import DiffusionPipeline
from transformers import HfArgumentParser

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.distillation.collect import Exited, fingerprint
from ee_diffusion.diffusion.distillation.dataset import States
from ee_diffusion.diffusion.distillation.deediff_objective import num_classes_of
from ee_diffusion.diffusion.distillation.lora import add_lora, merged
from ee_diffusion.diffusion.distillation.objective import DistillationObjective, ExitErrors, exit_errors
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.methods import deediff
from ee_diffusion.diffusion.model_specs import blocks_of
from ee_diffusion.diffusion.pipelines.sampling import use_sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.training.checkpointing import write_json
from ee_diffusion.training.config import ImageDataConfig, TrainConfig
from ee_diffusion.training.loop import Trainer
from train.fit_settings import FitConfig
from train.fit_supply import build_supply, held_out_states

DEFAULTS = {  # of the loop, where fitting small heads differs from training a model
    "train_batch_size": 16,
    "learning_rate": 1e-3,
    "adam_weight_decay": 0.01,
    "lr_warmup_steps": 50,
    "max_train_steps": 2000,
    "ema_decay": 0.99,
    "checkpointing_steps": 500,
    "label_column": None,
}


def parse() -> tuple[FitConfig, ImageDataConfig, TrainConfig, bool]:
    """Flags over the defaults."""
    kinds = (FitConfig, ImageDataConfig, TrainConfig)
    parser = HfArgumentParser(kinds, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Print the resolved settings as JSON and exit."
    )
    parser.set_defaults(**DEFAULTS)
    *configs, rest = parser.parse_args_into_dataclasses()
    fit, data, train = configs
    if not train.output_dir and not rest.dry_run:
        raise ValueError(f"output_dir={train.output_dir!r}, expected the folder to write to")
    if train.compile:
        raise ValueError("compile=True: fitting listens to blocks as they run, which cannot be compiled")
    if (fit.states == "dataset") != bool(data.sources()):
        raise ValueError(
            f"states={fit.states!r} with data from {data.sources() or 'nowhere'}: dataset needs data, others take none"
        )
    return fit, data, train, rest.dry_run


def load_pipeline(fit: FitConfig) -> DiffusionPipeline:
    """The pipeline in its own class, with its sampler; exits that it brings are left out."""
    own = DiffusionPipeline.load_config(fit.model)["_class_name"] == EarlyExitPipeline.__name__
    pipeline = (EarlyExitPipeline if own else DiffusionPipeline).from_pretrained(fit.model)
    pipeline.set_progress_bar_config(disable=True)
    if "exits" in pipeline.components:
        pipeline.register_modules(exits=None)
    if fit.sampler is not None:
        use_sampler(pipeline, fit.sampler)
    return pipeline


def build_exits(fit: FitConfig, transformer: torch.nn.Module) -> AdapterExits | DenoisingExits:
    """Fresh exits, or those to go on from. Raises ValueError where the latter are not what the flags say."""
    adapters = fit.exit_variant == "adapter"
    if fit.init_exits is None:
        layers = len(blocks_of(transformer))
        depths = tuple(fit.exit_depths or range(1, layers))
        if adapters:
            return AdapterExits.for_transformer(transformer, depths, rank=fit.adapter_rank)
        return DenoisingExits.for_transformer(transformer, depths, fit.exit_variant)
    kind = AdapterExits if adapters else DenoisingExits
    came = kind.load_config(fit.init_exits)["_class_name"]
    if came != kind.__name__:
        raise ValueError(f"the exits in {fit.init_exits} are {came}, the flags say {kind.__name__}")
    exits = kind.from_pretrained(fit.init_exits)
    there = (exits.depths, exits.config.rank if adapters else exits.config.variant)
    asked = (tuple(fit.exit_depths or exits.depths), fit.adapter_rank if adapters else fit.exit_variant)
    if asked != there:
        raise ValueError(f"the exits in {fit.init_exits} are {there}, the flags say {asked}")
    return exits


def conditions_of(fit: FitConfig, transformer: torch.nn.Module) -> list[int] | list[str] | None:
    """What to generate: the prompts, the labels, or every class in turn; None: the model is unconditional."""
    if fit.prompts is not None:
        return [line for line in Path(fit.prompts).read_text().splitlines() if line.strip()]
    if fit.labels is None:
        count = num_classes_of(transformer)
        return None if count is None else list(range(count))
    first = Path(fit.labels[0])
    words = first.read_text().split() if len(fit.labels) == 1 and first.is_file() else fit.labels
    try:
        return [int(word) for word in words]
    except ValueError as error:
        raise ValueError(f"labels={fit.labels}, expected integers or a file of them: {error}") from error


def judge(
    objective: DistillationObjective, held: dict[str, States], batch_size: int
) -> dict[str, tuple[ExitErrors, float]]:
    return {kind: exit_errors(objective, states, batch_size=batch_size) for kind, states in held.items()}


def table(depths: tuple[int, ...], before: ExitErrors, after: ExitErrors, power: float) -> str:
    """One line per exit; errors relative to the teacher's own mean square."""
    head = f"{'depth':>5} {'before':>8} {'own tail':>8} {'fitted':>8} {'gap':>7} {'said':>7} {'off by':>7} {'rank corr.':>10}"
    lines = [
        f"{depth:>5} {before.error[k] / power:>8.4f} {after.tail_error[k] / power:>8.4f} {after.error[k] / power:>8.4f} "
        f"{after.gap[k]:>7.4f} {after.said[k]:>7.4f} {after.said_error[k]:>7.4f} {after.rank_correlation[k]:>10.3f}"
        for k, depth in enumerate(depths)
    ]
    return "\n".join([head, *lines])


def save(folder: Path, objective: DistillationObjective, pipeline: DiffusionPipeline) -> None:
    """The exits; and the pipeline with them, if it has a place for them or its backbone adapted."""
    own = "exits" in pipeline.components
    if not own:
        objective.exits.save_pretrained(folder / "exits")
    if not (own or objective.adapted):
        return
    fitted = {"transformer": merged(objective.transformer)} | ({"exits": objective.exits} if own else {})
    before = {name: pipeline.components[name] for name in fitted}
    pipeline.register_modules(**fitted)
    pipeline.save_pretrained(folder)
    pipeline.register_modules(**before)


def peak_memory() -> dict[str, int]:
    """Bytes at the highest, of this process so far."""
    there = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return there | ({"cuda": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def compared(depths: tuple[int, ...], before: dict, after: dict) -> dict:
    """Print the tables, return their numbers."""
    gain = {}
    for kind, (errors, power) in after.items():
        print(
            f"\nheld-out trajectories of the {kind} model; squared errors relative to the full model's mean square, {power:.4f}"
        )
        print(table(depths, before[kind][0], errors, power))
        numbers = {"before": before[kind][0].to_dict(), "after": errors.to_dict()}
        gain[kind] = {"depths": list(depths), "power": power} | numbers
    return gain


def rule_of(fit: FitConfig) -> Policy | None:
    """The policy of exited trajectories."""
    if fit.exit_policy is not None:
        return Policy.load(fit.exit_policy)
    return None if fit.exit_threshold is None else deediff(fit.exit_threshold)


def machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    counts = {"threads": torch.get_num_threads(), "processes": PartialState().num_processes}
    return {"device": device, "torch": torch.__version__} | counts


def run(fit: FitConfig, data: ImageDataConfig, train: TrainConfig) -> dict:
    """Fit, and say what it cost and gained; empty on ranks other than the first."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # as the Trainer's Accelerator will find it
    folder = Path(train.output_dir)
    pipeline, policy = load_pipeline(fit).to(state.device), rule_of(fit)
    set_seed(train.seed)
    exits = build_exits(fit, pipeline.transformer).to(state.device)
    exited = None if policy is None else Exited(policy, exits)
    given = {
        "conditions": conditions_of(fit, pipeline.transformer),
        "exited": exited if fit.trajectories == "exited" else None,
        "num_inference_steps": fit.num_inference_steps,
        "guidance_scale": fit.guidance_scale,
    }
    memory = {"peak_memory_before": peak_memory()}
    supply = build_supply(fit, data, pipeline, given=given, folder=Path(fit.states_dir or folder / "states"))
    memory["peak_memory"] = peak_memory()
    held = held_out_states(fit, pipeline, given | {"exited": exited}) if state.is_main_process else {}
    weights = {"uncertainty_weight": fit.uncertainty_weight, "layerwise_weight": fit.layerwise_weight}
    models = {"exits": fingerprint(exits), "transformer": fingerprint(pipeline.transformer)}
    identity = weights | models | {"lora_rank": fit.lora_rank}
    if fit.lora_rank is not None:
        add_lora(pipeline.transformer, rank=fit.lora_rank)
    objective = DistillationObjective(pipeline.transformer, exits, adapted=fit.lora_rank is not None, **weights)
    before = judge(objective, held, fit.collect_batch_size)
    trainer = Trainer(objective, supply.source, train, save=partial(save, pipeline=pipeline), identity=identity)
    report = trainer.fit()
    if not state.is_main_process:
        return {}
    with trainer.learner.averaged() as fitted:
        gain = compared(exits.depths, before, judge(fitted, held, fit.collect_batch_size))
    cost = supply.cost | memory
    if supply.clock is not None:
        cost |= {"seconds": round(supply.clock.seconds, 2), "since_resume": report.resumed_from is not None}
    fitting = asdict(report) | {"peak_memory": peak_memory()}
    return {"states": cost, "fit": fitting, "gain": gain} | machine()


def main() -> None:
    fit, data, train, dry_run = parse()
    resolved = asdict(fit) | asdict(data) | asdict(train)
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return
    if report := run(fit, data, train):
        write_json(Path(train.output_dir) / "config.json", resolved)
        write_json(Path(train.output_dir) / "report.json", report)
        print(json.dumps({name: report[name] for name in ("states", "fit")}))


if __name__ == "__main__":
    run_script(main)
