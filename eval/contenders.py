"""Who takes part in the frontier, and how each draws.

Here: candidates. Not here: measuring them (frontier.py, clock.py), the hooks of peers (peers.py). S steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from options import SamplingOptions, flag
from peers import PEERS, Peer
from safetensors.torch import load_file, save_file
from tradeoff import Candidate, Draw

from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.courses import fit_prediction, record
from ee_diffusion.diffusion.gains import step_gains
from ee_diffusion.diffusion.generation import Generated, controls_of, generate
from ee_diffusion.diffusion.memory_exits import MemoryExits
from ee_diffusion.diffusion.methods import budgeted, deediff, periodic_cache, remembered, searched
from ee_diffusion.diffusion.oracle import OracleExits
from ee_diffusion.diffusion.pipeline import EarlyExitPipeline
from ee_diffusion.diffusion.search import gap_prices, nearest, search
from ee_diffusion.diffusion.tracking_exits import TrackingExits
from ee_diffusion.measure.splits import balanced_labels, seeds
from ee_diffusion.measure.tables import write_json, write_text

OURS = ("remembered", "budgeted", "searched", "searched noise", "searched fitted", "tracked")
DECIDE = ("remembered", "budgeted", "tracked")  # those that look at the image, and so have controls made of their trace
WARM_UP = 2  # full steps before the first answer from memory: a line needs two points


def _numbers(help: str, *values: float):
    return field(default_factory=lambda: list(values), metadata={"help": help})


@dataclass(frozen=True)
class FrontierOptions:
    """How many images, and which points of each curve."""

    count: int = flag("Test images.", 128)
    data: str | None = flag(
        "Data folder, for LPIPS, FD and accuracy; none: what EE_DIFFUSION_DATA names, or go without."
    )
    memory: str | None = flag("Folder of fitted exits that remember (train/fit_memory.py); none: unfitted.")
    tracking: str | None = flag("Folder of exits that remember at several depths (train/fit_tracking.py).")
    reference_count: int = flag("Real images behind the FD.", 10_000)
    cache_dir: str = flag("Where reference statistics are kept.", "runs/references")
    errors: list[float] = _numbers("`remembered`: errors allowed per step (rms, data in [-1, 1]).")
    budgets: list[float] = _numbers("`budgeted`: budgets of accumulated error; the model's gains are measured first.")
    shares: list[float] = _numbers("`searched`: shares of the steps that memory answers.", 0.64, 0.72)
    noise_shares: list[float] = _numbers("`searched noise`: the same where the noise is remembered.")
    fitted_shares: list[float] = _numbers(
        "`searched fitted`: the same with the best linear prediction of the noise.", 0.5, 0.64, 0.72, 0.8
    )
    tracked: list[float] = _numbers("Errors allowed per step with the exits of --tracking.")
    oracles: list[float] = _numbers("Errors allowed per step where the true error is known.")
    decay: float = flag("How much of the accumulated error a step leaves.", 0.7)
    power: float = flag("How far `budgeted` trusts the measured gains, 0 to 1.", 0.5)
    search_power: float = flag("How far the search trusts the measured gains, 0 to 1.", 1.0)
    search_count: int = flag("Images whose courses are searched (fitting seeds).", 16)
    gain_images: int = flag("Images on which gains are measured (fitting seeds).", 8)
    gain_every: int = flag("Gains are measured at every so many steps.", 4)
    periods: list[int] = field(default_factory=lambda: [2, 3], metadata={"help": "Periods of the fixed cache."})
    fractions: list[float] = _numbers("Fewer steps: fractions of the steps.", 0.5, 0.4, 0.3, 0.2)
    thresholds: list[float] = _numbers("DeeDiff's thresholds on u; none: leave it out.")
    first_block: list[float] = _numbers("Thresholds of diffusers' FirstBlockCache.")
    taylor: list[int] = field(default_factory=lambda: [3], metadata={"help": "Intervals of diffusers' TaylorSeer."})
    mag: list[float] = _numbers("Thresholds of diffusers' MagCache.")
    controls: bool = flag("Static and random controls made of the traces of the policies that decide.", True)

    def __post_init__(self):
        if (self.tracking is None) != (not self.tracked):
            raise ValueError(f"tracking={self.tracking!r}, tracked={self.tracked}, expected both or neither")


def load_memory(pipeline: EarlyExitPipeline, folder: str | None) -> MemoryExits:
    """Exits that remember, from a folder or unfitted."""
    if folder is None:
        return MemoryExits.for_pipeline(pipeline.transformer, pipeline.scheduler)
    exits = MemoryExits.from_pretrained(folder).to(pipeline.transformer.device)
    exits.check_fits(pipeline.transformer)
    return exits


def noise_memory(pipeline: EarlyExitPipeline) -> MemoryExits:
    """Exits that remember the noise, unfitted: a schedule asks for no uncertainty."""
    return MemoryExits.for_pipeline(pipeline.transformer, pipeline.scheduler, terms="noise")


def fitted_memory(
    pipeline: EarlyExitPipeline, sampling: SamplingOptions, options: FrontierOptions, folder: Path
) -> MemoryExits:
    """Exits that predict the noise linearly, along the full model's own courses of the fitting seeds; kept in `folder`.

    Raises:
        ValueError: `folder` holds exits that were fitted under other settings; what was drawn beside it is theirs.
    """
    wanted = {name: getattr(sampling, name) for name in ("model", "sampler", "num_inference_steps", "guidance_scale")}
    wanted |= {"dtype": sampling.dtype, "search_count": options.search_count}
    settings = folder / "settings.json"  # written last
    if settings.is_file():
        if (known := json.loads(settings.read_text())) != wanted:
            raise ValueError(f"{folder} holds exits fitted under {known}, expected {wanted}, or another --output_dir")
        return load_memory(pipeline, str(folder))
    labels = balanced_labels(options.search_count, pipeline.transformer.config.null_class)
    call = {"num_inference_steps": sampling.num_inference_steps, "guidance_scale": sampling.guidance_scale}
    exits = noise_memory(pipeline)
    made = fit_prediction(exits, record(pipeline, exits, seeds("fit", options.search_count), labels, **call))
    made.save_pretrained(folder)
    write_json(settings, wanted)
    return made


def drawer(
    pipeline: EarlyExitPipeline,
    sampling: SamplingOptions,
    memory: MemoryExits,
    tracking: TrackingExits | None = None,
    fitted: MemoryExits | None = None,
) -> Draw:
    """Draws with the exits that a candidate's kind needs. An oracle's time is without what its shadow of the full model took."""
    trained, peers = pipeline.exits, dict[str, Peer]()
    noise = noise_memory(pipeline)
    oracle = OracleExits(memory, pipeline.transformer)

    def draw(candidate: Candidate, chosen: list[int], labels: list[int], first: int) -> Generated:
        call = {"num_inference_steps": candidate.steps, "guidance_scale": sampling.guidance_scale}
        call |= {"batch_size": sampling.batch_size, "first_id": first}
        if candidate.kind in PEERS:
            if candidate.name not in peers:
                peers[candidate.name] = PEERS[candidate.kind](
                    pipeline, candidate.budget, num_steps=candidate.steps, guidance_scale=sampling.guidance_scale
                )
            return peers[candidate.name].generate(chosen, labels, **call)
        kinds = {"deediff": trained, "oracle": oracle, "tracked": tracking, "searched noise": noise}
        kinds |= {"searched fitted": fitted, "periodic fitted": fitted}
        pipeline.exits = kinds.get(candidate.kind.split(" of ")[-1], memory)
        if candidate.kind != "oracle":
            return generate(pipeline, chosen, labels, exit_policy=candidate.policy, **call)
        null = pipeline.transformer.config.null_class
        oracle.labels = torch.tensor([*labels, *[null] * len(labels)], device=pipeline.transformer.device)
        oracle.seconds = 0.0
        drawn = generate(pipeline, chosen, labels, exit_policy=candidate.policy, **call)
        return replace(drawn, seconds=(sum(drawn.seconds) - oracle.seconds,))

    return draw


def kept(draw: Draw, folder: Path, settings: dict) -> Draw:
    """The same, but what was drawn before under the same settings is read from `folder`: a long run goes on where it was stopped."""

    def again(candidate: Candidate, chosen: list[int], labels: list[int], first: int) -> Generated:
        what = [settings, asdict(candidate) | {"policy": candidate.policy and candidate.policy.to_dict()}]
        name = hashlib.sha256(json.dumps([*what, chosen, labels, first], sort_keys=True).encode()).hexdigest()[:24]
        path, trace = folder / f"{name}.safetensors", folder / f"{name}.trace.safetensors"
        if path.exists():
            stored = load_file(path)
            seconds = tuple(stored["seconds"].tolist())
            return Generated(stored["images"], Trace.load(trace) if trace.exists() else None, seconds)
        drawn = draw(candidate, chosen, labels, first)
        if drawn.trace is not None:
            drawn.trace.save(trace)
        save_file(
            {"images": drawn.images.cpu(), "seconds": torch.tensor(drawn.seconds, dtype=torch.float64)}, beside(path)
        )
        beside(path).replace(path)
        return drawn

    folder.mkdir(parents=True, exist_ok=True)
    return again


def noted(folder: Path, what: list, make: Callable[[], object]) -> object:
    """A plain value that is dear to make, by what it depends on: read from `folder` if it was made before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]}.json"
    if not path.exists():
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text())


def beside(path: Path) -> Path:
    """Where a file is written before it is moved to its place."""
    return path.with_suffix(".tmp")


def gains_of(
    pipeline: EarlyExitPipeline, memory: MemoryExits, sampling: SamplingOptions, options: FrontierOptions
) -> tuple[float, ...]:
    """What becomes of an error of each step (S,), measured on fitting seeds."""
    return step_gains(
        pipeline,
        memory,
        balanced_labels(options.gain_images, pipeline.transformer.config.null_class),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        every=options.gain_every,
        generator=torch.Generator().manual_seed(seeds("fit", 1)[0]),
    )


def schedules_of(
    pipeline: EarlyExitPipeline,
    memory: MemoryExits,
    sampling: SamplingOptions,
    options: FrontierOptions,
    weights: tuple[float, ...],
    shares: list[float],
) -> dict[str, list[int]]:
    """Number of full steps (as text) -> the searched schedule, one for each share of steps from memory."""
    steps, count = sampling.num_inference_steps, options.search_count
    labels = balanced_labels(count, pipeline.transformer.config.null_class)
    call = {"num_inference_steps": steps, "guidance_scale": sampling.guidance_scale}
    course = record(pipeline, memory, seeds("fit", count), labels, **call)
    found = search(gap_prices(memory, course, weights), steps)
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
            searched(full, num_steps=num_steps, num_layers=num_layers),
            num_steps,
        )
        for count, full in schedules.items()
    ]


def candidates_of(
    options: FrontierOptions,
    sensitivity: tuple[float, ...],
    weights: tuple[float, ...],
    depths: tuple[int, ...] = (0,),
) -> list[Candidate]:
    """The full model and everything that needs neither a trace nor a search. depths: of the exits of --tracking."""
    steps, found = len(sensitivity), []
    for budget in options.budgets:
        policy = budgeted(budget, weights=weights, decay=options.decay)
        found.append(Candidate(f"budgeted {budget}", "budgeted", budget, policy, steps))
    for error in options.errors:
        policy = remembered(error, sensitivity=sensitivity)
        found.append(Candidate(f"remembered {error}", "remembered", error, policy, steps))
    for error in options.oracles:
        policy = remembered(error, sensitivity=sensitivity)
        found.append(Candidate(f"oracle {error}", "oracle", error, policy, steps))
    for error in options.tracked:
        found.append(
            Candidate(
                f"tracked {error}", "tracked", error, remembered(error, sensitivity=sensitivity, exits=depths), steps
            )
        )
    for period in options.periods:
        policy = periodic_cache(period, warm_up=WARM_UP)
        found.append(Candidate(f"periodic cache {period}", "periodic_cache", None, policy, steps))
        if options.fitted_shares:  # what the search adds to the fit
            found.append(Candidate(f"periodic fitted {period}", "periodic fitted", None, policy, steps))
    for fewer in dict.fromkeys(max(1, round(steps * fraction)) for fraction in options.fractions):
        found.append(Candidate(f"{fewer} steps", "fewer_steps", None, None, fewer))
    for threshold in options.thresholds:
        found.append(Candidate(f"deediff {threshold}", "deediff", None, deediff(threshold), steps))
    for kind, values in (("first_block", options.first_block), ("taylor", options.taylor), ("mag", options.mag)):
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
