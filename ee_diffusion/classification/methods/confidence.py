"""The plain controls: stop at the largest probability; fine-tune the stock classifier alone."""

from __future__ import annotations

from torch import Tensor

from ee_diffusion.classification.method import BatchOutputs, Method, NoSettings, summed_loss
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy


def confidence(threshold: float) -> Policy:
    """Stop at the first exit whose largest probability is above `threshold` in [0, 1]; larger is safer.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    return Policy(Threshold(threshold, score="max_probability"))


def own_loss(outputs: BatchOutputs, settings: NoSettings) -> dict[str, Tensor]:
    """The loss of the model's own output."""
    return {"loss": summed_loss(outputs.logits[-1:], outputs.labels)}


PLAIN = Method(own_loss, trains="model", pruning="ignored")
