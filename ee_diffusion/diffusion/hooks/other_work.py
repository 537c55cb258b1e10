"""What a pipeline's call computes beside the forwards that run with exits: forwards of the same transformer without exits (skip-layer
guidance), of a second transformer (Wan 2.2), of a ControlNet.

Here: counting them. Not here: the share that they have in the call (core/trace.py).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from torch.utils.hooks import RemovableHandle

from ee_diffusion.core.patch import ForwardPatch, Uncopied, restore_all
from ee_diffusion.core.trace import Beside
from ee_diffusion.diffusion.hooks.compile import unwrapped
from ee_diffusion.diffusion.hooks.run_tracker import RunTracker
from ee_diffusion.diffusion.model_specs import MODEL_SPECS, blocks_of


class Counted:
    """A pipeline's denoisers beside one transformer, and that transformer's own forwards without exits, counted call by call."""

    def __init__(self, transformer: nn.Module, pipeline: DiffusionPipeline | None):
        self._transformer, self._pipeline = transformer, pipeline
        # runs -> what was asked for -> forwards, rows x blocks
        self._plain: WeakKeyDictionary[RunTracker, dict[str, list[int]]] = WeakKeyDictionary()
        self._others: dict[str, _Forwards] = {}
        self._uncounted: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._interceptions = (
            []
            if pipeline is None
            else [
                ForwardPatch(pipeline, self._loop_begins, name="progress_bar"),
                ForwardPatch(pipeline, self._call_ends, name="maybe_free_model_hooks"),
            ]
        )

    def begin(self, runs: RunTracker) -> None:
        """A run begins: what this transformer did without exits before is not its own."""
        self._plain[runs] = {}

    def forward(self, runs: RunTracker, reason: str) -> None:
        """A forward without exits, because of the argument `reason`."""
        self._plain.setdefault(runs, {}).setdefault(reason, [0, 0])[0] += 1

    def block(self, runs: RunTracker, reason: str, rows: int) -> None:
        """Within it a block runs on so many rows."""
        self._plain[runs][reason][1] += rows

    def seen(self, runs: RunTracker) -> tuple[Beside, ...]:
        """Since the last run began."""
        plain = [Beside(name, forwards, ran, ran) for name, (forwards, ran) in self._plain.get(runs, {}).items()]
        others = [one.seen() for one in self._others.values() if one.forwards]
        return (*plain, *others, *(Beside(name, 0, 0, 0) for name in self._uncounted))

    def detach(self) -> None:
        """Restore the pipeline's methods."""
        restore_all(self._interceptions)
        self._interceptions = []
        self._stop()

    def _loop_begins(self, original, *args, **kwargs):
        self._stop()
        self._others, self._uncounted = {}, []
        for name, component in self._pipeline.components.items():
            model = unwrapped(component) if isinstance(component, nn.Module) else None
            if not isinstance(model, ModelMixin) or model is self._transformer:
                continue
            if model._compiled_call_impl is not None:  # to count within what is compiled would compile it anew
                self._uncounted += [f"{name} ({type(model).__name__}, compiled)"] if _denoises(model) else []
                continue
            self._others[name] = counter = _Forwards(name, model)
            self._handles.append(component.register_forward_pre_hook(Uncopied(counter), with_kwargs=True))
        return original(*args, **kwargs)

    def _call_ends(self, original, *args, **kwargs):
        self._stop()
        return original(*args, **kwargs)

    def _stop(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _denoises(model: nn.Module) -> bool:
    return type(model).__name__ in MODEL_SPECS or "ControlNet" in type(model).__name__


class _Forwards:
    """Counts forwards of a model, and the rows in them."""

    def __init__(self, name: str, model: nn.Module):
        self._name, self._model = name, model
        self.forwards, self._rows = 0, 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.forwards += 1
        if type(self._model).__name__ in MODEL_SPECS:
            self._rows += len(args[0] if args else kwargs["hidden_states"])

    def seen(self) -> Beside:
        """With the blocks that exits of its own left out, if the model is of the family table."""
        blocks = self._rows and self._rows * len(blocks_of(self._model))
        attachment = self._model.__dict__.get("_ee_hook")
        trace = None if attachment is None else attachment.trace
        ran, whole = (1, 1) if trace is None else trace.work
        return Beside(
            f"{self._name} ({type(self._model).__name__})", self.forwards, round(blocks * ran / whole), blocks
        )
