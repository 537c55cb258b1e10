"""DeeDiff's trade-off beside its controls at the same seeds: quality against measured time, every candidate in one run.

python -m eval.tradeoff --output_dir runs/tradeoff --count 256

For each budget a threshold is found by replay on calibration seeds. Then every policy, and for each its controls (fewer steps at the
same measured time, a static schedule with its mean depth per step, random exits with its per-step and with its overall histogram),
draw the same test seeds. Candidates take turns batch by batch, each warm; a time is the median over batches of (candidate / full model).
With `--released folder` (exits of variant "released" for the same transformer) DeeDiff as its authors coded it runs beside it: at the
threshold they name, and at the budgets. Its branches exit on their own, so that of its controls those two run that know no image.
Writes tradeoff.json, tradeoff.md and tradeoff.png: the policies as soon as they are measured, at the end with their controls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.io import write_text
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import value_for_budget
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.methods import deediff_released
from ee_diffusion.diffusion.pipelines.sampling import Generated, classes_of, controls_of, generate
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.figures import save_figure
from ee_diffusion.metrics.image import PSNR_CAP
from ee_diffusion.metrics.quality import COLUMNS, Judge, flat
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from eval.harness.interleave import Candidate, Draw, Labels, in_turns, measured
from eval.harness.options import SamplingOptions, command, flag, parse, results_folder
from eval.harness.pipeline import load
from eval.harness.real_images import ReferenceOptions, judge_of, shape_of


@dataclass(frozen=True)
class TradeoffOptions:
    """How many images, at which budgets."""

    count: int = flag("Test images.", 256)
    calibration_count: int = flag("Calibration images.", 64)
    released: str | None = flag("Folder of exits of variant 'released' for the same transformer; none: go without.")
    released_threshold: float = flag("Certainty above which the authors' code exits on CIFAR-10.", 0.92)
    budgets: list[float] = field(
        default_factory=lambda: [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], metadata={"help": "Fractions of the blocks to aim at."}
    )


def drawer(pipeline: EarlyExitPipeline, sampling: SamplingOptions) -> Draw:
    def draw(candidate: Candidate, chosen: list[int], labels: Labels, first: int) -> Generated:
        pipeline.exits = candidate.exits
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


def quality(candidate: Candidate, drawn: Generated, full: Generated, *, judge: Judge, labels: Labels) -> dict:
    """One line of the table without its times: what was executed, and how the images are beside the full model's."""
    facts = {"name": candidate.name, "kind": candidate.kind, "budget": candidate.budget, "steps": candidate.steps}
    if drawn.trace is not None:
        facts |= {"report": asdict(drawn.trace.report())}
    return facts | judge(drawn.images, full.images, None if labels is None else torch.tensor(labels))


def row(candidate: Candidate, drawn: Generated, full: Generated, *, judge: Judge, labels: Labels) -> dict:
    """One line of the table: cost and quality of a candidate against the full model of the same phase."""
    return quality(candidate, drawn, full, judge=judge, labels=labels) | measured(drawn, full)


Rule = Callable[[float], Policy]  # from a certainty threshold


def recorded(
    exits: DenoisingExits,
    rule: Rule,
    sampling: SamplingOptions,
    options: TradeoffOptions,
    *,
    draw: Draw,
    num_classes: int | None,
) -> Trace:
    """All exits measured on the calibration seeds, nobody stopping."""
    chosen, policy = seeds("calibrate", options.calibration_count), replace(rule(1.0), record_all=True)
    recorder = Candidate("recorder", "recorder", None, policy, sampling.num_inference_steps, exits)
    return draw(recorder, chosen, balanced_labels(len(chosen), num_classes), 0).trace


def calibrated(
    kind: str, exits: DenoisingExits, rule: Rule, trace: Trace, *, steps: int, budgets: list[float]
) -> list[Candidate]:
    """A threshold per budget, by replay of a trace with all exits measured."""
    found = []
    for budget in budgets:
        choice = value_for_budget(trace, rule, budget=budget, low=0.0, high=1.0)
        print(f"{kind} {budget}: certainty threshold {choice.value:.5f}, replayed {choice.fraction:.3f}", flush=True)
        found.append(Candidate(f"{kind} {budget}", kind, budget, rule(choice.value), steps, exits))
    return found


def policies_of(
    pipeline: EarlyExitPipeline,
    sampling: SamplingOptions,
    options: TradeoffOptions,
    *,
    draw: Draw,
    num_classes: int | None,
) -> list[Candidate]:
    """DeeDiff as written and, if its exits are given, as released, at every budget."""
    exits, layers = pipeline.exits, len(pipeline.transformer.transformer_blocks)
    kinds: dict[str, tuple[DenoisingExits, Rule]] = {"deediff": (exits, lambda value: Policy(Threshold(value)))}
    if options.released is not None:
        theirs = DenoisingExits.from_pretrained(options.released).to(exits.device, exits.dtype)
        kinds["released"] = theirs, partial(deediff_released, depths=theirs.depths, num_layers=layers)
    found = []
    for kind, (heads, rule) in kinds.items():
        trace = recorded(heads, rule, sampling, options, draw=draw, num_classes=num_classes)
        settings = {"steps": sampling.num_inference_steps, "budgets": options.budgets}
        if kind == "released":
            value = options.released_threshold
            found.append(Candidate(f"released at {value}", kind, None, rule(value), settings["steps"], heads))
        found += calibrated(kind, heads, rule, trace, **settings)
    return found


def controls(candidate: Candidate, drawn: Generated, time: float, *, seed: int) -> list[Candidate]:
    """The controls of one policy, from its own trace and its measured time."""
    made = controls_of(drawn.trace, seed=seed)
    if candidate.policy.cfg_exit == "separate":  # its trace has no line for an image
        made = {"static": made["static"]}
    told = candidate.name.removeprefix("deediff ")
    found = [
        Candidate(f"{kind} {told}", kind, candidate.budget, policy, candidate.steps, candidate.exits)
        for kind, policy in made.items()
    ]
    steps = max(1, round(candidate.steps * time))
    return [*found, Candidate(f"fewer steps {told}", "fewer_steps", candidate.budget, None, steps)]


def line_of(row: dict) -> str | None:
    """The line of a picture that a row lies on; None: on none, its images are the full model's."""
    if row["psnr"]["mean"] >= PSNR_CAP:
        return None
    return "static released" if row["name"].startswith("static released") else row["kind"]


def picture(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    kinds = ("deediff", "released", "fewer_steps", "static", "static released", "random_per_step", "random_overall")
    for kind in kinds:
        points = sorted((r["time"], r["psnr"]["mean"]) for r in rows if line_of(r) == kind)
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=kind.replace("_", " "))
    axes.set_xlabel("measured time / full model")
    axes.set_ylabel("PSNR to the full model (dB)")
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    sampling, options, reference = parse(SamplingOptions, TradeoffOptions, ReferenceOptions, description=__doc__)
    folder, pipeline = results_folder(sampling.output_dir), load(sampling)
    num_classes = classes_of(pipeline, sampling.guidance_scale)
    draw, judge = drawer(pipeline, sampling), judge_of(reference, **shape_of(pipeline), num_classes=num_classes)
    chosen, labels = seeds("test", options.count), balanced_labels(options.count, num_classes)
    full = Candidate("full", "full", None, None, sampling.num_inference_steps)

    def keep(rows: list[dict]) -> None:
        """What is measured so far, on disk."""
        rows.sort(key=lambda r: (-(r["budget"] or 2), r["kind"]))
        settings = asdict(sampling) | asdict(options) | asdict(reference)
        facts = {"command": command(), "settings": settings, "figures": judge.note(), "environment": environment()}
        write_json(folder / "tradeoff.json", facts | {"rows": rows})
        columns = ["name", "steps", "time", "executed", *(name for name in COLUMNS if name in rows[0])]
        lines = [{**r, "executed": r.get("report", {}).get("mean_executed"), **flat(r)} for r in rows]
        write_text(folder / "tradeoff.md", markdown_table(lines, columns) + f"\n{judge.note()}\n")
        picture(rows, folder / "tradeoff.png")

    policies = policies_of(pipeline, sampling, options, draw=draw, num_classes=num_classes)
    first = in_turns([full, *policies], draw, chosen, labels, batch=sampling.batch_size)
    rows = [row(c, first[c.name], first["full"], judge=judge, labels=labels) for c in [full, *policies]]
    keep(rows)  # the controls take as long again
    times = {r["name"]: r["time"] for r in rows}
    chosen_by_budget = [c for c in policies if c.budget is not None]
    others = [o for c in chosen_by_budget for o in controls(c, first[c.name], times[c.name], seed=sampling.seed)]
    second = in_turns([full, *others], draw, chosen, labels, batch=sampling.batch_size)
    rows += [row(c, second[c.name], second["full"], judge=judge, labels=labels) for c in others]
    keep(rows)
    print((folder / "tradeoff.md").read_text())


if __name__ == "__main__":
    run_script(main)
