"""Fit the error estimator of cached outputs to a model, along its own trajectories; no data needed.

python -m train.fit_step_cache --model runs/exits --output_dir runs/step_cache

Runs the full model at every step and compares what the step cache would have returned; a second run, with other seeds, shows what the fit
gains over the unfitted estimator. Writes the component `exits/` (load it with CachedOutputExits.from_pretrained) and report.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ee_diffusion.cli.errors import run_script
from train.launch import launch


@dataclass(frozen=True)
class StepCacheConfig:
    """The model, how its outputs are cached, and the runs that the estimator is fitted to.

    Raises:
        ValueError: a number too small, a run too short to compare a cached output, a skip outside [0, 1), guidance that is not finite.
    """

    model: str | None = HfArg(default=None, help="Pipeline folder; none: the checkpoint that comes with the package.")
    output_dir: str | None = HfArg(default=None, help="Where exits/ and report.json go.")
    length: int = HfArg(default=2, help="Cached outputs: 1 repeats the newest, 2 extrapolates linearly.")
    cached_type: str = HfArg(default="sample", help="What is cached: sample or epsilon.")
    linear_prediction: bool = HfArg(default=False, help="Fit how cached outputs are weighted, by least squares, too.")
    states: str = HfArg(default="exited", help="Whose trajectories: exited or full.")
    skip: float = HfArg(default=0.6, help="Probability that a step returns a cached output.")
    count: int = HfArg(default=64, help="Images of each run.")
    num_inference_steps: int = HfArg(default=50, help="Denoising steps.")
    guidance_scale: float = HfArg(default=4.0, help="Classifier-free guidance.")
    iterations: int = HfArg(default=1000, help="Optimizer steps, each on the whole run.")

    def __post_init__(self):
        for name in ("length", "count", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.num_inference_steps < self.length + 2:
            raise ValueError(
                f"num_inference_steps={self.num_inference_steps}, expected at least {self.length + 2}: with {self.length} cached "
                f"outputs the first comparison is at step {self.length + 2}"
            )
        if not 0 <= self.skip < 1 or not math.isfinite(self.guidance_scale):
            raise ValueError(
                f"skip={self.skip}, guidance_scale={self.guidance_scale}, expected a probability below 1 and a finite number"
            )


def main() -> None:
    launch("train.work.step_cache:run", __doc__, StepCacheConfig)


if __name__ == "__main__":
    run_script(main)
