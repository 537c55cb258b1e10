"""FD of a frontier's finalists on many images: how much worse than the full model, with an interval, in disjoint blocks of seeds.

python -m eval.finalists --report runs/frontier/frontier.json --names "searched 12 full" "20 steps" --output_dir runs/finalists

The full model and the rows that --names name draw the same test seeds, none of which the report used, with the report's own settings.
FD is on resnet20's features against CIFAR-10's training images, or those that --reference_dir, --reference_files or
--reference_statistics names. `difference` is FD minus the full model's, its interval from resamples of
the pairs; `block_*` the same on each of --blocks disjoint parts of the seeds. What was seen is kept in seen/: a run that was stopped goes
on when started again. Writes finalists.json and finalists.md.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.io import write_tensors, write_text
from ee_diffusion.diffusion.pipelines.sampling import classes_of
from ee_diffusion.metrics.distribution import Statistics, frechet_distance, paired_difference
from ee_diffusion.metrics.features import ResNetFeatures, extract, resnet20_features
from ee_diffusion.metrics.files import to_bytes
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from eval.clock import candidate_of
from eval.harness.candidates import base_of, check_fitted, drawer, exits_by_kind, fitted_beside, load_memory
from eval.harness.interleave import Candidate, Draw, Labels
from eval.harness.options import DTYPES, SamplingOptions, command, flag, parse
from eval.harness.pipeline import load
from eval.harness.real_images import ReferenceOptions, known_reference, shape_of, unfit
from eval.harness.result_cache import contents, name_of

PART = 500  # images between two files of seen/


@dataclass(frozen=True)
class FinalistOptions:
    """Which rows of which report, and how many images.

    Raises:
        ValueError: numbers out of range.
    """

    report: str | None = flag("The frontier.json whose rows are looked at; its folder holds what was fitted.")
    names: list[str] = field(default_factory=list, metadata={"help": "Names of rows, beside the full model."})
    output_dir: str | None = flag("Where finalists.json and finalists.md go.")
    count: int = flag("Test images, after those of the report.", 10_000)
    blocks: int = flag("Disjoint parts of the seeds that are looked at alone.", 3)
    resamples: int = flag("Resamples of the pairs for an interval.", 400)
    batch_size: int | None = flag("Images per forward; none: as in the report.")
    dtype: str | None = flag("float32, bfloat16 or float16; none: as in the report.")
    device: str | None = flag("cpu, cuda, ...; none: cuda if there is one.")
    seed: int = flag("Seed of the resamples.", 0)

    def __post_init__(self):
        for name in ("report", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is missing")
        if not self.names or self.blocks < 1 or self.resamples < 2 or self.count < 2 * self.blocks:
            raise ValueError(
                f"names={self.names}, count={self.count}, blocks={self.blocks}, resamples={self.resamples}, expected a name, at least two "
                "images a block and two resamples"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}, expected one of {DTYPES}")


def finalists_of(rows: list[dict], names: list[str]) -> list[Candidate]:
    """The full model, and the rows of these names. Raises ValueError for a name that there is not, or whose policy was left out."""
    known = {row["name"]: row for row in rows}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"the report has no rows {unknown}, expected some of {sorted(known)}")
    dealt = [name for name in names if known[name]["kind"].startswith("random")]
    if dealt:
        raise ValueError(f"rows {dealt} deal exits out to the report's own images, expected others")
    return [candidate_of(known[name]) for name in dict.fromkeys(["full", *names])]


def sampling_of(report: dict, options: FinalistOptions) -> SamplingOptions:
    """The report's settings, with what was asked for in their place."""
    known = {name: report["settings"][name] for name in SamplingOptions.__dataclass_fields__}
    asked = {"batch_size": options.batch_size, "dtype": options.dtype, "device": options.device}
    asked = {name: value for name, value in asked.items() if value is not None}
    return SamplingOptions(**known | {"output_dir": options.output_dir} | asked)


def seen(
    candidate: Candidate,
    draw: Draw,
    network: ResNetFeatures,
    chosen: list[int],
    *,
    labels: Labels,
    store: Path,
    known: dict,
) -> Tensor:
    """Features (n, F) of what a candidate draws from the seeds `chosen`; kept in `store`, part by part."""
    store.mkdir(parents=True, exist_ok=True)
    batch, parts = known["sampling"]["batch_size"], []
    for start in tqdm(range(0, len(chosen), PART), desc=candidate.name, mininterval=10):
        some = slice(start, min(start + PART, len(chosen)))
        own = asdict(candidate) | {"policy": candidate.policy and candidate.policy.to_dict()}
        path = store / f"{name_of([known, own, chosen[some], labels and labels[some]])}.safetensors"
        if not path.exists():
            images = [
                to_bytes(
                    draw(
                        candidate,
                        chosen[first : min(first + batch, some.stop)],
                        labels and labels[first : min(first + batch, some.stop)],
                        first,
                    ).images
                )
                for first in range(some.start, some.stop, batch)
            ]
            write_tensors(path, {"features": extract(network, torch.cat(images), batch_size=256)})
        parts.append(load_file(path)["features"])
    return torch.cat(parts)


def row_of(name: str, features: Tensor, full: Tensor, reference: Statistics, *, options: FinalistOptions) -> dict:
    """One line: FD, the difference to the full model's with its interval, and the difference in each block."""
    found = frechet_distance(features, reference)
    facts = {"name": name, "images": found.count, "reference_images": found.reference_count, "fd": found.value}
    if name == "full":
        return facts
    low, high = paired_difference(features, full, reference, resamples=options.resamples, seed=options.seed)
    own = frechet_distance(full, reference).value
    facts |= {"difference": found.value - own, "low": low, "high": high, "relative": found.value / own - 1}
    blocks = zip(features.chunk(options.blocks), full.chunk(options.blocks), strict=True)
    for place, (part, other) in enumerate(blocks, start=1):
        facts[f"block_{place}"] = frechet_distance(part, reference).value - frechet_distance(other, reference).value
    return facts


def main() -> None:
    options, against = parse(FinalistOptions, ReferenceOptions, description=__doc__)
    report, source, folder = (
        json.loads(Path(options.report).read_text()),
        Path(options.report).parent,
        Path(options.output_dir),
    )
    finalists, sampling = finalists_of(report["rows"], options.names), sampling_of(report, options)
    settings, pipeline = report["settings"], load(sampling)
    num_classes, size = classes_of(pipeline, sampling.guidance_scale), pipeline.transformer.config.sample_size
    reason = unfit(against, **shape_of(pipeline), num_classes=num_classes)
    if reason:
        raise ValueError(f"no FD against {against.name}: {reason}")
    memory = load_memory(pipeline, settings["memory"])
    fitted = fitted_beside(pipeline, source)
    check_fitted(finalists, fitted, source)
    draw, network = drawer(pipeline, sampling, memory, fitted), resnet20_features(against.data)
    reference = known_reference(against, network, size=size).statistics
    chosen = seeds("test", options.count, first=settings["count"])
    labels = balanced_labels(options.count, num_classes)
    sampled = asdict(sampling) | dict.fromkeys(("model", "output_dir", "device"))  # `contents` says more of them
    kinds, rows, full = exits_by_kind(pipeline, memory, fitted), [], None
    for candidate in finalists:
        known = {"sampling": sampled, "contents": contents(pipeline, kinds.get(base_of(candidate.kind)))}
        features = seen(candidate, draw, network, chosen, labels=labels, store=folder / "seen", known=known)
        full = features if candidate.name == "full" else full
        rows.append(row_of(candidate.name, features, full, reference, options=options))
        write_json(
            folder / "finalists.json",
            {
                "command": command(),
                "settings": asdict(options) | asdict(against) | asdict(sampling),
                "figures": f"FD: against {against.name}.",
                "environment": environment(),
                "rows": rows,
            },
        )
        write_text(folder / "finalists.md", markdown_table(rows, list(rows[-1])) + f"\nFD: against {against.name}.\n")
    print((folder / "finalists.md").read_text())


if __name__ == "__main__":
    run_script(main)
