"""Names that are imported when first used (PEP 562). Here: the mechanism. Not here: which names (__init__.py, methods.py)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    module: str, names: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a module whose public names lie elsewhere in the package.

    names: public name -> the module that defines it. modules: public name -> the module that it is. Both below `ee_diffusion`.
    """
    namespaces, package = modules or {}, module.split(".")[0]

    def find(name: str) -> Any:
        home = names.get(name) or namespaces.get(name)
        if home is None:
            known = ", ".join(sorted({*names, *namespaces}))
            raise AttributeError(f"module {module!r} has no attribute {name!r}; public names: {known}")
        found = importlib.import_module(f"{package}.{home}")
        value = getattr(found, name) if name in names else found
        vars(sys.modules[module])[name] = value  # found without this function from now on
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[module]), *names, *namespaces})

    return find, listed
