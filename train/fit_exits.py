"""Fit exits to a pretrained pipeline without any data: the frozen model is its own teacher, along its own trajectories.

accelerate launch train/fit_exits.py --model <pipeline folder> --labels 0 1 2 --guidance_scale 3.0 --output_dir runs/fit
then along the trajectories of the exited model:
accelerate launch train/fit_exits.py --model <pipeline folder> --guidance_scale 3.0 --trajectories exited --exit_threshold 0.1 \\
  --init_exits runs/fit/exits --output_dir runs/fit_exited

`--states fresh`: new trajectories for every batch (train_batch_size then counts trajectories); `--states dataset` with the data flags of
train_uvit.py: noised images instead. `--lora_rank 8`: the backbone adapts, too. `--resume_from_checkpoint latest` goes on after a kill.
Writes exits/ (the whole pipeline where it has a place for exits, or where it was adapted), config.json, report.json, log.jsonl.
"""

from __future__ import annotations

import json
import platform
import resource
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from fit_settings import FitConfig
from transformers import HfArgumentParser

from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.distillation import DistillationObjective, ExitErrors, exit_errors
from ee_diffusion.diffusion.families import family_of
from ee_diffusion.diffusion.generation import use_sampler
from ee_diffusion.diffusion.heads import DenoisingExits
from ee_diffusion.diffusion.latents import NoisedStates
from ee_diffusion.diffusion.lora import add_lora, merged
from ee_diffusion.diffusion.methods import deediff
from ee_diffusion.diffusion.objective import null_class_of
from ee_diffusion.diffusion.parts import Parts
from ee_diffusion.diffusion.pipeline import EarlyExitPipeline
from ee_diffusion.diffusion.states import States
from ee_diffusion.diffusion.trajectories import Exited, FreshStates, fingerprint, identity_of, walk
from ee_diffusion.measure.splits import SEEDS, seeds
from ee_diffusion.training.checkpoints import write_json
from ee_diffusion.training.config import ImageDataConfig, TrainConfig
from ee_diffusion.training.data import Source, load_image_source
from ee_diffusion.training.loop import Trainer
from ee_diffusion.training.sources import KeySource, MappedSource, TableSource

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
        raise ValueError(f"states={fit.states!r} with data from {data.sources() or 'nowhere'}: dataset needs data, others take none")
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


def build_exits(fit: FitConfig, transformer: torch.nn.Module) -> DenoisingExits:
    if fit.init_exits is None:
        layers = len(getattr(transformer, family_of(transformer).blocks))
        depths = tuple(fit.exit_depths or range(1, layers))
        return DenoisingExits.for_transformer(transformer, depths, fit.exit_variant)
    exits = DenoisingExits.from_pretrained(fit.init_exits)
    asked = (tuple(fit.exit_depths or exits.depths), fit.exit_variant)
    if asked != (exits.depths, exits.config.variant):
        raise ValueError(f"the exits in {fit.init_exits} are {(exits.depths, exits.config.variant)}, the flags say {asked}")
    return exits


def conditions_of(fit: FitConfig, transformer: torch.nn.Module) -> list[int] | list[str] | None:
    """What to generate: the prompts, the labels, or every class in turn; None: the model is unconditional."""
    if fit.prompts is not None:
        return [line for line in Path(fit.prompts).read_text().splitlines() if line.strip()]
    if fit.labels is None:
        config, null_class = transformer.config, null_class_of(transformer)
        count = config.get("num_classes") if null_class is None else null_class
        return None if count is None else list(range(count))
    first = Path(fit.labels[0])
    words = first.read_text().split() if len(fit.labels) == 1 and first.is_file() else fit.labels
    try:
        return [int(word) for word in words]
    except ValueError as error:
        raise ValueError(f"labels={fit.labels}, expected integers or a file of them: {error}") from error


def stored_states(fit: FitConfig, folder: Path, pipeline: DiffusionPipeline, given: dict) -> tuple[States, Parts]:
    """Every rank walks the parts that are its own and not there yet; then all read all of them."""
    state, size = PartialState(), fit.collect_batch_size
    chosen = seeds("fit", fit.num_trajectories)
    conditions = given.pop("conditions")
    turn = None if conditions is None else [conditions[i % len(conditions)] for i in range(len(chosen))]
    identity = identity_of(pipeline, chosen, turn, **given) | {"trajectories_per_part": size}
    parts = Parts(folder, identity, count=-(-len(chosen) // size))
    missing = parts.missing()
    state.wait_for_everyone()
    for number in missing[state.process_index :: state.num_processes]:
        part = slice(number * size, (number + 1) * size)
        parts.write(number, walk(pipeline, chosen[part], turn and turn[part], **given).to_tensors())
    state.wait_for_everyone()
    return States.concatenate([States.from_tensors(tensors) for tensors in parts.read()]), parts


class Timed:
    """A function and the seconds spent in it."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, batch: dict) -> dict:
        begun = time.perf_counter()
        made = self.function(batch)
        self.seconds += time.perf_counter() - begun
        return made


def build_source(fit: FitConfig, data: ImageDataConfig, folder: Path, pipeline, given: dict) -> tuple[Source, dict, Timed | None]:
    """Where samples come from, what it cost so far, and the clock of what will be made on the way."""
    if fit.states == "stored":
        begun = time.perf_counter()
        states, parts = stored_states(fit, folder, pipeline, dict(given))
        cost = {"samples": len(states), "trajectories": states.shape[0], "calls": states.shape[1], "rows": states.shape[2]}
        cost |= {"seconds": round(time.perf_counter() - begun, 2), "bytes_on_disk": parts.nbytes, "bytes_in_memory": states.nbytes}
        return TableSource(states, json.dumps(parts.identity, sort_keys=True)), cost, None
    if fit.states == "fresh":
        fresh = Timed(FreshStates(pipeline, SEEDS["fit"], **given))
        name = json.dumps(asdict(fit), sort_keys=True)
        return MappedSource(KeySource(len(SEEDS["fit"])), fresh, name), {}, fresh
    classes = None if data.label_column is None else null_class_of(pipeline.transformer)
    noised = Timed(NoisedStates(pipeline, class_drop=fit.class_drop if classes is not None else 0.0))
    return MappedSource(load_image_source(data, classes), noised, f"noised, drop {fit.class_drop}"), {}, noised


def held_out_states(fit: FitConfig, pipeline: DiffusionPipeline, given: dict) -> dict[str, States]:
    """Trajectories of seeds that no fit sees: the full model's and, where exits are followed, those of the exits as they are now."""
    chosen, given = seeds("test", fit.held_out), dict(given)
    conditions = given.pop("conditions")
    turn = None if conditions is None else [conditions[i % len(conditions)] for i in range(len(chosen))]
    exited = given.pop("exited")
    kinds = {"full": None} | ({} if exited is None else {"exited": exited})
    return {kind: walk(pipeline, chosen, turn, exited=one, **given) for kind, one in kinds.items()}


def judge(objective: DistillationObjective, held: dict[str, States], batch_size: int) -> dict[str, tuple[ExitErrors, float]]:
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
    own = "exits" in pipeline.components
    if not own:
        objective.exits.save_pretrained(folder / "exits")
    if own or objective.adapted:
        parts = pipeline.components | {"transformer": merged(objective.transformer)}
        type(pipeline)(**(parts | ({"exits": objective.exits} if own else {}))).save_pretrained(folder)


def peak_memory() -> dict[str, int]:
    """Bytes at the highest, of this process so far."""
    there = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return there | ({"cuda": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def main() -> None:
    fit, data, train, dry_run = parse()
    resolved = asdict(fit) | asdict(data) | asdict(train)
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return
    state, folder = PartialState(), Path(train.output_dir)
    pipeline = load_pipeline(fit).to(state.device)
    set_seed(train.seed)
    exits = build_exits(fit, pipeline.transformer).to(state.device)
    policy = Policy.load(fit.exit_policy) if fit.exit_policy else None
    policy = deediff(fit.exit_threshold) if fit.exit_threshold is not None else policy
    given = {
        "conditions": conditions_of(fit, pipeline.transformer),
        "exited": None if policy is None else Exited(policy, exits),
        "num_inference_steps": fit.num_inference_steps,
        "guidance_scale": fit.guidance_scale,
    }
    before_memory = peak_memory()
    source, cost, clock = build_source(fit, data, Path(fit.states_dir or folder / "states"), pipeline, given)
    cost |= {"peak_memory_before": before_memory, "peak_memory": peak_memory()}
    held = held_out_states(fit, pipeline, given) if state.is_main_process else {}
    start = fingerprint(exits)
    if fit.lora_rank is not None:
        add_lora(pipeline.transformer, rank=fit.lora_rank)
    weights = {"uncertainty_weight": fit.uncertainty_weight, "layerwise_weight": fit.layerwise_weight}
    objective = DistillationObjective(pipeline.transformer, exits, adapted=fit.lora_rank is not None, **weights)
    before = judge(objective, held, fit.collect_batch_size)
    identity = weights | {"exits": start, "lora_rank": fit.lora_rank}
    trainer = Trainer(objective, source, train, save=partial(save, pipeline=pipeline), identity=identity)
    report = trainer.fit()
    if not state.is_main_process:
        return
    with trainer.learner.averaged() as fitted:
        after = judge(fitted, held, fit.collect_batch_size)
    gain = {}
    for kind, (errors, power) in after.items():
        print(f"\nheld-out trajectories of the {kind} model; squared error to the full model relative to its mean square {power:.4f}")
        print(table(exits.depths, before[kind][0], errors, power))
        gain[kind] = {"depths": list(exits.depths), "power": power, "before": before[kind][0].to_dict(), "after": errors.to_dict()}
    if clock is not None:
        cost |= {"seconds": round(clock.seconds, 2), "seconds_since_resume": report.resumed_from is not None}
    write_json(folder / "config.json", resolved)
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "processes": state.num_processes,
        "torch": torch.__version__,
    }
    fitting = asdict(report) | {"peak_memory": peak_memory()}
    write_json(folder / "report.json", {"states": cost, "fit": fitting, "gain": gain} | machine)
    print(json.dumps({"states": cost, "fit": fitting}))


if __name__ == "__main__":
    main()
