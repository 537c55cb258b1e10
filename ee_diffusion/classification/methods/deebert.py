"""DeeBERT (arXiv 2004.12993): stop below an entropy; its exits ("off-ramps") are trained on a frozen fine-tuned model.

B samples, C classes, A outputs, the model's own last.
"""

from __future__ import annotations

import math

from torch import Tensor

from ee_diffusion.classification.method import POOLED, BatchOutputs, Method, NoSettings, summed_loss
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy


def deebert(entropy: float, *, num_labels: int) -> Policy:
    """Stop at the first exit whose entropy is below `entropy` nats, in [0, log num_labels]; larger is bolder.

    Raises:
        ValueError: an entropy outside that range, or fewer than two labels.
    """
    if num_labels < 2 or not 0 <= entropy <= math.log(num_labels):
        raise ValueError(
            f"entropy={entropy} for {num_labels} labels, expected [0, log num_labels] and at least two labels"
        )
    return Policy(Threshold(1 - entropy / math.log(num_labels), score="negative_entropy"))


def _loss(outputs: BatchOutputs, settings: NoSettings) -> dict[str, Tensor]:
    """`sum_i CE_i` over the exits alone."""
    return {"loss": summed_loss(outputs.logits[:-1], outputs.labels)}


DEEBERT = Method(_loss, trains="exits", head=POOLED)
