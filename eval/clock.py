"""Measure the times of a frontier anew, on fewer images: quality does not depend on the clock, times do on what else runs.

python -m eval.clock --report runs/frontier/frontier.json --images 16

Every candidate of the report draws the same test images in turns with the full model, with the report's own settings, after a batch each
that is discarded; `time` of every row becomes the median over batches of (candidate / full model), `seconds` those of all its batches.
Batches are whole: of --images a multiple, or all of them. Writes the report, its table and its picture in place.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.pipelines.sampling import classes_of
from ee_diffusion.metrics.tables import environment
from eval.frontier import finished
from eval.harness.candidates import check_fitted, drawer, fitted_beside, load_memory
from eval.harness.interleave import Candidate, clock_images_of, clocked
from eval.harness.options import SamplingOptions, command
from eval.harness.pipeline import load


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", required=True, help="The frontier.json whose times are measured anew.")
    parser.add_argument("--images", type=int, required=True, help="Test images of every candidate.")
    parser.add_argument("--batch_size", type=int, help="Images per forward; none: as in the report.")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="Print the resolved flags and exit.")
    return parser.parse_args()


def candidate_of(row: dict) -> Candidate:
    """A row of a report -> who drew it."""
    policy = row["policy"] and Policy.from_dict(row["policy"])
    return Candidate(row["name"], row["kind"], row["budget"], policy, row["steps"])


def main() -> None:
    options = flags()
    if options.dry_run:
        print(json.dumps(vars(options)))
        return
    report, folder = json.loads(Path(options.report).read_text()), Path(options.report).parent
    known = report["settings"]
    fields = SamplingOptions.__dataclass_fields__
    sampling = SamplingOptions(**{name: known[name] for name in fields} | {"output_dir": str(folder)})
    sampling = replace(sampling, batch_size=options.batch_size or sampling.batch_size)
    images = clock_images_of(options.images, count=options.images, batch=sampling.batch_size)
    pipeline = load(sampling)
    num_classes = classes_of(pipeline, sampling.guidance_scale)
    memory = load_memory(pipeline, known["memory"])
    some = sorted((candidate_of(row) for row in report["rows"]), key=lambda one: one.kind != "full")
    fitted = fitted_beside(pipeline, folder)
    check_fitted(some, fitted, folder)
    draw = drawer(pipeline, sampling, memory, fitted)
    times = clocked(some, draw, images=images, batch=sampling.batch_size, num_classes=num_classes)
    report["rows"] = [row | times[row["name"]] for row in report["rows"]]
    batch = min(sampling.batch_size, images)
    counts = {"images": images, "batches": images // batch, "batch_size": batch}
    clock = {"command": command(), **counts, "environment": environment()}
    finished(folder, report | {"clock": clock})


if __name__ == "__main__":
    run_script(main)
