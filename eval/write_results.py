"""Write RESULTS.md from the reports in results/: every figure with its command, device, dtype, samples and controls.

python eval/write_results.py

Reports: results/train-*.json (train/train_uvit.py), and metrics*, tradeoff*, frontier*, dit-journey*, speed*,
uncertainty*, decode*, classif* and demo*.json (eval/), exit-heads* (train/exit_heads_lm.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from classifier_results import classifier_speed, classifiers, classify
from cloud_results import cloud_clock, cloud_rows, cloud_tokens

from ee_diffusion.errors import run_script
from ee_diffusion.measure.matching import shown
from ee_diffusion.measure.quality import COLUMNS, flat
from ee_diffusion.measure.tables import markdown_table, write_text

HEAD = """# Results

Written by `python eval/write_results.py` from the reports in `results/`; each section names its script and settings.
Times are wall clock on the device named. PSNR, SSIM and LPIPS are to the full model's images at equal seeds.
FD is the Frechet distance on resnet20's 64 pooled features, FID the one on Inception features; both depend on the number of
samples, which stands beside them.
"""


def environment(report: dict) -> str:
    facts = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return f"Device: {facts['device']} ({facts['machine']}), {facts['threads']} threads; {versions}.\n"


def settings(report: dict) -> str:
    return f"Settings: {listed(report['settings'])}.\n"


def listed(values: dict) -> str:
    """Settings in a line, without places on a disk."""
    places = (
        "model",
        "models",
        "policies",
        "states",
        "exits",
        "fit_report",
        "output_dir",
        "cache_dir",
        "data",
        "data_files",
        "device",
        "parts",
    )
    return ", ".join(f"{name} {value}" for name, value in values.items() if name not in places and value is not None)


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
    return "\n".join(
        [markdown_table(rows, columns), count, report["verdict"] + "\n", settings(report), environment(report)]
    )


def journey(report: dict) -> str:
    columns = ["name", "steps", "time", "executed", *[name for name in COLUMNS if name in report["rows"][0]]]
    rows = [{**row, "executed": row.get("report", {}).get("mean_executed"), **flat(row)} for row in report["rows"]]
    parts = [markdown_table(rows, columns), f"{report['rows'][0]['psnr']['count']} images.\n"]
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


def decode(report: dict) -> str:
    tables = [
        markdown_table(report[name])
        for name in ("speed", "quality", "lossless", "alone", "calibration")
        if report.get(name)
    ]
    rules = "; ".join(
        f"{name}: {one['schedule'] if one['criterion'] is None else one}" for name, one in report["policies"].items()
    )
    said = [f"Policies: {rules}.\n"] if rules else []
    notes = [f"{report['note']}\n"] if "note" in report else []
    return "\n".join([*tables, *notes, *said, settings(report), environment(report)])


def exit_heads(report: dict) -> str:
    rows = [
        {"depth": int(one["depth"]), "loss before": one["loss"], "loss": two["loss"], "same before": one["same"]}
        | {name: two[name] for name in ("same", "sure", "same_if_sure")}
        for one, two in zip(report["before"], report["after"], strict=True)
    ]
    steps = f"{report['fit']['steps']} steps, {report['fit']['samples']} samples"
    facts = f"{report['states']} tokens fitted, {report['held_out']} held out; {steps}.\n"
    names = "`loss`: KL to the full model (nats); `same`: tokens that are the full model's; `sure`: largest probability above 0.9.\n"
    return "\n".join([markdown_table(rows), facts, names, f"Device: {report['device']}, torch {report['torch']}.\n"])


def told(body: Callable[[dict], str]) -> Callable[[dict], str]:
    """A section that ends with its settings, where it has some, and its environment."""
    return lambda report: "\n".join(
        [body(report), *([settings(report)] if "settings" in report else []), environment(report)]
    )


def matching(report: dict) -> str:
    return markdown_table([shown(row) for row in report["rows"]]) + f"\nTower: {listed(report['tower'])}.\n"


def demo(report: dict) -> str:
    return markdown_table(report["rows"]) + f"\n{environment(report)}"


SECTIONS = {
    "train-": ("Training", "accelerate launch train/train_uvit.py --preset NAME", training),
    "metrics": (
        "The full-depth generator",
        "python eval/metrics.py --images runs/samples/samples.safetensors --output_dir runs/metrics --metrics fd fid kid accuracy",
        metrics,
    ),
    "tradeoff": (
        "DeeDiff's trade-off beside its controls",
        "python eval/tradeoff.py --output_dir runs/tradeoff",
        tradeoff,
    ),
    "frontier": (
        "Answers from memory beside what is simpler",
        "python eval/frontier.py --output_dir runs/frontier",
        frontier,
    ),
    "dit-journey": (
        "The journey of a stock DiT",
        "python eval/journey.py --model ... --exits ... --fit_report ... --output_dir ...",
        journey,
    ),
    "guarantee": (
        "Does a certified policy keep its promise",
        "python eval/guarantee.py --output_dir runs/guarantee",
        guarantee,
    ),
    "speed": ("The clock of one forward", "python eval/speed.py --output_dir runs/speed", speed),
    "training-step": ("What exits cost in training", "python eval/training_step.py ...", told(cloud_rows)),
    "uncertainty": (
        "What the uncertainty modules know",
        "python eval/uncertainty.py --output_dir runs/uncertainty",
        uncertainty,
    ),
    "exit-heads": ("Exits on a frozen language model", "accelerate launch train/exit_heads_lm.py ...", exit_heads),
    "decode": ("Decoding", "python eval/decode.py ...", decode),
    "classifiers": (
        "Classifiers with exits beside constant depth and truncated models",
        "python eval/classifier_table.py --reference ... --truncated ... --names ... --folders ... --output_dir ...",
        told(classifiers),
    ),
    "classify-": (
        "One classifier with exits",
        "python eval/classify.py --model ... --text_files ... --output_dir ...",
        told(classify),
    ),
    "classifier-speed": (
        "Seconds of classifiers",
        "python eval/classifier_speed.py --names ... --models ... --policies ... --pruning ... --output_dir ...",
        told(classifier_speed),
    ),
    "tower-match": ("Do images from prompts show what the prompts say", "python eval/retrieval.py ...", told(matching)),
    "cloud-tokens": ("Edge and cloud: tokens, bytes and FLOPs", "python eval/cloud.py ...", told(cloud_tokens)),
    "cloud-clock": ("Edge and cloud: seconds", "python eval/cloud_clock.py ...", told(cloud_clock)),
    "cloud-load": ("A cloud under load", "python eval/cloud_load.py ...", told(cloud_rows)),
    "cloud-memory": ("Memory of an edge", "python eval/cloud_memory.py ...", told(cloud_rows)),
    "demo": ("The demo", "make demo", demo),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", default="results", help="Folder of reports.")
    parser.add_argument("--output", default="RESULTS.md", help="The file to write.")
    options = parser.parse_args()
    parts = [HEAD]
    for start, (title, command, section) in SECTIONS.items():
        for path in sorted(Path(options.reports).glob(f"{start}*.json")):
            report = json.loads(path.read_text(encoding="utf-8"))
            said = f"`{report['command']}`" if "command" in report else f"`{command}`, with the settings below"
            parts.append(f"## {title}: {path.stem}\n\n{said}\n\n{section(report)}")
    if len(parts) == 1:
        raise ValueError(
            f"no reports in {options.reports}, expected some of {[f'{start}*.json' for start in SECTIONS]}"
        )
    write_text(options.output, "\n".join(parts))


if __name__ == "__main__":
    run_script(main)
