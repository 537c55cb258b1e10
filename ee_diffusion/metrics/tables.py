"""Reports: JSON with the environment it came from, and Markdown tables. Whole files or none, and no dates: equal runs give equal files.

Here: what a report holds. Not here: atomic writing itself (core/io.py).
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from ee_diffusion.core.io import write_text
from ee_diffusion.metrics.timing import describe

REPORT = "ee_diffusion.report.1"
PACKAGES = ("ee-diffusion", "torch", "diffusers", "transformers", "accelerate", "torchmetrics", "numpy")


def environment(device: torch.device | str | None = None) -> dict:
    """Versions, device, threads and cores. device None: the first CUDA device if there is one, else the CPU."""
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "device": describe(place),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: str | os.PathLike, content: Mapping) -> None:
    """Write JSON, whole or not at all. Dataclasses, small tensors, paths, dtypes and devices are understood; keys keep their order.

    Raises:
        ValueError: NaN or infinity, which JSON does not know.
        TypeError: a value of another kind.
    """
    text = json.dumps(dict(content), indent=2, allow_nan=False, default=_plain)
    write_text(path, text + "\n")


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    command: str,
    settings: Mapping,
    tables: Mapping[str, Sequence[Mapping]],
    note: str = "",
    device: torch.device | str | None = None,
) -> str:
    """Write a report as JSON, with the environment it came from, and its tables as Markdown beside it. Returns the Markdown.

    Args:
        path: the JSON file, `NAME.json`; the Markdown goes to `NAME.md`.
        tables: name -> rows, flat (a number or a text a column); a table without rows is left out. Floats keep six significant digits.
        note: what the figures are against, and what follows from them.

    Raises:
        ValueError: a row that holds a table, a path without `.json`, or as `write_json`.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"path={path}, expected the name of a .json file")
    kept = {name: [_row(name, row) for row in rows] for name, rows in tables.items() if rows}
    facts = {"format": REPORT, "title": title, "command": command, "settings": settings}
    write_json(path, {**facts, "environment": environment(device), "tables": kept, "note": note})
    parts = [f"{name}\n\n{markdown_table(rows, _columns(rows))}" for name, rows in kept.items()]
    text = "\n".join([f"# {title}\n", *parts, *([f"{note}\n"] if note else [])])
    write_text(path.with_suffix(".md"), text)
    return text


def _row(table: str, row: Mapping) -> dict:
    nested = [name for name, value in row.items() if isinstance(value, Mapping | list | tuple)]
    if nested:
        raise ValueError(
            f"table {table!r} has rows with tables in {nested}, expected a number or a text in each column"
        )
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def _columns(rows: Sequence[Mapping]) -> list[str]:
    """All columns, in the order in which the rows name them first."""
    return list(dict.fromkeys(name for row in rows for name in row))


def markdown_table(rows: Sequence[Mapping], columns: Sequence[str] | None = None) -> str:
    """Rows as an aligned Markdown table: numbers to the right, floats with four significant digits, what is absent or None as '-'.

    columns: which, in this order; None: those of the first row.

    Raises:
        ValueError: no rows, or a column that no row has.
    """
    if not rows:
        raise ValueError("no rows, expected at least one")
    names = list(rows[0]) if columns is None else list(columns)
    absent = [name for name in names if not any(name in row for row in rows)]
    if not names or absent:
        raise ValueError(
            f"no row has {absent or 'a column'}, expected some of {sorted({key for row in rows for key in row})}"
        )
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    widths = [max(3, len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)]
    lines = [_line(line, widths, numeric) for line in (names, rule, *cells)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, numeric, strict=True)
    ]
    return f"| {' | '.join(padded)} |"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return _significant(value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _significant(value: float) -> str:
    """Four significant digits without an exponent from 1e-4 to 1e6, `nan` and `inf` as they are."""
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.4g}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Path | torch.device | torch.dtype):
        return str(value)
    if isinstance(value, range | set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no place in a report: {value!r}")
