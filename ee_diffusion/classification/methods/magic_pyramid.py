"""Magic Pyramid (arXiv 2111.00230): token pruning learned in two stages, soft then hard; FastBERT's exits on the result.

After Learned Token Pruning (arXiv 2107.00910). How tokens are removed stands in token_pruning.py.
B samples, N tokens, L layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ee_diffusion.classification.method import BatchOutputs, Method, require_range, summed_loss
from ee_diffusion.classification.methods.confidence import own_loss
from ee_diffusion.classification.model_specs import model_spec_of
from ee_diffusion.classification.token_pruning import PARTS, check_prunable, check_pruning, projected, saliency
from ee_diffusion.core.patch import ForwardPatch


@dataclass(frozen=True)
class SoftPruningSettings:
    """mask_weight: what a kept token costs. temperature: T of the sigmoid. top_threshold and bottom_threshold: the last and the first
    layer's threshold to begin with, those between are on the line.

    Raises:
        ValueError: a number out of range.
    """

    mask_weight: float
    temperature: float
    top_threshold: float
    bottom_threshold: float = 0.0

    def __post_init__(self) -> None:
        require_range(self, 0, "mask_weight")
        require_range(self, 0, "top_threshold", "bottom_threshold", most=1)
        _check_temperature(self.temperature)


class SoftPruning(nn.Module):
    """The thresholds (L,) of the soft stage. All tokens run; what a layer gives for a token is multiplied by `sigmoid((s - theta_l) / T)`.

    Raises:
        ValueError: a class whose tokens cannot be removed.
    """

    def __init__(self, model: nn.Module, settings: SoftPruningSettings):
        super().__init__()
        check_prunable(model)
        ends = (settings.bottom_threshold, settings.top_threshold)
        self.thresholds = nn.Parameter(torch.linspace(*ends, model_spec_of(model).num_layers(model)))  # (L,)
        self._attach = functools.partial(soft_pruning, model, temperature=settings.temperature)

    def attached(self, mask: Tensor):
        """Within, a forward of the model fades tokens; see `soft_pruning`."""
        return self._attach(self.thresholds, mask)

    def pruning(self) -> tuple[float, ...]:
        """The thresholds learned, in [0, 1]."""
        return tuple(self.thresholds.detach().clamp(0, 1).tolist())


@contextmanager
def soft_pruning(model: nn.Module, thresholds: Tensor, mask: Tensor, *, temperature: float) -> Iterator[list[Tensor]]:
    """Within, a forward multiplies each token after layer l by `sigmoid((s - theta_l) / T)`; yields a list to which every layer
    appends these gates (B, N), 1 for the first token, 0 for padding. Thresholds (L,) get gradients; all tokens run.

    Raises:
        ValueError: a class whose tokens cannot be removed, thresholds of the wrong number, a temperature not above 0.
    """
    check_pruning(model, (0.0,) * len(thresholds))
    _check_temperature(temperature)
    gates: list[Tensor] = []
    keys = mask.bool()

    def faded(block: nn.Module, original, hidden, *args, **kwargs):
        with projected(block) as found:
            output = original(hidden, *args, **kwargs)
        heads = PARTS[type(block).__name__].heads(block)
        gate = ((saliency(*found, keys, heads=heads) - thresholds[len(gates)]) / temperature).sigmoid()  # (B, N)
        gate = torch.cat([torch.ones_like(gate[:, :1]), gate[:, 1:]], dim=1) * keys
        gates.append(gate)
        return output * gate[:, :, None].to(output.dtype)

    with ExitStack() as stack:
        for block in model_spec_of(model).blocks(model):
            stack.callback(ForwardPatch(block, functools.partial(faded, block)).restore)
        yield gates


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}, expected a finite number above 0")


def _soft_loss(outputs: BatchOutputs, settings: SoftPruningSettings) -> dict[str, Tensor]:
    """`CE + mask_weight kept`, kept: the share of the tokens that the gates let through, mean over layers."""
    kept = outputs.kept / outputs.real
    own = summed_loss(outputs.logits[-1:], outputs.labels)
    return {"loss": own + settings.mask_weight * kept, "kept": kept}


SOFT = Method(_soft_loss, trains="model", settings=SoftPruningSettings, pruning="ignored", token_gates=SoftPruning)
HARD = Method(own_loss, trains="model", pruning="required")
