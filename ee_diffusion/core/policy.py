"""Policy: what may run, when to stop, which exits. A frozen description that can be saved.

Here: the description. Not here: applying it to a run (session.py). E samples, R rows, L layers, S steps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from ee_diffusion.core.criteria import CRITERIA, Criterion, DepthTable, SampledExit
from ee_diffusion.core.fields import check_fields
from ee_diffusion.core.io import read_json, write_text
from ee_diffusion.core.rows import content_ids
from ee_diffusion.core.saved_names import todays_names
from ee_diffusion.core.schedules import SCHEDULES, FullDepth, Schedule, depth_of

_FORMAT = "ee_diffusion.policy.1"


@dataclass(frozen=True)
class Policy:
    """A schedule (which layers may run), a criterion (when to stop; None: never) and exits (depths; None: all that the heads have).

    `Policy()` is off: the model as it is. `record_all`: measure every exit but stop nobody, for calibration by replay.
    `made_for`: (name, value) of what it was calibrated on; a pipeline that differs refuses it. Empty: for any model.
    `cfg_exit`: under classifier-free guidance the rows of an image leave `joint` (the least safe decides) or `separate`.
    `delayed`: scores decide at the exit after the one where they were measured. They reach the host while the device runs the blocks in
    between, so that neither waits for the other, and everybody leaves an exit later than without. Not worth it on a CPU.

    Raises:
        ValueError: a field of another type; exits not ascending; record_all or delayed without a criterion that measures; delayed
            with a single exit.
    """

    criterion: Criterion | None = None
    schedule: Schedule = field(default_factory=FullDepth)
    exits: tuple[int, ...] | None = None
    record_all: bool = False
    cfg_exit: Literal["joint", "separate"] = "joint"
    made_for: tuple[tuple[str, str], ...] = ()
    delayed: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.exits, list):
            object.__setattr__(self, "exits", tuple(self.exits))
        check_fields(self)
        if self.exits is not None and (
            list(self.exits) != sorted(set(self.exits)) or (self.exits and self.exits[0] < 0)
        ):
            raise ValueError(f"exits={self.exits}, expected ascending distinct depths")
        measures = self.criterion is not None and not isinstance(self.criterion, DepthTable)
        if self.record_all and not measures:
            raise ValueError("record_all needs a criterion that says what to measure")
        if self.delayed and not measures:
            raise ValueError("delayed=True with nothing to measure, expected a criterion that decides on scores")
        if self.delayed and self.exits is not None:
            self._check_delayed(self.exits)

    @property
    def is_off(self) -> bool:
        """True if a run under this policy is the plain model."""
        return self.criterion is None and isinstance(self.schedule, FullDepth)

    def ids_of(self, content: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Ids (E,) for `begin` where the criterion draws by them, made of what each sample holds: content (E, N, ...), of it the places
        where mask (E, N) is not 0. Equal content draws alike, all other independently, in every batch. None: places do as ids."""
        return content_ids(content, mask) if isinstance(self.criterion, SampledExit) else None

    def validate(self, *, num_steps: int, num_layers: int, depths: tuple[int, ...]) -> tuple[int, ...]:
        """Exits (depths) of a run of S steps and L layers under heads at these depths.

        Raises:
            ValueError: exits that the heads lack; a schedule, a criterion or thresholds that do not fit.
        """
        exits = depths if self.exits is None else self.exits
        if depths and depths[-1] >= num_layers:
            raise ValueError(
                f"an exit at depth {depths[-1]}, expected below {num_layers}: the model has {num_layers} blocks"
            )
        missing = [depth for depth in exits if depth not in depths]
        if missing:
            raise ValueError(f"the policy exits at depths {missing}, the heads have {depths}")
        self._check_schedule(num_steps, num_layers, exits)
        self._check_delayed(exits)
        if self.criterion is not None:
            self.criterion.validate(num_steps, len(exits))
        return exits

    def _check_delayed(self, exits: tuple[int, ...]) -> None:
        if self.delayed and len(exits) < 2:
            raise ValueError(
                f"delayed=True with exits at {exits}, expected two or more: at the first one nobody leaves"
            )

    def _check_schedule(self, num_steps: int, num_layers: int, exits: tuple[int, ...]) -> None:
        for plan in self.schedule.plans(num_steps=num_steps, num_layers=num_layers):
            depth = depth_of(plan)
            if depth is None and self.criterion is not None:
                raise ValueError(
                    "a schedule with holes takes no criterion: an exit would answer from a state it was not trained on"
                )
            if depth is not None and depth < num_layers and depth not in exits:
                raise ValueError(f"the schedule stops at depth {depth}, exits are at {exits}")

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values that `from_dict` turns back into this policy."""
        criterion = (
            None if self.criterion is None else {"kind": type(self.criterion).__name__, **asdict(self.criterion)}
        )
        schedule = {"kind": type(self.schedule).__name__, **asdict(self.schedule)}
        if schedule.get("of", ...) is None:
            del schedule["of"]  # as it was before there was such a field
        values: dict[str, Any] = {"criterion": criterion, "schedule": schedule, "exits": self.exits}
        values |= {"made_for": self.made_for} if self.made_for else {}
        values |= {"delayed": True} if self.delayed else {}
        # Through JSON, so that a fresh dictionary equals one that was read from a file.
        return json.loads(json.dumps(values | {"record_all": self.record_all, "cfg_exit": self.cfg_exit}))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Policy:
        """The policy that `to_dict` described.

        Raises:
            ValueError: unknown kinds or fields.
        """
        values = todays_names(values)
        try:
            criterion = None if values["criterion"] is None else _built(CRITERIA, values["criterion"])
            rest = {name: _tuples(value) for name, value in values.items() if name not in ("criterion", "schedule")}
            return cls(criterion=criterion, schedule=_built(SCHEDULES, values["schedule"]), **rest)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the description of a policy: {error!r} in {values}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write to a JSON file, whole or not at all.

        Raises:
            ValueError: a path that is a folder, or no path at all.
        """
        write_text(path, json.dumps({"format": _FORMAT, **self.to_dict()}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Policy:
        """Read what `save` wrote.

        Raises:
            ValueError: a truncated file, or one that is no policy; the file is named.
        """
        values = read_json(path, "policy")
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} is no policy: expected a JSON object with format {_FORMAT!r}")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _built(kinds: Mapping[str, type], values: dict[str, Any]) -> Any:
    values = dict(values)
    return kinds[values.pop("kind")](**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
