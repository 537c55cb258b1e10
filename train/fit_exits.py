"""Fit exits to a pretrained pipeline without any data: the frozen model is its own teacher, along its own trajectories.

accelerate launch -m train.fit_exits --model <pipeline folder> --labels 0 1 2 --guidance_scale 3.0 --output_dir runs/fit
then along the trajectories of the exited model:
accelerate launch -m train.fit_exits --model <pipeline folder> --guidance_scale 3.0 --trajectories exited --exit_threshold 0.1 \\
  --init_exits runs/fit/exits --output_dir runs/fit_exited

`--exit_variant adapter --adapter_rank 32`: small adapters before the model's own tail, for any known class.
`--states fresh`: new trajectories for every batch (train_batch_size then counts trajectories); `--states dataset` with the data flags of
train_uvit: noised images instead. `--lora_rank 8`: the backbone adapts, too. `--resume_from_checkpoint latest` continues after a kill.
Writes exits/ (the whole pipeline where it has a place for exits, or where it was adapted), config.json, report.json, log.jsonl.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ee_diffusion.cli.errors import run_script
from ee_diffusion.training.config import ImageDataConfig, TrainConfig
from train.launch import launch

STATES = ("stored", "fresh", "dataset")
TRAJECTORIES = ("full", "exited")
VARIANTS = ("paper", "released", "adapter")
# Of the loop, where fitting small heads differs from training a model
DEFAULTS = {"train_batch_size": 16, "learning_rate": 1e-3, "adam_weight_decay": 0.01, "lr_warmup_steps": 50}
DEFAULTS |= {"max_train_steps": 2000, "ema_decay": 0.99, "checkpointing_steps": 500, "label_column": None}


@dataclass(frozen=True)
class FitConfig:
    """Which model, which states, which exits.

    Raises:
        ValueError: a value out of range, or flags that contradict each other.
    """

    model: str | None = HfArg(default=None, help="Folder of a diffusers pipeline with a `transformer`.")
    labels: list[str] | None = HfArg(default=None, help="Class labels in turn, or a file of them; none: every class.")
    prompts: str | None = HfArg(default=None, help="A file with a prompt a line, for text pipelines.")
    num_inference_steps: int = HfArg(default=50, help="Steps of the trajectories, as in use.")
    guidance_scale: float = HfArg(default=1.0, help="Guidance of the trajectories, as in use.")
    sampler: str | None = HfArg(default=None, help="ddim, ddpm, dpm, unipc, euler or heun; none: the pipeline's own.")
    states: str = HfArg(
        default="stored", help="stored: on disk before the fit; fresh: for every batch; dataset: noised images."
    )
    states_dir: str | None = HfArg(default=None, help="Where states are stored; none: states/ in output_dir.")
    num_trajectories: int = HfArg(default=256, help="Stored trajectories.")
    collect_batch_size: int = HfArg(default=16, help="Images per call of the pipeline, and per file of stored states.")
    trajectories: str = HfArg(
        default="full", help="full: the full model's; exited: the exited model's (with init_exits)."
    )
    exit_threshold: float | None = HfArg(default=None, help="DeeDiff's threshold, for exited trajectories.")
    exit_policy: str | None = HfArg(default=None, help="The same as a policy file.")
    init_exits: str | None = HfArg(default=None, help="Folder of exits to go on from; none: fresh ones.")
    exit_depths: list[int] | None = HfArg(default=None, help="Executed blocks at each exit; none: all but the last.")
    exit_variant: str = HfArg(
        default="paper", help="paper: DeeDiff's heads; released: the own tail; adapter: adapters before it."
    )
    adapter_rank: int | None = HfArg(default=None, help="Width inside adapters; 0: uncertainty modules alone.")
    uncertainty_weight: float = HfArg(default=1.0, help="Weight of the uncertainty modules' loss.")
    layerwise_weight: float = HfArg(default=1.0, help="Weight of the heads' loss.")
    lora_rank: int | None = HfArg(default=None, help="Also train LoRA of this rank in the blocks (peft).")
    class_drop: float = HfArg(default=0.1, help="states=dataset: probability that a label becomes the null class.")
    held_out: int = HfArg(default=16, help="Trajectories of other seeds to evaluate the exits on.")

    def __post_init__(self):
        for name, known in (("states", STATES), ("trajectories", TRAJECTORIES), ("exit_variant", VARIANTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {known}")
        for name in ("num_inference_steps", "num_trajectories", "collect_batch_size", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if (self.exit_variant == "adapter") != (self.adapter_rank is not None):
            raise ValueError(
                f"exit_variant={self.exit_variant!r}, adapter_rank={self.adapter_rank}: expected a rank for 'adapter', and for no other"
            )
        if self.labels and self.prompts:
            raise ValueError("give labels or prompts, not both")
        rules = (self.exit_threshold is not None) + (self.exit_policy is not None)
        if rules > 1 or (rules and not self.init_exits):
            raise ValueError(
                f"exit_threshold={self.exit_threshold}, exit_policy={self.exit_policy!r}, init_exits={self.init_exits!r}: expected "
                "at most one of exit_threshold and exit_policy, and init_exits with it, for fresh exits exit anywhere"
            )
        if self.trajectories == "exited" and (not rules or self.states == "dataset"):
            raise ValueError(
                "trajectories='exited' needs init_exits and one of exit_threshold and exit_policy, and is not for states='dataset'"
            )


def check(fit: FitConfig, data: ImageDataConfig, train: TrainConfig) -> None:
    if train.compile:
        raise ValueError("compile=True: fitting reads the states between blocks, which cannot be compiled")
    if (fit.states == "dataset") != bool(data.sources()):
        raise ValueError(
            f"states={fit.states!r} with data from {data.sources() or 'nowhere'}: dataset needs data, others take none"
        )


def main() -> None:
    configs = (FitConfig, ImageDataConfig, TrainConfig)
    launch(
        "train.work.fit_exits:run", __doc__, *configs, required=("output_dir", "model"), defaults=DEFAULTS, check=check
    )


if __name__ == "__main__":
    run_script(main)
