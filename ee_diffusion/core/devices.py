"""The device that a flag names. Not here: what runs on it."""

from __future__ import annotations

import torch


def device_named(name: str | None) -> torch.device:
    """The device of that name; None: a CUDA device if there is one, else the CPU.

    Raises:
        ValueError: an unknown device, or one that this machine or this build of torch has not.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={name!r} cannot be used here: {str(error).splitlines()[0]}; expected cpu, or a device that torch finds"
        ) from error
    return device
