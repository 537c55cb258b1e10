"""Settings of the U-ViT training script: its own flags and the named presets, each with its measured result behind it.

Here: values. Not here: what they do (ee_diffusion.training, ee_diffusion.diffusion).
"""

from __future__ import annotations

from dataclasses import dataclass, field


def _flag(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class UViTConfig:
    """The model and the objective. What `init_from` holds must agree with the flags.

    Raises:
        ValueError: an unknown mode or variant, a frozen backbone that comes from nowhere, exits or a variant without a use.
    """

    mode: str = _flag("backbone: the plain loss; joint: backbone and exits; frozen: only the exits train.", "backbone")
    init_from: str | None = _flag("Folder with transformer/ (and exits/, if any) to start from; none: from scratch.")
    patch_size: int = _flag("Pixels per patch side.", 2)
    num_layers: int = _flag("Blocks, an odd number.", 13)
    num_attention_heads: int = _flag("Attention heads.", 4)
    attention_head_dim: int = _flag("Width of a head.", 64)
    num_classes: int | None = _flag("Classes in the data (a row for no class is added); none: unconditional.")
    gradient_checkpointing: bool = _flag("Trade compute for memory.", False)
    exit_depths: list[int] | None = _flag("Executed blocks at each exit; none: after every block but the last.")
    exit_variant: str = _flag("paper or released.", "paper")
    uncertainty_weight: float = _flag("lambda of DeeDiff eq. 8.", 1.0)
    layerwise_weight: float = _flag("beta of DeeDiff eq. 8.", 1.0)
    class_drop: float = _flag("Probability that a label becomes the null class.", 0.1)
    snr_gamma: float | None = _flag("Weigh the plain loss by min(SNR, gamma) / SNR; none: unweighted, as in DeeDiff.")
    num_train_timesteps: int = _flag("Steps of the noise schedule.", 1000)
    beta_schedule: str = _flag("Its betas, as DDPMScheduler names them.", "linear")
    prediction_type: str = _flag("epsilon or v_prediction.", "epsilon")

    def __post_init__(self):
        if self.mode not in ("backbone", "joint", "frozen"):
            raise ValueError(f"mode={self.mode!r}, expected backbone, joint or frozen")
        if self.mode == "frozen" and not self.init_from:
            raise ValueError("mode='frozen' without init_from: expected the folder of a trained transformer")
        if self.mode == "backbone" and self.exit_depths:
            raise ValueError(f"mode='backbone' trains no exits, but exit_depths={self.exit_depths}")
        if self.exit_variant not in ("paper", "released"):
            raise ValueError(f"exit_variant={self.exit_variant!r}, expected paper or released")
        if not 0 <= self.class_drop <= 1:
            raise ValueError(f"class_drop={self.class_drop}, expected a probability")


@dataclass(frozen=True)
class ValidationConfig:
    """The pictures drawn every `validation_steps`."""

    validation_images: int = _flag("How many, seeds 0, 1, ..., classes in turn.", 16)
    validation_inference_steps: int = _flag("DDIM steps.", 25)
    validation_guidance_scale: float = _flag("Classifier-free guidance; 1: none.", 1.0)
    validation_threshold: float | None = _flag("Also draw with exits at this uncertainty threshold, and their map.")


_CIFAR10 = {
    "train_data_files": ["cifar10/train-*.parquet"],
    "image_column": "img",
    "label_column": "label",
    "resolution": 32,
    "random_flip": True,
    "num_classes": 10,
    "lr_scheduler": "constant_with_warmup",
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_weight_decay": 0.03,
    "mixed_precision": "bf16",
    "checkpoints_total_limit": 2,
}
_CPU = _CIFAR10 | {
    "patch_size": 4,
    "num_layers": 9,
    "train_batch_size": 128,
    "lr_scheduler": "cosine",
    "snr_gamma": 5.0,
    "ema_decay": 0.999,
    "checkpointing_steps": 100,
}
_GPU = _CIFAR10 | {
    "patch_size": 2,
    "num_layers": 13,
    "train_batch_size": 512,
    "compile": True,
    "checkpointing_steps": 2000,
}

# cpu_backbone then cpu_exits is how the second half of the shipped checkpoint was trained, from an earlier and poorer one on (its card has
# the figures); from scratch the two have not been run.
PRESETS: dict[str, dict] = {
    "cpu_backbone": _CPU
    | {
        "mode": "backbone",
        "optimizer": "muon",
        "learning_rate": 1e-3,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 50,
        "max_train_steps": 5000,
    },
    # The weights of the exits' terms are small on purpose: Adam trains exits and uncertainty modules alike at any weight, and at 1 they
    # would pull the shared blocks away from the full-depth task, which has had little training by then.
    "cpu_exits": _CPU
    | {
        "mode": "joint",
        "optimizer": "muon",
        "learning_rate": 8e-4,
        "lr_warmup_steps": 20,
        "max_train_steps": 850,
        "ema_decay": 0.998,
        "uncertainty_weight": 0.05,
        "layerwise_weight": 0.1,
    },
    "gpu_backbone": _GPU
    | {
        "mode": "backbone",
        "learning_rate": 4e-4,
        "lr_warmup_steps": 1000,
        "ema_decay": 0.9999,
        "max_train_steps": 20_000,
    },
    "gpu_exits": _GPU
    | {"mode": "joint", "learning_rate": 2e-4, "lr_warmup_steps": 500, "ema_decay": 0.9995, "max_train_steps": 8_000},
}
