"""Several evaluated classifiers in one table: means over seeds, paired intervals, each rule beside constant depths and truncated models of
exactly its cost.

python eval/classifier_table.py --reference results/plain --truncated results/cut2 results/cut4 \
    --names palbert palbert pabee --folders results/palbert-0 results/palbert-1 results/pabee-0 --output_dir results/table

Folders are outputs of eval/classify.py; equal names are seeds of one method, and where the references judged different texts, folds: every
text counts once, with the reference and the controls of its own fold. Several references on the same texts are seeds. Rule `none` is the
method's own last answer. A control "at equal cost" is the best mixture of two of its points: each text's value is the mean of both,
weighed so that the cost is met. `--lengths` adds each fold's shortest, middle and longest third of the texts. Writes report.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, mean, pstdev

import torch
from torch import Tensor

from ee_diffusion.core.policy import Policy
from ee_diffusion.encoder.evaluate import NOTHING, Look
from ee_diffusion.encoder.methods import pabee, pondernet
from ee_diffusion.errors import run_script
from ee_diffusion.measure.paired import summary
from ee_diffusion.measure.tables import markdown_table, write_report

FACTS = ("accuracy", "layers", "flops_fraction", "ece", "brier", "set_size", "missed", "shuffled_accuracy")


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One folder of eval/classify.py."""

    folder: Path
    report: dict
    look: Look

    @classmethod
    def read(cls, name: str) -> Evaluated:
        """What stands in a folder.

        Raises:
            ValueError: no look, or one of a regression.
        """
        folder = Path(name)
        look = Look.load(folder / "look.safetensors")
        if look.labels.is_floating_point():
            raise ValueError(f"{folder} is of a regression, expected classes")
        return cls(folder, json.loads((folder / "report.json").read_text()), look)

    def under(self, policy: Policy | None) -> tuple[Tensor, Tensor]:
        """(FLOPs (n,), float64 (n,): 1 where the answer is right) under a policy; None: at the end, no exit asked."""
        if policy is None:
            taken, score = torch.full_like(self.look.labels, len(self.look.depths)), NOTHING
        else:
            taken = self.look.taken(policy)
            score = NOTHING if policy.criterion is None else policy.criterion.score
        return self.look.cost(taken, score=score).double(), self.look.right(taken).double()

    def constant(self) -> list[tuple[Tensor, Tensor]]:
        """(FLOPs (n,), right (n,)) of every constant depth."""
        seen, n = self.look, len(self.look.labels)
        places = [torch.full((n,), place) for place in range(len(seen.depths) + 1)]
        return [(seen.cost(taken).double(), seen.right(taken).double()) for taken in places]


def hull(points: Sequence[tuple[float, Tensor]]) -> list[tuple[float, Tensor]]:
    """The points that no mixture of two others beats in mean value at their cost, cheapest first (the upper concave hull)."""
    kept: list[tuple[float, Tensor]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], point[1].mean().item())):
        while kept and (kept[-1][0] == cost or (len(kept) > 1 and _below(kept[-2], kept[-1], (cost, value)))):
            kept.pop()
        kept.append((cost, value))
    return kept


def _below(left: tuple[float, Tensor], middle: tuple[float, Tensor], right: tuple[float, Tensor]) -> bool:
    """Whether the line from left to right passes above the middle, in means."""
    share = (middle[0] - left[0]) / (right[0] - left[0])
    return bool((1 - share) * left[1].mean() + share * right[1].mean() >= middle[1].mean())


def at_cost(points: Sequence[tuple[float, Tensor]], cost: float) -> Tensor | None:
    """The value (n,) of each text at a cost between two points of the hull; None outside of the points."""
    for (below, low), (above, high) in pairwise(hull(points)):
        if below <= cost <= above:
            weight = (cost - below) / (above - below)
            return (1 - weight) * low + weight * high
    return None


def settings_of(run: Evaluated) -> dict[tuple[str, float], Policy]:
    """(rule, budget, patience or seed) -> policy, as the report chose it on the calibration texts."""
    exits = len(run.look.depths)
    found = {("pabee", t): pabee(t) for t in range(1, exits) if "agreement" in run.look.scores}
    found |= {("pondernet", 0): pondernet(0)} if "sampled" in run.report["controls"] else {}
    folder = run.folder / "policies"
    for rule, rows in run.report["budgeted"].items():
        found |= {(rule, row["budget"]): Policy.load(folder / f"{rule}-{row['budget']:g}.json") for row in rows}
    return found


def facts_of(run: Evaluated, rule: str, number: float) -> dict:
    """What the report says of a setting."""
    if rule == "pabee":
        return run.report["controls"]["pabee"][int(number) - 1]
    if rule == "pondernet":
        return run.report["controls"]["sampled"][0]
    return next(row for row in run.report["budgeted"][rule] if row["budget"] == number)


@dataclass(frozen=True, eq=False)
class Fold:
    """The references and truncated models that judged the same texts."""

    references: list[Evaluated]
    truncated: list[Evaluated]

    @property
    def look(self) -> Look:
        """Any one: labels, tokens and full costs are of the texts alone."""
        return self.references[0].look

    def judged(self, run: Evaluated) -> bool:
        """Whether a run judged these texts."""
        return torch.equal(run.look.labels, self.look.labels) and torch.equal(run.look.tokens, self.look.tokens)

    def share(self, cost: Tensor) -> float:
        """FLOPs (n,) in parts of the reference's."""
        return (cost.sum() / self.look.full.sum()).item()

    def reference(self) -> Tensor:
        """(n,) float64: in how many of the references the text is right."""
        return torch.stack([run.under(None)[1] for run in self.references]).mean(0)

    def ends(self) -> list[tuple[float, Tensor]]:
        """(share of the FLOPs, right (n,)) of each truncated depth and of the reference, seeds in one point."""
        found: dict[int, list[Evaluated]] = {}
        for run in [*self.truncated, *self.references]:
            found.setdefault(run.look.num_layers, []).append(run)
        points = []
        for runs in found.values():
            costs, rights = zip(*(run.under(None) for run in runs), strict=True)
            points.append((mean(self.share(cost) for cost in costs), torch.stack(rights).mean(0)))
        return points

    def thirds(self) -> tuple[Tensor, ...]:
        """Places of the shortest, the middle and the longest texts.

        Raises:
            ValueError: fewer than three texts.
        """
        order = self.look.tokens.argsort(stable=True)
        if len(order) < 3:
            raise ValueError(
                f"{self.references[0].folder} judged {len(order)} texts, expected three or more for --lengths"
            )
        return order.tensor_split(3)


def folds_of(references: list[Evaluated], truncated: list[Evaluated]) -> list[Fold]:
    """The references by the texts that they judged, with the truncated models of the same texts.

    Raises:
        ValueError: references of different depths, truncated models that judged other texts.
    """
    layers = sorted({run.look.num_layers for run in references})
    if len(layers) > 1:
        raise ValueError(f"references of {layers} layers, expected one model's; shorter ones are --truncated")
    folds: list[Fold] = []
    for run in references:
        known = next((fold for fold in folds if fold.judged(run)), None)
        known.references.append(run) if known else folds.append(Fold([run], []))
    for run in truncated:
        fold_of(run, folds).truncated.append(run)
    return folds


def fold_of(run: Evaluated, folds: list[Fold]) -> Fold:
    """The fold that a run judged.

    Raises:
        ValueError: texts that no reference judged.
    """
    for fold in folds:
        if fold.judged(run):
            return fold
    raise ValueError(f"{run.folder} was evaluated on other texts than any reference")


def dealt(name: str, runs: list[Evaluated], folds: list[Fold]) -> list[list[Evaluated]]:
    """The runs of one method by fold, as many for each.

    Raises:
        ValueError: a fold with fewer runs than another, a run given twice.
    """
    twice = [run.folder for run in runs if sum(run.folder == other.folder for other in runs) > 1]
    if twice:
        raise ValueError(f"{name}: {twice[0]} was given twice, expected each run once")
    homes = [fold_of(run, folds) for run in runs]
    found = [[run for run, home in zip(runs, homes, strict=True) if home is fold] for fold in folds]
    counts = [len(own) for own in found]
    if len(set(counts)) != 1:
        raise ValueError(f"{name}: {counts} runs on the references' sets of texts, expected as many on each")
    return found


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


def compared(
    seeds: list[list[Evaluated]], policies: dict[Path, Policy | None], folds: list[Fold], *, lengths: bool
) -> dict:
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


def beside_controls(seeds: list[list[Evaluated]], policies: dict[Path, Policy | None], folds: list[Fold]) -> dict:
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
    write_report(Path(options.output_dir) / "report.json", report)
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
