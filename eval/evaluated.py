"""What runs of eval/classify.py found, by the texts that they judged: seeds, folds, settings, and controls at exactly the same cost.

Here: reading, grouping, mixing. Not here: which rows a table has (classifier_table.py). n texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from ee_diffusion.classification.evaluation import NO_SCORE, ExitRecord
from ee_diffusion.classification.methods import pabee, pondernet
from ee_diffusion.core.policy import Policy

Setting = Policy | int | None  # a policy; a constant depth, by its place among the answers; the end, no exit asked


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One folder of eval/classify.py."""

    folder: Path
    report: dict
    look: ExitRecord

    @classmethod
    def read(cls, name: str) -> Evaluated:
        """What stands in a folder.

        Raises:
            ValueError: no look, or one of a regression.
        """
        folder = Path(name)
        look = ExitRecord.load(folder / "look.safetensors")
        if look.labels.is_floating_point():
            raise ValueError(f"{folder} is of a regression, expected classes")
        return cls(folder, json.loads((folder / "report.json").read_text()), look)

    def under(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """(FLOPs (n,), float64 (n,): 1 where the answer is right) of a setting."""
        seen, score = self.look, NO_SCORE
        if isinstance(setting, Policy):
            taken = seen.exits_under(setting)
            score = NO_SCORE if setting.criterion is None else setting.criterion.score
        else:
            taken = torch.full_like(seen.labels, len(seen.depths) if setting is None else setting)
        return seen.cost(taken, score=score).double(), seen.is_correct(taken).double()

    def constant(self) -> list[tuple[Tensor, Tensor]]:
        """(FLOPs (n,), right (n,)) of every constant depth."""
        return [self.under(place) for place in range(len(self.look.depths) + 1)]


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


def settings_of(run: Evaluated) -> dict[tuple[str, float], Setting]:
    """(rule, budget, depth, patience or seed) -> setting, as the report chose it on the calibration texts."""
    exits = len(run.look.depths)
    found: dict[tuple[str, float], Setting] = {}
    if "constant_depth" in run.report["controls"]:
        found |= {("constant", depth): place for place, depth in enumerate(run.look.depths)}
    found |= {("pabee", t): pabee(t) for t in range(1, exits) if "agreement" in run.look.scores}
    found |= {("pondernet", 0): pondernet(0)} if "sampled" in run.report["controls"] else {}
    folder = run.folder / "policies"
    for rule, rows in run.report["budgeted"].items():
        found |= {(rule, row["budget"]): Policy.load(folder / f"{rule}-{row['budget']:g}.json") for row in rows}
    return found


def facts_of(run: Evaluated, rule: str, number: float) -> dict:
    """What the report says of a setting."""
    if rule == "constant":
        return next(row for row in run.report["controls"]["constant_depth"] if row["depth"] == number)
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
    def look(self) -> ExitRecord:
        """Any one: labels, tokens and full costs are of the texts alone."""
        return self.references[0].look

    def learned_confidence(self, run: Evaluated) -> bool:
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
        known = next((fold for fold in folds if fold.learned_confidence(run)), None)
        known.references.append(run) if known else folds.append(Fold([run], []))
    for run in truncated:
        fold_of(run, folds).truncated.append(run)
    return folds


def fold_of(run: Evaluated, folds: list[Fold]) -> Fold:
    """The fold that a run judged.

    Raises:
        ValueError: texts that no reference judged, or another number of classes than its reference.
    """
    for fold in folds:
        if fold.learned_confidence(run):
            classes, expected = run.look.logits.shape[-1], fold.look.logits.shape[-1]
            if classes != expected:
                raise ValueError(f"{run.folder} tells {classes} classes apart, its reference {expected}")
            return fold
    learned_confidence = sorted({len(fold.look.labels) for fold in folds})
    raise ValueError(
        f"{run.folder} was evaluated on other texts than any reference: {len(run.look.labels)}, the references on {learned_confidence}"
    )


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
