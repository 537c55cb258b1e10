"""The samples of a fit, and the held-out ones: recorded and stored, recorded on the way, or noised images."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from diffusers import DiffusionPipeline

from ee_diffusion.diffusion.distillation.collect import FreshStates, identity_of, walk
from ee_diffusion.diffusion.distillation.dataset import States
from ee_diffusion.diffusion.distillation.deediff_objective import null_class_of, num_classes_of
from ee_diffusion.diffusion.distillation.shards import Parts
from ee_diffusion.diffusion.latents import NoisedStates
from ee_diffusion.metrics.splits import SEEDS, seeds
from ee_diffusion.training.config import ImageDataConfig
from ee_diffusion.training.datasets import Source, load_image_source
from ee_diffusion.training.sources import KeySource, MappedSource, TableSource
from train.fit_exits import FitConfig


def in_turn(conditions: list | None, count: int) -> list | None:
    return None if conditions is None else [conditions[i % len(conditions)] for i in range(count)]


def stored_states(
    fit: FitConfig, pipeline: DiffusionPipeline, given: dict, *, folder: Path
) -> tuple[States, Parts, int]:
    """Every rank records its share of the missing files; then all read all of them. Also: how many were missing."""
    state, size = PartialState(), fit.collect_batch_size
    chosen, given = seeds("fit", fit.num_trajectories), dict(given)
    turn = in_turn(given.pop("conditions"), len(chosen))
    identity = identity_of(pipeline, chosen, turn, **given) | {"trajectories_per_part": size}
    parts = Parts(folder, identity, count=-(-len(chosen) // size))
    missing = parts.missing()
    state.wait_for_everyone()
    for number in missing[state.process_index :: state.num_processes]:
        part = slice(number * size, (number + 1) * size)
        parts.write(number, walk(pipeline, chosen[part], turn and turn[part], **given).to_tensors())
    state.wait_for_everyone()
    return States.concatenate([States.from_tensors(tensors) for tensors in parts.read()]), parts, len(missing)


class Timed:
    """A function and the seconds spent in it."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, batch: dict) -> dict:
        started = time.perf_counter()
        made = self.function(batch)
        self.seconds += time.perf_counter() - started
        return made


@dataclass(frozen=True)
class Supply:
    """Where samples come from, what they cost so far, and the clock of what is made on the way."""

    source: Source
    cost: dict
    clock: Timed | None = None


def build_supply(
    fit: FitConfig, data: ImageDataConfig, pipeline: DiffusionPipeline, *, given: dict, folder: Path
) -> Supply:
    if fit.states == "stored":
        started = time.perf_counter()
        states, parts, recorded = stored_states(fit, pipeline, given, folder=folder)
        trajectories, calls, rows = states.shape
        cost = {"samples": len(states), "trajectories": trajectories, "calls": calls, "rows": rows}
        cost |= {
            "seconds": round(time.perf_counter() - started, 2),
            "parts": parts.count,
            "files_recorded_now": recorded,
        }
        cost |= {"bytes_on_disk": parts.nbytes, "bytes_in_memory": states.nbytes}
        return Supply(TableSource(states, json.dumps(parts.identity, sort_keys=True)), cost)
    if fit.states == "fresh":
        clock = Timed(FreshStates(pipeline, SEEDS["fit"], **given))
        others = {name: value for name, value in given.items() if name != "conditions"}
        identity = identity_of(pipeline, SEEDS["fit"][-1:], given["conditions"], **others)
        name = f"fresh states {json.dumps(identity, sort_keys=True)}"
        return Supply(MappedSource(KeySource(len(SEEDS["fit"])), clock, name), {}, clock)
    classes = None if data.label_column is None else num_classes_of(pipeline.transformer)
    dropped = classes is not None and null_class_of(pipeline.transformer) is not None
    clock = Timed(NoisedStates(pipeline, class_drop=fit.class_drop if dropped else 0.0))
    return Supply(MappedSource(load_image_source(data, classes), clock, f"noised, drop {fit.class_drop}"), {}, clock)


def held_out_states(fit: FitConfig, pipeline: DiffusionPipeline, given: dict) -> dict[str, States]:
    """Trajectories of seeds that no fit sees: the full model's and, where exits are followed, those of the exits as they are now."""
    chosen, given = seeds("test", fit.held_out), dict(given)
    turn, exited = in_turn(given.pop("conditions"), len(chosen)), given.pop("exited")
    kinds = {"full": None} if exited is None else {"full": None, "exited": exited}
    return {kind: walk(pipeline, chosen, turn, exited=one, **given) for kind, one in kinds.items()}
