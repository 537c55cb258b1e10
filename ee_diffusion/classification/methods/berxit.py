"""BERxiT (EACL 2021): a module shared by all exits learns whether an exit is right.

B samples, D width, C classes, K exits, A = K + 1 outputs, the model's own last.
"""

from __future__ import annotations

from torch import Tensor, nn

from ee_diffusion.classification.method import POOLED, BatchOutputs, Judge, Method, NoSettings, summed_loss
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy


def berxit(confidence: float) -> Policy:
    """Stop at the first exit whose learned-to-exit module gives more than `confidence` to being right; larger is safer.

    Raises:
        ValueError: a confidence outside [0, 1].
    """
    return Policy(Threshold(confidence, score="learned_confidence"))


# The learned-to-exit module: one Linear on the first token; the model does not learn through it.
CORRECTNESS = Judge(
    "correctness",
    lambda size, dropout: nn.Linear(size, 1),
    lambda heads, inputs: heads.vector(inputs.hidden, inputs.context).detach(),
    looks_at="vector",
)


def correctness(logits: Tensor, labels: Tensor) -> Tensor:
    """The target of a learned-to-exit module, without gradient: logits (K, B, C), labels (B,) -> (K, B).

    Classes: 1 if right, else 0. Regression: `1 - tanh |y_i - y|`.
    """
    if labels.is_floating_point():
        return 1 - (logits.detach()[:, :, 0].float() - labels).abs().tanh()
    return (logits.detach().argmax(-1) == labels).float()


def learned_exit_loss(confidence: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """`sum_i (u_i - correct_i)^2`: confidence (K, B), logits (K, B, C); trains the confidence, never the heads."""
    return (confidence - correctness(logits, labels)).square().sum(0).mean()


def _loss(outputs: BatchOutputs, settings: NoSettings) -> dict[str, Tensor]:
    """Odd batches train the model's own output, even ones all (the alternating scheme); the learned-to-exit module every time."""
    trained = outputs.logits[-1:] if outputs.batches_seen % 2 == 0 else outputs.logits
    answers = summed_loss(trained, outputs.labels)
    learned = learned_exit_loss(outputs.judge_logits.sigmoid(), outputs.logits[:-1], outputs.labels)
    return {"loss": answers + learned, "answers": answers, "learned_to_exit": learned}


BERXIT = Method(_loss, trains="both", head=POOLED, judge=CORRECTNESS)
