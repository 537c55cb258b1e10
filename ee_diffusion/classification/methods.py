"""Published methods of early exit in classifiers as policies: one function each, naming the paper and every deviation.

Which exits a method wants stands in `EXITS`; how they are trained in objective.py.
"""

from __future__ import annotations

import math

from ee_diffusion.core.criteria import GatedExit, Patience, QExit, SampledExit, Threshold
from ee_diffusion.core.policy import Policy

# method -> (head, judge) of its `ClassifierExits`
EXITS: dict[str, tuple[str, str]] = {
    "palbert": ("shared", "halting"),
    "pondernet": ("shared", "linear_halting"),
    "pabee": ("pooled", "none"),
    "deebert": ("pooled", "none"),
    "fastbert": ("pooled", "none"),
    "berxit": ("pooled", "correctness"),
    "jei_dnn": ("linear", "statistics"),
}


def palbert(q: float) -> Policy:
    """PALBERT's Q-exit (arXiv 2204.03276): stop at the first i with `sum_{j<=i} p_j > q`, `p_i = lambda_i prod_{j<i} (1 - lambda_j)`.

    q in [0, 1], 0.5 in the paper; larger is safer. Deviations: rows of a batch leave on their own (the released code runs batches of
    one); the model's own end takes the mass that remains, so that p sums to 1.

    Raises:
        ValueError: q outside [0, 1].
    """
    return Policy(QExit(q, score="learned_confidence"))


def pondernet(seed: int) -> Policy:
    """PonderNet's sampling exit (arXiv 2107.05407): the exit is drawn from p. The control of PALBERT's Q-exit.

    Deviation: one draw per element by the inverse of the cumulative distribution, fixed by `seed` and the element's id, where the paper
    draws a Bernoulli at every layer; the distribution of the exit is the same. A text's id is made of its tokens where none is given.
    """
    return Policy(SampledExit(seed, score="learned_confidence"))


def pabee(patience: int) -> Policy:
    """PABEE (arXiv 2006.04152): stop once `patience` exits in a row agreed with the one before.

    Raises:
        ValueError: patience below 1.
    """
    return Policy(Patience(0.5, patience, score="agreement"))


def pabee_regression(patience: int, *, tolerance: float) -> Policy:
    """PABEE for regression: stop once `patience` answers in a row lay within `tolerance` of the one before.

    Raises:
        ValueError: patience below 1, a tolerance not above 0.
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}, expected a finite number above 0")
    return Policy(Patience(math.exp(-tolerance), patience, score="closeness"))


def deebert(entropy: float, *, num_labels: int) -> Policy:
    """DeeBERT (arXiv 2004.12993): stop at the first exit whose entropy is below `entropy` nats, in [0, log num_labels]; larger is bolder.

    Raises:
        ValueError: an entropy outside that range, or fewer than two labels.
    """
    if num_labels < 2 or not 0 <= entropy <= math.log(num_labels):
        raise ValueError(
            f"entropy={entropy} for {num_labels} labels, expected [0, log num_labels] and at least two labels"
        )
    return Policy(Threshold(1 - entropy / math.log(num_labels), score="negative_entropy"))


def fastbert(speed: float) -> Policy:
    """FastBERT (arXiv 2004.02178): stop at the first exit whose entropy over log C is below `speed` in [0, 1]; larger is bolder.

    Deviation: FastBERT's student is a small transformer of its own; here it is a pooled head.

    Raises:
        ValueError: speed outside [0, 1].
    """
    return Policy(Threshold(1 - speed, score="negative_entropy"))


def berxit(confidence: float) -> Policy:
    """BERxiT (EACL 2021): stop at the first exit whose learned-to-exit module gives more than `confidence` to being right; larger is safer.

    Raises:
        ValueError: a certainty outside [0, 1].
    """
    return Policy(Threshold(confidence, score="learned_confidence"))


def jei_dnn(threshold: float) -> Policy:
    """JEI-DNN (arXiv 2310.09163): stop where `P_l / prod_{j<l} (1 - a_j) >= threshold`, `P_l = max(0, min(g_l, 1 - sum_{j<l} g_j))`.

    threshold in [0, 1], 0.5 in the paper; larger is safer.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    return Policy(GatedExit(threshold, score="learned_confidence"))


def confidence(threshold: float) -> Policy:
    """The plain control: stop at the first exit whose largest probability is above `threshold` in [0, 1]; larger is safer.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    return Policy(Threshold(threshold, score="max_probability"))
