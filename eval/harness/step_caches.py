"""Exits by the name that a candidate has of them, and what is measured for them: fits, error amplification, searched schedules, thresholds.

Everything here is fitted and measured on fitting or calibration seeds, never on those that are tested, and in float32 whatever the run's
dtype. Not here: candidates (candidates.py), drawing (drawing.py). S steps.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import value_for_budget
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.exits.oracle import OracleExits
from ee_diffusion.diffusion.fingerprint import fingerprint
from ee_diffusion.diffusion.methods import deediff_released
from ee_diffusion.diffusion.pipelines.sampling import classes_of, generate
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_propagation import error_amplification, error_weights
from ee_diffusion.diffusion.step_cache.recording import record
from ee_diffusion.diffusion.step_cache.schedule_search import gap_prices, nearest, search
from ee_diffusion.diffusion.step_cache.solver import local_error_gain
from ee_diffusion.diffusion.step_cache.trajectories import fit_prediction
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import write_json
from eval.harness.candidates import Setup
from eval.harness.options import CandidateOptions, SamplingOptions
from eval.harness.pipeline import in_float32
from eval.harness.result_cache import contents, noted


def load_step_cache(pipeline: EarlyExitPipeline, folder: str | None) -> CachedOutputExits:
    """A step cache, from a folder or unfitted."""
    if folder is None:
        return CachedOutputExits.for_pipeline(pipeline.transformer, pipeline.scheduler)
    exits = CachedOutputExits.from_pretrained(folder).to(pipeline.transformer.device)
    exits.check_fits(pipeline.transformer)
    return exits


def epsilon_cache(pipeline: EarlyExitPipeline) -> CachedOutputExits:
    """A step cache that extrapolates the noise, unfitted."""
    return CachedOutputExits.for_pipeline(pipeline.transformer, pipeline.scheduler, cached_type="epsilon")


def fitted_cache(
    pipeline: EarlyExitPipeline,
    sampling: SamplingOptions,
    count: int,
    folder: Path,
    weights: tuple[float, ...] | None = None,
) -> CachedOutputExits:
    """A step cache fitted by least squares along the full model's trajectories of `count` fitting seeds; kept in `folder`.

    weights: error weights (S,), for joint least squares. Trajectories are recorded in float32: half precision's rounding, taken for
    chance, draws the fit towards the mean, and what each step then misses points the same way.

    Raises:
        ValueError: `folder` holds exits fitted under other settings; what was drawn beside it is theirs.
    """
    wanted = {name: getattr(sampling, name) for name in ("model", "sampler", "num_inference_steps", "guidance_scale")}
    whole = in_float32(pipeline, sampling)
    wanted |= {"dtype": "float32", "search_count": count, "weights": fingerprint(whole.transformer)}
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
        return load_step_cache(pipeline, str(folder))
    exits, labels = epsilon_cache(whole), balanced_labels(count, classes_of(pipeline, sampling.guidance_scale))
    call = {"num_inference_steps": sampling.num_inference_steps, "guidance_scale": sampling.guidance_scale}
    made = fit_prediction(exits, record(whole, exits, seeds("fit", count), labels, **call), weights)
    made.save_pretrained(folder)
    write_json(settings, wanted)
    return load_step_cache(pipeline, str(folder))


class NamedExits(dict[str | None, nn.Module | None]):
    """Name -> exits, loaded when first asked for. `model`: the pipeline's own; `cache`, `epsilon`: a step cache as --step_cache says, or of
    the noise; `fitted`, `joint`: from the folders of these names in `folder`; `released`; `oracle`; others by --other_caches.

    Raises:
        ValueError: a name of none of these, or of exits that `folder` has not.
    """

    def __init__(self, pipeline: EarlyExitPipeline, options: CandidateOptions, folder: Path):
        others = dict(one.split("=", 1) for one in options.other_caches)
        self.makers: dict[str | None, Callable[[], nn.Module | None]] = {
            **{name: partial(load_step_cache, pipeline, place) for name, place in others.items()},
            "cache": partial(load_step_cache, pipeline, options.step_cache),
            "epsilon": partial(epsilon_cache, pipeline),
            **{name: partial(self._beside, pipeline, folder / name) for name in ("fitted", "joint")},
            "released": partial(_released, pipeline, options.released),
            "oracle": lambda: OracleExits(self["cache"], pipeline.transformer),
        }
        super().__init__({None: None, "model": pipeline.exits})

    def __missing__(self, name: str) -> nn.Module | None:
        if name not in self.makers:
            raise ValueError(f"exits {name!r}, expected one of {sorted(map(str, self.makers))}")
        self[name] = self.makers[name]()
        return self[name]

    @staticmethod
    def _beside(pipeline: EarlyExitPipeline, folder: Path) -> CachedOutputExits:
        if not (folder / "settings.json").is_file():
            raise ValueError(
                f"{folder.parent} has no folder {folder.name}, expected what its candidates were drawn with"
            )
        return load_step_cache(pipeline, str(folder))


def _released(pipeline: EarlyExitPipeline, folder: str | None) -> DenoisingExits | None:
    own = pipeline.transformer
    return folder and DenoisingExits.from_pretrained(folder).to(own.device, own.dtype)


class Measured:
    """What makers of candidates ask of a U-ViT pipeline. What is dear to find is kept in `folder`/drawn by what it depends on (`known`:
    the run's settings); fitted exits in folders of their own.
    """

    def __init__(
        self,
        pipeline: EarlyExitPipeline,
        sampling: SamplingOptions,
        options: CandidateOptions,
        *,
        folder: Path,
        known: dict,
    ):
        self.pipeline, self.sampling, self.options, self.folder, self.known = pipeline, sampling, options, folder, known
        self.exits = NamedExits(pipeline, options, folder)
        self.call = {"num_inference_steps": sampling.num_inference_steps, "guidance_scale": sampling.guidance_scale}
        self.num_classes = classes_of(pipeline, sampling.guidance_scale)
        if options.searched_fitted:
            self.exits["fitted"] = fitted_cache(pipeline, sampling, options.search_count, folder / "fitted")
        if options.searched_joint:
            weights = self.weights(options.search_power)
            self.exits["joint"] = fitted_cache(pipeline, sampling, options.search_count, folder / "joint", weights)

    def setup(self) -> Setup:
        steps, layers = self.sampling.num_inference_steps, len(self.pipeline.transformer.transformer_blocks)
        return Setup(steps, layers, self.local_gains, self.weights, self.schedules, self.rule, self.thresholds)

    @cached_property
    def local_gains(self) -> tuple[float, ...]:
        """What an error of each step does in that step (S,)."""
        return local_error_gain(self.exits["cache"], self.pipeline.scheduler, self.sampling.num_inference_steps)

    @cached_property
    def amplification(self) -> tuple[float, ...]:
        """What becomes of an error of each step (S,), measured on fitting seeds."""
        options = self.options
        what = [self.known, contents(self.pipeline, self.exits["cache"]), "error amplification"]
        what += [options.amplification_images, options.amplification_every]
        return tuple(noted(self.folder / "drawn", what, self._amplification))

    def _amplification(self) -> tuple[float, ...]:
        labels = balanced_labels(self.options.amplification_images, self.num_classes)
        return error_amplification(
            in_float32(self.pipeline, self.sampling),
            self.exits["cache"],
            labels,
            batch_size=1 if labels else self.options.amplification_images,
            every=self.options.amplification_every,
            generator=torch.Generator().manual_seed(seeds("fit", 1)[0]),
            **self.call,
        )

    def weights(self, power: float) -> tuple[float, ...]:
        """Error weights (S,) at a trust in the amplification."""
        return error_weights(self.local_gains, self.amplification, power=power)

    def schedules(self, name: str, shares: Sequence[float]) -> list[list[int]]:
        """The searched compute steps, a schedule for each share of cached steps. In half precision the last step is computed (`search`)."""
        weights, count = self.weights(self.options.search_power), self.options.search_count
        what = [self.known, contents(self.pipeline, self.exits[name]), "schedules"]
        what += [shares, count, list(weights)]
        return noted(self.folder / "drawn", what, partial(self._schedules, name, shares, weights))

    def _schedules(self, name: str, shares: Sequence[float], weights: tuple[float, ...]) -> list[list[int]]:
        exits, steps, count = self.exits[name], self.sampling.num_inference_steps, self.options.search_count
        labels, whole = balanced_labels(count, self.num_classes), in_float32(self.pipeline, self.sampling)
        trajectory = record(whole, exits, seeds("fit", count), labels, **self.call)
        found = search(gap_prices(exits, trajectory, weights), steps, last_full=self.sampling.dtype != "float32")
        return [list(nearest(found, steps * (1 - share)).full) for share in shares]

    def rule(self, name: str) -> Callable[[float], Policy]:
        """Certainty threshold -> the policy of these exits."""
        if name != "released":
            return lambda value: Policy(Threshold(value))
        layers = len(self.pipeline.transformer.transformer_blocks)
        return partial(deediff_released, depths=self.exits[name].depths, num_layers=layers)

    def thresholds(self, name: str, shares: Sequence[float]) -> dict[float, Policy]:
        """Share of the blocks -> the policy that executes it, by replay of a trace with all exits measured on calibration seeds."""
        chosen, rule = seeds("calibrate", self.options.calibration_count), self.rule(name)
        self.pipeline.exits = self.exits[name]
        call = {"batch_size": self.sampling.batch_size, "exit_policy": replace(rule(1.0), record_all=True), **self.call}
        trace = generate(self.pipeline, chosen, balanced_labels(len(chosen), self.num_classes), **call).trace
        found = {}
        for share in shares:
            choice = value_for_budget(trace, rule, budget=share, low=0.0, high=1.0)
            print(f"{name} {share}: threshold {choice.value:.5f}, replayed {choice.fraction:.3f}", flush=True)
            found[share] = rule(choice.value)
        return found
