"""Several evaluated classifiers in one table: means over seeds, paired intervals, each rule beside constant depths and truncated models of
exactly its cost.

python eval/classifier_table.py --reference results/plain --truncated results/cut2 results/cut4 \
    --names palbert palbert pabee --folders results/palbert-0 results/palbert-1 results/pabee-0 --output_dir results/table

Folders are outputs of eval/classify.py on the same texts; equal names are seeds of one method. A control "at equal cost" is the best
mixture of two of its points: each text's value is the mean of both, weighed so that the cost is met. Writes report.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, pstdev

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
        folder = Path(name)
        return cls(folder, json.loads((folder / "report.json").read_text()), Look.load(folder / "look.safetensors"))

    def right(self, policy: Policy) -> Tensor:
        """(n,) float64: 1 where the answer under a policy is right."""
        return self.look.right(self.look.taken(policy)).double()

    def share(self, policy: Policy) -> float:
        """FLOPs in parts of the full model's."""
        score = NOTHING if policy.criterion is None else policy.criterion.score
        return (self.look.cost(self.look.taken(policy), score=score).sum() / self.look.full.sum()).item()

    def constant(self) -> list[tuple[float, Tensor]]:
        """(FLOPs in parts of the full model's, right (n,)) of every constant depth."""
        seen, n = self.look, len(self.look.labels)
        found = []
        for place in range(len(seen.depths) + 1):
            taken = torch.full((n,), place)
            found.append(((seen.cost(taken).sum() / seen.full.sum()).item(), seen.right(taken).double()))
        return found


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


def rows_of(name: str, runs: list[Evaluated], reference: Tensor, truncated: list[tuple[float, Tensor]]) -> list[dict]:
    """One method's settings that all of its seeds have."""
    own = [settings_of(run) for run in runs]
    shared = [key for key in own[0] if all(key in other for other in own)]
    rows = []
    for rule, number in shared:
        policies = [found[rule, number] for found in own]
        facts = [facts_of(run, rule, number) for run in runs]
        row = {"exits": name, "rule": rule, "number": number, "seeds": len(runs)}
        row |= {key: mean(fact[key] for fact in facts) for key in FACTS if key in facts[0]}
        row["spread"] = pstdev(fact["accuracy"] for fact in facts)
        right = torch.stack([run.right(policy) for run, policy in zip(runs, policies, strict=True)])  # (seeds, n)
        row |= paired("full", right.mean(0) - reference)
        costs = [run.share(policy) for run, policy in zip(runs, policies, strict=True)]
        for control, points in (("constant", [run.constant() for run in runs]), ("truncated", [truncated] * len(runs))):
            values = [at_cost(one, cost) for one, cost in zip(points, costs, strict=True)]
            if all(value is not None for value in values):
                row |= paired(control, (right - torch.stack(values)).mean(0))
        rows.append(row)
    return rows


def paired(name: str, difference: Tensor) -> dict:
    """Mean over texts of a difference (n,) that is a mean over seeds, with its 95 % interval over texts."""
    found = summary(difference)
    return {f"to_{name}": found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def points_of(name: str, run: Evaluated, reference: Evaluated) -> dict:
    """A model that answers at its end: a truncated one, or the reference itself."""
    right, cost = own_end(run, reference)
    return {"exits": name, "rule": "none", "accuracy": right.mean().item(), "flops_fraction": cost} | paired(
        "full", right - own_end(reference, reference)[0]
    )


def own_end(run: Evaluated, reference: Evaluated) -> tuple[Tensor, float]:
    """(right (n,), FLOPs in parts of the reference's) of a model without exits."""
    seen = run.look
    right = seen.right(torch.full_like(seen.labels, len(seen.depths))).double()
    return right, (seen.costs[NOTHING][:, -1].sum() / reference.look.full.sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", required=True, help="The fine-tuned model, evaluated.")
    parser.add_argument(
        "--truncated", nargs="*", default=[], help="Models of fewer layers, trained as long, evaluated."
    )
    parser.add_argument("--names", nargs="+", required=True, help="The method of each folder.")
    parser.add_argument("--folders", nargs="+", required=True, help="Outputs of eval/classify.py.")
    parser.add_argument("--output_dir", required=True, help="Where report.json goes.")
    parser.add_argument("--note", help="What a reader must know of the models, kept in the report.")
    options = parser.parse_args()
    if len(options.names) != len(options.folders):
        raise ValueError(f"{len(options.names)} names and {len(options.folders)} folders, expected one name for each")
    reference = Evaluated.read(options.reference)
    cut = [Evaluated.read(folder) for folder in options.truncated]
    points = {f"truncated {run.look.num_layers}": run for run in cut}
    runs = [Evaluated.read(folder) for folder in options.folders]
    for run, folder in zip([*cut, *runs], [*options.truncated, *options.folders], strict=True):
        if not torch.equal(run.look.labels, reference.look.labels) or not torch.equal(
            run.look.tokens, reference.look.tokens
        ):
            raise ValueError(f"{folder} was evaluated on other texts than {options.reference}")
    rows = [
        points_of("full model", reference, reference),
        *(points_of(name, run, reference) for name, run in points.items()),
    ]
    right = own_end(reference, reference)[0]
    ends = by_cost([own_end(run, reference) for run in [*cut, reference]])
    for name in dict.fromkeys(options.names):
        chosen = [run for run, own in zip(runs, options.names, strict=True) if own == name]
        rows += rows_of(name, chosen, right, ends)
    report = {"texts": len(right), "calibration_texts": reference.report["calibration_texts"], "rows": rows}
    report |= {} if options.note is None else {"note": options.note}
    write_report(Path(options.output_dir) / "report.json", report)
    wanted = [
        "exits",
        "rule",
        "number",
        "layers",
        "flops_fraction",
        "accuracy",
        "to_full",
        "to_constant",
        "to_truncated",
    ]
    print(markdown_table(rows, [name for name in wanted if any(name in row for row in rows)]))


def by_cost(ends: list[tuple[Tensor, float]]) -> list[tuple[float, Tensor]]:
    """Seeds of one truncated model become one point."""
    found: dict[float, list[Tensor]] = {}
    for right, cost in ends:
        found.setdefault(round(cost, 6), []).append(right)
    return [(cost, torch.stack(rights).mean(0)) for cost, rights in sorted(found.items())]


if __name__ == "__main__":
    run_script(main)
