"""Reports of diffusion models with exits as sections of a page. Used by write_results.py."""

from __future__ import annotations

from ee_diffusion.metrics.quality import COLUMNS, flat
from ee_diffusion.metrics.retrieval import shown
from ee_diffusion.metrics.tables import markdown_table
from eval.report_facts import environment, listed, settings


def training(report: dict) -> str:
    losses = ", ".join(f"{name} {value:.4f}" for name, value in report["losses"].items())
    facts = {key: report[key] for key in ("steps", "samples", "seconds", "samples_per_second", "trainable_parameters")}
    return markdown_table([facts]) + f"\nDevice: {report['device']}, torch {report['torch']}. Last losses: {losses}.\n"


def metrics(report: dict) -> str:
    rows = []
    for name in ("accuracy", "fd", "fid", "kid"):
        if name in report:
            facts = report[name]
            value, against = facts.get("value", facts.get("mean")), facts.get("reference_count")
            rows.append({"figure": name, "value": value, "images": facts["count"], "reference images": against})
    drawn = report.get("samples")
    samples = "Samples: not said how they were drawn.\n" if drawn is None else f"Samples drawn with: {listed(drawn)}.\n"
    return markdown_table(rows) + f"\n{samples}Reference: {report['reference']}. {environment(report)}"


def tradeoff(report: dict) -> str:
    rows = []
    for row in report["rows"]:
        facts = row.get("report", {})
        spread = facts.get("spread_per_step")
        row = {key: row.get(key) for key in ("name", "steps", "time")} | flat(row)
        row |= {"executed": facts.get("mean_executed"), "spread": None if spread is None else sum(spread) / len(spread)}
        rows.append(row)
    columns = ["name", "steps", "time", "executed", "spread", *[name for name in COLUMNS if name in rows[0]]]
    count = report["rows"][0]["psnr"]["count"]
    shapes = [row for row in report["rows"] if row["kind"] == "deediff"]
    where = [{"policy": row["name"]} | tenths(row["report"]["executed_per_step"]) for row in shapes]
    parts = [
        markdown_table(rows, columns),
        f"{count} images. `time`: measured over the full model's, median over batches. `spread`: standard deviation over images of\n"
        "the blocks executed at a step, mean over steps.\n",
        "Where in time: mean blocks executed in each tenth of the run, noise to data.\n",
        markdown_table(where),
        settings(report),
        environment(report),
    ]
    return "\n".join(parts)


def tenths(values: list[float]) -> dict[str, float]:
    """Means over ten equal parts of a list."""
    edges = [round(i * len(values) / 10) for i in range(11)]
    spans = [(edges[i], max(edges[i] + 1, edges[i + 1])) for i in range(10)]
    return {str(i + 1): sum(values[a:b]) / len(values[a:b]) for i, (a, b) in enumerate(spans) if values[a:b]}


def frontier(report: dict) -> str:
    first = report["rows"][0]
    columns = ["name", "steps", *(["time"] if "time" in first else []), "executed"]
    columns += [name for name in COLUMNS if name in first]
    rows = [{**row, "executed": row.get("report", {}).get("mean_executed"), **flat(row)} for row in report["rows"]]
    count = f"{report['rows'][0]['psnr']['count']} images.\n"
    if "clock" in report:
        again = report["clock"]
        place = f"{again['images']} images in {again['batches']} batches, {again['environment']['threads']} threads"
        count += f"\nTimes measured anew on {place}: `{again['command']}`\n"
    count += f"\n{report['note']}\n" if "note" in report else ""
    said = [f"{report['verdict']}\n"] if "verdict" in report else []
    return "\n".join([markdown_table(rows, columns), count, *said, settings(report), environment(report)])


def finalists(report: dict) -> str:
    told = f"\n{report['note']}\n" if "note" in report else ""
    return "\n".join(
        [markdown_table(report["rows"], list(report["rows"][-1])), told, settings(report), environment(report)]
    )


def journey(report: dict) -> str:
    columns = ["name", "steps", "time", "executed", *[name for name in COLUMNS if name in report["rows"][0]]]
    rows = [{**row, "executed": row.get("report", {}).get("mean_executed"), **flat(row)} for row in report["rows"]]
    parts = [markdown_table(rows, columns), f"{report['rows'][0]['psnr']['count']} images.\n"]
    parts += [f"{report['note']}\n"] if report.get("note") else []
    if report["fit"]:
        gain = report["fit"]["gain"]["full"]
        errors = zip(gain["depths"], gain["before"]["error"], gain["after"]["error"], strict=True)
        power = gain["power"]
        parts.append(
            "Fit without data, squared error to the full model relative to its mean square, held-out trajectories:\n"
        )
        parts.append(markdown_table([{"depth": d, "unfitted": a / power, "fitted": b / power} for d, a, b in errors]))
        walked, fitted = report["fit"]["states"], report["fit"]["fit"]
        parts.append(
            f"{walked['trajectories']} trajectories walked in {walked['seconds']:.0f} s, {fitted['samples']} samples fitted in "
            f"{fitted['seconds']:.0f} s, at most {fitted['peak_memory']['process'] / 1e6:.0f} MB; {report['fit']['threads']} threads.\n"
        )
    again, found = report["reloaded"], report["calibration"]
    parts.append(
        f"Calibrated on {found['images']} images: {found['replayed']:.3f} of the blocks by replay, {found['live']:.3f} live. "
        f"Saved, loaded in a new process: {again['images']} images, largest difference {again['largest_difference']:g}, "
        f"same depths: {again['same_depths']}.\n"
    )
    return "\n".join([*parts, settings(report), environment(report)])


def guarantee(report: dict) -> str:
    promise = (
        f"Allowed to miss: {report['settings']['delta']}, with the resamplings' own spread {report['allowed']:.3f}.\n"
    )
    tables = [markdown_table(report["candidates"]), markdown_table(report["rows"])]
    return "\n".join([*tables, promise, settings(report), environment(report)])


def speed(report: dict) -> str:
    tables = [markdown_table(report["overhead"]), markdown_table(report["realised"])]
    tables += [
        "`ideal_ms`: parts timed in their places, within a whole forward; `alone_ms`: each in a loop of its own.\n",
        "The whole call of the pipeline for one image (`time_over_off`: over the call without exits):\n",
        markdown_table(report["pipeline"]),
    ]
    return "\n".join([*tables, settings(report), environment(report)])


def uncertainty(report: dict) -> str:
    columns = ["depth", "mean_within", "pooled", "pooled_constant"]
    tables = [
        f"Against the error to the {name}:\n\n{markdown_table(rows, columns)}\n"
        for name, rows in report["rows"].items()
    ]
    return "".join(tables) + f"{settings(report)}\n{environment(report)}"


def matching(report: dict) -> str:
    return markdown_table([shown(row) for row in report["rows"]]) + f"\nTower: {listed(report['tower'])}.\n"


def demo(report: dict) -> str:
    return markdown_table(report["rows"]) + f"\n{environment(report)}"
