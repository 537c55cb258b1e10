"""The files that every run leaves beside its weights: config.json with its settings, report.json with what was done, and where."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ee_diffusion.training.checkpointing import write_json
from train.launch import merged_settings


def process_state() -> PartialState:
    """This process and its device, as the Trainer's Accelerator will find them."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def machine() -> dict[str, str | int]:
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"device": device, "processes": PartialState().num_processes, "torch": torch.__version__}


def write_reports(report: dict[str, Any], *settings: Any) -> None:
    """Write config.json and report.json into `output_dir`, on the main process alone."""
    resolved = merged_settings(*settings)
    if PartialState().is_main_process:
        folder = Path(resolved["output_dir"])
        write_json(folder / "config.json", resolved)
        write_json(folder / "report.json", report | machine())
