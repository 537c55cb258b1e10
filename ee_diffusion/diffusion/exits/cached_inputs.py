"""Which models and schedulers exits can cache outputs for, and what those must agree on.

Here: checks, and what exits take over. Not here: the exits (cached.py), facts about classes (model_specs.py).
T training timesteps.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, SchedulerMixin, UnCLIPScheduler
from torch import Tensor, nn

from ee_diffusion.diffusion.exits.parameterization import prediction_type_of
from ee_diffusion.diffusion.model_specs import MODEL_SPECS

DRAW_WITH_VARIANCE = (
    DDPMScheduler,
    DDPMParallelScheduler,
    UnCLIPScheduler,
)  # where variance_type is "learned" or "learned_range"

BACKWARD = {  # from images to noise, and the scheduler that takes the same steps the other way
    "DDIMInverseScheduler": "DDIMScheduler",
    "DPMSolverMultistepInverseScheduler": "DPMSolverMultistepScheduler",
}


def sizes_of(transformer: nn.Module) -> dict[str, Any]:
    """What exits take over of a transformer: `in_channels`, `sample_size` (None: not a number) and `out_channels` (None: as many).

    Raises:
        ValueError: a model without a number of channels, or whose output is not what the solver gets.
    """
    name, channels = type(transformer).__name__, transformer.config.get("in_channels")
    if not isinstance(channels, int):
        raise ValueError(f"{name} has in_channels={channels!r}, expected a number")
    if (family := MODEL_SPECS.get(name)) is not None and family.turned:
        raise ValueError(
            f"{name}: its pipeline turns the output's sign and its times around, which memory does not know"
        )
    outputs, size = outputs_of(transformer), transformer.config.get("sample_size")
    return {
        "in_channels": channels,
        "sample_size": size if isinstance(size, int) else None,
        "out_channels": None if outputs == channels else outputs,
    }


def outputs_of(model: nn.Module) -> int | None:
    """Channels that a transformer puts out, None: it does not say. HunyuanDiT's config has no number, the model has."""
    family = MODEL_SPECS.get(type(model).__name__)
    if family is not None and family.outputs is not None:
        return family.outputs(model)
    return vars(model).get("out_channels") or model.config.get("out_channels")


def noise_of(scheduler: SchedulerMixin) -> dict[str, Any]:
    """What exits take over of a scheduler: `num_train_timesteps` and `prediction_type`.

    Raises:
        ValueError: one that is neither variance-preserving (`alphas_cumprod`) nor FlowMatchEulerDiscreteScheduler.
    """
    table, kind = getattr(scheduler, "alphas_cumprod", None), prediction_type_of(scheduler)
    if kind is None or (kind != "flow" and table is None):
        told = {"prediction_type": scheduler.config.get("prediction_type")}
        told |= {name: True for name in ("use_flow_sigmas", "invert_sigmas") if scheduler.config.get(name)}
        raise ValueError(
            f"{type(scheduler).__name__} with {', '.join(f'{name}={value!r}' for name, value in told.items())}: expected "
            "FlowMatchEulerDiscreteScheduler (sigmas not inverted) for flow matching, or a variance-preserving scheduler (alphas_cumprod) "
            "such as DDIMScheduler or DPMSolverMultistepScheduler"
        )
    if (forward := BACKWARD.get(type(scheduler).__name__)) is not None:
        raise ValueError(
            f"{type(scheduler).__name__} goes from images to noise, expected {forward}, which draws images"
        )
    count = scheduler.config.num_train_timesteps if kind == "flow" else len(table)
    return {"num_train_timesteps": count, "prediction_type": kind}


def check_variance(scheduler: SchedulerMixin) -> None:
    """Raises ValueError for a scheduler that draws with a predicted variance. Others may carry the name in their config."""
    variance = str(scheduler.config.get("variance_type"))
    if isinstance(scheduler, DRAW_WITH_VARIANCE) and variance.startswith("learned"):
        raise ValueError(
            f"{type(scheduler).__name__} with variance_type={variance!r} draws with the predicted variance, expected one that does not"
        )


def check_noise(scheduler: SchedulerMixin, known: Tensor, *, prediction_type: str) -> None:
    """Raises ValueError for a scheduler that reads an output in another way, or whose noise schedule is not `known` (T,)."""
    table, kind = getattr(scheduler, "alphas_cumprod", None), prediction_type_of(scheduler)
    if kind != prediction_type:
        raise ValueError(f"cached exits read {prediction_type!r}, the scheduler {kind!r}")
    if kind == "flow" and scheduler.config.num_train_timesteps == len(known):
        return
    known = known.cpu()
    if table is None or table.shape != known.shape or not torch.allclose(table.cpu().float(), known, atol=1e-4):
        raise ValueError(
            f"cached exits know another noise schedule than this {type(scheduler).__name__}'s: make or fit them for it"
        )
