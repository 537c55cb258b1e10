"""Several models' texts in one table: each run of eval/decode.py beside the reference's, meaning by meaning.

python -m eval.decode_table --reference runs/lm-full/decode --names full skip15 keep15 \\
    --folders runs/lm-full/decode runs/lm-skip15/decode runs/lm-keep15/decode --output_dir runs/lm-table

Folders are outputs of eval/decode.py with the same `--count` meanings. Of each the last candidate is taken (the policy, or `full` where
there is none); of the reference `full`. `lost`: 1 - ROUGE-L / the reference's, with a 95 % bootstrap interval over meanings, the same
meanings drawn for both. Where the folder beside holds a training's report.json, its steps and seconds stand in the row. Writes report.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from ee_diffusion.cli.errors import run_script
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from ee_diffusion.metrics.text import bootstrap_ratio
from eval.harness.options import Explaining, command


def read(folder: Path) -> tuple[dict, dict]:
    """decode.json and texts.json. Raises ValueError for a folder without them."""
    files = [folder / name for name in ("decode.json", "texts.json")]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {missing}, expected an output of eval/decode.py with --count above 0")
    report, texts = (json.loads(path.read_text()) for path in files)
    if not report.get("quality"):
        raise ValueError(f"{folder} holds no table of texts, expected an output of eval/decode.py in its mode `tables`")
    return report, texts


def settings_of(report: dict) -> dict:
    """What texts of two runs must have in common."""
    return {name: report["settings"][name] for name in ("text", "prompt", "chat", "max_new_tokens", "dtype")}


def rouge_of(folder: Path, name: str, *, report: dict, texts: dict) -> Tensor:
    """(n,) ROUGE-L of a candidate, meaning by meaning. Raises ValueError where the two files are not of one run."""
    said = {row["name"]: row["rougeL"] for row in report["quality"]}
    if name not in said or name not in texts["candidates"]:
        raise ValueError(f"{folder} has the candidates {list(said)}, expected {name!r} among them")
    each = torch.tensor(texts["candidates"][name]["rougeL"])
    if abs(each.mean().item() - said[name]) > 1e-4:
        raise ValueError(
            f"{folder}: texts.json has a mean ROUGE-L of {each.mean():.4f}, decode.json {said[name]:.4f}; expected files of one run"
        )
    return each


def row_of(name: str, folder: Path, wanted: Tensor, *, meanings: list[str], settings: dict, seed: int) -> dict:
    """One run's last candidate beside the reference's ROUGE-L (n,)."""
    report, texts = read(folder)
    if texts["meanings"] != meanings:
        raise ValueError(f"{folder} was judged on other meanings than the reference, expected the same {len(meanings)}")
    if (came := settings_of(report)) != settings:
        raise ValueError(f"{folder} was judged with {came}, the reference with {settings}; expected the same")
    said = report["quality"][-1]
    each = rouge_of(folder, said["name"], report=report, texts=texts)  # (n,)
    low, high = bootstrap_ratio(each, wanted, resamples=2000, seed=seed)
    row = {"name": name, "layers": said["layers"]}
    row |= {key: said[key] for key in ("rougeL", "rougeL_low", "rougeL_high", "bleu", "chrf")}
    row |= {"lost": 1 - (each.mean() / wanted.mean()).item(), "lost_low": 1 - high, "lost_high": 1 - low}
    training = folder.parent / "report.json"
    if training.is_file():
        facts = json.loads(training.read_text())["fit"]
        row |= {"steps": facts["steps"], "training_seconds": facts["seconds"], "loss": facts["losses"]["loss"]}
    return row


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Explaining)
    parser.add_argument("--reference", required=True, help="The run whose `full` all others stand beside.")
    parser.add_argument("--names", nargs="+", required=True, help="A name for each folder.")
    parser.add_argument("--folders", nargs="+", required=True, help="Outputs of eval/decode.py.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the bootstrap.")
    parser.add_argument("--output_dir", "--output-dir", required=True, help="Where report.json goes.")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="Print the resolved flags and exit.")
    return parser.parse_args()


def main() -> None:
    options = flags()
    if options.dry_run:
        print(json.dumps(vars(options)))
        return
    if len(options.names) != len(options.folders) or len(set(options.names)) != len(options.names):
        raise ValueError(f"names {options.names} for {len(options.folders)} folders, expected one each, all distinct")
    first, texts = read(Path(options.reference))
    wanted, meanings = rouge_of(Path(options.reference), "full", report=first, texts=texts), texts["meanings"]
    if not wanted.mean() > 0:
        raise ValueError(f"the reference's ROUGE-L is {wanted.mean():.3g}, expected above 0: nothing to stand beside")
    pairs = zip(options.names, map(Path, options.folders), strict=True)
    settings = settings_of(first)
    rows = [
        row_of(name, folder, wanted, meanings=meanings, settings=settings, seed=options.seed) for name, folder in pairs
    ]
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings |= {"count": len(meanings), "seed": options.seed}
    write_json(
        folder / "report.json",
        {"command": command(), "settings": settings, "table": rows, "environment": environment("cpu")},
    )
    print(markdown_table(rows))


if __name__ == "__main__":
    run_script(main)
