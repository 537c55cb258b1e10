"""The import graph of the package as Markdown: `make imports`. Files and lines of each room, and what each room imports of the others."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from test_imports import PACKAGE, files_of, imports_of


def room_of(path: Path) -> str:
    """The folder of a file, of two levels within `diffusion`; files beside the folders are a room of their own."""
    parents = path.relative_to(PACKAGE).parts[:-1]
    return "/".join(parents[:2]) if parents else path.name


def import_graph() -> str:
    """One row for each room: files, lines, and the rooms it imports with the number of import statements."""
    homes = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): room_of(path)
        for path in files_of("ee_diffusion")
    }
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    arrows: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for path in files_of("ee_diffusion"):
        room = room_of(path)
        sizes[room].append(len(path.read_text(encoding="utf-8").splitlines()))
        arrows[room].update(homes[found.module] for found in imports_of(path) if homes.get(found.module, room) != room)
    rows = ["| room | files | lines | imports |", "| --- | --- | --- | --- |"]
    for room, lines in sorted(sizes.items()):
        targets = ", ".join(f"{name} ({count})" for name, count in arrows[room].most_common())
        rows.append(f"| {room} | {len(lines)} | {sum(lines)} | {targets} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(import_graph())
