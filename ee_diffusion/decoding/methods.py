"""Published decoding methods as policies: one function each, naming the paper, its equation and every deviation.

A step is one generated token that is read (token 0 comes from the prompt's forward); the prompt itself is always read at full depth.
"""

from __future__ import annotations

from ee_diffusion.core.criteria import DecayingThreshold, DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedLayers, LinearDecay, PowerDecay

CALM_SCORES = ("max_probability", "margin", "saturation", "confidence", "pruned_probability")


def skipdecode(*, warm_up: int, least: int, most: int, horizon: int) -> Policy:
    """SkipDecode (arXiv 2307.02628, sec. 3): `n(t)` falls linearly from `most` layers to `least` over `horizon` tokens; the first
    `warm_up` layers and the last `n(t) - warm_up` run.

    Layers that run at t+1 ran at t, so no key or value is ever missing and those of dropped layers are freed. The whole batch shares
    the schedule. Deviation: none in the rule; the paper fine-tunes the model under it.

    Raises:
        ValueError: horizon below 2, least above most, not 1 <= warm_up < least; at the start of a run most above the model's layers.
    """
    return Policy(schedule=LinearDecay(most, least, horizon, bottom=warm_up))


def early_termination(*, least: int, most: int, horizon: int) -> Policy:
    """SkipDecode's `n(t)` with the first n(t) layers instead: the ablation "stop early" against "skip".

    Raises:
        ValueError: as `skipdecode`.
    """
    return Policy(schedule=LinearDecay(most, least, horizon, bottom=None))


def d3(alpha: float, *, first: int, least: int) -> Policy:
    """D3 (arXiv 2503.08524): `floor(L * alpha^t)` layers, the first and the last kept, the middle dropped.

    first: layers always kept at the bottom, the others are the last ones; least: layers below which the depth does not fall.
    Deviation: the paper chooses the dropped span by a search; here it ends where the last layers begin.

    Raises:
        ValueError: alpha outside (0, 1], not 1 <= first < least.
    """
    return Policy(schedule=PowerDecay(alpha, least, bottom=first))


def uniform_skipping(count: int, *, num_layers: int) -> Policy:
    """Unified Layer Skipping (arXiv 2404.06954): `count` evenly spaced layers of `num_layers`, the same at every token, first and last in.

    Deviation: a layer that never runs needs no keys and values, so none are copied to it.

    Raises:
        ValueError: count outside 2..num_layers.
    """
    if not isinstance(count, int) or not isinstance(num_layers, int) or not 2 <= count <= num_layers:
        raise ValueError(f"count={count!r} layers of {num_layers!r}, expected whole numbers, 2 or more of them")
    span = count - 1
    keep = tuple((2 * i * (num_layers - 1) + span) // (2 * span) for i in range(count))
    return Policy(schedule=FixedLayers(keep, of=num_layers))


def calm(threshold: float, *, exits: tuple[int, ...], score: str, horizon: int | None) -> Policy:
    """CALM (arXiv 2207.07061): exit at the first of `exits` whose score is above the threshold.

    score: "max_probability", "margin" (top-2 difference), "saturation" (cosine of consecutive states), "confidence" (a learned
    classifier: `LearnedExits`) or "pruned_probability" (softmax over the best tokens of the first check, arXiv 2410.18952).
    horizon: T of the position-decayed threshold `0.9 lambda + 0.1 lambda exp(-4 t / T)`; None: a constant threshold. Missing keys and
    values are computed from the state a token left with (sec. 3.3). Deviations: decoder-only models; exits at a sparse set of depths,
    since each softmax check costs an LM head.

    Raises:
        ValueError: a threshold outside the score's range, a score that is none of these, a horizon below 1.
    """
    if score not in CALM_SCORES:
        raise ValueError(f"score={score!r}, expected one of {CALM_SCORES}")
    if isinstance(exits, int) or not exits:
        raise ValueError(f"exits={exits!r}, expected depths, at least one")
    criterion = Threshold(threshold, score) if horizon is None else DecayingThreshold(threshold, horizon, score=score)
    return Policy(criterion, exits=exits)


def depth_per_request(depths: tuple[int, ...], *, exits: tuple[int, ...]) -> Policy:
    """Each sequence of the batch at a depth of its own, at every token: the first exit that is at least as deep, else the whole model.

    Raises:
        ValueError: no depths, or negative ones.
    """
    return Policy(DepthTable((depths,), every_step=True), exits=exits)
