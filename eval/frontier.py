"""The frontier: answers from memory beside everything that is simpler, at the same seeds, in one run, by the clock.

python eval/frontier.py --output_dir runs/frontier --count 128

Candidates: fewer steps; a cache of fixed period (memory without uncertainty); answers from memory per image (memory with uncertainty),
bounded step by step (`remembered`) or by what adds up (`budgeted`); and, for each of those, a static schedule and random exits made of
its own trace; DeeDiff (uncertainty without memory), if the pipeline has trained exits. They take turns batch by batch; a time is the
median over batches of (candidate / full model).
Writes frontier.json, frontier.md and frontier.png.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from options import SamplingOptions, flag, load, parse, results_folder
from tradeoff import Candidate, Draw, in_turns, judge_of, row

from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.gains import influence, step_gains
from ee_diffusion.diffusion.generation import Generated, controls_of, generate
from ee_diffusion.diffusion.memory_exits import MemoryExits
from ee_diffusion.diffusion.methods import budgeted, deediff, periodic_cache, remembered
from ee_diffusion.diffusion.pipeline import EarlyExitPipeline
from ee_diffusion.diffusion.solver import step_sensitivity
from ee_diffusion.measure.pictures import save_figure
from ee_diffusion.measure.quality import COLUMNS, flat
from ee_diffusion.measure.splits import balanced_labels, seeds
from ee_diffusion.measure.tables import environment, markdown_table, write_json, write_text

OURS = ("remembered", "budgeted")
WARM_UP = 2  # full steps before the first answer from memory: a line needs two points


@dataclass(frozen=True)
class FrontierOptions:
    """How many images, and which points of each curve."""

    count: int = flag("Test images.", 128)
    data: str | None = flag(
        "Data folder, for LPIPS, FD and accuracy; none: what EE_DIFFUSION_DATA names, or go without."
    )
    memory: str | None = flag("Folder of fitted exits that remember (train/fit_memory.py); none: unfitted.")
    reference_count: int = flag("Real images behind the FD.", 10_000)
    cache_dir: str = flag("Where reference statistics are kept.", "runs/references")
    errors: list[float] = field(
        default_factory=lambda: [0.0004, 0.0008, 0.0015, 0.003],
        metadata={"help": "Errors allowed per step (rms, data in [-1, 1])."},
    )
    budgets: list[float] = field(
        default_factory=list,
        metadata={"help": "Budgets of accumulated error; the model's gains are measured first. None: leave it out."},
    )
    decay: float = flag("How much of the accumulated error a step leaves.", 0.7)
    power: float = flag("How far the measured gains are trusted, 0 to 1.", 0.5)
    gain_images: int = flag("Images on which gains are measured (fitting seeds).", 8)
    gain_every: int = flag("Gains are measured at every so many steps.", 4)
    periods: list[int] = field(default_factory=lambda: [2, 3, 4, 5], metadata={"help": "Periods of the fixed cache."})
    fractions: list[float] = field(
        default_factory=lambda: [0.66, 0.5, 0.4, 0.3, 0.24], metadata={"help": "Fewer steps: fractions of the steps."}
    )
    thresholds: list[float] = field(
        default_factory=list, metadata={"help": "DeeDiff's thresholds on u; none: leave it out."}
    )


def load_memory(pipeline: EarlyExitPipeline, folder: str | None) -> MemoryExits:
    """Exits that remember, from a folder or unfitted."""
    if folder is None:
        return MemoryExits.for_pipeline(pipeline.transformer, pipeline.scheduler)
    exits = MemoryExits.from_pretrained(folder).to(pipeline.transformer.device)
    exits.check_fits(pipeline.transformer)
    return exits


def drawer(pipeline: EarlyExitPipeline, sampling: SamplingOptions, memory: MemoryExits) -> Draw:
    """Draws with exits that remember, or for DeeDiff with the pipeline's own."""
    trained = pipeline.exits

    def draw(candidate: Candidate, chosen: list[int], labels: list[int], first: int) -> Generated:
        pipeline.exits = trained if candidate.kind == "deediff" else memory
        call = {"num_inference_steps": candidate.steps, "guidance_scale": sampling.guidance_scale}
        policy = {"exit_policy": candidate.policy, "batch_size": sampling.batch_size, "first_id": first}
        return generate(pipeline, chosen, labels, **policy, **call)

    return draw


def weights_of(
    pipeline: EarlyExitPipeline, memory: MemoryExits, sampling: SamplingOptions, options: FrontierOptions
) -> tuple[float, ...]:
    """What an error of each step does to the final image, with gains measured on fitting seeds."""
    gains = step_gains(
        pipeline,
        memory,
        balanced_labels(options.gain_images, pipeline.transformer.config.null_class),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        every=options.gain_every,
        generator=torch.Generator().manual_seed(seeds("fit", 1)[0]),
    )
    sensitivity = step_sensitivity(memory, pipeline.scheduler, sampling.num_inference_steps)
    return influence(sensitivity, gains, power=options.power)


def candidates_of(
    options: FrontierOptions, sensitivity: tuple[float, ...], weights: tuple[float, ...]
) -> list[Candidate]:
    """The full model and everything that needs no trace."""
    steps, found = len(sensitivity), []
    for budget in options.budgets:
        policy = budgeted(budget, weights=weights, decay=options.decay)
        found.append(Candidate(f"budgeted {budget}", "budgeted", budget, policy, steps))
    for error in options.errors:
        policy = remembered(error, sensitivity=sensitivity)
        found.append(Candidate(f"remembered {error}", "remembered", error, policy, steps))
    for period in options.periods:
        policy = periodic_cache(period, warm_up=WARM_UP)
        found.append(Candidate(f"periodic cache {period}", "periodic_cache", None, policy, steps))
    for fewer in dict.fromkeys(max(1, round(steps * fraction)) for fraction in options.fractions):
        found.append(Candidate(f"{fewer} steps", "fewer_steps", None, None, fewer))
    for threshold in options.thresholds:
        found.append(Candidate(f"deediff {threshold}", "deediff", None, deediff(threshold), steps))
    return [Candidate("full", "full", None, None, steps), *found]


def controls(candidate: Candidate, trace: Trace, *, seed: int) -> list[Candidate]:
    """What knowing the image must beat: the same numbers of full steps, dealt out without looking at it."""
    return [
        Candidate(
            f"{kind} of {candidate.name}", f"{kind} of {candidate.kind}", candidate.budget, policy, candidate.steps
        )
        for kind, policy in controls_of(trace, seed=seed, warm_up=WARM_UP).items()
    ]


def picture(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(r["kind"] for r in rows if r["kind"] != "full"):
        points = sorted((r["time"], r["psnr"]["mean"], r["psnr"]["high"]) for r in rows if r["kind"] == kind)
        times, means, highs = zip(*points, strict=True)
        bars = [(high or mean) - mean for mean, high in zip(means, highs, strict=True)]  # 95 % over seeds
        style = "--" if " of " in kind else "-"
        axes.errorbar(
            times, means, yerr=bars, marker="o", markersize=4, capsize=2, linestyle=style, label=kind.replace("_", " ")
        )
    axes.set_xlabel("measured time / full model")
    axes.set_ylabel("PSNR to the full model (dB)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def verdict(rows: list[dict]) -> str:
    """For each point of ours: the best other candidate that takes no longer (2 % are the clock's)."""
    lines = []
    for ours in (r for r in rows if r["kind"] in OURS):
        others = [r for r in rows if r["kind"] not in (*OURS, "full") and r["time"] <= 1.02 * ours["time"]]
        best = max(others, key=lambda r: r["psnr"]["mean"], default=None)
        said = "nothing else is as fast" if best is None else f"{best['name']} {best['psnr']['mean']:.1f} dB"
        lines.append(
            f"- {1 / ours['time']:.2f}x: {ours['name']} {ours['psnr']['mean']:.1f} dB; at most that time: {said}"
        )
    return "\n".join(lines)


def main() -> None:
    sampling, options = parse(SamplingOptions, FrontierOptions, description=__doc__)
    folder, pipeline = results_folder(sampling), load(sampling)
    num_classes = pipeline.transformer.config.null_class or pipeline.transformer.config.num_classes
    judge = judge_of(data=options.data, reference_count=options.reference_count, cache_dir=options.cache_dir)
    chosen, labels = seeds("test", options.count), balanced_labels(options.count, num_classes)

    memory = load_memory(pipeline, options.memory)
    sensitivity = step_sensitivity(memory, pipeline.scheduler, sampling.num_inference_steps)
    weights = weights_of(pipeline, memory, sampling, options) if options.budgets else ()
    first = candidates_of(options, sensitivity, weights)
    draw = drawer(pipeline, sampling, memory)
    drawn = in_turns(first, draw, chosen, labels, batch=sampling.batch_size)
    rows = [row(c, drawn[c.name], drawn["full"], judge=judge, labels=labels) for c in first]
    ours = [c for c in first if c.kind in OURS]
    second = [other for c in ours for other in controls(c, drawn[c.name].trace, seed=sampling.seed)]
    drawn = in_turns([first[0], *second], draw, chosen, labels, batch=sampling.batch_size)
    rows += [row(c, drawn[c.name], drawn["full"], judge=judge, labels=labels) for c in second]

    rows.sort(key=lambda r: (r["kind"], -r["time"]))
    settings = asdict(sampling) | asdict(options) | ({"weights": weights} if weights else {})
    said = verdict(rows)
    write_json(
        folder / "frontier.json", {"settings": settings, "environment": environment(), "rows": rows, "verdict": said}
    )
    columns = ["name", "steps", "time", "executed", *(name for name in COLUMNS if name in rows[0])]
    lines = [{**r, "executed": r.get("report", {}).get("mean_executed"), **flat(r)} for r in rows]
    write_text(folder / "frontier.md", markdown_table(lines, columns) + "\n" + said + "\n")
    picture(rows, folder / "frontier.png")
    print((folder / "frontier.md").read_text())


if __name__ == "__main__":
    main()
