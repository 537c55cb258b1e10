"""Quality beside measured time: the step cache and exits beside everything that is simpler, at the same seeds, in one run.

python -m eval.frontier --config eval/configs/frontier-ddim50.yaml --output_dir runs/frontier

Candidates are named by their flags: fewer steps; a periodic cache; schedules found by search; step caches that decide per image, by an
error each step or by what adds up; DeeDiff at thresholds or at shares of the blocks, as written and as released; an oracle that knows the
true error (its shadow of the full model is not timed); diffusers' caches. Policies that decide get controls made of their own trace: a
static schedule, random exits per step and overall, and, for shares of the blocks, fewer steps in the same measured time.
Images and traces are kept in drawn/: a run that was stopped goes on when started again. Times are never kept: all candidates draw
--clock_images images in turns with the full model, each warm; a time is the median over batches of (candidate / full model). Where other
work disturbed this clock, start it again on a quiet machine: nothing is drawn twice, all is timed anew.
Writes report.json, report.md, frontier.png and candidates.json, which eval.finalists reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from ee_diffusion.cli.errors import run_script
from eval.harness.options import COUNT, CandidateOptions, ReferenceOptions, SamplingOptions, check_numbers, flag, launch


@dataclass(frozen=True)
class FrontierOptions:
    """How many images.

    Raises:
        ValueError: numbers out of range.
    """

    count: int = flag("Test images.", 128)
    clock_images: int | None = flag("Test images that times are measured on, whole batches; none: two batches.")
    clock_batch_size: int | None = flag("Images per forward while times are measured; none: --batch_size.")

    def __post_init__(self):
        check_numbers(self, COUNT, "count")
        check_numbers(self, COUNT, *(name for name in ("clock_batch_size",) if self.clock_batch_size is not None))


def main() -> None:
    kinds = (SamplingOptions, FrontierOptions, CandidateOptions, ReferenceOptions)
    launch(__doc__, "eval.work.frontier:run", *kinds)


if __name__ == "__main__":
    run_script(main)
