"""Evaluate a classifier with exits: accuracy against layers and FLOPs by replay of one look, controls beside it, conformal sets, seconds.

python eval/classify.py --model runs/palbert/model --text_files sst2/dev.tsv --text_columns sentence --output_dir results/palbert

Every rule and threshold is judged from one pass of stored scores; half of the texts (--calibration_share) calibrate the conformal sets, the
figures are of the other half. Controls: every constant depth, random exits with the same histogram, the oracle. `--budget` also times the
rule that meets it, live. `--dry-run` prints the resolved settings. Writes report.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, HfArgumentParser

from ee_diffusion.core.calibrate import shuffled_overall, value_for_budget
from ee_diffusion.core.conformal import conformal_sets, conformal_thresholds
from ee_diffusion.core.policy import Policy
from ee_diffusion.encoder.classifier import EarlyExitClassifier
from ee_diffusion.encoder.costs import costs_of
from ee_diffusion.encoder.evaluate import Look, look
from ee_diffusion.encoder.methods import berxit, confidence, fastbert, jei_dnn, pabee, palbert, pondernet
from ee_diffusion.measure.classification import figures
from ee_diffusion.training.config import TextDataConfig
from ee_diffusion.training.text import TextSource, load_text_source

JUDGED: dict[str, dict[str, Callable[[float], Policy]]] = {
    "none": {},
    "halting": {"palbert": palbert},
    "linear_halting": {"palbert": palbert},
    "correctness": {"berxit": berxit},
    "statistics": {"jei_dnn": jei_dnn},
}


def _flag(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated and how.

    Raises:
        ValueError: a number out of range.
    """

    model: str | None = _flag("Folder of an EarlyExitClassifier with its tokeniser.")
    output_dir: str | None = _flag("Where report.json goes.")
    points: int = _flag("Thresholds on each curve.", 20)
    batch_size: int = _flag("Texts per batch of the look.", 32)
    calibration_share: float = _flag("Share of the texts that calibrate the conformal sets.", 0.5)
    miss_rate: float = _flag("Of the conformal sets.", 0.1)
    draws: int = _flag("Drawn exits and shuffles per curve.", 5)
    seed: int = _flag("Of the split, the draws and the shuffles.", 0)
    budget: float | None = _flag("Fraction of the layers that the timed rule may use; none: nothing is timed.")
    timed_texts: int = _flag("Texts of each timing.", 64)
    timed_runs: int = _flag("Runs of each timing, the median of which counts.", 3)

    def __post_init__(self):
        if not 0 < self.calibration_share < 1 or not 0 < self.miss_rate < 1:
            raise ValueError(f"calibration_share={self.calibration_share}, miss_rate={self.miss_rate}, expected (0, 1)")
        for name in ("points", "batch_size", "draws", "timed_texts", "timed_runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")


def batches(source: TextSource, size: int) -> Iterator[dict[str, Tensor]]:
    """The texts in their order."""
    for part in torch.arange(len(source)).split(size):
        yield source.batch(part, part)


class Judge:
    """Figures and costs of answers taken, on the texts that are not for calibration."""

    def __init__(self, classifier: EarlyExitClassifier, seen: Look, config: EvalConfig):
        self.seen, self.config = seen, config
        n = len(seen.labels)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
        cut = int(n * config.calibration_share)
        self.calibration, self.test = order[:cut], order[cut:]
        self.classifier = classifier
        self._ways: dict[str | None, Tensor] = {}

    def ways(self, score: str | None) -> Tensor:
        """(n, A) FLOPs of the whole way to each answer of each text, under rules that look at `score`."""
        if score not in self._ways:
            seen, model, exits = self.seen, self.classifier.model, self.classifier.exits
            lengths, where = seen.tokens.unique(return_inverse=True)
            per_length = []
            for tokens in lengths.tolist():
                costs = costs_of(model, exits, tokens, score=score)
                whole = seen.num_layers * costs.block + costs.tail
                per_length.append(costs.up_to(seen.depths, seen.num_layers) * whole)
            self._ways[score] = torch.stack(per_length)[where]
        return self._ways[score]

    def __call__(self, taken: Tensor, *, score: str | None) -> dict:
        """taken (n,) under a rule that looks at `score` -> figures of the test texts, mean layers, FLOPs in parts of the full model's
        (not where tokens are pruned: a look does not count them)."""
        seen, test = self.seen, self.test
        depths = torch.tensor([*seen.depths, seen.num_layers])[taken[test]].double()
        found = figures(seen.given(taken)[test], seen.labels[test]) | {"layers": depths.mean().item()}
        if self.classifier.pruning is None:
            used, whole = self.ways(score)[test, taken[test]].sum(), self.ways(None)[test, -1].sum()
            found["flops_fraction"] = (used / whole).item()
        return found

    def conformal(self, taken: Tensor) -> dict:
        """Mean size and miss rate of sets calibrated per exit on the calibration texts."""
        seen, rate = self.seen, self.config.miss_rate
        p, part = seen.given(taken).double().softmax(-1), self.calibration
        thresholds = conformal_thresholds(
            p[part], seen.labels[part], taken[part], num_answers=len(seen.depths) + 1, miss_rate=rate
        )
        sets = conformal_sets(p[self.test], taken[self.test], thresholds=thresholds)  # (m, C)
        held = sets.gather(1, seen.labels[self.test][:, None])[:, 0]
        return {
            "set_size": sets.sum(1).double().mean().item(),
            "missed": 1 - held.double().mean().item(),
            "allowed": rate,
        }

    def shuffled(self, taken: Tensor) -> float:
        """Mean accuracy of random exits with the same histogram."""
        generator = torch.Generator().manual_seed(self.config.seed)
        drawn = [
            self(shuffled_overall(taken[None], generator)[0], score=None)["accuracy"] for _ in range(self.config.draws)
        ]
        return sum(drawn) / len(drawn)


def rules(classifier: EarlyExitClassifier) -> dict[str, Callable[[float], Policy]]:
    """The rules with a threshold in [0, 1], larger is safer, that these exits can follow."""
    plain = {"confidence": confidence, "fastbert": lambda value: fastbert(1 - value)}
    return JUDGED[classifier.exits.judge] | plain


def curve(judge: Judge, rule: Callable[[float], Policy], points: int) -> list[dict]:
    """One rule at thresholds spread over the quantiles of its own scores."""
    score = rule(0.5).criterion.score
    scores = judge.seen.scores[score]
    if rule is palbert:  # its threshold is on the cumulated probability
        scores = 1 - (1 - scores).cumprod(0)
    values = scores.flatten().double().quantile(torch.linspace(0, 1, points, dtype=torch.float64)).clamp(0, 1)
    found = []
    for value in values.unique().tolist():
        taken = judge.seen.taken(rule(value))
        found.append(
            {
                "value": value,
                **judge(taken, score=score),
                "shuffled_accuracy": judge.shuffled(taken),
                **judge.conformal(taken),
            }
        )
    return found


def controls(judge: Judge, classifier: EarlyExitClassifier, config: EvalConfig) -> dict:
    seen = judge.seen
    n, answers = len(seen.labels), (*seen.depths, seen.num_layers)
    constant = [{"depth": depth, **judge(torch.full((n,), place), score=None)} for place, depth in enumerate(answers)]
    found = {"constant_depth": constant, "oracle": judge(seen.oracle(), score=None)}
    found["pabee"] = [
        {"patience": t, **judge(seen.taken(pabee(t)), score="agreement")} for t in range(1, len(seen.depths))
    ]
    if classifier.exits.judge in ("halting", "linear_halting"):
        found["sampled"] = [
            judge(seen.taken(pondernet(config.seed + draw)), score="judged") for draw in range(config.draws)
        ]
    return found


@torch.no_grad()
def seconds(classifier: EarlyExitClassifier, source: TextSource, policy: Policy, config: EvalConfig) -> dict:
    """Median seconds for the first texts at batches of 1, 8, 32: the full model and the rule, in turn; one run of each to warm up."""
    count = min(config.timed_texts, len(source))
    found = {"texts": count, "runs": config.timed_runs, "threads": torch.get_num_threads()}
    for size in (1, 8, 32):
        made = [source.batch(part, part) for part in torch.arange(count).split(size)]
        times: dict[str, list[float]] = {"full": [], "rule": []}
        for run in range(config.timed_runs + 1):
            for name, chosen in (("full", Policy()), ("rule", policy)):
                classifier.policy = chosen
                begun = time.perf_counter()
                for batch in made:
                    classifier(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                if run:
                    times[name].append(time.perf_counter() - begun)
        found[f"batch_{size}"] = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    return found


def evaluate(classifier: EarlyExitClassifier, source: TextSource, config: EvalConfig) -> dict:
    known = rules(classifier)
    scores = list(dict.fromkeys([*(rule(0.5).criterion.score for rule in known.values()), "agreement"]))
    seen = look(classifier, batches(source, config.batch_size), scores=scores)
    judge = Judge(classifier, seen, config)
    report = {"texts": len(seen.labels), "test_texts": len(judge.test), "depths": [*seen.depths, seen.num_layers]}
    report["rules"] = {name: curve(judge, rule, config.points) for name, rule in known.items()}
    report["controls"] = controls(judge, classifier, config)
    if config.budget is not None:
        name, rule = next(iter(known.items()))
        score = rule(0.5).criterion.score
        choice = value_for_budget(seen.trace(score), rule, budget=config.budget, low=0.0, high=1.0)
        taken = judge(seen.taken(rule(choice.value)), score=score)
        timed = seconds(classifier, source, rule(choice.value), config)
        report["budgeted"] = {"rule": name, **asdict(choice), **taken, "seconds": timed}
    return report


def main() -> None:
    parser = HfArgumentParser((EvalConfig, TextDataConfig), description=__doc__.splitlines()[0])
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="Print the resolved settings and exit.")
    config, data, rest = parser.parse_args_into_dataclasses()
    resolved = asdict(config) | asdict(data)
    if rest.dry_run:
        print(json.dumps(resolved, indent=2))
        return
    if not config.model or not config.output_dir:
        raise ValueError(f"model={config.model!r}, output_dir={config.output_dir!r}, expected two folders")
    classifier, tokenizer = (
        EarlyExitClassifier.from_pretrained(config.model),
        AutoTokenizer.from_pretrained(config.model),
    )
    if classifier.config.num_labels < 2:
        raise ValueError("a regression has no exits by class probabilities: nothing here judges it")
    source = load_text_source(
        data,
        lambda texts: tokenizer(texts, truncation=True, max_length=data.max_length)["input_ids"],
        num_labels=classifier.config.num_labels,
        pad=tokenizer.pad_token_id,
    )
    report = {"settings": resolved} | evaluate(classifier, source, config)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["controls"]["constant_depth"][-1]))


if __name__ == "__main__":
    main()
