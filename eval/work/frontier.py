"""The frontier: candidates drawn on test seeds, timed in turns, judged beside the full model. Flags: eval/frontier.py."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from ee_diffusion.diffusion.pipelines.sampling import Generated, classes_of
from ee_diffusion.metrics.figures import save_figure
from ee_diffusion.metrics.quality import Judge, flat
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import write_json, write_report
from eval.frontier import FrontierOptions
from eval.harness.candidates import EXITS, MAKERS, OURS, STEP_CACHE, candidates_of, check_kinds, controls
from eval.harness.drawing import drawer
from eval.harness.interleave import Candidate, Labels, by_batch, clock_images_of, clocked
from eval.harness.options import CandidateOptions, ReferenceOptions, SamplingOptions, command, merged, results_folder
from eval.harness.pipeline import load
from eval.harness.real_images import judge_of, shape_of
from eval.harness.result_cache import contents, kept
from eval.harness.step_caches import Measured, NamedExits

COLORS = [
    colormaps["tab20"](place) for place in (*range(0, 20, 2), *range(1, 20, 2)) if place not in (14, 15)
]  # no gray
MARKERS = "os^DvP*X<>hpd8"


def run(
    sampling: SamplingOptions, options: FrontierOptions, choices: CandidateOptions, reference: ReferenceOptions
) -> None:
    check_kinds(choices, [name for name in MAKERS if not name.startswith("db_cache")])
    clock = {"batch": options.clock_batch_size or sampling.batch_size}
    clock["images"] = clock_images_of(options.clock_images, count=options.count, batch=clock["batch"])
    folder, pipeline = results_folder(sampling.output_dir), load(sampling)
    clock["num_classes"] = num_classes = classes_of(pipeline, sampling.guidance_scale)
    judge = judge_of(reference, **shape_of(pipeline), num_classes=num_classes)
    chosen, labels = seeds("test", options.count), balanced_labels(options.count, num_classes)
    known = drawn_under(sampling)
    measured = Measured(pipeline, sampling, choices, folder=folder, known=known)
    live = drawer(pipeline, replace(sampling, batch_size=max(clock["batch"], sampling.batch_size)), measured.exits)
    draw = kept(live, folder / "drawn", known, contents_by_exits(pipeline, measured.exits))

    first = candidates_of(measured.setup(), choices)
    drawn = by_batch(first, draw, chosen, labels, batch=sampling.batch_size)
    times = clocked(first, live, **clock)
    second = []
    for one in (one for one in first if choices.controls and one.kind in (*STEP_CACHE, *EXITS)):
        time = times[one.name]["time"] if one.kind in EXITS else None
        second += controls(one, drawn[one.name].trace, seed=sampling.seed, time=time)
    if second:
        drawn |= by_batch(second, draw, chosen, labels, batch=sampling.batch_size)
        again = clocked([first[0], *second], live, **clock)
        times |= {name: own for name, own in again.items() if name != "full"}
    found = [(one, row(one, drawn[one.name], drawn["full"], times[one.name], judge, labels)) for one in first + second]
    settings = merged(sampling, options, choices, reference) | {"clock_images": clock["images"]}
    settings |= {"amplification": list(measured.__dict__.get("amplification", ()))}
    write(folder, found, drawn, settings=settings, note=judge.note(), count=options.count)


def drawn_under(sampling: SamplingOptions) -> dict:
    """The settings that images depend on; `contents` says more of the model and the device."""
    return asdict(sampling) | dict.fromkeys(("model", "output_dir", "device"))


def contents_by_exits(pipeline, exits: NamedExits):
    """Candidate -> the `contents` that it draws with; an oracle's are those of the cache that it asks about."""

    @cache
    def by_name(name: str | None) -> dict:
        return contents(pipeline, exits["cache" if name == "oracle" else name])

    return lambda candidate: by_name(candidate.exits)


def row(candidate: Candidate, drawn: Generated, full: Generated, times: dict, judge: Judge, labels: Labels) -> dict:
    """One line of the table: what was executed, how long it took, how the images are beside the full model's."""
    facts = {"name": candidate.name, "kind": candidate.kind, "steps": candidate.steps, **times}
    if drawn.trace is not None:
        report = drawn.trace.report()
        spread = sum(report.spread_per_step) / len(report.spread_per_step)
        facts |= {"executed": report.mean_executed, "spread": spread}
    found = judge(drawn.images, full.images, None if labels is None else torch.tensor(labels))
    return facts | flat(found) | {f"psnr_{end}": found["psnr"][end] for end in ("low", "high")}


def write(folder: Path, found: list[tuple[Candidate, dict]], drawn: dict[str, Generated], **facts) -> None:
    """Report, picture, and the candidates for later."""
    count, settings = facts["count"], facts["settings"]
    pairs = sorted(found, key=lambda pair: (pair[0].kind, -pair[1]["time"]))
    rows = [own for _, own in pairs]
    tables = {"candidates": rows, "blocks by tenth of the run": tenths(rows, drawn)}
    executed = "`executed`: mean blocks of a step; `spread`: its standard deviation over images."
    text = write_report(
        folder / "report.json",
        title="Quality beside measured time",
        command=command(),
        settings=settings,
        tables=tables,
        note="\n".join([f"{count} images. {facts['note']} {executed}", verdict(rows)]).strip(),
    )
    kept_rows = [
        one.to_dict() | {"report": drawn[one.name].trace and asdict(drawn[one.name].trace.report())} for one, _ in pairs
    ]
    write_json(folder / "candidates.json", {"settings": settings, "candidates": kept_rows})
    picture(rows, folder / "frontier.png")
    print(text)


def tenths(rows: list[dict], drawn: dict[str, Generated]) -> list[dict]:
    """Where in time: mean blocks executed in each tenth of the run, from noise to data, of those that decide."""
    found = []
    for own in (own for own in rows if own["kind"] in (*STEP_CACHE, *EXITS, "deediff")):
        values = drawn[own["name"]].trace.report().executed_per_step
        edges = [round(i * len(values) / 10) for i in range(11)]
        spans = [(edges[i], max(edges[i] + 1, edges[i + 1])) for i in range(10)]
        means = {str(i + 1): sum(values[a:b]) / len(values[a:b]) for i, (a, b) in enumerate(spans) if values[a:b]}
        found.append({"name": own["name"]} | means)
    return found


def verdict(rows: list[dict]) -> str:
    """For each point of ours: the best other candidate that takes no longer (2 % are the clock's)."""
    lines = []
    for ours in (r for r in rows if r["kind"] in OURS):
        others = [r for r in rows if r["kind"] not in (*OURS, "full", "oracle") and r["time"] <= 1.02 * ours["time"]]
        best = max(others, key=lambda r: r["psnr"], default=None)
        beside = "nothing else is as fast" if best is None else f"{best['name']} {best['psnr']:.1f} dB"
        lines.append(f"- {1 / ours['time']:.2f}x: {ours['name']} {ours['psnr']:.1f} dB; at most that time: {beside}")
    return "\n".join(lines)


def picture(rows: list[dict], path: Path) -> None:
    """PSNR over time: a line for each kind, those made of another's trace in gray."""
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(r["kind"] for r in rows if r["kind"] != "full"))
    lines = [kind for kind in kinds if " of " not in kind]
    for place, kind in enumerate(kinds):
        points = sorted((r["time"], r["psnr"], r["psnr_high"]) for r in rows if r["kind"] == kind)
        times, means, highs = zip(*points, strict=True)
        bars = [(high or mean) - mean for mean, high in zip(means, highs, strict=True)]  # 95 % over seeds
        color = COLORS[lines.index(kind) % len(COLORS)] if kind in lines else "0.6"
        style = {"color": color, "marker": MARKERS[place % len(MARKERS)], "markersize": 5, "capsize": 2}
        style |= {"linestyle": "-" if kind in lines else "--", "linewidth": 2 if kind in OURS else 1}
        axes.errorbar(times, means, yerr=bars, label=kind.replace("_", " "), **style)
    axes.set_xlabel("measured time / full model")
    axes.set_ylabel("PSNR to the full model (dB)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)
