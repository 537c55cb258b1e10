"""What a policy and fitted exits were made for: a fingerprint of weights, the settings of sampling. Not here: who asks for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from torch import Tensor, nn

from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.saved_names import first_config, first_tensor

# settings of exits that earlier versions did not have; None says what those meant
ADDED = ("out_channels", "joint", "fitted_embedded_guidance", "fitted_shape", "model_weights")

CHUNK = 2**22  # numbers that are read at a time
SOME = 16  # values of each tensor by which a change is noticed

_WEIGHTS: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = (
    WeakKeyDictionary()
)  # what they were when, and their fingerprint


def fingerprint(*modules: nn.Module | None) -> str:
    """SHA-256 (16 hexadecimal digits) over names, shapes and values, in the precision in which they are held."""
    digest = hashlib.sha256()
    for place, module in enumerate(modules):
        for name, tensor in {} if module is None else module.state_dict().items():
            digest.update(f"{place}/{first_tensor(name)}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def made_for_of(
    pipeline: DiffusionPipeline, *, num_inference_steps: int | Sequence[int], guidance_scale: float, eta: float = 0.0
) -> tuple[tuple[str, str], ...]:
    """What a policy calibrated on this pipeline with these settings was made for (`Policy.made_for`).

    num_inference_steps: their number, or the timesteps themselves where they are given by hand.
    """
    return (
        ("weights", fingerprint(pipeline.transformer, pipeline.exits)),
        (
            "exits settings",
            _digest(
                first_config(settings_of(pipeline.exits.config)) if isinstance(pipeline.exits, ConfigMixin) else {}
            ),
        ),
        ("scheduler", type(pipeline.scheduler).__name__),
        ("scheduler settings", _digest(settings_of(pipeline.scheduler.config))),
        ("num_inference_steps", str(num_inference_steps)),
        ("guidance_scale", str(float(guidance_scale))),
        ("eta", str(float(eta))),
    )


def check_made_for(
    policy: Policy,
    pipeline: DiffusionPipeline,
    *,
    num_inference_steps: int | Sequence[int],
    guidance_scale: float,
    eta: float = 0.0,
) -> None:
    """Raises ValueError if the policy was calibrated on something else. One made for any model costs nothing here."""
    if not policy.made_for:
        return
    call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "eta": eta}
    here = dict(made_for_of(pipeline, **call))
    differ = [(name, value) for name, value in policy.made_for if here.get(name) != value]
    if differ:
        told = "; ".join(f"{name} {value}, this run has {here.get(name)}" for name, value in differ)
        hint = " (weights are the transformer's and the exits': are pipe.exits those it was calibrated with?)"
        raise ValueError(
            f"the policy was calibrated for {told}{hint if differ[0][0] in ('weights', 'exits settings') else ''}"
        )


def weights_of(model: nn.Module) -> str | None:
    """A fingerprint of a model's weights that half precision does not change: of what is left of them in bfloat16, and in float16. None
    where some are not at hand as plain numbers (on the meta device, quantized, sharded).

    All weights count. They are read where they are, and again once something wrote to them: once a tensor has another place or version, or
    some of its values have changed (writes to `.data`, as merging adapters does them, leave no other trace).
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    state = {name: torch.view_as_real(one) if one.is_complex() else one for name, one in state.items()}
    if not state or any(type(tensor) is not Tensor or tensor.is_meta for tensor in state.values()):
        return None
    written = tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in state.values())
    written += tuple(torch.cat([_some(one) for one in state.values()]).tolist())
    known = _WEIGHTS.get(model)
    if known is None or known[0] != written:
        _WEIGHTS[model] = known = written, "-".join(_halved(state, dtype) for dtype in (torch.bfloat16, torch.float16))
    return known[1]


def same_weights(one: str | None, other: str | None) -> bool:
    """Whether two of `weights_of` mean the same weights, be it in half precision; what is not known is taken for the same."""
    return None in (one, other) or any(a == b for a, b in zip(one.split("-"), other.split("-"), strict=True))


def _some(tensor: Tensor) -> Tensor:
    """At most SOME values of a tensor, spread over it, as whole numbers that stand for their bits."""
    values = tensor.reshape(-1)
    return values[:: max(1, len(values) // SOME)][:SOME].float().cpu().view(torch.int32)


def _halved(state: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name}/{tuple(tensor.shape)}/".encode())
        total = 0
        for start, part in enumerate(tensor.reshape(-1).split(CHUNK)):
            number = part.to(dtype).view(torch.int16) if part.is_floating_point() else part
            place = torch.arange(len(part), device=part.device) + start * CHUNK
            total += int((number.long() * (2 * place + 1)).sum())  # modulo 2^64, in any order the same
        digest.update(str(total % 2**64).encode())
    return digest.hexdigest()[:8]


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings (a noise schedule and order, what exits cache) without versions and defaults (`_...`), and without what a later version
    added where it says nothing."""
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    return {name: value for name, value in known.items() if name not in ADDED or value is not None}


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
