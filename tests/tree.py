"""The checkout's own files, and the Python blocks of its README. Used by the tests of the tree itself."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = {"build", "dist", "demo", "runs", "outputs"}


@lru_cache
def tracked_files(root: Path = ROOT) -> tuple[Path, ...]:
    """Files git knows or would add; where there is no git, every file outside hidden folders and those that commands make."""
    done = subprocess.run(
        ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True,
        check=False,
    )
    if done.returncode == 0 and done.stdout:
        found = [root / name for name in done.stdout.decode().split("\0") if name]
    else:
        found = list(_walk(root))
    return tuple(sorted(path for path in found if path.is_file()))


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        made = MADE if Path(folder) == root else {"__pycache__"}
        folders[:] = [name for name in folders if name not in made and not name.startswith(".")]
        yield from (Path(folder) / name for name in files)


def python_blocks(markdown: str) -> list[str]:
    """The contents of the ```python blocks, in order."""
    return re.findall(r"^```python\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)
