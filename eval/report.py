"""docs/results.md from the reports in results/: seven questions, one table each, with its command, its controls and a link to its JSON.

python -m eval.report

Here: reading reports and writing the page. Not here: which questions, rows and columns (eval/configs/results.yaml).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.io import write_text
from ee_diffusion.metrics.tables import REPORT, markdown_table

KEYS = ("format", "title", "command", "settings", "environment", "tables", "note")
HEAD = """# Results

Written by `python -m eval.report` from `results/`; each section links to the report with all rows and settings. Commands stand as they were
typed then: scripts and flags may have other names today. Times are wall clock beside the full model in the same run. PSNR is to the full
model's images at equal seeds; FD is the Frechet distance on resnet20's 64 pooled features, FID the one on Inception features. Both depend
on the number of samples.
"""


def read_report(path: Path) -> dict:
    """A report.

    Raises:
        ValueError: no report of this format, or one without its parts.
    """
    report = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in KEYS if key not in report]
    if report.get("format") != REPORT or missing:
        raise ValueError(
            f"{path} is no report: format {report.get('format')!r}, without {missing}, expected {REPORT!r}"
        )
    return report


def chosen_rows(rows: Sequence[Mapping], wanted: Mapping[str, Sequence]) -> list[Mapping]:
    """The rows whose columns hold one of the values wanted, in that order; all rows where nothing is.

    Raises:
        ValueError: a value that no row holds.
    """
    found = list(rows)
    for column, values in wanted.items():
        missing = [value for value in values if not any(row.get(column) == value for row in found)]
        if missing:
            raise ValueError(f"no row has {column} {missing}, expected some of {[row.get(column) for row in rows]}")
        found = sorted((row for row in found if row.get(column) in values), key=lambda row: values.index(row[column]))
    return found


def answer(question: Mapping, folder: Path) -> str:
    """One section: the question, its table, what follows from it, where it comes from."""
    name, columns = question["report"], question["columns"]
    report = read_report(folder / f"{name}.json")
    if question["table"] not in report["tables"]:
        raise ValueError(f"{name} has no table {question['table']!r}, expected one of {list(report['tables'])}")
    rows = [
        {shown: plain(row.get(column)) for column, shown in columns.items()}
        for row in chosen_rows(report["tables"][question["table"]], question.get("rows", {}))
    ]
    device = report["environment"].get("device")
    parts = [f"## {question['question']}", markdown_table(rows), question["answer"].strip()]
    parts.append(f"Command (device {device}):\n\n```bash\n{report['command']}\n```")
    return "\n\n".join([*parts, f"All rows: [results/{name}.json](data/{name}.json)."])


def plain(value: object) -> object:
    """A cell; images that are the full model's have no distance to it."""
    return "-" if value == 100 or (isinstance(value, float) and math.isinf(value)) else value


def page(questions: Sequence[Mapping], folder: Path) -> str:
    """docs/results.md."""
    titles = {path.stem: read_report(path)["title"] for path in sorted(folder.glob("*.json"))}
    listed = "\n".join(f"- [{stem}](data/{stem}.json): {title}" for stem, title in titles.items())
    return "\n\n".join([HEAD, *(answer(one, folder) for one in questions), f"## All reports\n\n{listed}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", default="results", help="Folder of reports.")
    parser.add_argument("--questions", default="eval/configs/results.yaml", help="What the page asks.")
    parser.add_argument("--output", default="docs/results.md", help="The page to write.")
    options = parser.parse_args()
    questions = yaml.safe_load(Path(options.questions).read_text(encoding="utf-8"))
    write_text(options.output, page(questions, Path(options.reports)))


if __name__ == "__main__":
    run_script(main)
