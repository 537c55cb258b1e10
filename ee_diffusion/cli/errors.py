"""Errors of programs, said in one line. Here: what to print, the exit status. Not here: the errors themselves."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

TRACEBACK = "EE_DIFFUSION_TRACEBACK"
INTERRUPTED = 128 + 2  # SIGINT


def said_in_one_line(name: str, work: Callable[[], int | None]) -> int:
    """Do the work. Returns its exit status (None: 0), or 2 for a ValueError, an OSError or a loss that is not finite
    (FloatingPointError), which is printed on stderr in one line; 130 for Ctrl-C, as a shell has it.

    With the environment variable EE_DIFFUSION_TRACEBACK set it is raised instead.
    """
    try:
        return work() or 0
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"{name}: error: {error} ({TRACEBACK}=1 shows where)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get(TRACEBACK):
            raise
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` and leave the process with its exit status."""
    sys.exit(said_in_one_line(Path(sys.argv[0]).name, main))
