"""Loading weights without mercy: diffusers only warns when a file holds another model's weights, and leaves random ones in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def load_strictly(load: Callable[..., Any], name: str, path: Any, **options: Any) -> Any:
    """`load(path, **options)`, a diffusers `from_pretrained`, refusing keys that are missing, foreign or of another shape.

    Raises:
        ValueError: the file is not one of a `name`.
    """
    wants_facts = options.pop("output_loading_info", False)
    model, facts = load(path, output_loading_info=True, **options)
    wrong = {
        kind: list(facts[kind])[:3] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if facts[kind]
    }
    if wrong:
        raise ValueError(f"{path} is no checkpoint of a {name}: {wrong}")
    return (model, facts) if wants_facts else model


def keep_exits(pipeline_class: type) -> type:
    """Class decorator for pipelines: exits that are assigned later are saved. diffusers takes a component that once was None for absent
    whatever is assigned to it, and would leave it out of `save_pretrained`."""
    assign = pipeline_class.__setattr__

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "exits" and value is not None and "exits" in self.__dict__:
            self.register_to_config(exits=(type(value).__module__, type(value).__name__))
        assign(self, name, value)

    pipeline_class.__setattr__ = __setattr__
    return pipeline_class
