"""The frontier: answers from memory beside everything that is simpler, at the same seeds, in one run, by the clock.

python -m eval.frontier --output_dir runs/frontier --count 128

Candidates: fewer steps; a cache of fixed period (memory without uncertainty); schedules found by search (`searched`); answers from memory
per image (memory with uncertainty), bounded step by step (`remembered`) or by what adds up (`budgeted`), and for each of
those a static schedule and random exits made of its own trace; an oracle that knows the true error of each
step (its shadow of the full model is not counted); DeeDiff (uncertainty without memory); diffusers' caches. Images and traces are kept in
drawn/: a run that was stopped goes on when started again. Times are not kept: at the end all candidates draw --clock_images images in
turns with the full model, each warm, and a time is the median over batches of (candidate / full model). Where other work disturbs this
clock, `eval/clock.py` measures the times anew. Writes frontier.json, frontier.md and frontier.png.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import nn

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.io import write_text
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.pipelines.sampling import classes_of
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.error_propagation import error_weights
from ee_diffusion.diffusion.step_cache.solver import local_error_gain
from ee_diffusion.metrics.figures import save_figure
from ee_diffusion.metrics.quality import COLUMNS, flat
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from eval.harness.candidates import (
    DECIDE,
    OURS,
    base_of,
    candidates_of,
    controls,
    drawer,
    exits_by_kind,
    fitted_memory,
    gains_of,
    load_memory,
    schedules_of,
    searched_candidates,
)
from eval.harness.frontier_options import FrontierOptions
from eval.harness.interleave import Candidate, by_batch, clock_images_of, clocked
from eval.harness.options import SamplingOptions, command, parse, results_folder
from eval.harness.pipeline import load
from eval.harness.real_images import ReferenceOptions, judge_of, shape_of
from eval.harness.result_cache import contents, kept, noted
from eval.tradeoff import quality

COLOURS = [
    colormaps["tab20"](place) for place in (*range(0, 20, 2), *range(1, 20, 2)) if place not in (14, 15)
]  # no grey
MARKERS = "os^DvP*X<>hpd8"


def picture(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(r["kind"] for r in rows if r["kind"] != "full"))
    lines = [kind for kind in kinds if " of " not in kind]  # controls made of another's trace are grey
    for place, kind in enumerate(kinds):
        points = sorted((r["time"], r["psnr"]["mean"], r["psnr"]["high"]) for r in rows if r["kind"] == kind)
        times, means, highs = zip(*points, strict=True)
        bars = [(high or mean) - mean for mean, high in zip(means, highs, strict=True)]  # 95 % over seeds
        colour = COLOURS[lines.index(kind) % len(COLOURS)] if kind in lines else "0.6"
        style = {"color": colour, "marker": MARKERS[place % len(MARKERS)], "markersize": 5, "capsize": 2}
        style |= {"linestyle": "-" if kind in lines else "--", "linewidth": 2 if kind in OURS else 1}
        axes.errorbar(times, means, yerr=bars, label=kind.replace("_", " "), **style)
    axes.set_xlabel("measured time / full model")
    axes.set_ylabel("PSNR to the full model (dB)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def verdict(rows: list[dict]) -> str:
    """For each point of ours: the best other candidate that takes no longer (2 % are the clock's)."""
    lines = []
    for ours in (r for r in rows if r["kind"] in OURS):
        others = [r for r in rows if r["kind"] not in (*OURS, "full", "oracle") and r["time"] <= 1.02 * ours["time"]]
        best = max(others, key=lambda r: r["psnr"]["mean"], default=None)
        said = "nothing else is as fast" if best is None else f"{best['name']} {best['psnr']['mean']:.1f} dB"
        lines.append(
            f"- {1 / ours['time']:.2f}x: {ours['name']} {ours['psnr']['mean']:.1f} dB; at most that time: {said}"
        )
    return "\n".join(lines)


def finished(folder: Path, report: dict) -> None:
    """Verdict, table and picture of a report that has its rows."""
    rows = sorted(report["rows"], key=lambda r: (r["kind"], -r["time"]))
    report |= {"rows": rows, "verdict": verdict(rows)}
    write_json(folder / "frontier.json", report)
    columns = ["name", "steps", "time", "executed", *(name for name in COLUMNS if name in rows[0])]
    lines = [{**r, "executed": r.get("report", {}).get("mean_executed"), **flat(r)} for r in rows]
    write_text(folder / "frontier.md", "\n".join([markdown_table(lines, columns), *_said(report)]))
    picture(rows, folder / "frontier.png")
    print((folder / "frontier.md").read_text())


def _said(report: dict) -> list[str]:
    """What stands under the table, each with an end of line; older reports do not say what their figures are against."""
    return [f"{report[name]}\n" for name in ("figures", "verdict") if name in report]


def candidates(
    pipeline: EarlyExitPipeline,
    sampling: SamplingOptions,
    options: FrontierOptions,
    kinds: dict[str, nn.Module | None],
    *,
    sensitivity: tuple[float, ...],
    gains: tuple[float, ...] | None,
    store: Path,
    known: dict,
) -> list[Candidate]:
    """All that need no trace. What is dear to find is noted in `store`. kinds: of `exits_by_kind`."""
    steps, layers = sampling.num_inference_steps, len(pipeline.transformer.transformer_blocks)
    weights = error_weights(sensitivity, gains or (1.0,) * steps, power=options.power)
    found = candidates_of(options, sensitivity, weights)
    weights = error_weights(sensitivity, gains or (1.0,) * steps, power=options.search_power)
    asked = {
        "searched": options.shares,
        "searched noise": options.noise_shares,
        "searched fitted": options.fitted_shares,
        "searched together": options.together_shares,
    }
    for kind, shares in asked.items():
        if shares:
            own = kinds[kind]
            what = [
                known,
                contents(pipeline, own),
                kind,
                "in float32, then the last step",
                shares,
                options.search_count,
                list(weights),
            ]
            make = partial(schedules_of, pipeline, own, sampling, options, weights, shares)
            found += searched_candidates(noted(store, what, make), kind, num_steps=steps, num_layers=layers)
    return found


def gains_if_asked(
    pipeline: EarlyExitPipeline,
    sampling: SamplingOptions,
    options: FrontierOptions,
    memory: CachedOutputExits,
    *,
    store: Path,
    known: dict,
) -> tuple[float, ...] | None:
    """What becomes of an error of each step, noted in `store`; None where nobody asks for it."""
    if not (
        options.budgets or options.shares or options.noise_shares or options.fitted_shares or options.together_shares
    ):
        return None
    what = [known, contents(pipeline, memory), "gains in float32", options.gain_images, options.gain_every]
    return tuple(noted(store, what, lambda: gains_of(pipeline, memory, sampling, options)))


def main() -> None:
    sampling, options, reference = parse(SamplingOptions, FrontierOptions, ReferenceOptions, description=__doc__)
    images = clock_images_of(options.clock_images, count=options.count, batch=sampling.batch_size)
    folder, pipeline = results_folder(sampling.output_dir), load(sampling)
    num_classes = classes_of(pipeline, sampling.guidance_scale)
    judge = judge_of(reference, **shape_of(pipeline), num_classes=num_classes)
    chosen, labels = seeds("test", options.count), balanced_labels(options.count, num_classes)

    memory = load_memory(pipeline, options.memory)
    known = asdict(sampling) | dict.fromkeys(("model", "output_dir", "device"))  # `contents` says more of them
    store, steps = folder / "drawn", sampling.num_inference_steps
    sensitivity = local_error_gain(memory, pipeline.scheduler, steps)
    gains, fitted = gains_if_asked(pipeline, sampling, options, memory, store=store, known=known), {}
    if options.fitted_shares:
        fitted["fitted"] = fitted_memory(pipeline, sampling, options, folder / "fitted")
    if options.together_shares:
        weights = error_weights(sensitivity, gains, power=options.search_power)
        fitted["together"] = fitted_memory(pipeline, sampling, options, folder / "together", weights)
    kinds = exits_by_kind(pipeline, memory, fitted)
    first = candidates(
        pipeline, sampling, options, kinds, sensitivity=sensitivity, gains=gains, store=store, known=known
    )
    made_with = cache(lambda kind: contents(pipeline, kinds.get(base_of(kind))))
    live = drawer(pipeline, sampling, memory, fitted)
    draw = kept(live, store, known, lambda candidate: made_with(candidate.kind))

    drawn = by_batch(first, draw, chosen, labels, batch=sampling.batch_size)
    deciding = [one for one in first if one.kind in DECIDE and options.controls]
    second = [other for one in deciding for other in controls(one, drawn[one.name].trace, seed=sampling.seed)]
    drawn |= by_batch(second, draw, chosen, labels, batch=sampling.batch_size) if second else {}
    times = clocked([*first, *second], live, images=images, batch=sampling.batch_size, num_classes=num_classes)
    rows = [
        quality(one, drawn[one.name], drawn["full"], judge=judge, labels=labels)
        | times[one.name]
        | {"policy": one.policy and one.policy.to_dict()}
        for one in (*first, *second)
    ]
    settings = asdict(sampling) | asdict(options) | asdict(reference) | {"clock_images": images}
    settings |= {"gains": gains} if gains else {}
    facts = {"command": command(), "settings": settings, "figures": judge.note(), "environment": environment()}
    finished(folder, facts | {"rows": rows})


if __name__ == "__main__":
    run_script(main)
