"""Runs as one of several processes under torchrun: the tiny training, and a report of how many there were. usage: rank_run.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

from training.tiny_run import tiny_trainer

from ee_diffusion.training.checkpointing import write_json

folder = Path(sys.argv[1])
trainer = tiny_trainer(folder)
trainer.fit()
if trainer.accelerator.is_main_process:
    write_json(folder / "report.json", {"processes": trainer.accelerator.num_processes})
