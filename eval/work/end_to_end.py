"""A stock DiTPipeline end to end: its exits, one call for every kind of candidate, its report. Flags: eval/end_to_end.py."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file
from torch.nn.functional import interpolate

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import value_for_budget
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.pipelines.sampling import Generated
from ee_diffusion.diffusion.pipelines.stock import EarlyExitDiTPipeline
from ee_diffusion.diffusion.protocols import DenoiserHeads
from ee_diffusion.diffusion.step_cache.fit import fit_schedules
from ee_diffusion.diffusion.step_cache.solver import local_error_gain
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import write_report
from eval.end_to_end import EndToEndOptions
from eval.harness.baselines import db_cache
from eval.harness.candidates import STEP_CACHE, Setup, candidates_of, check_kinds, controls
from eval.harness.interleave import Candidate, in_turns, measured
from eval.harness.options import CandidateOptions, ReferenceOptions, command, merged, results_folder
from eval.harness.real_images import judge_of
from eval.harness.step_caches import load_step_cache
from eval.work.frontier import row

KINDS = ("deediff_shares", "error_thresholds", "cache_intervals", "searched_fitted", "searched_joint", "fewer_steps")
RELOADED = """
import sys, torch
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.pipelines.stock import EarlyExitDiTPipeline
from safetensors.torch import save_file
folder, steps, guidance, labels, chosen = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5]
torch.set_num_threads(int(sys.argv[6]))
pipe = EarlyExitDiTPipeline.from_pretrained(folder + "/pipeline")
pipe.set_progress_bar_config(disable=True)
drawn = pipe(
    [int(label) for label in labels.split()],
    generator=[torch.Generator().manual_seed(int(seed)) for seed in chosen.split()],
    num_inference_steps=steps, guidance_scale=guidance, output_type="np", exit_policy=Policy.load(folder + "/policy.json"),
)
save_file({"images": torch.from_numpy(drawn.images).contiguous(), "depths": drawn.trace.depths}, folder + "/reloaded.safetensors")
"""


def run(options: EndToEndOptions, choices: CandidateOptions, reference: ReferenceOptions) -> None:
    check_kinds(choices, (*KINDS, "db_cache", "db_cache_taylor"))
    folder, pipe = results_folder(options.output_dir), DiTPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    names = sorted(pipe.labels, key=pipe.labels.get)[: options.num_classes]  # where the pipeline says them
    size = (options.judged_size,) * 2
    judge = judge_of(reference, size=size, num_classes=options.num_classes, class_names=names)
    work = Stock(pipe, options, choices)
    first, again = candidates_of(work.setup(), choices), []
    print(json.dumps(work.calibrated), flush=True)
    if work.calibrated:
        policy = next(one.policy for one in first if one.kind == "deediff_share")
        again = [reloaded(pipe, work.exits["model"], policy, options)]
        print(json.dumps(again), flush=True)
    chosen, labels = seeds("test", options.count), balanced_labels(options.count, options.num_classes)

    def rows_of(some: list[Candidate]) -> tuple[dict[str, Generated], list[dict]]:
        drawn = in_turns(some, work.draw, chosen, labels, batch=options.batch_size)
        times = {one.name: measured(drawn[one.name], drawn["full"]) for one in some}
        return drawn, [row(one, drawn[one.name], drawn["full"], times[one.name], judge, labels) for one in some]

    drawn, rows = rows_of(first)
    second = []
    for one, own in zip(first, rows, strict=True):
        if choices.controls and one.kind in ("deediff_share", *STEP_CACHE):
            second += controls(one, drawn[one.name].trace, seed=options.seed, time=own["time"])
    rows += rows_of([first[0], *second])[1][1:] if second else []
    text = write_report(
        folder / "report.json",
        title="A stock DiT pipeline, end to end",
        command=command(),
        settings=merged(options, choices, reference),
        tables={"candidates": rows, "calibration": work.calibrated, "loaded in a new process": again}
        | tables_of_fit(options.fit_report),
        note=f"{options.count} images. {judge.note()} {len(pipe.transformer.transformer_blocks)} blocks, "
        f"{pipe.transformer.num_parameters()} parameters.",
    )
    print(text)


class Stock:
    """What makers of candidates ask of a stock pipeline, and how it draws: its call as ever, exits attached around it."""

    def __init__(self, pipe: DiTPipeline, options: EndToEndOptions, choices: CandidateOptions):
        self.pipe, self.options, self.choices = pipe, options, choices
        cache = load_step_cache(pipe, choices.step_cache)
        self.exits: dict[str, DenoiserHeads] = {"model": load_exits(options.exits), "cache": cache}
        self.found: dict[int, Policy] = {}
        self.calibrated: list[dict] = []
        if choices.searched_fitted or choices.searched_joint:
            self.exits["joint"], self.found = fitted_cache(pipe, options)
            self.exits["fitted"] = each_by_itself(self.exits["joint"])

    def setup(self) -> Setup:
        steps = self.options.num_inference_steps
        gains = local_error_gain(self.exits["cache"], self.pipe.scheduler, steps)
        layers = len(self.pipe.transformer.transformer_blocks)
        return Setup(steps, layers, gains, lambda _: gains, self.schedules, lambda _: _policy, self.thresholds)

    def schedules(self, name: str, shares: Sequence[float]) -> list[list[int]]:
        """The compute steps of the searched schedules nearest to the shares, the same for both fits."""
        steps = self.options.num_inference_steps
        counts = [min(self.found, key=lambda full: (abs(full - steps * (1 - share)), -full)) for share in shares]
        depths = [self.found[count].schedule.depths for count in counts]
        return [[step for step, depth in enumerate(own) if depth] for own in depths]

    def thresholds(self, name: str, shares: Sequence[float]) -> dict[float, Policy]:
        """Share of the blocks -> the threshold found by replay on calibration seeds; what the live run then costs is noted."""
        recorded, found = self.traced(Policy(Threshold(1.0), record_all=True)), {}
        for share in shares:
            choice = value_for_budget(recorded, _policy, budget=share, low=0.0, high=1.0)
            found[share] = _policy(choice.value)
            live = self.traced(found[share])
            facts = {"share": share, "threshold": choice.value, "replayed": choice.fraction}
            facts |= {"live": live.report().mean_executed / live.planned.shape[1]}
            self.calibrated.append(facts | {"images": self.choices.calibration_count})
        return found

    def traced(self, policy: Policy) -> Trace:
        chosen = seeds("calibrate", self.choices.calibration_count)
        labels, size = balanced_labels(len(chosen), self.options.num_classes), self.options.batch_size
        candidate = Candidate("calibration", "calibration", None, policy, self.options.num_inference_steps, "model")
        parts = [(chosen[i : i + size], labels[i : i + size], i) for i in range(0, len(chosen), size)]
        return Trace.concatenate([self.draw(candidate, *part).trace for part in parts])

    def draw(self, candidate: Candidate, chosen: list[int], labels: list[int], first: int) -> Generated:
        call = {
            "class_labels": labels,
            "generator": [torch.Generator().manual_seed(seed) for seed in chosen],
            "num_inference_steps": candidate.steps,
            "guidance_scale": self.options.guidance_scale,
            "output_type": "np",
        }
        begun, ended, trace = time.perf_counter(), None, None
        if candidate.kind.startswith("db_cache"):
            order = int(candidate.kind.endswith("taylor"))
            with db_cache(self.pipe, candidate.value, num_steps=candidate.steps, taylor_order=order) as cached:
                begun = time.perf_counter()
                images = cached(**call).images
                ended = time.perf_counter()
        elif candidate.policy is None:
            images = self.pipe(**call).images
        else:
            policy = _slice(candidate.policy, first, len(chosen))
            with attach_exits(self.pipe, self.exits[candidate.exits], policy) as attachment:
                images, trace = self.pipe(**call).images, attachment.trace
            ids = torch.arange(first, first + len(chosen))
            trace = replace(trace, samples=ids, policy=candidate.policy.to_dict())
        seconds, side = (ended or time.perf_counter()) - begun, self.options.judged_size
        small = interpolate(torch.from_numpy(images).permute(0, 3, 1, 2), size=(side, side), mode="area")
        return Generated(small.contiguous(), trace, (seconds,))


def _policy(threshold: float) -> Policy:
    return Policy(Threshold(threshold))


def _slice(policy: Policy, first: int, count: int) -> Policy:
    """A plan for all images, cut to one batch of them."""
    if not isinstance(policy.criterion, DepthTable):
        return policy
    return replace(policy, criterion=DepthTable(tuple(line[first : first + count] for line in policy.criterion.depths)))


def load_exits(folder: str) -> AdapterExits | DenoisingExits:
    """Exits of the class that their config names. Raises ValueError for another one."""
    kinds = {kind.__name__: kind for kind in (AdapterExits, DenoisingExits)}
    name = AdapterExits.load_config(folder)["_class_name"]
    if name not in kinds:
        raise ValueError(f"{folder} holds {name}, expected one of {sorted(kinds)}")
    return kinds[name].from_pretrained(folder).eval()


def fitted_cache(pipe: DiTPipeline, options: EndToEndOptions) -> tuple[CachedOutputExits, dict[int, Policy]]:
    """A step cache fitted to this solver, number of steps and guidance, and the searched schedules, by their number of compute steps."""
    chosen, labels = seeds("fit", options.fit_count), balanced_labels(options.fit_count, options.num_classes)

    def call() -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in chosen]
        settings = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
        pipe(labels, generator=generators, output_type="np", **settings)

    return fit_schedules(pipe, call)


def each_by_itself(exits: CachedOutputExits) -> CachedOutputExits:
    """The same fit without error weights: least squares at each step, the control of joint least squares."""
    made = CachedOutputExits.from_config(exits.config, joint=None).to(exits.alphas_cumprod.device)
    made.load_state_dict(
        {name: value for name, value in exits.state_dict().items() if name != "prediction.error_weights"}
    )
    return made.eval()


def reloaded(pipe: DiTPipeline, exits: AdapterExits | DenoisingExits, policy: Policy, options: EndToEndOptions) -> dict:
    """Save the pipeline with its exits, draw one batch in a new process, and compare it with this process's."""
    folder, chosen = Path(options.output_dir), seeds("test", min(options.batch_size, options.count))
    labels = balanced_labels(len(chosen), options.num_classes)
    with_exits = EarlyExitDiTPipeline.from_pipe(pipe, vae=pipe.vae, exits=exits)
    with_exits.set_progress_bar_config(disable=True)
    with_exits.save_pretrained(folder / "pipeline")
    policy.save(folder / "policy.json")
    call = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    generators = [torch.Generator().manual_seed(seed) for seed in chosen]
    drawn = with_exits(labels, generator=generators, output_type="np", exit_policy=policy, **call)
    words = [folder, *call.values(), " ".join(map(str, labels)), " ".join(map(str, chosen)), torch.get_num_threads()]
    subprocess.run([sys.executable, "-c", RELOADED, *map(str, words)], check=True)
    there = load_file(folder / "reloaded.safetensors")
    (folder / "reloaded.safetensors").unlink()
    apart = (torch.from_numpy(drawn.images) - there["images"]).abs().max().item()
    same = torch.equal(drawn.trace.depths, there["depths"])
    return {"images": len(chosen), "largest_difference": apart, "same_depths": same}


def tables_of_fit(path: str | None) -> dict[str, list[dict]]:
    """The error of every exit before and after the fit, relative to the full model's mean square, and what the fit took."""
    if path is None:
        return {}
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    gain, states, fit = report["gain"]["full"], report["states"], report["fit"]
    errors = zip(gain["depths"], gain["before"]["error"], gain["after"]["error"], strict=True)
    power = gain["power"]
    took = {"trajectories": states["trajectories"], "seconds_collecting": states["seconds"]}
    took |= {"samples": fit["samples"], "seconds_fitting": fit["seconds"], "threads": report["threads"]}
    return {
        "fit without data: relative squared error to the full model": [
            {"depth": depth, "unfitted": before / power, "fitted": after / power} for depth, before, after in errors
        ],
        "what the fit took": [took | {"peak_megabytes": fit["peak_memory"]["process"] / 1e6}],
    }
