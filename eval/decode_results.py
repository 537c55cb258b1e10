"""Reports of decoding with exits as sections of a page. Used by write_results.py."""

from __future__ import annotations

from ee_diffusion.metrics.tables import markdown_table
from eval.report_facts import environment, settings


def decode(report: dict) -> str:
    tables = [
        markdown_table(report[name])
        for name in ("speed", "table", "quality", "lossless", "alone", "calibration")
        if report.get(name)
    ]
    rules = "; ".join(
        f"{name}: {one['schedule'] if one['criterion'] is None else one}"
        for name, one in report.get("policies", {}).items()
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
