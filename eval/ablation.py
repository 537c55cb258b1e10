"""What each part of answering from memory is worth: one table, the same seeds, one run.

python -m eval.ablation --memory runs/memory/exits --memory_full_states runs/memory_full/exits --output_dir runs/ablation

Lines: memory without uncertainty (a fixed period), uncertainty without memory (DeeDiff), both; the decision per image and for the whole
batch by its worst image; the uncertainty fitted along the exited and along the full model's trajectories; the bound on
each step alone. A folder that is not given: its lines are left out. Images are kept in drawn/; times are measured at the end, on
--clock_images images, in turns with the full model. Writes ablation.json and ablation.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.io import write_text
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.methods import accumulated_error_budget, deediff, per_step_error_threshold, periodic_cache
from ee_diffusion.diffusion.pipelines.sampling import Generated, classes_of, generate
from ee_diffusion.diffusion.step_cache.error_propagation import error_weights
from ee_diffusion.diffusion.step_cache.solver import local_error_gain
from ee_diffusion.metrics.quality import COLUMNS, flat
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from eval.harness.candidates import WARM_UP, gains_of, load_memory
from eval.harness.frontier_options import FrontierOptions
from eval.harness.interleave import Candidate, by_batch, clock_images_of, clocked
from eval.harness.options import SamplingOptions, command, flag, parse, results_folder
from eval.harness.pipeline import load
from eval.harness.real_images import ReferenceOptions, judge_of, shape_of
from eval.harness.result_cache import contents, kept
from eval.harness.whole_batch import WholeBatch
from eval.tradeoff import quality


@dataclass(frozen=True)
class AblationOptions:
    """How many images, at which settings, and what was fitted how."""

    count: int = flag("Test images.", 32)
    clock_images: int | None = flag("Test images that times are measured on; none: two batches.")
    memory: str | None = flag("Exits of train/fit_step_cache.py (--states exited); none: unfitted.")
    memory_full_states: str | None = flag("The same with --states full.")
    budget: float = flag("Of `budgeted`.", 0.0048)
    decay: float = flag("Of `budgeted`.", 0.7)
    error: float = flag("Of `remembered`.", 0.0015)
    period: int = flag("Of the fixed cache.", 3)
    threshold: float = flag("Of DeeDiff, on u.", 0.1)


def lines(pipeline, options: AblationOptions, sampling: SamplingOptions) -> Iterator[tuple[str, object, Policy]]:
    """Name, exits, policy."""
    memory, steps = load_memory(pipeline, options.memory), sampling.num_inference_steps
    sensitivity = local_error_gain(memory, pipeline.scheduler, steps)
    weights = error_weights(sensitivity, gains_of(pipeline, memory, sampling, FrontierOptions()), power=0.5)
    both = accumulated_error_budget(options.budget, weights=weights, decay=options.decay)
    yield "memory without uncertainty", memory, periodic_cache(options.period, warmup_steps=WARM_UP)
    if pipeline.exits is not None:
        yield "uncertainty without memory", pipeline.exits, deediff(options.threshold)
    yield "both, per image", memory, both
    yield "both, whole batch", memory, Policy(WholeBatch(both.criterion), exits=(0,))
    if options.memory_full_states:
        yield "both, fitted along the full model", load_memory(pipeline, options.memory_full_states), both
    yield "both, bounded step by step", memory, per_step_error_threshold(options.error, local_gains=sensitivity)


def main() -> None:
    sampling, options, reference = parse(SamplingOptions, AblationOptions, ReferenceOptions, description=__doc__)
    images = clock_images_of(options.clock_images, count=options.count, batch=sampling.batch_size)
    folder, pipeline = results_folder(sampling.output_dir), load(sampling)
    num_classes = classes_of(pipeline, sampling.guidance_scale)
    judge = judge_of(reference, **shape_of(pipeline), num_classes=num_classes)
    chosen, labels = seeds("test", options.count), balanced_labels(options.count, num_classes)
    steps, exits = sampling.num_inference_steps, {}
    some = [Candidate("full", "full", None, None, steps)]
    for name, own, policy in lines(pipeline, options, sampling):
        exits[name] = own
        some.append(Candidate(name, "line", None, policy, steps))

    def draw(candidate: Candidate, few: list[int], classes: list[int], first: int) -> Generated:
        pipeline.exits = exits.get(candidate.name)
        call = {"num_inference_steps": steps, "guidance_scale": sampling.guidance_scale, "first_id": first}
        return generate(pipeline, few, classes, batch_size=sampling.batch_size, exit_policy=candidate.policy, **call)

    known = asdict(sampling) | dict.fromkeys(("model", "output_dir", "device"))  # `contents` says more of them
    made_with = cache(lambda name: contents(pipeline, exits.get(name)))
    again = kept(draw, folder / "drawn", known, lambda candidate: made_with(candidate.name))
    drawn = by_batch(some, again, chosen, labels, batch=sampling.batch_size)
    times = clocked(some, draw, images=images, batch=sampling.batch_size, num_classes=num_classes)
    rows = [quality(one, drawn[one.name], drawn["full"], judge=judge, labels=labels) | times[one.name] for one in some]
    settings = asdict(sampling) | asdict(options) | asdict(reference) | {"clock_images": images}
    report = {"command": command(), "settings": settings, "figures": judge.note(), "environment": environment()}
    report["rows"] = rows
    write_json(folder / "ablation.json", report)
    columns = ["name", "time", "executed", *(name for name in COLUMNS if name in rows[0])]
    shown = [{**r, "executed": r.get("report", {}).get("mean_executed"), **flat(r)} for r in rows]
    write_text(folder / "ablation.md", markdown_table(shown, columns) + f"\n{judge.note()}\n")
    print((folder / "ablation.md").read_text())


if __name__ == "__main__":
    run_script(main)
