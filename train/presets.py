"""Named settings of train_uvit, each with its measured result behind it. Here: values. Not here: what they do."""

from __future__ import annotations

_CIFAR10 = {"train_data_files": ["cifar10/train-*.parquet"], "image_column": "img", "label_column": "label"}
_CIFAR10 |= {"resolution": 32, "random_flip": True, "num_classes": 10, "lr_scheduler": "constant_with_warmup"}
_CIFAR10 |= {"adam_beta1": 0.9, "adam_beta2": 0.99, "adam_weight_decay": 0.03, "mixed_precision": "bf16"}
_CIFAR10 |= {"checkpoints_total_limit": 2}

_CPU = _CIFAR10 | {"patch_size": 4, "num_layers": 9, "train_batch_size": 128, "optimizer": "muon", "snr_gamma": 5.0}
_CPU |= {"lr_scheduler": "cosine", "ema_decay": 0.999, "checkpointing_steps": 100}
_GPU = _CIFAR10 | {"patch_size": 2, "num_layers": 13, "train_batch_size": 512, "compile": True}
_GPU |= {"checkpointing_steps": 2000}

# cpu_backbone then cpu_exits is how the second half of the shipped checkpoint was trained, from an earlier and poorer one on (its card has
# the figures); from scratch the two have not been run.
_CPU_BACKBONE = _CPU | {"mode": "backbone", "learning_rate": 1e-3, "lr_scheduler": "constant_with_warmup"}
_CPU_BACKBONE |= {"lr_warmup_steps": 50, "max_train_steps": 5000}

# The weights of the exits' terms are small on purpose: Adam trains exits and uncertainty modules alike at any weight, and at 1 they would
# pull the shared blocks away from the full-depth task, which has had little training by then.
_CPU_EXITS = _CPU | {"mode": "joint", "learning_rate": 8e-4, "lr_warmup_steps": 20, "max_train_steps": 850}
_CPU_EXITS |= {"ema_decay": 0.998, "uncertainty_weight": 0.05, "layerwise_weight": 0.1}

_GPU_BACKBONE = _GPU | {"mode": "backbone", "learning_rate": 4e-4, "lr_warmup_steps": 1000}
_GPU_BACKBONE |= {"ema_decay": 0.9999, "max_train_steps": 20_000}
_GPU_EXITS = _GPU | {"mode": "joint", "learning_rate": 2e-4, "lr_warmup_steps": 500}
_GPU_EXITS |= {"ema_decay": 0.9995, "max_train_steps": 8_000}

PRESETS = {
    "cpu_backbone": _CPU_BACKBONE,
    "cpu_exits": _CPU_EXITS,
    "gpu_backbone": _GPU_BACKBONE,
    "gpu_exits": _GPU_EXITS,
}
