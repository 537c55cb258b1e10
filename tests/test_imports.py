"""The import table of docs/architecture.md, read off the source, and what `import ee_diffusion` may load."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from tree import ROOT

import ee_diffusion
from ee_diffusion import methods

PACKAGE = ROOT / "ee_diffusion"

# Folder of the package -> what its files may import beside the standard library and their own folder.
CORE = {"torch", "safetensors"}
SHARED = {"pixels.py": {"numpy", "PIL"}}  # files beside the folders that all of them but the core may import
PUBLIC = {"__init__.py", "methods.py"}  # tables of names that lie elsewhere, imported when first used
LAZY = {"lazy.py"}  # how
SIDE = CORE | {"numpy", "PIL", "ee_diffusion.core", "ee_diffusion.pixels"}
TABLE = {
    "core": CORE,
    "diffusion": SIDE | {"diffusers", "huggingface_hub", "matplotlib"},
    "decoding": SIDE | {"transformers", "huggingface_hub"},
    # the one arrow between sides: an edge and a cloud split a language model that decoding drives
    "edge_cloud": SIDE
    | {"ee_diffusion.decoding", "transformers", "huggingface_hub", "grpc", "grpc_health", "google.protobuf"}
    | {"prometheus_client", "ray"},
    "classification": SIDE | {"transformers", "huggingface_hub"},
    # of diffusers the loop takes the learning rate schedules and the moving average, of transformers the flags; no model
    "training": SIDE
    | {"accelerate", "datasets", "tqdm", "peft", "diffusers.optimization", "diffusers.training_utils"}
    | {"transformers.hf_argparser", "transformers.utils"},
    "metrics": SIDE | {"torchmetrics", "matplotlib"},
    "checkpoints": set(),
    "custom_pipelines": {"ee_diffusion.diffusion"},
}
# Folders and files that need extras of pyproject.toml; all others run on what `pip install ee-diffusion` brings.
EXTRAS = {
    "decoding": {"decoding"},
    "edge_cloud": {"cloud", "decoding"},
    "ray_serve.py": {"ray"},
    "training": {"train"},
    "classification": {"classification"},
    "metrics": {"eval"},
    "figures.py": {"plot"},
    "lora.py": {"lora"},
    "train": {"train"},
    "eval": {"train", "eval", "plot", "peers"},
}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "google": "protobuf",
}
# Parts that may import every folder of the package (never each other's files, except their own).
COMMAND_LINE = {"cli"}
TOP = {*COMMAND_LINE, "pipelines", "train", "eval"}
HEAVY = ("diffusers", "transformers", "accelerate", "torchmetrics", "datasets", "matplotlib")


class Import(NamedTuple):
    path: Path
    line: int
    module: str
    inside_function: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def _modules(node: ast.AST, path: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level == 0:
            # `from ee_diffusion import core` names a folder of ours as surely as `from ee_diffusion.core import ...`
            own = node.module == "ee_diffusion"
            return [f"{node.module}.{alias.name}" if own else str(node.module) for alias in node.names]
        base = path.relative_to(ROOT).parts[: -node.level]
        return [".".join((*base, node.module or alias.name)) for alias in node.names]
    return []


def _walk(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, inside
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, inside or is_function)


def imports_of(path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    found = []
    for node, inside in _walk(tree):
        found += [Import(path, node.lineno, module, inside) for module in _modules(node, path)]
        name = node.func if isinstance(node, ast.Call) else None
        called = name.id if isinstance(name, ast.Name) else name.attr if isinstance(name, ast.Attribute) else ""
        if called in {"__import__", "import_module"}:
            found.append(Import(path, node.lineno, "<dynamic>", inside))
    return found


def files_of(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _root(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "ee_diffusion" else parts[0]


def _is_allowed(module: str, allowed: set[str]) -> bool:
    if module.split(".")[0] in sys.stdlib_module_names:
        return True
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def _declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {Requirement(line).name for line in lines}


def test_every_file_of_the_package_is_in_the_table():
    strangers = [
        path.relative_to(PACKAGE)
        for path in files_of("ee_diffusion")
        if path.relative_to(PACKAGE).parts[0] not in {*TABLE, *SHARED, *PUBLIC, *LAZY, *COMMAND_LINE}
    ]
    assert not strangers, f"not in the import table: {strangers}"


@pytest.mark.parametrize("part", sorted(TABLE | SHARED))
def test_imports_flow_one_way(part: str):
    allowed = SHARED[part] if part in SHARED else TABLE[part] | {f"ee_diffusion.{part}"}
    wrong = [
        str(found)
        for path in ([PACKAGE / part] if part in SHARED else files_of(f"ee_diffusion/{part}"))
        for found in imports_of(path)
        if not _is_allowed(found.module, allowed)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["ee_diffusion", "pipelines", "train", "eval"])
def test_every_import_is_a_declared_dependency(folder: str):
    wrong = []
    for path in files_of(folder):
        extras = set().union(*(EXTRAS.get(part, set()) for part in path.relative_to(ROOT).parts))
        declared = _declared(*extras) | {"ee-diffusion"}
        beside = {folder} & {"train", "eval"}
        for found in imports_of(path):
            top = found.module.split(".")[0]
            known = top in sys.stdlib_module_names or top in beside or top == "<dynamic>"
            if not known and DISTRIBUTIONS.get(top, top.replace("_", "-")) not in declared:
                wrong.append(f"{found}, which {sorted(extras) or 'the runtime'} does not declare")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["ee_diffusion", "pipelines", "train", "eval"])
def test_no_import_inside_a_function(folder: str):
    wrong = [
        str(found)
        for path in files_of(folder)
        for found in imports_of(path)
        if path != PACKAGE / "lazy.py" and (found.inside_function or found.module == "<dynamic>")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", sorted({"ee_diffusion", *TOP} - COMMAND_LINE))
def test_the_package_and_the_scripts_import_no_other_part(folder: str):
    others = ({*TOP} - {*COMMAND_LINE, folder}) | {"tests"}
    wrong = [str(found) for path in files_of(folder) for found in imports_of(path) if _root(found.module) in others]
    assert not wrong, "\n".join(wrong)


def test_the_checker_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "ee_diffusion" / "core" / "probe.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch.nn\nfrom ee_diffusion import diffusion\nfrom ..training import loop\nfrom . import scores\n"
        "def f():\n    import numpy\n    __import__('json')\n"
    )
    seen = [(found.module, found.inside_function) for found in imports_of(path)]
    assert seen == [
        ("torch.nn", False),
        ("ee_diffusion.diffusion", False),
        ("ee_diffusion.training", False),
        ("ee_diffusion.core.scores", False),
        ("numpy", True),
        ("<dynamic>", True),
    ]


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_model_library_and_is_quick():
    out = _run(
        "import sys, time, torch\n"
        "before = time.process_time()\n"  # work, not waiting: a busy machine changes nothing
        "import ee_diffusion\n"
        "seconds = time.process_time() - before\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(f'{seconds:.3f}', *loaded)\n"
    ).split()
    assert out[1:] == [], f"import ee_diffusion loads {out[1:]}"
    assert float(out[0]) < 0.5, f"import ee_diffusion took {out[0]} s of work beyond torch"


def test_the_core_loads_no_model_library():
    names = [name for name, home in ee_diffusion.HOMES.items() if home.startswith("core.")]
    out = _run(
        f"import ee_diffusion, sys\nfor name in {names!r}: getattr(ee_diffusion, name)\n"
        "ee_diffusion.criteria, ee_diffusion.schedules, ee_diffusion.methods\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert out == "", f"the core loads {out}"


def test_the_top_level_is_small():
    assert len(ee_diffusion.__all__) <= 36, "at most 35 names, and the version"


@pytest.mark.parametrize(
    "module, name", [(module, name) for module in (ee_diffusion, methods) for name in sorted(module.HOMES)]
)
def test_public_name_comes_from_its_home(module: ModuleType, name: str):
    value, home = getattr(module, name), f"ee_diffusion.{module.HOMES[name]}"
    assert value is getattr(importlib.import_module(home), name)
    assert value.__module__ == home, "defined elsewhere: name its own module"
    assert name in module.__all__


@pytest.mark.parametrize("name", sorted(ee_diffusion.NAMESPACES))
def test_a_namespace_is_a_module(name: str):
    assert getattr(ee_diffusion, name) is importlib.import_module(f"ee_diffusion.{ee_diffusion.NAMESPACES[name]}")


@pytest.mark.parametrize("module", [ee_diffusion.criteria, ee_diffusion.schedules], ids=["criteria", "schedules"])
def test_a_namespace_lists_what_it_defines(module: ModuleType):
    assert all(getattr(module, name).__module__ == module.__name__ for name in module.__all__)


def test_public_names_are_listed_before_they_are_used():
    assert _run("import ee_diffusion\nprint(*(set(ee_diffusion.__all__) - set(dir(ee_diffusion))))") == ""


@pytest.mark.parametrize("module", [ee_diffusion, methods], ids=["top", "methods"])
def test_type_checkers_see_the_same_table(module: ModuleType):
    declared = {
        alias.name: str(node.module).removeprefix("ee_diffusion.")
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module not in {"__future__", "typing", "ee_diffusion.lazy"}
        for alias in node.names
    }
    namespaces = getattr(module, "NAMESPACES", {})
    assert set(declared) == {*module.HOMES, *namespaces}
    assert {name: declared[name] for name in module.HOMES} == module.HOMES


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Polcy'; public names: "):
        _ = ee_diffusion.Polcy


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, directly or by way of others."""
    reached = {module: set(targets) for module, targets in arrows.items()}
    while any(not reached[other] <= reached[module] for module in arrows for other in reached[module]):
        for targets in reached.values():
            targets |= set().union(*(reached[other] for other in targets))
    return [
        {other for other in reached[module] if module in reached[other]}
        for module in arrows
        if module in reached[module]
    ]


def arrows_within(package: Path) -> dict[str, set[str]]:
    """Module of the package -> the modules of it that its file names in imports, those for type checkers included."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(package.rglob("*.py"))}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    return {
        name: {
            target
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for target in _targets(node, modules)
        }
        for name, path in modules.items()
    }


def _targets(node: ast.AST, modules: dict[str, Path]) -> set[str]:
    if isinstance(node, ast.Import):
        named = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        below = {f"{node.module}.{alias.name}" for alias in node.names}
        named = {name for name in below if name in modules} or {str(node.module)}
    else:
        return set()
    return named & modules.keys()


def test_no_module_imports_itself_by_way_of_others():
    arrows = arrows_within(PACKAGE)
    for public in ("ee_diffusion", "ee_diffusion.methods"):  # tables for type checkers, imported when first used
        arrows[public] = {"ee_diffusion.lazy"}
    assert not (found := circles(arrows)), f"these import each other: {found}"


def test_a_circle_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    package = tmp_path / "ee_diffusion"
    (package / "core").mkdir(parents=True)
    (package / "core" / "__init__.py").write_text("")
    (package / "core" / "a.py").write_text("from ee_diffusion.core import b\n")
    (package / "core" / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ee_diffusion.core.c import C\n"
    )
    (package / "core" / "c.py").write_text("import ee_diffusion.core.a\n")
    (package / "core" / "d.py").write_text("import ee_diffusion.core.a\n")
    ring = {f"ee_diffusion.core.{name}" for name in "abc"}
    assert circles(arrows_within(package)) == [ring] * 3
