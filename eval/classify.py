"""Evaluate a classifier with exits: accuracy against layers and FLOPs by replay of one look, controls, conformal sets, guarantees.

python -m eval.classify --model runs/palbert/model --text_files sst2/test-labeled.tsv --calibration_files sst2/dev.tsv \
    --text_columns sentence --output_dir results/palbert

Every rule and threshold is judged from one pass of stored scores. Thresholds of budgets, conformal sets and guarantees are chosen on the
calibration texts (--calibration_files, else a share of the texts), figures are of the others; what is
split, and what --max_texts leaves, is drawn by --seed. Controls: every constant depth (the anytime curve), random exits with the same
histogram, the oracle. `--risk` adds a guarantee, over exit thresholds and, where tokens are pruned, `--pruning_scales` of the pruning
thresholds. Seconds: eval/classifier_speed.py. Images: --train_data_files instead of --text_files.
`--dry-run` prints the resolved settings. Writes report.json, look.safetensors (for eval/classifier_table.py) and policies/.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, HfArgumentParser

from ee_diffusion.classification.activations import StoredStates, fingerprint_of, stored_states
from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.evaluation import NO_SCORE, ExitRecord, record_exits
from ee_diffusion.classification.exits import ClassifierHeads
from ee_diffusion.classification.methods import pabee
from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.devices import device_named
from ee_diffusion.core.policy import Policy
from ee_diffusion.metrics.splits import shuffled
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from ee_diffusion.training.config import ImageDataConfig, TextDataConfig
from ee_diffusion.training.datasets import Source
from ee_diffusion.training.sources import TableSource, load_labeled_images
from ee_diffusion.training.text_datasets import TextSource, load_text_source, once
from eval.judging import (
    Judge,
    Rule,
    budgeted,
    by_length,
    candidates,
    controls,
    curve,
    guarantee,
    regression,
    rules,
    score_of,
)


def _flag(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated and how.

    Raises:
        ValueError: a number out of range.
    """

    model: str | None = _flag("Folder of an EarlyExitClassifier with its tokeniser.")
    output_dir: str | None = _flag("Where the report, the look and the policies go.")
    points: int = _flag("Thresholds on each curve.", 20)
    batch_size: int = _flag("Texts per batch of the look.", 32)
    calibration_files: list[str] | None = _flag("Texts to choose on; none: a share of the others.")
    calibration_share: float = _flag("Share of the texts to choose on, where there are no files of their own.", 0.5)
    miss_rate: float = _flag("Of the conformal sets.", 0.1)
    draws: int = _flag("Drawn exits and shuffles per curve.", 5)
    seed: int = _flag("Of the split, the draws and the shuffles.", 0)
    budgets: list[float] = field(
        default_factory=lambda: [0.4, 0.55, 0.7, 0.85],
        metadata={"help": "Fractions of the layers, for budgeted batches."},
    )
    states: str | None = _flag("File of stored states of a frozen model, for exits on it; written where absent.")
    device: str | None = _flag("cpu, cuda, ...; none: cuda if there is one.")
    risk: float | None = _flag("How often an answer may be wrong where the full model is right; none: no guarantee.")
    delta: float = _flag("How often the guarantee may fail.", 0.1)
    pruning_scales: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Multiples of the pruning thresholds that --risk chooses from."},
    )

    def __post_init__(self):
        for name in ("calibration_share", "miss_rate", "delta", "risk"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}={value}, expected a number in (0, 1)")
        for name in ("points", "batch_size", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if any(not 0 < budget <= 1 for budget in self.budgets) or any(scale < 0 for scale in self.pruning_scales):
            raise ValueError(f"budgets={self.budgets}, pruning_scales={self.pruning_scales}, expected (0, 1] and >= 0")


def sources(
    config: EvalConfig, data: TextDataConfig, images: ImageDataConfig, classifier: EarlyExitClassifier
) -> list[Source]:
    """What is judged and, where it has files of its own, what is chosen on (first)."""
    if images.sources():
        return [load_labeled_images(replace(images, random_flip=False), num_labels=classifier.config.num_labels)]
    if data.folds is not None and not data.held_out:
        warnings.warn(f"judging what training with fold={data.fold} sees; --held_out true takes the rest", stacklevel=2)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    chosen = [replace(data, text_files=config.calibration_files)] if config.calibration_files else []
    read = [
        load_text_source(
            replace(one, max_texts=None),
            lambda texts: tokenizer(texts, truncation=True, max_length=data.max_length)["input_ids"],
            num_labels=classifier.config.num_labels,
            pad=tokenizer.pad_token_id,
        )
        for one in [*chosen, data]
    ]
    return [drawn(source, data.max_texts, seed=config.seed) for source in read]


def drawn(source: TextSource, most: int | None, *, seed: int) -> TextSource:
    """At most so many texts of a source, by a seeded draw: the first ones of a sorted file speak for themselves alone. None: all."""
    if most is None or most >= len(source):
        return source
    places = sorted(shuffled(len(source), seed=seed)[:most])
    return TextSource([source.tokens[place].tolist() for place in places], source.labels[places], pad=source.pad)


def looked(config: EvalConfig, classifier: EarlyExitClassifier, source: Source, states: Path | None) -> ExitRecord:
    """The look at a source, by way of stored states where they are asked for."""
    classifier.eval()
    known = rules(classifier)
    steps = "closeness" if classifier.config.num_labels == 1 else "agreement"
    scores = list(dict.fromkeys([*map(score_of, known.values()), steps]))
    if states is not None:
        heads = ClassifierHeads(classifier.model, classifier.exits)
        if states.exists():
            kept = StoredStates.load(states, origin=fingerprint_of(heads, classifier.pruning, source.fingerprint()))
        else:
            batches = once(source, config.batch_size, classifier.device)
            kept = stored_states(heads, batches, pruning=classifier.pruning, data=source.fingerprint())
            kept.save(states)
        source = TableSource(kept, kept.origin)
    return record_exits(classifier, once(source, config.batch_size, classifier.device), scores=scores)


def gathered(
    config: EvalConfig, classifier: EarlyExitClassifier, given: list[Source]
) -> tuple[ExitRecord, torch.Tensor, torch.Tensor]:
    """One look at all texts, and the places of those to choose on and of those to judge."""
    names = [None] * len(given)
    if config.states:
        names = [Path(config.states).with_suffix(f".{place}.safetensors") for place in range(len(given))]
    parts = [looked(config, classifier, source, states) for source, states in zip(given, names, strict=True)]
    sizes = [len(part.labels) for part in parts]
    if len(parts) == 2:
        return ExitRecord.concatenate(parts), torch.arange(sizes[0]), sizes[0] + torch.arange(sizes[1])
    order = torch.tensor(shuffled(sizes[0], seed=config.seed))
    cut = int(sizes[0] * config.calibration_share)
    return parts[0], order[:cut], order[cut:]


def evaluate(classifier: EarlyExitClassifier, given: list[Source], config: EvalConfig) -> tuple[dict, Judge]:
    seen, calibration, test = gathered(config, classifier, given)
    judge = Judge(seen, calibration, test, config.miss_rate, config.draws, config.seed)
    known = rules(classifier)
    facts = {
        "texts": len(test),
        "calibration_texts": len(calibration),
        "mean_tokens": seen.tokens[test].double().mean().item(),
        "depths": [*seen.depths, seen.num_layers],
        "pruning": classifier.pruning,
    }
    if classifier.config.num_labels == 1:
        return facts | {"budgeted": {}, "controls": regression(judge)}, judge
    report = facts | {
        "rules": {name: curve(judge, rule, config.points) for name, rule in known.items()},
        "budgeted": {name: budgeted(judge, rule, config.budgets) for name, rule in known.items()},
        "controls": controls(judge, classifier),
    }
    rule = next(iter(known.values()))
    everything = {"full depth": (Policy(), NO_SCORE)} | {
        f"budget {row['budget']}": (rule(row["value"]), score_of(rule)) for row in report["budgeted"][next(iter(known))]
    }
    report["by_length"] = {name: by_length(judge, policy, score=score) for name, (policy, score) in everything.items()}
    if config.risk is not None:
        report["guarantee"] = guaranteed(classifier, given, config, judge, rule)
    return report, judge


def guaranteed(
    classifier: EarlyExitClassifier, given: list[Source], config: EvalConfig, judge: Judge, rule: Rule
) -> dict:
    """A look for each pruning scale, then the choice among all settings."""
    looks, own = {}, classifier.pruning
    reference = judge.seen
    if own is not None:
        classifier.pruning = None
        reference = gathered(replace(config, states=None), classifier, given)[0]
    for scale in config.pruning_scales if own is not None else [1.0]:
        if scale == 1:
            looks[scale] = judge.seen
            continue
        classifier.pruning = tuple(min(1.0, scale * value) for value in own)
        looks[scale] = gathered(replace(config, states=None), classifier, given)[0]
    classifier.pruning = own
    values = [place / config.points for place in range(config.points + 1)]
    offered = candidates(looks, rule, values, reference=reference)
    promise = {"risk": config.risk, "delta": config.delta, "seed": config.seed}
    return guarantee(offered, reference.full, judge.calibration, judge.test, **promise)


def told(report: dict) -> str:
    """What report.json says first: the full model, each rule at each budget, and what was certified."""
    whole = {"rule": "full model"} | report["controls"]["constant_depth"][-1]
    rows = [{"rule": name} | row for name, rows in report["budgeted"].items() for row in rows]
    names = ("rule", "budget", "layers", "flops_fraction", "accuracy", "shuffled_accuracy", "ece", "set_size", "missed")
    columns = [name for name in names if any(name in row for row in (whole, *rows))]
    lines = [markdown_table([whole, *rows], columns)]
    if report.get("guarantee"):
        certified = report["guarantee"]["learn_then_test"]
        lines.append(f"certified by learn then test: {'none' if certified is None else json.dumps(certified)}")
    return "\n".join(lines)


def main() -> None:
    kinds = (EvalConfig, TextDataConfig, ImageDataConfig)
    parser = HfArgumentParser(kinds, description=__doc__.splitlines()[0])
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="Print the resolved settings and exit.")
    config, data, images, rest = parser.parse_args_into_dataclasses()
    resolved = asdict(config) | asdict(data) | asdict(images)
    if rest.dry_run:
        print(json.dumps(resolved, indent=2))
        return
    if not config.model or not config.output_dir:
        raise ValueError(f"model={config.model!r}, output_dir={config.output_dir!r}, expected two folders")
    device = device_named(config.device)
    classifier = EarlyExitClassifier.from_pretrained(config.model).to(device)
    if classifier.config.num_labels == 1 and config.risk is not None:
        raise ValueError(f"risk={config.risk} of a regression, expected none: the loss of a guarantee is a wrong class")
    report, judge = evaluate(classifier, sources(config, data, images, classifier), config)
    folder = Path(config.output_dir)
    (folder / "policies").mkdir(parents=True, exist_ok=True)
    known = rules(classifier)
    for name, rows in report["budgeted"].items():
        for row in rows:
            known[name](row["value"]).save(folder / "policies" / f"{name}-{row['budget']:g}.json")
    for patience in range(1, len(judge.seen.depths)) if "agreement" in judge.seen.scores else ():
        pabee(patience).save(folder / "policies" / f"pabee-{patience}.json")
    judge.seen.select(judge.test).save(folder / "look.safetensors")
    judge.seen.select(judge.calibration).save(folder / "calibration.safetensors")
    write_json(folder / "report.json", {"settings": resolved, **report, "environment": environment()})
    print(told(report))


if __name__ == "__main__":
    run_script(main)
