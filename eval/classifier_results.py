"""Reports of classifiers with exits as sections of a page: tables over seeds, one classifier, seconds. Not here: writing them."""

from __future__ import annotations

from ee_diffusion.metrics.tables import markdown_table

CLASSIFIER_COLUMNS = [
    "exits",
    "rule",
    "number",
    "seeds",
    "layers",
    "flops",
    "accuracy",
    "spread",
    "shuffled",
    "ece",
    "set_size",
    "missed",
]
DIFFERENCES = {"to_full": "full", "to_constant": "constant", "to_truncated": "truncated"}


def classifiers(report: dict) -> str:
    """The rows of eval/classifier_table.py, differences in accuracy with their intervals."""
    rows = []
    for row in filter(shown, report["rows"]):
        row = row | {"flops": row["flops_fraction"], "shuffled": row.get("shuffled_accuracy")}
        for name, kind in DIFFERENCES.items():
            if name in row:
                row[name] = difference(row, kind)
        rows.append(row)
    columns = [name for name in (*CLASSIFIER_COLUMNS, *DIFFERENCES) if any(row.get(name) is not None for row in rows)]
    folds = f", {report['folds']} folds, each with others of its own" if report.get("folds", 1) > 1 else ""
    text = (
        f"{report['texts']} samples judged, {report['calibration_texts']} others to choose thresholds and sets on{folds}.\n"
        "`number`: fraction of the layers asked for, of `constant` the depth, of `pabee` the patience; rule `none`: the last answer.\n"
        "`flops`: in parts of the full model's, judges and exits counted. `spread`: standard deviation over seeds and folds.\n"
        "`shuffled`: random exits with the same histogram. Differences in accuracy, paired over samples, 95 %: to the full model,\n"
        "and to the best mixtures of constant depths and of truncated models at exactly the same FLOPs. Other rules on the same\n"
        "exits are in the JSON.\n"
    )
    notes = [f"{report['note']}\n"] if "note" in report else []
    return "\n".join([markdown_table(rows, columns), text, *by_length([*filter(shown, report["rows"])]), *notes])


def shown(row: dict) -> bool:
    """Whether the page shows a row: constant depths, plain confidence, and the rule after which the exits are named."""
    return row["rule"] in ("none", "constant", "confidence") or row["exits"].startswith(row["rule"])


def difference(facts: dict, kind: str) -> str:
    """A paired difference with its interval; of a single text there is none."""
    low, high = facts[f"{kind}_low"], facts[f"{kind}_high"]
    return f"{facts[f'to_{kind}']:+.4f}" + (f" ({low:+.4f} to {high:+.4f})" if low is not None else "")


def by_length(rows: list[dict]) -> list[str]:
    """The thirds of the texts, short ones first, where the table was made with --lengths."""
    found = []
    for row in rows:
        shown = {"exits": row["exits"], "rule": row["rule"], "number": row.get("number")}
        for third, facts in row.get("lengths", {}).items():
            shown |= {
                f"{third}: flops": facts["flops_fraction"],
                f"{third}: accuracy to full": difference(facts, "full"),
            }
        if "lengths" in row:
            found.append(shown)
    return [markdown_table(found), "The shortest, middle and longest third of the texts.\n"] if found else []


def classifier_speed(report: dict) -> str:
    lengths = report.get("mean_tokens", {})
    rows = [row | {"tokens": lengths.get(row["texts"])} for row in report["rows"]]
    columns = ["texts", "tokens", "name", "batch", "seconds", "ratio", "low", "high"]
    count = f"{report['count']} texts in all, {report['runs']} runs in turn; ratio to the first setting, median and extremes over runs.\n"
    return "\n".join([markdown_table(rows, columns), count])


def classify(report: dict) -> str:
    """One classifier: constant depths, budgets, lengths, guarantee."""
    columns = ["accuracy", "layers", "flops_fraction", "gain", "gain_low", "gain_high", "ece", "set_size", "missed"]
    rows = [row | {"rule": "constant", "number": row["depth"]} for row in report["controls"]["constant_depth"]]
    rows.append(report["controls"]["oracle"] | {"rule": "oracle", "number": None})
    for rule, found in report["budgeted"].items():
        rows += [row | {"rule": rule, "number": row["budget"]} for row in found]
    thirds = [{"setting": name} | row for name, found in report["by_length"].items() for row in found]
    parts = [markdown_table(rows, ["rule", "number", *columns, "shuffled_accuracy"])]
    parts.append(
        f"{report['texts']} judged, {report['calibration_texts']} others to choose on; `gain`: paired difference to the end.\n"
    )
    parts.append(markdown_table(thirds))
    if "guarantee" in report:
        found = report["guarantee"]
        rows = [{"choice": name} | value for name, value in found.items() if isinstance(value, dict)]
        none = [name for name, value in found.items() if value is None]
        head = f"Risk {found['risk']}, delta {found['delta']}, {found['candidates']} candidates, {found['pareto']} on the Pareto front."
        parts.append(f"{head}{' Nothing certified by: ' + ', '.join(none) + '.' if none else ''}\n")
        parts += [markdown_table(rows)] if rows else []
    return "\n".join(parts)
