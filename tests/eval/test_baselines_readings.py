"""diffusers' caches, as they are run here, against slow readings of what was published, call for call and bit for bit.

A reading gets what the cached transformer was called with. B rows, N tokens, D width, S calls of a run.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, apply_first_block_cache, apply_mag_cache
from diffusers.models import CacheMixin
from factories import pipeline, uvit
from stock import dit_pipeline
from torch import Tensor, nn

from ee_diffusion.diffusion.hooks.forward_to_depth import passing
from ee_diffusion.diffusion.model_specs import blocks_of, model_spec_of
from eval.harness import baselines
from eval.harness.candidates import Setup, candidates_of
from eval.harness.options import CandidateOptions

STEPS = 12
RATIOS = [1.0, 0.9, 1.05, 0.98, 1.03, 0.97, 1.01, 0.99, 1.2, 0.98, 1.01, 0.97]  # of S calls
Call = tuple[tuple, dict[str, Any], Tensor]  # arguments by place, by name, the answer


@contextmanager
def noted(transformer: nn.Module) -> Iterator[list[Call]]:
    """The calls of a transformer."""
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args, kwargs, output[0]))

    handle = transformer.register_forward_hook(note, with_kwargs=True)
    yield calls
    handle.remove()


def states_of(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The answer and the hidden states (B, N, D) at every depth 0..L."""
    states: list[Tensor] = []
    blocks = blocks_of(transformer)
    handles = [blocks[0].register_forward_pre_hook(lambda module, given: states.append(given[0]))]
    handles += [block.register_forward_hook(lambda module, given, made: states.append(made)) for block in blocks]
    output = transformer(*args, **kwargs)[0]
    for handle in handles:
        handle.remove()
    return output, states


def with_residual(transformer: nn.Module, args: tuple, kwargs: dict[str, Any], depth: int, residual: Tensor) -> Tensor:
    """The answer of the first `depth` blocks and the tail, with a residual added once in between."""
    tail = getattr(transformer, model_spec_of(transformer).tail)
    handle = tail.register_forward_pre_hook(lambda module, given: (given[0] + residual, *given[1:]))
    with passing(transformer, depth):
        output = transformer(*args, **kwargs)[0]
    handle.remove()
    return output


class MagReading:
    """MagCache (Ma et al. 2025, "MagCache: Fast Video Generation with Magnitude-Aware Cache", section 3.3): the residual of all blocks
    is kept from the last call that ran them, and added once to the first block's input while

        sum over the calls left out of |1 - product of the ratios since then| <= threshold,

    at most `most` times in a row, and never in the first `retention` of the calls."""

    def __init__(self, threshold: float, *, ratios: list[float], most: int = 3, retention: float = 0.2):
        self.threshold, self.ratios, self.most = threshold, ratios, most
        self.first = math.floor(retention * len(ratios) + 0.5)
        self.kept: Tensor | None = None
        self.since: list[float] = []  # ratios since the last call that ran all blocks
        self.ran: list[bool] = []

    def __call__(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        call = len(self.ran)
        since = [*self.since, self.ratios[call]]
        error = sum(abs(1 - math.prod(since[: length + 1])) for length in range(len(since)))
        leave_out = call >= self.first and error <= self.threshold and len(since) <= self.most
        self.ran.append(not leave_out)
        self.since = since if leave_out else []
        if leave_out:
            return with_residual(transformer, args, kwargs, 0, self.kept)
        output, states = states_of(transformer, args, kwargs)
        self.kept = states[-1] - states[0]
        return output


class FirstBlockReading:
    """First Block Cache (ParaAttention): the first block always runs; where the mean absolute change of its residual since the last call
    that ran all blocks is at most `threshold` of that residual's mean size, the other blocks' residual of that call is added once."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.first: Tensor | None = None
        self.others: Tensor | None = None
        self.ran: list[bool] = []

    def __call__(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        output, states = states_of(transformer, args, kwargs)
        first = states[1] - states[0]
        if self.first is not None and (first - self.first).abs().mean() / self.first.abs().mean() <= self.threshold:
            self.ran.append(False)
            return with_residual(transformer, args, kwargs, 1, self.others)
        self.ran.append(True)
        self.first, self.others = first, states[-1] - states[1]
        return output


class TaylorReading:
    """TaylorSeer (Liu et al. 2025, "From Reusing to Forecasting", equation 8): k calls after a full one the answer is

        sum over i <= order of k^i / (i! N^i) * D^i,   D^0 the last full answer, D^i = D^(i-1) now - D^(i-1) at the full call before,

    N calls between the two. Full are the first three calls, the fifth, and from there every `interval`-th."""

    def __init__(self, interval: int, order: int):
        self.interval, self.order = interval, order
        self.slopes: list[Tensor] = []  # D^i / N^i
        self.last = 0
        self.ran: list[bool] = []

    def __call__(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        call = len(self.ran)
        self.ran.append(call < 3 or (call >= 4 and (call - 4) % self.interval == 0))
        if not self.ran[-1]:
            ahead = call - self.last
            return sum(slope * (ahead**i / math.factorial(i)) for i, slope in enumerate(self.slopes))
        slopes = [transformer(*args, **kwargs)[0]]
        for before in self.slopes[: self.order]:
            slopes.append((slopes[-1] - before) / (call - self.last))
        self.slopes, self.last = slopes, call
        return slopes[0]


def draw_uvit(cached: Callable[[Any], baselines.CachedPipeline]) -> tuple[nn.Module, list[Call]]:
    """A guided run of two images with a cache on our U-ViT: the model itself, and the cached one's calls."""
    pipe = pipeline()
    own = cached(pipe)
    with noted(own.pipeline.transformer) as calls:
        own.generate([1, 2], [0, 1], num_inference_steps=STEPS, guidance_scale=2.0, batch_size=2)
    return pipe.transformer, calls


def draw_dit(apply: Callable[[nn.Module], None]) -> tuple[nn.Module, list[Call]]:
    """The same on a stock DiT."""
    pipe = dit_pipeline()
    plain = copy.deepcopy(pipe.transformer)
    apply(pipe.transformer)
    with CacheMixin.cache_context(pipe.transformer, "both"), noted(pipe.transformer) as calls:
        generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        pipe([0, 1], generator=generator, num_inference_steps=STEPS, guidance_scale=2.0, output_type="np")
    return plain, calls


@torch.no_grad()
def check(transformer: nn.Module, calls: list[Call], reading: Any) -> None:
    """The answers of a run are the reading's, bit for bit; of both kinds of calls there are several."""
    assert len(calls) == STEPS
    for args, kwargs, answer in calls:
        assert torch.equal(answer, reading(transformer, args, kwargs)), reading.ran
    assert min(sum(reading.ran), STEPS - sum(reading.ran)) >= 3, reading.ran


@pytest.mark.parametrize("threshold", [0.06, 0.12, 10.0])
@pytest.mark.parametrize("draw", [draw_uvit, draw_dit])
def test_mag_cache_adds_the_residual_of_all_blocks_once_and_stops_as_published(
    draw, threshold: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(baselines, "ratios_of", lambda *_, **__: RATIOS)
    if draw is draw_uvit:
        model, calls = draw(lambda pipe: baselines.mag_cache(pipe, threshold, num_steps=STEPS, guidance_scale=2.0))
    else:
        config = MagCacheConfig(threshold=threshold, num_inference_steps=STEPS, mag_ratios=RATIOS)
        model, calls = draw(lambda transformer: apply_mag_cache(transformer, config))
    check(model, calls, MagReading(threshold, ratios=RATIOS))


@pytest.mark.parametrize("draw, threshold", [(draw_uvit, 0.3), (draw_dit, 1.1)])
def test_first_block_cache_adds_the_other_blocks_residual_once(draw, threshold: float):
    if draw is draw_uvit:
        model, calls = draw(
            lambda pipe: baselines.first_block_cache(pipe, threshold, num_steps=STEPS, guidance_scale=2.0)
        )
    else:
        config = FirstBlockCacheConfig(threshold=threshold)
        model, calls = draw(lambda transformer: apply_first_block_cache(transformer, config))
    check(model, calls, FirstBlockReading(threshold))


@pytest.mark.parametrize("interval, order", [(3, 1), (4, 1), (3, 2), (4, 2), (3, 3)])
@pytest.mark.parametrize("draw", [draw_uvit, draw_dit])
def test_taylorseer_expands_the_models_output_to_the_order_asked_for(draw, interval: int, order: int):
    if draw is draw_uvit:
        run = {"num_steps": STEPS, "guidance_scale": 2.0, "order": order}
        model, calls = draw(lambda pipe: baselines.taylorseer(pipe, interval, **run))
    else:
        model, calls = draw(lambda transformer: baselines.apply_taylorseer(transformer, interval, order=order))
    check(model, calls, TaylorReading(interval, order))


def test_taylorseer_of_second_order_is_a_candidate_of_its_own():
    run = {"num_steps": STEPS, "guidance_scale": 2.0}
    (candidate,) = [
        one
        for one in candidates_of(Setup(STEPS, 5, (), *4 * (None,)), CandidateOptions(taylor_second_order=[4]))
        if one.kind == "taylor_second_order"
    ]
    assert (candidate.name, candidate.value) == ("taylor second order 4", 4)
    model, calls = draw_uvit(lambda pipe: baselines.BASELINES[candidate.kind](pipe, candidate.value, **run))
    check(model, calls, TaylorReading(4, 2))


@torch.no_grad()
@pytest.mark.parametrize("sampler, calls_of_a_run", [(None, STEPS), (HeunDiscreteScheduler, 2 * STEPS - 1)])
def test_mag_cache_measures_a_ratio_for_every_call_of_the_model(sampler, calls_of_a_run: int):
    pipe = pipeline()
    if sampler is not None:
        pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    plain = baselines.CachedPipeline(pipe)
    with noted(plain.pipeline.transformer) as calls:
        labels = baselines.balanced_labels(8, baselines.classes_of(pipe, 2.0))
        call = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "batch_size": 8}
        plain.generate(baselines.seeds("fit", 8), labels, **call)
    states = [states_of(pipe.transformer, args, kwargs)[1] for args, kwargs, _ in calls]
    lengths = [(own[-1] - own[0]).norm(dim=-1) for own in states]  # (R, N) a call
    read = [1.0, *((after / before).mean().item() for before, after in itertools.pairwise(lengths))]
    measured = baselines.ratios_of(pipe, num_steps=STEPS, guidance_scale=2.0)
    assert len(measured) == calls_of_a_run
    assert measured == pytest.approx(read, rel=1e-5)


@pytest.mark.parametrize("kind, value", [("first_block", 0.3), ("taylor", 4), ("taylor_second_order", 3), ("mag", 0.2)])
def test_batches_of_one_call_know_nothing_of_each_other(kind: str, value: float):
    own = baselines.BASELINES[kind](pipeline(), value, num_steps=STEPS, guidance_scale=2.0)
    call = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "batch_size": 2}
    alone = [own.generate(*batch, **call).images for batch in (([1, 2], [0, 1]), ([3], [2]))]
    together = own.generate([1, 2, 3], [0, 1, 2], **call)
    assert torch.equal(together.images, torch.cat(alone))
    assert len(together.seconds) == 2


def test_taylorseer_refuses_what_it_cannot_predict():
    with pytest.raises(ValueError, match="TaylorSeer on a Linear, whose last module is not known: expected one of"):
        baselines.apply_taylorseer(nn.Linear(2, 2), 3, order=1)
    with pytest.raises(ValueError, match="order=0, expected an integer of at least 1"):
        baselines.apply_taylorseer(uvit(), 3, order=0)


def test_a_single_block_is_refused():
    pipe = pipeline()
    pipe.transformer, pipe.exits = uvit(num_layers=1), None
    with pytest.raises(ValueError, match="a transformer of 1 block, expected at least 2"):
        baselines.CachedPipeline(pipe)
