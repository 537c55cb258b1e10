"""Prompts of public text sets for chat models: what is asked, what the set answers. Used by answers.py and cloud.py.

Here: reading files. Not here: templates of a model (its tokenizer has them), generating.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

SETS = ("alpaca", "dialogsum", "truthfulqa")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Prompt:
    """`name` (set and place in it), `text` that a user would write, `reference`: the set's own answer."""

    name: str
    text: str
    reference: str


def read_prompts(folder: str, name: str, *, split: str) -> list[Prompt]:
    """All prompts of a set. Alpaca: every tenth is for testing; DialogSum: its development part is for training; TruthfulQA: testing only.

    Raises:
        ValueError: an unknown set or split, or one that a set has not.
    """
    if name not in SETS or split not in SPLITS:
        raise ValueError(f"set {name!r}, split {split!r}, expected one of {SETS} and of {SPLITS}")
    read = {"alpaca": _alpaca, "dialogsum": _dialogsum, "truthfulqa": _truthfulqa}[name]
    found = read(Path(folder), split)
    if not found:
        raise ValueError(f"{name} has no {split} prompts")
    return [Prompt(f"{name}/{split}/{place}", text, reference) for place, text, reference in found]


def _alpaca(folder: Path, split: str) -> list[tuple[int, str, str]]:
    rows = json.loads((folder / "instruct" / "llamafactory_alpaca_en_demo.json").read_text(encoding="utf-8"))
    chosen = [(place, row) for place, row in enumerate(rows) if (place % 10 == 0) == (split == "test")]
    return [(place, f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for place, row in chosen]


def _dialogsum(folder: Path, split: str) -> list[tuple[int, str, str]]:
    file = folder / "dialogsum" / f"dialogsum.{'dev' if split == 'train' else 'test'}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    text = "Summarize this dialogue in one sentence.\n{}"
    return [
        (place, text.format(row["dialogue"]), row.get("summary") or row["summary1"]) for place, row in enumerate(rows)
    ]


def _truthfulqa(folder: Path, split: str) -> list[tuple[int, str, str]]:
    if split == "train":
        return []
    with (folder / "truthfulqa" / "TruthfulQA.csv").open(newline="", encoding="utf-8") as file:
        return [(place, row["Question"], row["Best Answer"]) for place, row in enumerate(csv.DictReader(file))]
