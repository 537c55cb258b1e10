"""Fit exits to a frozen pipeline: the pipeline and its exits, what they learn from, errors before and after."""

from __future__ import annotations

import json
import resource
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline

from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.distillation.collect import Exited, fingerprint
from ee_diffusion.diffusion.distillation.dataset import States
from ee_diffusion.diffusion.distillation.deediff_objective import num_classes_of
from ee_diffusion.diffusion.distillation.objective import DistillationObjective, ExitErrors, exit_errors
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.methods import deediff
from ee_diffusion.diffusion.model_specs import blocks_of, model_spec_of
from ee_diffusion.diffusion.pipelines.sampling import use_sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.training.config import ImageDataConfig, TrainConfig
from ee_diffusion.training.loop import Trainer
from ee_diffusion.training.lora import add_lora, merged
from train.fit_exits import FitConfig
from train.work.fit_supply import build_supply, held_out_states
from train.work.report import process_state, write_reports


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
    """Fresh exits, or those to continue from. Raises ValueError where the latter differ from the flags."""
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
    found = (exits.depths, exits.config.rank if adapters else exits.config.variant)
    wanted = (tuple(fit.exit_depths or exits.depths), fit.adapter_rank if adapters else fit.exit_variant)
    if wanted != found:
        raise ValueError(f"the exits in {fit.init_exits} are {found}, the flags say {wanted}")
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


def errors_of(
    objective: DistillationObjective, held: dict[str, States], batch_size: int
) -> dict[str, tuple[ExitErrors, float]]:
    return {kind: exit_errors(objective, states, batch_size=batch_size) for kind, states in held.items()}


def table(depths: tuple[int, ...], before: ExitErrors, after: ExitErrors, power: float) -> str:
    """One line per exit; errors relative to the teacher's own mean square."""
    head = f"{'depth':>5} {'before':>8} {'own tail':>8} {'fitted':>8} {'gap':>7} {'estim.':>7} {'off by':>7} {'rank corr.':>10}"
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
    """Largest number of bytes of this process so far."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return peak | ({"cuda": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


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


def policy_of(fit: FitConfig) -> Policy | None:
    """The policy of exited trajectories."""
    if fit.exit_policy is not None:
        return Policy.load(fit.exit_policy)
    return None if fit.exit_threshold is None else deediff(fit.exit_threshold)


def run(fit: FitConfig, data: ImageDataConfig, train: TrainConfig) -> None:
    """Fit, and report what it cost and gained."""
    state, folder = process_state(), Path(train.output_dir)
    pipeline, policy = load_pipeline(fit).to(state.device), policy_of(fit)
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
        add_lora(pipeline.transformer, model_spec_of(pipeline.transformer).lists, rank=fit.lora_rank)
    objective = DistillationObjective(pipeline.transformer, exits, adapted=fit.lora_rank is not None, **weights)
    before = errors_of(objective, held, fit.collect_batch_size)
    trainer = Trainer(objective, supply.source, train, save=partial(save, pipeline=pipeline), identity=identity)
    report = trainer.fit()
    if not state.is_main_process:
        return
    with trainer.learner.averaged() as fitted:
        gain = compared(exits.depths, before, errors_of(fitted, held, fit.collect_batch_size))
    cost = supply.cost | memory
    if supply.clock is not None:
        cost |= {"seconds": round(supply.clock.seconds, 2), "since_resume": report.resumed_from is not None}
    fitting = asdict(report) | {"peak_memory": peak_memory()}
    write_reports({"states": cost, "fit": fitting, "gain": gain}, fit, data, train)
    print(json.dumps({"states": cost, "fit": fitting}))
