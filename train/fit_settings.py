"""Settings of the fitting script, checked when they are made. Not here: what they do (ee_diffusion.diffusion, ee_diffusion.training)."""

from __future__ import annotations

from dataclasses import dataclass, field

STATES = ("stored", "fresh", "dataset")
TRAJECTORIES = ("full", "exited")
VARIANTS = ("paper", "released", "adapter")


def _flag(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class FitConfig:
    """Which model, which states, which exits.

    Raises:
        ValueError: a value out of range, or flags that contradict each other.
    """

    model: str | None = _flag("Folder of a diffusers pipeline with a `transformer`.")
    labels: list[str] | None = _flag("Class labels in turn, or one file with a label a line; none: every class.")
    prompts: str | None = _flag("A file with a prompt a line, for text pipelines.")
    num_inference_steps: int = _flag("Steps of the trajectories, as in use.", 50)
    guidance_scale: float = _flag("Guidance of the trajectories, as in use.", 1.0)
    sampler: str | None = _flag("ddim, ddpm, dpm, unipc, euler or heun; none: the pipeline's own.")
    states: str = _flag(
        "stored: on disk before the fit; fresh: new ones for every batch; dataset: noised images.", "stored"
    )
    states_dir: str | None = _flag("Where stored states lie; none: states/ in output_dir.")
    num_trajectories: int = _flag("Stored trajectories.", 256)
    collect_batch_size: int = _flag("Images per call of the pipeline, and per file of stored states.", 16)
    trajectories: str = _flag(
        "full: the full model's; exited: the exited model's (needs init_exits and a rule).", "full"
    )
    exit_threshold: float | None = _flag(
        "Rule of exited trajectories, which the exits are judged on wherever it is given: DeeDiff's threshold on the mean uncertainty."
    )
    exit_policy: str | None = _flag("The same as a policy file.")
    init_exits: str | None = _flag("Folder of exits to go on from; none: fresh ones.")
    exit_depths: list[int] | None = _flag("Executed blocks at each exit; none: after every block but the last.")
    exit_variant: str = _flag(
        "paper: DeeDiff's heads; released: the model's own tail; adapter: small adapters before it (any class of the family table).",
        "paper",
    )
    adapter_rank: int | None = _flag("exit_variant=adapter: width inside the adapters; 0: uncertainty modules alone.")
    uncertainty_weight: float = _flag("Weight of the uncertainty modules' loss.", 1.0)
    layerwise_weight: float = _flag("Weight of the heads' loss.", 1.0)
    lora_rank: int | None = _flag("Also train adapters of this rank in the backbone's blocks (needs peft).")
    class_drop: float = _flag("states=dataset: probability that a label becomes the null class.", 0.1)
    held_out: int = _flag("Trajectories with seeds of their own that the exits are judged on.", 16)

    def __post_init__(self):
        if not self.model:
            raise ValueError(f"model={self.model!r}, expected the folder of a pipeline")
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
