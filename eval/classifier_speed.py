"""Seconds of classifiers with exits, side by side on the same texts: batches of 1, 8, 32, every setting in turn, medians of ratios.

python -m eval.classifier_speed --names full palbert both --models runs/plain/model runs/palbert/model runs/magic/model \
    --policies off results/palbert/policies/palbert-0.7.json own --pruning none none own \
    --text_files sst2/test-labeled.tsv --text_columns sentence --output_dir results/speed

The first setting is what the others are compared with. A policy is a file, `off`, or `own` (saved with the model); pruning `own` or `none`.
Every run goes over all timed texts, spread evenly over the lengths; one run of each setting warms up. Images: --train_data_files.
`--dry-run` prints the resolved settings. Writes report.json, after every batch size.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, HfArgumentParser

from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.devices import device_named
from ee_diffusion.core.policy import Policy
from ee_diffusion.metrics.tables import environment, write_json
from ee_diffusion.metrics.timing import interleaved
from ee_diffusion.training.config import ImageDataConfig, TextDataConfig
from ee_diffusion.training.datasets import Source
from ee_diffusion.training.sources import load_labeled_images
from ee_diffusion.training.text_datasets import TextSource, load_text_source


def _flag(help: str, default=None):
    return field(default=default, metadata={"help": help})


def _list(help: str):
    return field(default_factory=list, metadata={"help": help})


@dataclass(frozen=True)
class SpeedConfig:
    """What is timed and how.

    Raises:
        ValueError: lists of different lengths, numbers out of range.
    """

    names: list[str] = _list("A name for each setting.")
    models: list[str] = _list("The folder of each setting's EarlyExitClassifier.")
    policies: list[str] = _list("The policy of each: a file, off or own.")
    pruning: list[str] = _list("Whether tokens are removed: own or none.")
    output_dir: str | None = _flag("Where report.json goes.")
    device: str | None = _flag("cpu, cuda, ...; none: cuda if there is one.")
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Texts per forward."})
    timed_texts: int = _flag("Texts of each run.", 64)
    timed_runs: int = _flag("Runs of each setting.", 5)
    thirds: bool = _flag("Also time the shortest, middle and longest third of the texts by themselves.", False)

    def __post_init__(self):
        lengths = [len(one) for one in (self.names, self.models, self.policies, self.pruning)]
        if len(set(lengths)) != 1:
            raise ValueError(f"{lengths} names, models, policies and prunings, expected one of each for every setting")
        unknown = [word for word in self.pruning if word not in ("own", "none")]
        if unknown:
            raise ValueError(f"pruning {unknown[0]!r}, expected own or none")
        for name in ("timed_texts", "timed_runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")


def settings(config: SpeedConfig) -> dict[str, EarlyExitClassifier]:
    """Each setting's classifier, as it will be called."""
    found, device = {}, device_named(config.device)
    for name, folder, policy, pruning in zip(config.names, config.models, config.policies, config.pruning, strict=True):
        classifier = EarlyExitClassifier.from_pretrained(folder).to(device).eval()
        if policy != "own":
            classifier.policy = Policy() if policy == "off" else Policy.load(policy)
        if pruning == "none":
            classifier.pruning = None
        found[name] = classifier
    return found


def source_of(config: SpeedConfig, data: TextDataConfig, images: ImageDataConfig, num_labels: int) -> Source:
    if images.sources():
        return load_labeled_images(replace(images, random_flip=False), num_labels=num_labels)
    tokenizer = AutoTokenizer.from_pretrained(config.models[0])
    return load_text_source(
        data,
        lambda texts: tokenizer(texts, truncation=True, max_length=data.max_length)["input_ids"],
        num_labels=num_labels,
        pad=tokenizer.pad_token_id,
    )


def chosen(source: Source, count: int) -> torch.Tensor:
    """Places of `count` texts that stand for all lengths, shortest first; images as they come."""
    if not isinstance(source, TextSource):
        return torch.arange(min(count, len(source)))
    order = torch.tensor([len(one) for one in source.tokens]).argsort(stable=True)
    places = torch.linspace(0, len(source) - 1, min(count, len(source))).round().long()
    return order[places]


@torch.no_grad()
def run(classifier: EarlyExitClassifier, batches: list[dict]) -> None:
    for batch in batches:
        classifier(**{name: value for name, value in batch.items() if name not in ("labels", "key")})


def timed(
    ready: dict[str, EarlyExitClassifier], source: Source, places: torch.Tensor, *, size: int, runs: int
) -> list[dict]:
    """Every setting in turn, `runs` times: medians of seconds, and of the ratio to the first setting in the same turn."""
    mixed = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))]
    device = next(iter(ready.values())).device
    batches = [source.batch(part, part.to(device)) for part in mixed.split(size)]
    calls = {name: functools.partial(run, classifier, batches) for name, classifier in ready.items()}
    timings = interleaved(calls, repeats=runs, warmup=1, dtype=torch.float32, batch=size)
    first = next(iter(timings.values()))
    rows = []
    for name, timing in timings.items():
        ratios = sorted(own / whole for own, whole in zip(timing.seconds, first.seconds, strict=True))
        found = {"seconds": timing.median, "ratio": timing.ratio(first), "low": ratios[0], "high": ratios[-1]}
        rows.append({"name": name, "batch": size} | found)
    return rows


def main() -> None:
    parser = HfArgumentParser((SpeedConfig, TextDataConfig, ImageDataConfig), description=__doc__.splitlines()[0])
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="Print the resolved settings and exit.")
    config, data, images, rest = parser.parse_args_into_dataclasses()
    resolved = asdict(config) | asdict(data) | asdict(images)
    if rest.dry_run:
        print(json.dumps(resolved, indent=2))
        return
    if not config.models or not config.output_dir:
        raise ValueError(f"models={config.models}, output_dir={config.output_dir!r}, expected folders")
    ready = settings(config)
    source = source_of(config, data, images, next(iter(ready.values())).config.num_labels)
    places = chosen(source, config.timed_texts)
    groups = {"all": places}
    if config.thirds:
        groups |= dict(zip(("short", "middle", "long"), places.tensor_split(3), strict=True))
    report = {"settings": resolved, "count": len(places), "runs": config.timed_runs}
    if isinstance(source, TextSource):
        report["mean_tokens"] = {
            name: sum(len(source.tokens[i]) for i in own) / len(own) for name, own in groups.items()
        }
    rows = []
    for group, own in groups.items():
        for size in config.batch_sizes:
            timings = timed(ready, source, own, size=size, runs=config.timed_runs)
            rows += [{"texts": group} | row for row in timings]
            write_json(Path(config.output_dir) / "report.json", {**report, "rows": rows, "environment": environment()})
    print(json.dumps(rows))


if __name__ == "__main__":
    run_script(main)
