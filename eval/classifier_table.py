"""Several evaluated classifiers in one table: means over seeds, paired intervals, each rule beside constant depths and truncated models of
exactly its cost.

python -m eval.classifier_table --reference results/plain --truncated results/cut2 results/cut4 \
    --names palbert palbert pabee --folders results/palbert-0 results/palbert-1 results/pabee-0 --output_dir results/table

Folders are outputs of eval/classify.py; equal names are seeds of one method, and where the references judged different texts, folds: every
text counts once, with the reference and the controls of its own fold. Several references on the same texts are seeds. Rule `none` is the
method's own last answer, `constant` every exit by itself. A control "at equal cost" is the best mixture of two of its points: each text's
value is the mean of both, weighed so that the cost is met. `--lengths` adds each fold's shortest, middle and longest third of the texts.
Writes report.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor

from ee_diffusion.cli.errors import run_script
from ee_diffusion.metrics.image import summary
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from eval.evaluated import Evaluated, Fold, Setting, at_cost, dealt, facts_of, folds_of, settings_of

FACTS = ("accuracy", "layers", "flops_fraction", "ece", "brier", "set_size", "missed", "shuffled_accuracy")


def rows_of(name: str, runs: list[Evaluated], folds: list[Fold], *, lengths: bool) -> list[dict]:
    """One method's own end, then its settings that all of its runs have."""
    seeds = dealt(name, runs, folds)
    own = {run.folder: settings_of(run) for run in runs}
    texts = [len(run.look.labels) for run in runs]
    shared = [key for key in own[runs[0].folder] if all(key in other for other in own.values())]
    rows = []
    for rule, number in [("none", None), *shared]:
        row = {"exits": name, "rule": rule, "number": number, "seeds": len(seeds[0])}
        facts = [] if rule == "none" else [facts_of(run, rule, number) for run in runs]
        row |= {key: fmean([fact[key] for fact in facts], texts) for key in FACTS if facts and key in facts[0]}
        taken = {folder: None if rule == "none" else found[rule, number] for folder, found in own.items()}
        rows.append(row | compared(seeds, taken, folds, lengths=lengths) | beside_controls(seeds, taken, folds))
    return rows


def compared(seeds: list[list[Evaluated]], policies: dict[Path, Setting], folds: list[Fold], *, lengths: bool) -> dict:
    """Accuracy and FLOPs over all texts and the paired difference to the references; seeds: the runs of each fold."""
    parts: dict[str, list[Tensor]] = {"right": [], "reference": [], "cost": [], "full": []}
    accuracies, thirds, before = [], [], 0
    for runs, fold in zip(seeds, folds, strict=True):
        costs, rights = zip(*(run.under(policies[run.folder]) for run in runs), strict=True)
        accuracies += [right.mean().item() for right in rights]
        found = (torch.stack(rights).mean(0), fold.reference(), torch.stack(costs).mean(0), fold.look.full.double())
        for own, value in zip(parts.values(), found, strict=True):
            own.append(value)
        thirds.append([places + before for places in fold.thirds()] if lengths else [])
        before += len(fold.look.labels)
    right, reference, cost, full = (torch.cat(own) for own in parts.values())
    row = {"accuracy": right.mean().item(), "flops_fraction": (cost.sum() / full.sum()).item()}
    row |= {"spread": pstdev(accuracies)} | paired("full", right - reference)
    if lengths:
        row["lengths"] = {
            third: {"accuracy": right[at].mean().item(), "flops_fraction": (cost[at].sum() / full[at].sum()).item()}
            | paired("full", (right - reference)[at])
            for third, at in zip(("short", "middle", "long"), map(torch.cat, zip(*thirds, strict=True)), strict=True)
        }
    return row


def beside_controls(seeds: list[list[Evaluated]], policies: dict[Path, Setting], folds: list[Fold]) -> dict:
    """Paired differences to constant depths of the same run and to truncated models, where they have points around its cost."""
    differences: dict[str, list[Tensor]] = {"constant": [], "truncated": []}
    for runs, fold in zip(seeds, folds, strict=True):
        costs, rights = zip(*(run.under(policies[run.folder]) for run in runs), strict=True)
        constant = [[(fold.share(cost), right) for cost, right in run.constant()] for run in runs]
        for control, points in (("constant", constant), ("truncated", [fold.ends()] * len(runs))):
            values = [at_cost(one, fold.share(cost)) for one, cost in zip(points, costs, strict=True)]
            if all(value is not None for value in values):
                differences[control].append((torch.stack(rights) - torch.stack(values)).mean(0))
    row = {}
    for control, found in differences.items():
        row |= paired(control, torch.cat(found)) if len(found) == len(folds) else {}
    return row


def paired(name: str, difference: Tensor) -> dict:
    """Mean over texts of a difference (n,) that is a mean over seeds, with its 95 % interval over texts."""
    found = summary(difference)
    return {f"to_{name}": found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def ends_of(name: str, runs: list[Evaluated], folds: list[Fold], *, lengths: bool) -> dict:
    """Models that answer at their end, for want of exits: the references, or the truncated ones of one depth."""
    seeds = dealt(name, runs, folds)
    row = {"exits": name, "rule": "none", "seeds": len(seeds[0])}
    return row | compared(seeds, dict.fromkeys(run.folder for run in runs), folds, lengths=lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", nargs="+", required=True, help="The fine-tuned model, evaluated: seeds, folds.")
    parser.add_argument(
        "--truncated", nargs="*", default=[], help="Models of fewer layers, trained as long, evaluated."
    )
    parser.add_argument("--names", nargs="+", required=True, help="The method of each folder.")
    parser.add_argument("--folders", nargs="+", required=True, help="Outputs of eval/classify.py.")
    parser.add_argument("--lengths", action="store_true", help="Also each third of the texts by length.")
    parser.add_argument("--output_dir", required=True, help="Where report.json goes.")
    parser.add_argument("--note", help="What a reader must know of the models, kept in the report.")
    options = parser.parse_args()
    if len(options.names) != len(options.folders):
        raise ValueError(f"{len(options.names)} names and {len(options.folders)} folders, expected one name for each")
    references, cut, runs = (
        [Evaluated.read(folder) for folder in folders]
        for folders in (options.reference, options.truncated, options.folders)
    )
    folds = folds_of(references, cut)
    rows = [ends_of("full model", references, folds, lengths=options.lengths)]
    for depth in sorted({run.look.num_layers for run in cut}):
        own = [run for run in cut if run.look.num_layers == depth]
        rows.append(ends_of(f"truncated {depth}", own, folds, lengths=options.lengths))
    for name in dict.fromkeys(options.names):
        chosen = [run for run, own in zip(runs, options.names, strict=True) if own == name]
        rows += rows_of(name, chosen, folds, lengths=options.lengths)
    report = {
        "texts": sum(len(fold.look.labels) for fold in folds),
        "folds": len(folds),
        "calibration_texts": references[0].report["calibration_texts"],
        "rows": rows,
    }
    report |= {} if options.note is None else {"note": options.note}
    write_json(Path(options.output_dir) / "report.json", report | {"environment": environment()})
    wanted = (
        "exits",
        "rule",
        "number",
        "layers",
        "flops_fraction",
        "accuracy",
        "to_full",
        "to_constant",
        "to_truncated",
    )
    print(markdown_table(rows, [name for name in wanted if any(name in row for row in rows)]))


if __name__ == "__main__":
    run_script(main)
