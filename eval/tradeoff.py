"""DeeDiff's trade-off beside its controls at the same seeds: quality against measured time, every candidate in one run.

python eval/tradeoff.py --output_dir runs/tradeoff --count 256

For each budget a threshold is found by replay on calibration seeds. Then every policy, and for each its controls (fewer steps at the
same measured time, a static schedule with its mean depth per step, random exits with its per-step and with its overall histogram),
draw the same test seeds. Candidates take turns batch by batch, and a time is the median over batches of (candidate / full model).
Writes tradeoff.json, tradeoff.md and tradeoff.png.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from options import SamplingOptions, flag, load, parse, results_folder
from tqdm.auto import tqdm

from ee_diffusion.core.calibrate import value_for_budget
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.generation import Generated, controls_of, generate, joined
from ee_diffusion.diffusion.pipeline import EarlyExitPipeline
from ee_diffusion.measure.classifiers import data_folder, load_classifier
from ee_diffusion.measure.features import resnet20_features
from ee_diffusion.measure.perceptual import load_lpips
from ee_diffusion.measure.pictures import save_figure
from ee_diffusion.measure.quality import COLUMNS, Judge, flat
from ee_diffusion.measure.references import reference, reference_path
from ee_diffusion.measure.splits import balanced_labels, seeds
from ee_diffusion.measure.tables import environment, markdown_table, write_json, write_text
from ee_diffusion.training.config import ImageDataConfig
from ee_diffusion.training.data import load_image_source


@dataclass(frozen=True)
class TradeoffOptions:
    """How many images, at which budgets."""

    count: int = flag("Test images.", 256)
    calibration_count: int = flag("Calibration images.", 64)
    data: str | None = flag(
        "Data folder, for LPIPS, FD and accuracy; none: what EE_DIFFUSION_DATA names, or go without."
    )
    reference_count: int = flag("Real images behind the FD.", 10_000)
    cache_dir: str = flag("Where reference statistics are kept.", "runs/references")
    budgets: list[float] = field(
        default_factory=lambda: [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], metadata={"help": "Fractions of the blocks to aim at."}
    )


@dataclass(frozen=True)
class Candidate:
    """One way to draw the images: a policy at a number of steps."""

    name: str
    kind: str
    budget: float | None
    policy: Policy | None
    steps: int


Draw = Callable[[Candidate, list[int], list[int], int], Generated]


def drawer(pipeline: EarlyExitPipeline, sampling: SamplingOptions) -> Draw:
    def draw(candidate: Candidate, chosen: list[int], labels: list[int], first: int) -> Generated:
        return generate(
            pipeline,
            chosen,
            labels,
            batch_size=sampling.batch_size,
            first_id=first,
            num_inference_steps=candidate.steps,
            guidance_scale=sampling.guidance_scale,
            exit_policy=candidate.policy,
        )

    return draw


def in_turns(
    candidates: list[Candidate], draw: Draw, chosen: list[int], labels: list[int], *, batch: int
) -> dict[str, Generated]:
    """All candidates over all seeds, batch by batch, beginning with another one each time, so that drift is shared."""
    draw(candidates[0], chosen[:batch], labels[:batch], 0)  # warm-up
    parts: dict[str, list[Generated]] = {candidate.name: [] for candidate in candidates}
    with tqdm(total=len(candidates) * -(-len(chosen) // batch), desc="batches", mininterval=10) as progress:
        for turn, start in enumerate(range(0, len(chosen), batch)):
            shift = turn % len(candidates)
            for candidate in candidates[shift:] + candidates[:shift]:
                part = draw(candidate, chosen[start : start + batch], labels[start : start + batch], start)
                parts[candidate.name].append(part)
                progress.update()
    return {name: joined(several) for name, several in parts.items()}


def row(candidate: Candidate, drawn: Generated, full: Generated, *, judge: Judge, labels: list[int]) -> dict:
    """One line of the table: cost and quality of a candidate against the full model of the same phase."""
    time = median(a / b for a, b in zip(drawn.seconds, full.seconds, strict=True))
    facts = {
        "name": candidate.name,
        "kind": candidate.kind,
        "budget": candidate.budget,
        "steps": candidate.steps,
        "time": time,
    }
    facts["seconds"] = sum(drawn.seconds)
    if drawn.trace is not None:
        facts |= {"report": asdict(drawn.trace.report())}
    return facts | judge(drawn.images, full.images, torch.tensor(labels))


def calibrated(sampling: SamplingOptions, options: TradeoffOptions, draw: Draw, num_classes: int) -> list[Candidate]:
    """A threshold per budget, from calibration seeds by replay."""
    chosen = seeds("calibrate", options.calibration_count)
    recorder = Candidate(
        "recorder", "recorder", None, Policy(Threshold(1.0), record_all=True), sampling.num_inference_steps
    )
    trace = draw(recorder, chosen, balanced_labels(len(chosen), num_classes), 0).trace
    found = []
    for budget in options.budgets:
        choice = value_for_budget(trace, lambda value: Policy(Threshold(value)), budget=budget, low=0.0, high=1.0)
        policy = Policy(Threshold(choice.value))
        print(
            f"budget {budget}: certainty threshold {choice.value:.5f} (u < {1 - choice.value:.5f}), replayed {choice.fraction:.3f}",
            flush=True,
        )
        found.append(Candidate(f"deediff {budget}", "deediff", budget, policy, sampling.num_inference_steps))
    return found


def controls(candidate: Candidate, drawn: Generated, time: float, *, seed: int) -> list[Candidate]:
    """The controls of one policy, from its own trace and its measured time."""
    made = controls_of(drawn.trace, seed=seed)
    found = [
        Candidate(f"{kind} {candidate.budget}", kind, candidate.budget, policy, candidate.steps)
        for kind, policy in made.items()
    ]
    steps = max(1, round(candidate.steps * time))
    return [*found, Candidate(f"fewer steps {candidate.budget}", "fewer_steps", candidate.budget, None, steps)]


def judge_of(*, data: str | None, reference_count: int, cache_dir: str) -> Judge:
    """All figures whose networks and reference images are at hand."""
    if data is None and "EE_DIFFUSION_DATA" not in os.environ:
        return Judge()
    network = resnet20_features(data)
    files = (str(data_folder(data) / "cifar10" / "train-*.parquet"),)
    real = load_image_source(ImageDataConfig(train_data_files=files, image_column="img"), None).images[:reference_count]
    path = reference_path(cache_dir, f"cifar10-train-{len(real)}", network)
    known = reference(path, real, network, keep=0, batch_size=256)
    classifier = load_classifier("resnet56", folder=data)
    return Judge(perceptual=load_lpips(data), features=network, reference=known.statistics, classifier=classifier)


def picture(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for kind in ("deediff", "fewer_steps", "static", "random_per_step", "random_overall"):
        points = sorted((r["time"], r["psnr"]["mean"]) for r in rows if r["kind"] == kind)
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=kind.replace("_", " "))
    axes.set_xlabel("measured time / full model")
    axes.set_ylabel("PSNR to the full model (dB)")
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    sampling, options = parse(SamplingOptions, TradeoffOptions, description=__doc__)
    folder, pipeline = results_folder(sampling), load(sampling)
    num_classes = pipeline.transformer.config.null_class or pipeline.transformer.config.num_classes
    draw, judge = (
        drawer(pipeline, sampling),
        judge_of(data=options.data, reference_count=options.reference_count, cache_dir=options.cache_dir),
    )
    chosen, labels = seeds("test", options.count), balanced_labels(options.count, num_classes)
    full = Candidate("full", "full", None, None, sampling.num_inference_steps)

    policies = calibrated(sampling, options, draw, num_classes)
    first = in_turns([full, *policies], draw, chosen, labels, batch=sampling.batch_size)
    rows = [row(c, first[c.name], first["full"], judge=judge, labels=labels) for c in [full, *policies]]
    times = {r["name"]: r["time"] for r in rows}
    others = [o for c in policies for o in controls(c, first[c.name], times[c.name], seed=sampling.seed)]
    second = in_turns([full, *others], draw, chosen, labels, batch=sampling.batch_size)
    rows += [row(c, second[c.name], second["full"], judge=judge, labels=labels) for c in others]

    rows.sort(key=lambda r: (-(r["budget"] or 2), r["kind"]))
    settings = asdict(sampling) | asdict(options)
    write_json(folder / "tradeoff.json", {"settings": settings, "environment": environment(), "rows": rows})
    columns = ["name", "steps", "time", "executed", *(name for name in COLUMNS if name in rows[0])]
    lines = [{**r, "executed": r.get("report", {}).get("mean_executed"), **flat(r)} for r in rows]
    write_text(folder / "tradeoff.md", markdown_table(lines, columns))
    picture(rows, folder / "tradeoff.png")
    print((folder / "tradeoff.md").read_text())


if __name__ == "__main__":
    main()
