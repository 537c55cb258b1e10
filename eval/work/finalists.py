"""FD of a frontier's finalists on many seeds, with paired intervals. Flags: eval/finalists.py. n images, F features."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from ee_diffusion.core.io import write_tensors
from ee_diffusion.diffusion.pipelines.sampling import classes_of
from ee_diffusion.metrics.distribution import Statistics, frechet_distance, paired_difference
from ee_diffusion.metrics.features import ResNetFeatures, extract, resnet20_features
from ee_diffusion.metrics.files import to_bytes
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import write_report
from eval.finalists import FinalistOptions
from eval.harness.drawing import drawer
from eval.harness.interleave import Candidate, Draw, Labels
from eval.harness.options import CandidateOptions, ReferenceOptions, SamplingOptions, command, merged, results_folder
from eval.harness.pipeline import load
from eval.harness.real_images import known_reference, shape_of, unfit
from eval.harness.result_cache import name_of
from eval.harness.step_caches import NamedExits
from eval.work.frontier import contents_by_exits, drawn_under

PART = 500  # images between two files of features/


def run(options: FinalistOptions, against: ReferenceOptions) -> None:
    known = json.loads(Path(options.report).read_text(encoding="utf-8"))
    finalists, settings = finalists_of(known["candidates"], options.names), known["settings"]
    sampling, choices = (options_of(kind, settings) for kind in (SamplingOptions, CandidateOptions))
    asked = {name: getattr(options, name) for name in ("batch_size", "dtype", "device")}
    sampling = replace(sampling, output_dir=options.output_dir, **{name: own for name, own in asked.items() if own})
    pipeline = load(sampling)
    num_classes, size = classes_of(pipeline, sampling.guidance_scale), pipeline.transformer.config.sample_size
    if reason := unfit(against, **shape_of(pipeline), num_classes=num_classes):
        raise ValueError(f"no FD against {against.name}: {reason}")
    exits = NamedExits(pipeline, choices, Path(options.report).parent)
    made_with = contents_by_exits(pipeline, exits)
    made_with_all = {one.name: made_with(one) for one in finalists}  # what is missing is said before anything is drawn
    folder, draw = results_folder(options.output_dir), drawer(pipeline, sampling, exits)
    network = resnet20_features(against.data)
    reference = known_reference(against, network, size=size).statistics
    chosen = seeds("test", options.count, first=settings["count"])
    labels, rows, full = balanced_labels(options.count, num_classes), [], None
    for candidate in finalists:
        under = {"sampling": drawn_under(sampling), "contents": made_with_all[candidate.name]}
        place = {"labels": labels, "store": folder / "features", "known": under}
        features = features_of(candidate, draw, network, chosen, **place)
        full = features if candidate.name == "full" else full
        rows.append(row_of(candidate.name, features, full, reference, options=options))
        text = write_report(
            folder / "report.json",
            title="FD of a frontier's finalists",
            command=command(),
            settings=merged(options, against, sampling),
            tables={"candidates": rows},
            note=f"FD: against {against.name}. `difference`: to the full model's, with a 95 % interval over pairs.",
        )
    print(text)


def options_of(kind: type, settings: dict):
    """The options of a report's settings that belong to one dataclass."""
    return kind(**{name: settings[name] for name in kind.__dataclass_fields__})


def finalists_of(rows: list[dict], names: list[str]) -> list[Candidate]:
    """The full model, and the candidates of these names. Raises ValueError for a name that there is not, or that is tied to its images."""
    known = {row["name"]: Candidate.from_dict({k: row[k] for k in Candidate.__dataclass_fields__}) for row in rows}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"the frontier has no candidates {unknown}, expected some of {sorted(known)}")
    dealt = [name for name in names if known[name].kind.startswith("random")]
    if dealt:
        raise ValueError(f"candidates {dealt} deal exits out to the frontier's own images, expected others")
    return [known[name] for name in dict.fromkeys(["full", *names])]


def features_of(
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
        end = min(start + PART, len(chosen))
        some = labels and labels[start:end]
        path = store / f"{name_of([known, candidate.to_dict(), chosen[start:end], some])}.safetensors"
        if not path.exists():
            images = []
            for first in range(start, end, batch):
                few = slice(first, min(first + batch, end))
                images.append(to_bytes(draw(candidate, chosen[few], labels and labels[few], first).images))
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
