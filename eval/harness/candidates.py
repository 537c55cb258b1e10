"""Candidates: one registry, flag -> maker, of all that is compared with the full model. Used by the frontier and end to end.

Here: names, policies, controls. Not here: exits and what is measured for them (step_caches.py), drawing (drawing.py), flags (options.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.methods import (
    accumulated_error_budget,
    deediff,
    per_step_error_threshold,
    periodic_cache,
    static_cache_schedule,
)
from ee_diffusion.diffusion.pipelines.sampling import controls_of
from eval.harness.interleave import Candidate
from eval.harness.options import CandidateOptions
from eval.harness.whole_batch import WholeBatch

WARMUP_STEPS = 2  # compute steps before the first cached one: a line needs two points
STEP_CACHE = ("error_threshold", "error_budget")  # kinds that look at the image, and cache whole steps
EXITS = ("deediff_share", "released")  # kinds that look at the image, and leave at a depth
OURS = ("error_threshold", "error_budget", "searched", "searched_epsilon", "searched_fitted", "searched_joint")
FITTED = {
    "fitted": "searched_fitted",
    "joint": "searched_joint",
}  # exits fitted beside a report -> the flag that asks for them


@dataclass(frozen=True)
class Setup:
    """What makers need to know of the run: its steps and blocks, and what is found when a maker asks.

    local_gains: what an error of each step does in that step (S,). weights: power -> error weights (S,). schedules: name of exits, shares
    of cached steps -> compute steps of each. rule: name of exits -> a policy for each threshold. thresholds: name of exits, shares of the
    blocks -> the policy that executes each.
    """

    steps: int
    layers: int
    local_gains: tuple[float, ...]
    weights: Callable[[float], tuple[float, ...]]
    schedules: Callable[[str, Sequence[float]], list[list[int]]]
    rule: Callable[[str], Callable[[float], Policy]]
    thresholds: Callable[[str, Sequence[float]], dict[float, Policy]]


Maker = Callable[[Setup, CandidateOptions], Iterator[Candidate]]


def _error_thresholds(setup: Setup, options: CandidateOptions) -> Iterator[Candidate]:
    for error in options.error_thresholds:
        policy = per_step_error_threshold(error, local_gains=setup.local_gains)
        yield Candidate(f"error threshold {error}", "error_threshold", error, policy, setup.steps, "cache")


def _oracles(setup: Setup, options: CandidateOptions) -> Iterator[Candidate]:
    for error in options.oracles:
        policy = per_step_error_threshold(error, local_gains=setup.local_gains)
        yield Candidate(f"oracle {error}", "oracle", error, policy, setup.steps, "oracle")


def _error_budgets(setup: Setup, options: CandidateOptions) -> Iterator[Candidate]:
    for budget in options.error_budgets:
        policy = accumulated_error_budget(budget, weights=setup.weights(options.power), decay=options.decay)
        yield Candidate(f"error budget {budget}", "error_budget", budget, policy, setup.steps, "cache")
        for name, _, _ in (one.partition("=") for one in options.other_caches):
            yield Candidate(
                f"error budget {budget}, {name}", f"error_budget, {name}", budget, policy, setup.steps, name
            )


def _whole_batch(setup: Setup, options: CandidateOptions) -> Iterator[Candidate]:
    for budget in options.whole_batch:
        own = accumulated_error_budget(budget, weights=setup.weights(options.power), decay=options.decay)
        policy = Policy(WholeBatch(own.criterion), exits=(0,))
        yield Candidate(f"whole batch {budget}", "whole_batch", budget, policy, setup.steps, "cache")


def _cache_intervals(setup: Setup, options: CandidateOptions) -> Iterator[Candidate]:
    for interval in options.cache_intervals:
        policy = periodic_cache(interval, warmup_steps=WARMUP_STEPS)
        yield Candidate(f"periodic cache {interval}", "periodic_cache", interval, policy, setup.steps, "cache")
        for name in (name for name, flag in FITTED.items() if getattr(options, flag)):  # what search adds to the fit
            yield Candidate(f"periodic {name} {interval}", f"periodic_{name}", interval, policy, setup.steps, name)


def _searched(setup: Setup, options: CandidateOptions, *, kind: str, exits: str) -> Iterator[Candidate]:
    shares = getattr(options, kind)
    counts = {len(steps): steps for steps in (setup.schedules(exits, shares) if shares else [])}
    for count, steps in counts.items():
        policy = static_cache_schedule(steps, num_steps=setup.steps, num_layers=setup.layers)
        yield Candidate(f"{kind.replace('_', ' ')} {count} computed", kind, count, policy, setup.steps, exits)


def _fewer_steps(setup: Setup, options: CandidateOptions) -> Iterator[Candidate]:
    for steps in dict.fromkeys(max(1, round(setup.steps * fraction)) for fraction in options.fewer_steps):
        yield Candidate(f"{steps} steps", "fewer_steps", None, None, steps)


def _deediff(setup: Setup, options: CandidateOptions) -> Iterator[Candidate]:
    for threshold in options.deediff:
        yield Candidate(f"deediff {threshold}", "deediff", threshold, deediff(threshold), setup.steps, "model")


def _deediff_shares(setup: Setup, options: CandidateOptions) -> Iterator[Candidate]:
    for share, policy in (setup.thresholds("model", options.deediff_shares) if options.deediff_shares else {}).items():
        yield Candidate(f"deediff at {share} of the blocks", "deediff_share", share, policy, setup.steps, "model")


def _released(setup: Setup, options: CandidateOptions) -> Iterator[Candidate]:
    """DeeDiff as its authors coded it: at the threshold they name, and at the shares of the blocks."""
    if options.released is None:
        return
    value = options.released_threshold
    policy = setup.rule("released")(value)
    yield Candidate(f"released {value}", "released_threshold", value, policy, setup.steps, "released")
    for share, policy in setup.thresholds("released", options.deediff_shares).items():
        yield Candidate(f"released at {share} of the blocks", "released", share, policy, setup.steps, "released")


def _baseline(setup: Setup, options: CandidateOptions, *, kind: str) -> Iterator[Candidate]:
    for value in getattr(options, kind):
        yield Candidate(f"{kind.replace('_', ' ')} {value}", kind, value, None, setup.steps)


MAKERS: dict[str, Maker] = {
    "error_budgets": _error_budgets,
    "whole_batch": _whole_batch,
    "error_thresholds": _error_thresholds,
    "oracles": _oracles,
    "cache_intervals": _cache_intervals,
    "searched": partial(_searched, kind="searched", exits="cache"),
    "searched_epsilon": partial(_searched, kind="searched_epsilon", exits="epsilon"),
    "searched_fitted": partial(_searched, kind="searched_fitted", exits="fitted"),
    "searched_joint": partial(_searched, kind="searched_joint", exits="joint"),
    "fewer_steps": _fewer_steps,
    "deediff": _deediff,
    "deediff_shares": _deediff_shares,
    "released": _released,
    **{kind: partial(_baseline, kind=kind) for kind in ("first_block", "taylor", "taylor_second_order", "mag")},
    **{kind: partial(_baseline, kind=kind) for kind in ("db_cache", "db_cache_taylor")},
}


def check_kinds(options: CandidateOptions, known: Collection[str]) -> None:
    """Raises ValueError where no kind is asked for, or one that is not `known`."""
    asked = [name for name in MAKERS if getattr(options, name)]
    if not asked or set(asked) - set(known):
        raise ValueError(f"candidates {asked}, expected some of {', '.join(known)}; eval/configs/ has examples")


def candidates_of(setup: Setup, options: CandidateOptions) -> list[Candidate]:
    """The full model and everything that is made without a trace."""
    full = Candidate("full", "full", None, None, setup.steps)
    return [full, *(one for make in MAKERS.values() for one in make(setup, options))]


def controls(candidate: Candidate, trace: Trace, *, seed: int, time: float | None = None) -> list[Candidate]:
    """What knowing the image must beat: static and random exits made of its trace; with `time`, its measured share of the full model's,
    also fewer steps in the same time. Exits of branches that decide apart have no random control: their trace has no line for an image."""
    cached = candidate.exits == "cache"
    made = controls_of(trace, seed=seed, warm_up=WARMUP_STEPS if cached else 0)
    if candidate.policy.cfg_exit == "separate":
        made = {"static": made["static"]}
    found = [
        replace(
            candidate,
            name=f"{kind.replace('_', ' ')} of {candidate.name}",
            kind=f"{kind} of {candidate.kind}",
            policy=replace(policy, exits=(0,)) if cached else policy,
        )
        for kind, policy in made.items()
    ]
    if time is None:
        return found
    steps = max(1, round(candidate.steps * time))
    name = f"fewer steps of {candidate.name}"
    return [*found, Candidate(name, f"fewer_steps of {candidate.kind}", candidate.value, None, steps)]
