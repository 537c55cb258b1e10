"""Tiny models, exits and drivers for the laws, and every criterion with numbers that split a batch.

Here: things to test with. Not here: what must hold (laws.py). R rows, E samples, K exits, L layers, S steps, N tokens, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

from ee_diffusion.core.active_batch import run_blocks
from ee_diffusion.core.criteria import (
    Criterion,
    DecayingThreshold,
    DepthTable,
    ErrorBudget,
    GatedExit,
    Patience,
    QExit,
    Threshold,
)
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay
from ee_diffusion.core.session import Session, StepSession, begin
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.model_specs import model_spec_of
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline

IMAGES, STEPS, SIZE, CHANNELS, CLASSES = 7, 2, 8, 3, 5
NULL_CLASS = CLASSES  # of both tiny models


# --- models


def uvit(kind: str = "class", *, num_layers: int = 7, **config) -> UViTTransformer2DModel:
    """A tiny U-ViT with large random weights, so that images differ; `kind`: class, unconditional or text."""
    sizes = {
        "sample_size": SIZE,
        "patch_size": 2,
        "in_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
    }
    kinds: dict[str, dict[str, Any]] = {
        "class": {"num_classes": CLASSES + 1, "null_class": NULL_CLASS},
        "unconditional": {},
        "text": {"text_dim": 6, "num_text_tokens": 3},
    }
    model = UViTTransformer2DModel(**{**sizes, "num_layers": num_layers, "mlp_ratio": 2.0, **kinds[kind], **config})
    randomise(model, seed=1)
    if model.class_embed is not None:
        with torch.no_grad():
            model.class_embed.weight.mul_(6)  # so that the branches of guidance differ
    return model.eval()


def dit(num_layers: int = 5, *, channels: int = CHANNELS, classes: int = CLASSES) -> DiTTransformer2DModel:
    """A tiny DiT of diffusers, class-conditional with its null class."""
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=channels,
        num_layers=num_layers,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=classes,
    )
    return randomise(model, seed=2).eval()


def exits_for(model: nn.Module, depths: tuple[int, ...], variant: str = "paper", bias: float = -1.6) -> DenoisingExits:
    """Exits whose uncertainty modules say something else for every image and depth; certainties lie mostly below a half."""
    exits = randomise(DenoisingExits.for_transformer(model, depths, variant), seed=3)
    generator = torch.Generator().manual_seed(4)
    sign = 1 if variant == "released" else -1  # a certainty, or an uncertainty
    with torch.no_grad():
        for linear in exits.uncertainty_modules:
            values, width = linear.weight.shape
            one = torch.randn(1, width, generator=generator) * 1.2 / math.sqrt(width)
            linear.weight.copy_(one + 0.1 * torch.randn(values, width, generator=generator) / math.sqrt(width))
            linear.bias.fill_(bias * sign)
    return exits.eval()


def pipeline(kind: str = "class", variant: str = "paper", depths: tuple[int, ...] = (0, 2, 3, 5)) -> EarlyExitPipeline:
    """A whole tiny pipeline with a DDIM scheduler."""
    model = uvit(kind)
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    made = EarlyExitPipeline(model, scheduler, exits_for(model, depths, variant, bias=-2.6))
    made.set_progress_bar_config(disable=True)
    return made


def randomise(module: nn.Module, *, seed: int, gain: float = 1.0) -> nn.Module:
    """Normal weights of variance gain^2 / fan-in and small offsets, so that no parameter is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                fan_in = 4 if parameter.shape[0] == 1 else parameter[0].numel()
                parameter.copy_(noise * gain / math.sqrt(fan_in))
            else:
                parameter.copy_(0.1 * noise + name.endswith("weight"))  # the scale of a norm, or an offset
    return module


class ToyBlock(nn.Module):
    """h + tanh(inner(h)) + half the mean over tokens: rows never mix, tokens do."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return 0.8 * hidden + torch.tanh(self.inner(hidden)) + 0.5 * hidden.mean(1, keepdim=True)


class ToyTail(nn.Module):
    """(R, N, D) -> (R, C), like a classifier's."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.mean(1))


class ToyHeads(nn.Module):
    """Exits of a plain stack. Both the answer and the certainty look at the context, so that a mixed-up row shows."""

    def __init__(self, depths: tuple[int, ...], space: str, width: int, classes: int):
        super().__init__()
        self.depths, self.space = depths, space
        answers = width if space == "hidden" else classes
        self.heads = nn.ModuleList(nn.Linear(width, answers) for _ in depths)
        self.uncertainty_modules = nn.ModuleList(nn.Linear(width, 1) for _ in depths)

    def answer(self, exit: int, hidden: Tensor, context) -> Tensor:
        shift = context["timestep"][:, None] / 500
        if self.space == "hidden":
            return self.heads[exit](hidden) + shift[:, None]
        return self.heads[exit](hidden.mean(1)) + shift

    def confidence(self, exit: int, hidden: Tensor, context) -> Tensor:
        logit = self.uncertainty_modules[exit](hidden.mean(1))[:, 0]  # (R,)
        return torch.sigmoid(0.5 * logit - 2.0 + context["timestep"] / 500)

    def check_fits(self, model: nn.Module) -> None:
        """Anything fits a toy."""


# --- drivers: one way to run S steps under a policy, whatever stops the blocks


@dataclass(frozen=True)
class Layout:
    """Which rows a batch of images has: one per image, or two of them under guidance, that leave together or apart."""

    name: str
    rows_per_sample: int
    apart: bool = False

    def rows(self, num_images: int) -> Tensor:
        """(R,) the sample of each row."""
        if self.apart:
            return torch.arange(self.rows_per_sample * num_images)
        return torch.arange(num_images).repeat(self.rows_per_sample)

    def samples(self, images: list[int]) -> Tensor:
        """(E,) ids of the samples, in the order of `rows`."""
        ids = torch.tensor(images)
        return torch.cat([ids + IMAGES * branch for branch in range(self.rows_per_sample)]) if self.apart else ids

    def places(self, images: list[int]) -> list[int]:
        """The rows of the full batch that these images have."""
        return [image + IMAGES * branch for branch in range(self.rows_per_sample) for image in images]


LAYOUTS = {
    layout.name: layout for layout in (Layout("single", 1), Layout("joint", 2), Layout("separate", 2, apart=True))
}


def images_of(images: list[int], step: int, rows_per_sample: int) -> dict[str, Tensor]:
    """One step's inputs of some images, conditional rows first: pixels, timesteps (another one for each image), labels."""
    drawn = [torch.Generator().manual_seed(1000 * step + image) for image in images]
    pixels = torch.stack([torch.randn(CHANNELS, SIZE, SIZE, generator=one) for one in drawn])
    pixels = pixels + torch.stack([1.5 * torch.randn(CHANNELS, 1, 1, generator=one) for one in drawn])  # (B, C, H, W)
    times = torch.tensor([20 + 61 * image + 400 * step for image in images])  # (B,)
    labels = torch.tensor([(image + step) % CLASSES for image in images])
    null = torch.full_like(labels, NULL_CLASS)
    return {
        "pixels": pixels.repeat(rows_per_sample, 1, 1, 1),  # (R, C, H, W)
        "timestep": times.repeat(rows_per_sample),  # (R,)
        "labels": torch.cat([labels, null]) if rows_per_sample == 2 else labels,  # (R,)
    }


class PlainDriver:
    """`core.loop.run_blocks` over a toy stack."""

    def __init__(self, space: str, depths: tuple[int, ...] = (0, 1, 2, 4), num_layers: int = 6):
        width = CHANNELS * SIZE
        self.model = randomise(nn.ModuleList(ToyBlock(width) for _ in range(num_layers)), seed=5, gain=1.5)
        self.heads = randomise(ToyHeads(depths, space, width, 4), seed=6)
        self.tail = randomise(ToyTail(width, 4), seed=7)
        self.num_layers, self.tokens = num_layers, SIZE

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model)

    @property
    def inners(self) -> list[nn.Module]:
        return [block.inner for block in self.blocks]

    def hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        tokens = inputs["pixels"].permute(0, 2, 1, 3).flatten(2)  # (R, N, D)
        return tokens + inputs["labels"][:, None, None] / 5

    def base(self, inputs: dict[str, Tensor]) -> Tensor:
        hidden = self.hidden(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.tail(hidden)

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield

    def start(self, policy: Policy, **arguments) -> Session:
        return begin(policy, self.num_layers, self.heads.depths, **arguments)

    def under(self, step: StepSession, inputs: dict[str, Tensor]) -> Tensor:
        context = {"timestep": inputs["timestep"]}
        return run_blocks(self.blocks, self.hidden(inputs), step, heads=self.heads, tail=self.tail, context=context)


class AttachedDriver:
    """`attach` on a diffusers transformer."""

    def __init__(self, model: nn.Module, depths: tuple[int, ...], variant: str):
        self.model, self.heads = model, exits_for(model, depths, variant)
        self.family = model_spec_of(model)
        self.num_layers = len(self.blocks)
        self.tokens = (SIZE // 2) ** 2 + getattr(model, self.family.prefix_tokens or "", 0)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(getattr(self.model, self.family.blocks))

    @property
    def inners(self) -> list[nn.Module]:
        return [getattr(block, self.family.inner) for block in self.blocks]

    def base(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(inputs["pixels"], inputs["timestep"], class_labels=inputs["labels"]).sample

    @contextmanager
    def ready(self) -> Iterator[None]:
        with attach_exits(self.model, self.heads) as self.attachment:
            yield

    def start(self, policy: Policy, **arguments) -> Session:
        return self.attachment.start(policy, **arguments)

    def under(self, step: StepSession, inputs: dict[str, Tensor]) -> Tensor:
        with self.attachment.use(step):
            return self.base(inputs)


Driver = PlainDriver | AttachedDriver

_DRIVERS: dict[str, Callable[[], Driver]] = {
    "plain-output": lambda: PlainDriver("output"),
    "plain-hidden": lambda: PlainDriver("hidden"),
    "uvit-paper": lambda: AttachedDriver(uvit(), (0, 2, 3, 5), "paper"),
    "uvit-released": lambda: AttachedDriver(uvit(), (1, 3, 4, 6), "released"),
    "dit-paper": lambda: AttachedDriver(dit(), (0, 1, 3, 4), "paper"),
    "dit-released": lambda: AttachedDriver(dit(), (1, 2, 3, 4), "released"),
}
DRIVERS = tuple(_DRIVERS)


@functools.cache
def driver_named(name: str) -> Driver:
    """One of `DRIVERS`; made once, for nobody changes it."""
    return _DRIVERS[name]()


@dataclass(frozen=True, eq=False)
class Run:
    """`outputs` (S, R, ...) and what the session recorded."""

    outputs: Tensor
    trace: Trace


@torch.no_grad()
def run(
    driver: Driver,
    policy: Policy,
    layout: Layout,
    images: list[int] | None = None,
    each: Callable[[int], None] | None = None,
) -> Run:
    """S steps under a policy, on all images or some; `each(step)` is called before every step."""
    images = list(range(IMAGES)) if images is None else images
    outputs = []
    with driver.ready():
        session = driver.start(policy, rows=layout.rows(len(images)), num_steps=STEPS, samples=layout.samples(images))
        for index in range(STEPS):
            if each is not None:
                each(index)
            inputs = images_of(images, index, layout.rows_per_sample)
            outputs.append(driver.under(session.step(index, 900.0 - 400 * index), inputs))
    return Run(torch.stack(outputs), session.trace())


@torch.no_grad()
def base_outputs(driver: Driver, layout: Layout) -> Tensor:
    """(S, R, ...) of the model as it is."""
    images = list(range(IMAGES))
    return torch.stack([driver.base(images_of(images, index, layout.rows_per_sample)) for index in range(STEPS)])


@contextmanager
def truncated(driver: Driver, depth: int) -> Iterator[list[Tensor]]:
    """The model with its blocks from `depth` on passing their input through; yields a list that gets the states before the tail."""
    states: list[Tensor] = []

    def passing(hidden: Tensor, *args, **kwargs) -> Tensor:
        states[:] = [hidden]
        return hidden

    for block in driver.blocks[depth:]:
        block.__dict__["forward"] = passing
    try:
        yield states
    finally:
        for block in driver.blocks[depth:]:
            del block.__dict__["forward"]


@torch.no_grad()
def answer_at(driver: Driver, depth: int, inputs: dict[str, Tensor]) -> Tensor:
    """What the model truncated to `depth` blocks answers through that depth's exit (or, at L, through its own tail)."""
    if depth == driver.num_layers:
        return driver.base(inputs)
    with truncated(driver, depth) as states:
        by_tail = driver.base(inputs)
    exit, context = driver.heads.depths.index(depth), {"timestep": inputs["timestep"]}
    if driver.heads.space == "output":
        return driver.heads.answer(exit, states[0], context)
    if isinstance(driver, PlainDriver):
        return driver.tail(driver.heads.answer(exit, states[0], context))
    return by_tail  # the released exits answer with the hidden states themselves


# --- criteria


@functools.cache
def recorded(driver: str, layout: str) -> Trace:
    """A run of a driver with every exit measured and nobody stopped."""
    return run(driver_named(driver), Policy(Threshold(0.5), record_all=True), LAYOUTS[layout]).trace


def between(values: Tensor, count: int = 10) -> list[float]:
    """Numbers that lie well between the values, spread over their range."""
    ordered = values[~values.isnan()].unique()
    gaps = ordered.diff()
    middles = ((ordered[1:] + ordered[:-1]) / 2)[gaps > 1e-3]
    chosen = torch.linspace(0, len(middles) - 1, min(count, len(middles))).round().long()
    return middles[chosen].tolist()


def splitting(trace: Trace, make: Callable[[float], Criterion], values: list[float]) -> Criterion:
    """The criterion among `make(value)` under which the samples of a trace stop at the most different depths, some at none (at every
    step, where the steps are independent; else in the whole run)."""
    num_layers, every_step = trace.planned.shape[1], len(trace.times) == STEPS

    def variety(criterion: Criterion) -> int:
        depths = replay(trace, Policy(criterion))
        full = (depths == num_layers).float()
        share = full.mean(1) if every_step else full.mean()[None]  # (S,) or (1,)
        return -1 if bool(((share == 0) | (share > 0.7)).any()) else sum(len(row.unique()) for row in depths)

    best = max((make(value) for value in values), key=variety)
    assert variety(best) > 0, "no value splits the batch"
    return best


def _middle(scores: Tensor, quantile: float) -> float:
    """A number well between two scores, about at the quantile."""
    ordered = scores.flatten().sort().values
    place = int(quantile * (len(ordered) - 1))
    near = range(max(0, place - 1), min(len(ordered) - 1, place + 2))
    best = max(near, key=lambda index: float(ordered[index + 1] - ordered[index]))
    return float(ordered[best] + ordered[best + 1]) / 2


def _per_exit(trace: Trace, quantile: float) -> tuple[float, ...]:
    return tuple(_middle(scores, quantile) for scores in trace.scores.transpose(0, 1))  # (K,)


def _per_step(trace: Trace, quantile: float) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(_middle(scores, quantile) for scores in step) for step in trace.scores)  # (S, K)


def _planned(trace: Trace) -> DepthTable:
    choices = torch.tensor([*trace.exits.tolist(), trace.planned.shape[1]])
    generator = torch.Generator().manual_seed(8)
    drawn = torch.randint(len(choices), (len(trace.times), int(trace.samples.max()) + 1), generator=generator)
    return DepthTable(tuple(tuple(row) for row in choices[drawn].tolist()))


def _accumulated(trace: Trace, quantile: float) -> ErrorBudget:
    """Steps of unlike weight; the second is decided by what the first has left."""
    steps = trace.scores.shape[0]
    budget = 1 - _middle(trace.scores[trace.scores.isfinite()], quantile)  # no score lies on it
    return ErrorBudget(max(budget, 1e-6), tuple(1.0 + 0.3 * (step % 2) for step in range(steps)), 0.5)


_QUANTILES = [0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9]
_CRITERIA: dict[str, Callable[[Trace], Criterion]] = {
    "threshold": lambda trace: splitting(trace, Threshold, between(trace.scores)),
    "threshold-per-exit": lambda trace: splitting(trace, lambda q: Threshold(_per_exit(trace, q)), _QUANTILES),
    "threshold-per-step": lambda trace: splitting(trace, lambda q: Threshold(_per_step(trace, q)), _QUANTILES),
    "threshold-decaying": lambda trace: splitting(
        trace, lambda value: DecayingThreshold(value, 2, rate=9.0), between(trace.scores)
    ),
    "patience-consecutive": lambda trace: splitting(trace, lambda value: Patience(value, 2), between(trace.scores)),
    "patience-total": lambda trace: splitting(
        trace, lambda value: Patience(value, (2, 2, 1, 1), consecutive=False), between(trace.scores)
    ),
    "cumulative": lambda trace: splitting(trace, QExit, between(1 - (1 - trace.scores).cumprod(1))),
    "gate": lambda trace: splitting(trace, GatedExit, between(trace.scores)),
    "accumulated": lambda trace: splitting(trace, lambda q: _accumulated(trace, q), _QUANTILES),
    "planned": _planned,
}
CRITERIA = tuple(_CRITERIA)


@functools.cache
def criterion_named(name: str, driver: str, layout: str) -> Criterion:
    """One of `CRITERIA`, with numbers that split the batch of that driver and layout."""
    return _CRITERIA[name](recorded(driver, layout))


def criteria_for(trace: Trace) -> dict[str, Criterion]:
    """Every criterion, with numbers that split the samples of a trace recorded with all exits measured (4 exits)."""
    return {name: make(trace) for name, make in _CRITERIA.items()}


def stricter(criterion: Criterion, num_layers: int) -> list[Criterion]:
    """Criteria of the same kind that may only stop later."""

    def nearer_one(value, share: float):
        if isinstance(value, tuple):
            return tuple(nearer_one(one, share) for one in value)
        return value + share * (1 - value)

    shares = (0.02, 0.1, 0.3, 1.0)
    if isinstance(criterion, Threshold):
        return [Threshold(nearer_one(criterion.threshold, share)) for share in shares]
    if isinstance(criterion, Patience):
        sums = criterion.consecutive
        more = [
            Patience(nearer_one(criterion.threshold, share), criterion.patience, consecutive=sums) for share in shares
        ]
        counts = criterion.patience
        counts = tuple(count + 1 for count in counts) if isinstance(counts, tuple) else counts + 1
        return [*more, Patience(criterion.threshold, counts, consecutive=sums)]
    if isinstance(criterion, DecayingThreshold):
        return [replace(criterion, threshold=nearer_one(criterion.threshold, share)) for share in shares]
    if isinstance(criterion, QExit):
        return [QExit(nearer_one(criterion.q, share)) for share in shares]
    if isinstance(criterion, GatedExit):
        return [GatedExit(nearer_one(criterion.threshold, share)) for share in shares]
    if isinstance(criterion, ErrorBudget):
        return [replace(criterion, budget=criterion.budget * share) for share in (0.95, 0.8, 0.5, 0.1)]
    assert isinstance(criterion, DepthTable)
    return [
        DepthTable(tuple(tuple(min(num_layers, depth + more) for depth in row) for row in criterion.depths))
        for more in (1, 2)
    ]
