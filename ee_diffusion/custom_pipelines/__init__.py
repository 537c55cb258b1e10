"""Files for `custom_pipeline=` of diffusers, which takes the path of a file: each re-exports one class of the package.

`pipelines/` in the repository holds the same files, for paths relative to its root.
"""

from __future__ import annotations

from pathlib import Path


def custom_pipeline(name: str) -> str:
    """The path to hand to `DiffusionPipeline.from_pretrained(folder, custom_pipeline=..., trust_remote_code=True)`.

    name: of the class, as "EarlyExitDiTPipeline".

    Raises:
        ValueError: there is no file for such a class.
    """
    known = {path.stem.replace("_", ""): path for path in sorted(Path(__file__).parent.glob("early_exit*_pipeline.py"))}
    if name.lower() not in known:
        raise ValueError(
            f"custom_pipeline({name!r}), expected the class of one of {[path.stem for path in known.values()]}"
        )
    return str(known[name.lower()])
