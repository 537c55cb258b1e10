"""Settings out of range, trackers that are not there, and objectives with nothing to train are refused before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from training.tiny_run import TinyObjective, save, tiny_config, tiny_source

from ee_diffusion.training.config import ImageDataConfig, TrainConfig
from ee_diffusion.training.loop import Trainer


@pytest.mark.parametrize(
    "bad",
    [
        {"train_batch_size": 0},
        {"gradient_accumulation_steps": 0},
        {"max_train_steps": 0},
        {"max_train_minutes": 0},
        {"checkpoints_total_limit": 0},
        {"validation_steps": 0},
        {"seed": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"adam_beta2": 1.0},
        {"ema_decay": 1.5},
        {"adam_weight_decay": -0.1},
        {"max_grad_norm": -1.0},
        {"lr_warmup_steps": -1},
        {"mixed_precision": "fp8"},
        {"report_to": "paper"},
        {"optimizer": "sgd"},
    ],
)
def test_values_out_of_range_are_named(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}, expected"):
        TrainConfig(**bad)


def test_one_loss_scale_serves_one_optimizer():
    with pytest.raises(ValueError, match="mixed_precision='fp16' with optimizer='muon'"):
        TrainConfig(optimizer="muon", mixed_precision="fp16")


def test_endless_schedules_leave_the_number_of_steps_out_of_the_maths():
    assert "max_train_steps" not in TrainConfig().maths()
    assert TrainConfig(lr_scheduler="cosine").maths()["max_train_steps"] == 10_000


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"output_dir": None}, "output_dir=None, expected"),
        ({"lr_scheduler": "sideways"}, "lr_scheduler='sideways', expected one of"),
        ({"validation_steps": 3}, "no `validate` was given"),
    ],
)
def test_a_trainer_refuses_before_work(tmp_path: Path, changes, told):
    with pytest.raises(ValueError, match=told):
        Trainer(TinyObjective(), tiny_source(), replace(tiny_config(tmp_path / "new"), **changes), save=save)
    assert not (tmp_path / "new").exists()


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ee_diffusion.training.loop.get_available_trackers", list)
    with pytest.raises(ValueError, match="report_to='wandb' is not installed"):
        Trainer(TinyObjective(), tiny_source(), tiny_config(tmp_path, report_to="wandb"), save=save)


def test_nothing_to_train_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to train"):
        Trainer(TinyObjective().requires_grad_(False), tiny_source(), tiny_config(tmp_path), save=save)


def test_origins_are_those_that_were_given():
    assert ImageDataConfig(train_data_dir="x", dataset_name="y").sources() == ["dataset_name", "train_data_dir"]
