"""What every section of the page ends with: settings and environment of a report. Not here: sections, writing them."""

from __future__ import annotations

from collections.abc import Callable


def environment(report: dict) -> str:
    facts = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return f"Device: {facts['device']} ({facts['machine']}), {facts['threads']} threads; {versions}.\n"


def settings(report: dict) -> str:
    """And, where the report says so, what its figures are against."""
    against = f"{report['figures']}\n\n" if "figures" in report else ""
    return f"{against}Settings: {listed(report['settings'])}.\n"


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
        "reference_dir",
        "reference_files",
        "reference_statistics",
        "device",
        "parts",
    )
    return ", ".join(f"{name} {value}" for name, value in values.items() if name not in places and value is not None)


def told(body: Callable[[dict], str]) -> Callable[[dict], str]:
    """A section that ends with its settings, where it has some, and its environment."""
    return lambda report: "\n".join(
        [body(report), *([settings(report)] if "settings" in report else []), environment(report)]
    )
