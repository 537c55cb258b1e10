"""A stock `DiTPipeline` end to end: load, attach, calibrate, generate beside the controls, save, load again in a new process.

python -m eval.end_to_end --model runs/dit --exits runs/fit/exits --fit_report runs/fit/report.json --output_dir runs/end-to-end

The exits come from train.fit_exits, which sees no data. Thresholds for --deediff_shares of the blocks are found by replay on calibration
seeds; they, the step cache, fewer steps, cache-dit's DBCache and the controls of each (fewer steps in the same measured time, a static
schedule, random exits per step and overall) draw the same test seeds. --searched_fitted and --searched_joint fit the step cache to the
pipeline's own call (`fit_schedules`). Candidates take turns batch by batch; a time is the median over batches of (candidate / full
model), the decoder included. Images are judged at --judged_size pixels.
Writes pipeline/ (with the exits), policy.json, report.json and report.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from ee_diffusion.cli.errors import run_script
from eval.harness.options import COUNT, CandidateOptions, ReferenceOptions, check_numbers, flag, launch

COUNTS = ("num_classes", "num_inference_steps", "batch_size", "count", "fit_count", "judged_size")
DEFAULTS = {"deediff_shares": [0.6], "error_thresholds": [0.01], "cache_intervals": [2], "calibration_count": 32}


@dataclass(frozen=True)
class EndToEndOptions:
    """Which model, which exits, how many images.

    Raises:
        ValueError: a folder that is not given, a number out of range.
    """

    model: str | None = flag("Folder of a stock DiTPipeline.")
    exits: str | None = flag("Folder of exits fitted to it.")
    fit_report: str | None = flag("report.json of that fit, to be quoted; none: left out.")
    output_dir: str | None = flag("Folder for the results.")
    num_classes: int = flag("Classes that are drawn, the first of the model's.", 10)
    num_inference_steps: int = flag("Denoising steps.", 50)
    guidance_scale: float = flag("Classifier-free guidance.", 3.0)
    batch_size: int = flag("Images per call.", 16)
    count: int = flag("Test images.", 64)
    fit_count: int = flag("Images that the step cache is fitted to, drawn in full.", 16)
    judged_size: int = flag("Pixels that images are reduced to before they are judged.", 32)
    seed: int = flag("Seed of the random controls.", 0)

    def __post_init__(self):
        for name in ("model", "exits", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}, expected a folder")
        check_numbers(self, COUNT, *COUNTS)


def main() -> None:
    launch(__doc__, "eval.work.end_to_end:run", EndToEndOptions, CandidateOptions, ReferenceOptions, **DEFAULTS)


if __name__ == "__main__":
    run_script(main)
