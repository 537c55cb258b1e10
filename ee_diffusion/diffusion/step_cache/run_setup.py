"""What a run is made under (solver, times, guidance, shape, weights), read off a pipeline's own call, and whether exits were fitted so.

Here: reading, comparing, the warning. Not here: fitting (trajectories.py, recording.py), calibrated policies (fingerprint.py).
B samples as the solver has them, R rows, S steps.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from ee_diffusion.core.patch import ForwardPatch, Uncopied
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.linear_predictor import NEAR
from ee_diffusion.diffusion.fingerprint import same_weights, weights_of
from ee_diffusion.diffusion.hooks.compile import unwrapped

CLOSE = 0.02  # guidance that differs by less of itself is one: it is measured, and half precision rounds
Guidance = float | None | Sequence[float | None]  # of all steps, or of each


@dataclass(frozen=True)
class RunSetup:
    """None: not known, or of exits that hold wherever they are used. `num_steps` S, `times` (S,); `guidance_scale` of classifier-free
    guidance, `embedded_guidance` the number that a guidance-distilled transformer is given; `shape` of a sample; `weights`: `weights_of`
    the transformer."""

    scheduler: str | None = None
    num_steps: int | None = None
    times: tuple[float, ...] | None = None
    guidance_scale: Guidance = None
    embedded_guidance: float | None = None
    shape: tuple[int, ...] | None = None
    weights: str | None = None

    def guidance_at(self, step: int) -> float | None:
        """Of one step."""
        scale = self.guidance_scale
        return scale[step] if isinstance(scale, Sequence) and step < len(scale) else _number(scale)


def setup_of(exits: object) -> RunSetup:
    """What exits were fitted under."""
    if not isinstance(exits, CachedOutputExits):
        return RunSetup()
    config, times = exits.config, None if exits.prediction is None else tuple(exits.prediction.times.tolist())
    return RunSetup(
        config.fitted_scheduler,
        config.fitted_steps or None,
        times,
        config.fitted_guidance,
        config.fitted_embedded_guidance,
        None if config.fitted_shape is None else tuple(config.fitted_shape),
        config.model_weights,
    )


def is_fitted(exits: object) -> bool:
    """Whether exits were fitted under anything that a run can be held against."""
    return setup_of(exits) != RunSetup()


def setup_here(pipeline: DiffusionPipeline, exits: object, times: Sequence[float], **more: Any) -> RunSetup:
    """What a run of a pipeline along some times (S,) has. Weights are only read where the exits know theirs."""
    weights = None if setup_of(exits).weights is None else weights_of(unwrapped(pipeline.transformer))
    return RunSetup(type(pipeline.scheduler).__name__, len(times), tuple(times), weights=weights, **more)


def differences(known: RunSetup, here: RunSetup, step: int = 0) -> list[tuple[str, str]]:
    """What differs at a step beside solver, number of steps and guidance, in words of both; of what one of them does not know nothing is
    said."""
    found, one, other = [], known.embedded_guidance, here.embedded_guidance
    if not _near(one, other):
        found.append((f"embedded guidance {one}", f"embedded guidance {other}"))
    if known.times and here.times and (known.scheduler, known.num_steps) == (here.scheduler, here.num_steps):
        apart = [pair for pair in zip(known.times, here.times, strict=True) if abs(pair[0] - pair[1]) >= NEAR]
        found += [(f"a step at time {a:g}", f"it at {b:g}") for a, b in apart[:1]]
    if None not in (known.shape, here.shape) and known.shape != here.shape:
        found.append((f"samples {known.shape}", f"samples {here.shape}"))
    if not same_weights(known.weights, here.weights):
        found.append((f"weights {known.weights}", f"weights {here.weights}"))
    return found


def warn_of_setup(exits: object, here: RunSetup, step: int = 0) -> bool:
    """Warns where exits were fitted under something else than what a run has at a step; -> whether it did."""
    known = setup_of(exits)
    told, same = differences(known, here, step), _near(known.guidance_at(step), here.guidance_at(step))
    same = same and known.scheduler in (None, here.scheduler) and known.num_steps in (None, here.num_steps)
    if same and not told:
        return False
    sides = []
    for place, one in enumerate((known, here)):
        guidance = one.guidance_at(step)
        words = [f"{one.scheduler}, {one.num_steps} steps", f"guidance {'not known' if guidance is None else guidance}"]
        sides.append(", ".join([*(words if known.num_steps else []), *(pair[place] for pair in told)]))
    when = f" at step {step}" if step else ""
    warnings.warn(
        f"what these exits remember is weighed for {sides[0]}; this run has {sides[1]}{when}: fit them to it "
        "(ee-diffusion calibrate --kind static_cache_schedule --fit_cache FOLDER; for stock pipelines fit_schedules)",
        stacklevel=3,
    )
    return True


def _near(one: float | None, other: float | None) -> bool:
    """Whether two guidance scales are one; what is not known is taken for the same."""
    return one is None or other is None or abs(one - other) <= CLOSE * max(abs(one), abs(other))


def _number(value: Guidance) -> float | None:
    return value if isinstance(value, int | float) else None


def guidance_in(outputs: Sequence[Tensor], used: Tensor) -> float | None:
    """The s of `u + s (c - u)`, from what a transformer said in the forwards of a step, (R, ...) in all, and what the solver was given,
    (B, ...): 1 where an image has one row; None where it has more than two, or nothing tells.

    By least squares, u and c each with a factor of its own for every image (of packed tokens, every token), so that guidance may be
    rescaled; then the median. Whether u or c comes first does not matter where s is above 1.
    """
    rows = torch.cat([one[:, : used.shape[1]] for one in outputs])
    halves = used.chunk(2)
    if len(halves) == 2 and torch.equal(*halves):  # DiTPipeline's solver has the second rows, too
        used = halves[0]
    if rows.shape[1:] != used.shape[1:] or len(rows) % len(used):
        return None
    if len(rows) == len(used):
        return 1.0
    if len(rows) != 2 * len(used):
        return None
    axes = (0, 1) if used.ndim == 3 else (0, 0)
    one, other, answer = (part.double().flatten(*axes).flatten(1) for part in (*rows.chunk(2), used))  # (U, n)
    dot = {name: (x * y).sum(1) for name, x, y in (("aa", one, one), ("ab", one, other), ("bb", other, other))}
    toward_one, toward_other = (one * answer).sum(1), (other * answer).sum(1)
    first = toward_one * dot["bb"] - toward_other * dot["ab"]
    second = toward_other * dot["aa"] - toward_one * dot["ab"]
    share = (second / (first + second)).nan_to_num(torch.nan, torch.nan, torch.nan)
    scale = share.nanmedian().item()
    return None if scale != scale else float(f"{max(scale, 1 - scale):.4g}")


def steady(values: Sequence[float | None]) -> Guidance:
    """One number where all that are known agree, None where none is, else all."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    return known[len(known) // 2] if known[-1] - known[0] <= CLOSE * abs(known[-1]) else tuple(values)


def intercept_step(scheduler: SchedulerMixin, wrapper: Callable[..., Any]) -> ForwardPatch:
    """`scheduler.step(...)` becomes `wrapper(original, arguments by name)`."""
    signature = inspect.signature(scheduler.step)

    def step(original, *args, **kwargs):
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as unfit:
            raise ValueError(
                f"this pipeline cannot drive {type(scheduler).__name__} ({unfit}), expected one of its own schedulers, or DDIMScheduler "
                "or DPMSolverMultistepScheduler"
            ) from unfit
        return wrapper(partial(original, *args, **kwargs), arguments)

    return ForwardPatch(scheduler, step, name="step")


class Listener:
    """What a transformer says, forward by forward, until it is taken. `heard` is called after each forward."""

    def __init__(self, transformer: nn.Module, heard: Callable[[], None] = lambda: None):
        self._heard = heard
        self._said: list[Tensor] = []
        self._embedded: float | None = None
        if vars(transformer).get("_compiled_call_impl") is not None:  # a hook would be compiled, too
            self.remove = ForwardPatch(transformer, self._called, name="_compiled_call_impl").restore
        else:
            self.remove = transformer.register_forward_hook(Uncopied(self._hooked), with_kwargs=True).remove

    def forget(self) -> None:
        """Of a step that did not come to its end."""
        self._said = []

    def taken(self, used: Tensor) -> tuple[float | None, float | None]:
        """(classifier-free, embedded) guidance of the step whose solver was given `used` (B, ...); then nothing is kept."""
        said, self._said = self._said, []
        return (guidance_in(said, used) if said else None), self._embedded

    def _called(self, original, *args, **kwargs):
        output = original(*args, **kwargs)
        self._hooked(None, args, kwargs, output)
        return output

    def _hooked(self, module: nn.Module | None, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        self._said.append((output[0] if isinstance(output, tuple) else output.sample).detach())
        embedded = kwargs.get("guidance")
        self._embedded = float(embedded.flatten()[0]) if isinstance(embedded, Tensor) else None
        self._heard()


class Watch:
    """Holds every run of a pipeline with exits attached against what those were fitted under, step by step, and warns once a run."""

    def __init__(self, pipeline: DiffusionPipeline, exits: object):
        self._pipeline, self._exits = pipeline, exits
        self._here: RunSetup | None = None  # of the run that goes on, as long as it has not warned
        self._index = 0
        self._interception: ForwardPatch | None = None
        self._listener = Listener(pipeline.transformer, self._heard)

    def begin(self, num_steps: int) -> None:
        """A run begins: its first forward is under way. One that broke off may have left its scheduler intercepted."""
        self._leave()
        times = self._pipeline.scheduler.timesteps.tolist()[-num_steps:]
        self._here = setup_here(self._pipeline, self._exits, times)
        self._index = 0
        self._listener.forget()

    def detach(self) -> None:
        """Watch no longer."""
        self._leave()
        self._listener.remove()

    def _heard(self) -> None:
        """After a forward the solver's step follows, or the forward of another row."""
        if self._here is None:
            self._listener.forget()
        elif self._interception is None:
            self._interception = intercept_step(self._pipeline.scheduler, self._step)

    def _step(self, original: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
        self._leave()
        used, sample = arguments.get("model_output"), arguments.get("sample")
        if self._here is not None and isinstance(used, Tensor) and isinstance(sample, Tensor):
            scale, embedded = self._listener.taken(used)
            here = replace(self._here, guidance_scale=scale, embedded_guidance=embedded, shape=tuple(sample.shape[1:]))
            if warn_of_setup(self._exits, here, self._index):
                self._here = None
            self._index += 1
        return original()

    def _leave(self) -> None:
        if self._interception is not None:
            self._interception.restore()
            self._interception = None
