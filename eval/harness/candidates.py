"""Who takes part in the frontier, and how each draws.

Here: candidates. Not here: their numbers (frontier_options.py), turns and times (turns.py), what is kept (keeping.py), the hooks of
peers (peers.py). S steps.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.oracle import OracleExits
from ee_diffusion.diffusion.fingerprint import fingerprint
from ee_diffusion.diffusion.guidance import cfg_labels
from ee_diffusion.diffusion.methods import (
    accumulated_error_budget,
    deediff,
    per_step_error_threshold,
    periodic_cache,
    static_cache_schedule,
)
from ee_diffusion.diffusion.pipelines.sampling import Generated, classes_of, controls_of, generate
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_propagation import error_amplification
from ee_diffusion.diffusion.step_cache.recording import record
from ee_diffusion.diffusion.step_cache.schedule_search import gap_prices, nearest, search
from ee_diffusion.diffusion.step_cache.trajectories import fit_prediction
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import write_json
from eval.harness.baselines import PEERS, Peer
from eval.harness.frontier_options import FrontierOptions
from eval.harness.interleave import Candidate, Draw, Labels
from eval.harness.options import SamplingOptions
from eval.harness.pipeline import in_float32

OURS = ("remembered", "budgeted", "searched", "searched noise", "searched fitted", "searched together")
FITTED = ("fitted", "together")  # folders beside a report: answers weighed each by itself, and all of a run together
DECIDE = ("remembered", "budgeted")  # those that look at the image, and so have controls made of their trace
WARM_UP = 2  # full steps before the first answer from memory: a line needs two points


def load_memory(pipeline: EarlyExitPipeline, folder: str | None) -> CachedOutputExits:
    """Exits that remember, from a folder or unfitted."""
    if folder is None:
        return CachedOutputExits.for_pipeline(pipeline.transformer, pipeline.scheduler)
    exits = CachedOutputExits.from_pretrained(folder).to(pipeline.transformer.device)
    exits.check_fits(pipeline.transformer)
    return exits


def noise_memory(pipeline: EarlyExitPipeline) -> CachedOutputExits:
    """Exits that remember the noise, unfitted: a schedule asks for no uncertainty."""
    return CachedOutputExits.for_pipeline(pipeline.transformer, pipeline.scheduler, cached_type="epsilon")


def fitted_memory(
    pipeline: EarlyExitPipeline,
    sampling: SamplingOptions,
    options: FrontierOptions,
    folder: Path,
    weights: tuple[float, ...] | None = None,
) -> CachedOutputExits:
    """Exits that predict the noise linearly, along the full model's own trajectories of the fitting seeds; kept in `folder`. weights: what
    an error of each step does in the end, for joint least squares (`trajectories.fit_prediction`).

    Trajectories are run in float32 whatever the run's dtype: half precision's rounding, taken for chance, draws the weights towards the
    mean, and what each step then misses points the same way.

    Raises:
        ValueError: `folder` holds exits that were fitted under other settings; what was drawn beside it is theirs.
    """
    wanted = {name: getattr(sampling, name) for name in ("model", "sampler", "num_inference_steps", "guidance_scale")}
    whole = in_float32(pipeline, sampling)
    wanted |= {"dtype": "float32", "search_count": options.search_count}
    wanted |= {"weights": fingerprint(whole.transformer)}
    wanted |= {} if weights is None else {"influence": [float(f"{weight:.6g}") for weight in weights]}
    settings = folder / "settings.json"  # written last
    if settings.is_file():
        known = json.loads(settings.read_text())
        if "weights" not in known:  # written before it was noted
            warnings.warn(
                f"{folder} does not say for which weights its exits were fitted: taken for {known}", stacklevel=2
            )
        if wanted | known != wanted or known.keys() | {"weights"} != wanted.keys():
            raise ValueError(f"{folder} holds exits fitted under {known}, expected {wanted}, or another --output_dir")
        return load_memory(pipeline, str(folder))
    labels = balanced_labels(options.search_count, classes_of(pipeline, sampling.guidance_scale))
    call = {"num_inference_steps": sampling.num_inference_steps, "guidance_scale": sampling.guidance_scale}
    exits = noise_memory(whole)
    made = fit_prediction(exits, record(whole, exits, seeds("fit", options.search_count), labels, **call), weights)
    made.save_pretrained(folder)
    write_json(settings, wanted)
    return load_memory(pipeline, str(folder))


def fitted_beside(pipeline: EarlyExitPipeline, folder: Path) -> dict[str, CachedOutputExits]:
    """What was fitted for a report, from the folders beside it: those of FITTED that are there and finished."""
    there = [name for name in FITTED if (folder / name / "settings.json").is_file()]
    return {name: load_memory(pipeline, str(folder / name)) for name in there}


def check_fitted(candidates: Iterable[Candidate], fitted: Mapping[str, CachedOutputExits], folder: Path) -> None:
    """Raises ValueError for candidates that drew with fitted exits which are not beside their report."""
    asked = {name for name in FITTED for one in candidates if base_of(one.kind).endswith(name)}
    if missing := sorted(asked - fitted.keys()):
        raise ValueError(f"{folder} has no folder {missing[0]}, expected what its {missing[0]} rows were drawn with")


def exits_by_kind(
    pipeline: EarlyExitPipeline,
    memory: CachedOutputExits,
    fitted: Mapping[str, CachedOutputExits] | None = None,
) -> dict[str, nn.Module | None]:
    """Kind of candidate -> the exits it draws with; the oracle's are those it is asked about. Controls go by the kind they were made of.
    fitted: by the names of FITTED."""
    found = dict.fromkeys(("remembered", "budgeted", "searched", "periodic_cache", "oracle"), memory)
    found |= {"deediff": pipeline.exits, "searched noise": noise_memory(pipeline)}
    return found | {f"{kind} {name}": (fitted or {}).get(name) for kind in ("searched", "periodic") for name in FITTED}


def base_of(kind: str) -> str:
    """The kind of candidate that a kind of control was made of; of others their own."""
    return kind.split(" of ")[-1]


def drawer(
    pipeline: EarlyExitPipeline,
    sampling: SamplingOptions,
    memory: CachedOutputExits,
    fitted: Mapping[str, CachedOutputExits] | None = None,
) -> Draw:
    """Draws with the exits that a candidate's kind needs. An oracle's time is without what its shadow of the full model took."""
    peers, oracle = dict[str, Peer](), OracleExits(memory, pipeline.transformer)
    kinds = exits_by_kind(pipeline, memory, fitted) | {"oracle": oracle}

    def draw(candidate: Candidate, chosen: list[int], labels: Labels, first: int) -> Generated:
        call = {"num_inference_steps": candidate.steps, "guidance_scale": sampling.guidance_scale}
        call |= {"batch_size": sampling.batch_size, "first_id": first}
        if candidate.kind in PEERS:
            if candidate.name not in peers:
                peers[candidate.name] = PEERS[candidate.kind](
                    pipeline, candidate.budget, num_steps=candidate.steps, guidance_scale=sampling.guidance_scale
                )
            return peers[candidate.name].generate(chosen, labels, **call)
        pipeline.exits = kinds.get(base_of(candidate.kind))
        if candidate.kind != "oracle":
            return generate(pipeline, chosen, labels, exit_policy=candidate.policy, **call)
        rows = {"guidance_scale": sampling.guidance_scale, "device": pipeline.transformer.device}
        oracle.labels = cfg_labels(labels, pipeline.transformer.config.null_class, **rows)
        oracle.seconds = 0.0
        drawn = generate(pipeline, chosen, labels, exit_policy=candidate.policy, **call)
        return replace(drawn, seconds=(sum(drawn.seconds) - oracle.seconds,))

    return draw


def gains_of(
    pipeline: EarlyExitPipeline, memory: CachedOutputExits, sampling: SamplingOptions, options: FrontierOptions
) -> tuple[float, ...]:
    """What becomes of an error of each step (S,), measured on fitting seeds, in float32."""
    labels = balanced_labels(options.gain_images, classes_of(pipeline, sampling.guidance_scale))
    return error_amplification(
        in_float32(pipeline, sampling),
        memory,
        labels,
        batch_size=1 if labels else options.gain_images,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        every=options.gain_every,
        generator=torch.Generator().manual_seed(seeds("fit", 1)[0]),
    )


def schedules_of(
    pipeline: EarlyExitPipeline,
    memory: CachedOutputExits,
    sampling: SamplingOptions,
    options: FrontierOptions,
    weights: tuple[float, ...],
    shares: list[float],
) -> dict[str, list[int]]:
    """Number of full steps (as text) -> the searched schedule, one for each share of steps from memory; priced in float32. In half
    precision the last step is a full one (`search`)."""
    steps, count = sampling.num_inference_steps, options.search_count
    labels = balanced_labels(count, classes_of(pipeline, sampling.guidance_scale))
    call = {"num_inference_steps": steps, "guidance_scale": sampling.guidance_scale}
    trajectory = record(in_float32(pipeline, sampling), memory, seeds("fit", count), labels, **call)
    found = search(gap_prices(memory, trajectory, weights), steps, last_full=sampling.dtype != "float32")
    schedules = (nearest(found, steps * (1 - share)).full for share in shares)
    return {str(len(full)): list(full) for full in schedules}


def searched_candidates(
    schedules: dict[str, list[int]], kind: str, *, num_steps: int, num_layers: int
) -> list[Candidate]:
    """Candidates of `schedules_of`."""
    return [
        Candidate(
            f"{kind} {count} full",
            kind,
            int(count),
            static_cache_schedule(full, num_steps=num_steps, num_layers=num_layers),
            num_steps,
        )
        for count, full in schedules.items()
    ]


def candidates_of(
    options: FrontierOptions,
    sensitivity: tuple[float, ...],
    weights: tuple[float, ...],
) -> list[Candidate]:
    """The full model and everything that needs neither a trace nor a search."""
    steps, found = len(sensitivity), []
    for budget in options.budgets:
        policy = accumulated_error_budget(budget, weights=weights, decay=options.decay)
        found.append(Candidate(f"budgeted {budget}", "budgeted", budget, policy, steps))
    for error in options.errors:
        policy = per_step_error_threshold(error, local_gains=sensitivity)
        found.append(Candidate(f"remembered {error}", "remembered", error, policy, steps))
    for error in options.oracles:
        policy = per_step_error_threshold(error, local_gains=sensitivity)
        found.append(Candidate(f"oracle {error}", "oracle", error, policy, steps))
    for period in options.periods:
        policy = periodic_cache(period, warmup_steps=WARM_UP)
        found.append(Candidate(f"periodic cache {period}", "periodic_cache", None, policy, steps))
        for name, shares in zip(FITTED, (options.fitted_shares, options.together_shares), strict=True):
            if shares:  # what the search adds to the fit
                found.append(Candidate(f"periodic {name} {period}", f"periodic {name}", None, policy, steps))
    for fewer in dict.fromkeys(max(1, round(steps * fraction)) for fraction in options.fractions):
        found.append(Candidate(f"{fewer} steps", "fewer_steps", None, None, fewer))
    for threshold in options.thresholds:
        found.append(Candidate(f"deediff {threshold}", "deediff", None, deediff(threshold), steps))
    for kind in PEERS:
        values = getattr(options, kind)
        found += [Candidate(f"{kind.replace('_', ' ')} {value}", kind, value, None, steps) for value in values]
    return [Candidate("full", "full", None, None, steps), *found]


def controls(candidate: Candidate, trace: Trace, *, seed: int) -> list[Candidate]:
    """What knowing the image must beat: the same numbers of full steps, dealt out without looking at it."""
    return [
        Candidate(
            f"{kind} of {candidate.name}", f"{kind} of {candidate.kind}", candidate.budget, policy, candidate.steps
        )
        for kind, policy in controls_of(trace, seed=seed, warm_up=WARM_UP).items()
    ]
