"""FastBERT (arXiv 2004.02178): exits distilled from a frozen model's own output; stop below a normalized entropy.

B samples, C classes, K exits.
"""

from __future__ import annotations

from torch import Tensor

from ee_diffusion.classification.method import POOLED, BatchOutputs, Method, NoSettings
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy


def fastbert(speed: float) -> Policy:
    """Stop at the first exit whose entropy over log C is below `speed` in [0, 1]; larger is bolder.

    Deviation: the paper's student is a small transformer of its own; here it is a pooled head.

    Raises:
        ValueError: speed outside [0, 1].
    """
    return Policy(Threshold(1 - speed, score="negative_entropy"))


def distillation_loss(students: Tensor, teacher: Tensor) -> Tensor:
    """`sum_i KL(p_student_i || p_teacher)`, no gradient to the teacher: logits (K, B, C) and (B, C)."""
    student, target = students.float().log_softmax(-1), teacher.detach().float().log_softmax(-1)
    return (student.exp() * (student - target)).sum(-1).sum(0).mean()


def _loss(outputs: BatchOutputs, settings: NoSettings) -> dict[str, Tensor]:
    return {"loss": distillation_loss(outputs.logits[:-1], outputs.logits[-1])}


FASTBERT = Method(_loss, trains="exits", head=POOLED)
