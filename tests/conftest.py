"""What every test gets: no network, few threads, fixed seeds, the data folder or a skip."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, hence before anything else
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from family_report import family_report
from tree import ROOT


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "install the wheel with all it depends on into an empty environment (minutes)"
    parser.addoption("--full-install", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tiny models: a second thread costs more than it saves, and much more on a busy machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed", "error") for report in terminalreporter.stats.get(kind, [])]
    lines = family_report(report for report in reports if isinstance(report, pytest.TestReport))
    if lines:
        terminalreporter.section("families")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries that draw from the global generator)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The data folder: EE_DIFFUSION_DATA, else `shared/data` beside the checkout, else the test is skipped."""
    given = os.environ.get("EE_DIFFUSION_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder: {folder} is absent, set EE_DIFFUSION_DATA")
    return folder
