"""States: what a transformer was called with along trajectories, as tensors to pick samples from.

Here: their form, and which arguments they are made of. Not here: where they come from (collect.py), files (shards.py).
T trajectories (one an image), J calls of the transformer on each, G rows of an image in a call (2 under guidance), R rows, B samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Arguments of diffusers' transformers that hold one entry per row of the batch. Others are refused, never guessed from a shape.
ROW_INPUTS = (
    "hidden_states",
    "timestep",
    "class_labels",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "pooled_projections",
    "guidance",
)
_SILENT = ("return_dict",)
_VARYING = "varying."
_CONSTANT = "constant."


@dataclass(frozen=True, eq=False)
class States:
    """What a transformer was called with along T trajectories of J calls.

    `varying`: inputs (T, J, G, ...), bit for bit as the transformer got them; `constant`: inputs (T, G, ...) that were the same in every
    call of a trajectory. A *sample* is one trajectory at one call, all its G rows; sample s is call s % J of trajectory s // J.
    """

    varying: dict[str, Tensor]
    constant: dict[str, Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, J, G)."""
        return tuple(self.varying["timestep"].shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(value.nbytes for value in (*self.varying.values(), *self.constant.values()))

    def __len__(self) -> int:
        return self.shape[0] * self.shape[1]

    def __getitem__(self, samples: Tensor) -> dict[str, Tensor]:
        """samples (B,) -> every input (B, G, ...)."""
        trajectory, call = samples // self.shape[1], samples % self.shape[1]
        changing = {name: value[trajectory, call] for name, value in self.varying.items()}
        return changing | {name: value[trajectory] for name, value in self.constant.items()}

    def by_trajectory(self) -> dict[str, Tensor]:
        """Every input (T, J * G, ...): all rows of each trajectory as one sample."""
        return {name: value.flatten(1, 2) for name, value in self._spread().items()}

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat names -> tensors, for a file; `from_tensors` turns them back."""
        named = {_VARYING + name: value for name, value in self.varying.items()}
        return named | {_CONSTANT + name: value for name, value in self.constant.items()}

    @classmethod
    def of_calls(cls, calls: Sequence[Mapping[str, Tensor]], num_images: int) -> States:
        """J calls' inputs (R, ...), whose rows lie branch by branch (all images of one, then of the next), by trajectory, on the CPU."""
        per_image = {
            name: torch.stack([one[name].unflatten(0, (-1, num_images)) for one in calls]).movedim(2, 0)
            for name in calls[0]
        }  # (T, J, G, ...)
        may_vary = ("hidden_states", "timestep")
        fixed = [name for name, value in per_image.items() if name not in may_vary and _same_in_every_call(value)]
        varying = {name: value.cpu().contiguous() for name, value in per_image.items() if name not in fixed}
        return cls(varying, {name: per_image[name][:, 0].cpu().contiguous() for name in fixed})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> States:
        """The states that `to_tensors` wrote down.

        Raises:
            ValueError: tensors of something else.
        """
        varying, constant = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in (_VARYING, _CONSTANT)
        )
        if not {"hidden_states", "timestep"} <= varying.keys() or len(varying) + len(constant) != len(tensors):
            raise ValueError(f"tensors {sorted(tensors)}, expected those of States.to_tensors")
        return cls(varying, constant)

    @classmethod
    def concatenate(cls, parts: Sequence[States]) -> States:
        """Trajectories of one kind, joined. An input that varies in one part varies in all.

        Raises:
            ValueError: nothing to join, or parts with other inputs, calls or rows.
        """
        if not parts:
            raise ValueError("no states to concatenate, expected at least one part")
        kinds = {(*part.shape[1:], *sorted(part.varying.keys() | part.constant.keys())) for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"states of different kinds cannot be joined: calls, rows and inputs are {sorted(kinds)}")
        fixed = set.intersection(*(set(part.constant) for part in parts))
        spread = [part._spread() for part in parts]
        varying = {name: torch.cat([part[name] for part in spread]) for name in spread[0] if name not in fixed}
        return cls(varying, {name: torch.cat([part.constant[name] for part in parts]) for name in sorted(fixed)})

    def _spread(self) -> dict[str, Tensor]:
        """Every input (T, J, G, ...)."""
        calls = self.shape[1]
        repeated = {name: value[:, None].expand(-1, calls, *value.shape[1:]) for name, value in self.constant.items()}
        return self.varying | repeated


def row_inputs(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arguments of a transformer's forward that hold one entry per row; a timestep for all becomes one a row.

    Raises:
        ValueError: an argument that says something and is not known to be per row.
    """
    strange = [
        name for name, value in arguments.items() if name not in (*ROW_INPUTS, *_SILENT) and not _is_nothing(value)
    ]
    if strange or not {"hidden_states", "timestep"} <= arguments.keys():
        raise ValueError(
            f"the transformer is called with {sorted(arguments)}: cannot keep {strange}, only {ROW_INPUTS}"
        )
    inputs = {name: arguments[name] for name in ROW_INPUTS if arguments.get(name) is not None}
    rows = inputs["hidden_states"]
    timestep = torch.as_tensor(inputs["timestep"], device=rows.device).reshape(-1)
    inputs["timestep"] = timestep.expand(len(rows)) if len(timestep) == 1 else timestep
    wrong = [name for name, value in inputs.items() if len(value) != len(rows)]
    if wrong:
        raise ValueError(f"{wrong} have not the {len(rows)} rows of hidden_states")
    return inputs


def _is_nothing(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_nothing(part) for part in value.values())
    return value is None or value is False


def _same_in_every_call(value: Tensor) -> bool:
    return bool((value == value[:, :1]).all())
