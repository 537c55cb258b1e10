"""How a module of train/ starts: flags become frozen settings, `--dry-run` prints them, and the work is loaded by its name.

Nothing here loads torch: `--help` and refused settings come at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pkgutil import resolve_name
from typing import Any

from transformers import HfArgumentParser


def launch(
    work: str,
    about: str,
    *configs: type,
    required: tuple[str, ...] = ("output_dir",),
    defaults: Mapping[str, Any] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    check: Callable[..., None] | None = None,
) -> None:
    """Read the flags of `configs`, over a preset, over `defaults`, and call `work` ("module:function") with one object of each.

    Args:
        about: the docstring of the module; its first line heads the help.
        required: flags that the work needs and a dry run does not.
        presets: name -> settings; with them there is a flag `--preset`.
        check: is called as `work` is, before anything is loaded, to refuse settings that contradict each other.

    Raises:
        ValueError: a required flag is missing, or a value that a config or `check` refuses.
    """
    parser = HfArgumentParser(configs, description=about.splitlines()[0])
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="Print the settings as JSON and exit.")
    parser.set_defaults(**(defaults or {}))
    if presets:
        parser.add_argument("--preset", choices=sorted(presets), help="Named settings (train/presets.py); flags win.")
        parser.set_defaults(**presets.get(parser.parse_known_args()[0].preset, {}))
    *settings, rest = parser.parse_args_into_dataclasses()
    resolved = merged_settings(*settings)
    missing = [name for name in required if not resolved[name]]
    if missing and not rest.dry_run:
        raise ValueError(f"{', '.join(f'{name}={resolved[name]!r}' for name in missing)}, expected a value for each")
    if check is not None:
        check(*settings)
    if rest.dry_run:
        print(json.dumps(resolved, indent=2))
    else:
        resolve_name(work)(*settings)


def merged_settings(*settings: Any) -> dict[str, Any]:
    """All fields of the settings in one table, as config.json holds them."""
    return {name: value for one in settings for name, value in asdict(one).items()}
