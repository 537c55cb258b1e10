"""What eval/classify.py says of one look: figures of rules, their controls, conformal sets, budgets, guarantees, lengths.

Here: from a look to numbers. Not here: looking, timing, command lines. n texts, A answers, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.evaluation import NO_SCORE, ExitRecord
from ee_diffusion.classification.methods import (
    berxit,
    confidence,
    fastbert,
    jei_dnn,
    pabee,
    pabee_regression,
    palbert,
    pondernet,
)
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import shuffled_overall, value_for_budget
from ee_diffusion.core.risk_control import (
    certified,
    conformal_sets,
    conformal_thresholds,
    in_expectation,
    pareto_order,
    upper_bound,
)
from ee_diffusion.metrics.classification import figures
from ee_diffusion.metrics.image import summary
from ee_diffusion.metrics.splits import shuffled

Rule = Callable[[float], Policy]
JUDGED: dict[str, dict[str, Rule]] = {
    "none": {},
    "halting": {"palbert": palbert},
    "linear_halting": {"palbert": palbert},
    "correctness": {"berxit": berxit},
    "statistics": {"jei_dnn": jei_dnn},
}


def rules(classifier: EarlyExitClassifier) -> dict[str, Rule]:
    """The rules with a threshold in [0, 1], larger is safer, that these exits can follow.

    Raises:
        ValueError: a model that gives several classes at once, of which nothing is judged here.
    """
    if classifier.config.problem_type == "multi_label_classification":
        raise ValueError(
            "problem_type='multi_label_classification', expected a model that gives one class or one value"
        )
    if classifier.config.num_labels == 1:  # no class probabilities to look at
        return JUDGED[classifier.exits.judge]
    plain = {"confidence": confidence, "fastbert": lambda value: fastbert(1 - value)}
    return JUDGED[classifier.exits.judge] | plain


def score_of(rule: Rule) -> str:
    """The score that a rule looks at."""
    return rule(0.5).criterion.score


@dataclass(frozen=True, eq=False)
class Judge:
    """Figures and costs of answers taken: chosen on `calibration`, said of `test`, indices of texts. `draws` of every shuffle, from `seed`
    on; `miss_rate` of the conformal sets."""

    seen: ExitRecord
    calibration: Tensor
    test: Tensor
    miss_rate: float
    draws: int
    seed: int

    def __call__(self, taken: Tensor, *, score: str = NO_SCORE) -> dict:
        """taken (n,) under a rule that looks at `score` -> figures of the test texts, the paired difference in accuracy (of a regression in
        minus the squared error) to the model's own answers with its 95 % interval, mean layers, FLOPs in parts of the full model's."""
        seen, test = self.seen, self.test
        found = figures(seen.logits_at(taken)[test], seen.labels[test])
        found |= {"layers": seen.layers(taken)[test].double().mean().item()}
        found |= {"flops_fraction": (seen.cost(taken, score=score)[test].sum() / seen.full[test].sum()).item()}
        own = seen.quality(torch.full_like(taken, len(seen.depths)))
        gain = summary((seen.quality(taken) - own)[test])
        return found | {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}

    def conformal(self, taken: Tensor) -> dict:
        """Mean size and miss rate of sets calibrated per exit on the calibration texts."""
        seen, part = self.seen, self.calibration
        p = seen.logits_at(taken).double().softmax(-1)
        thresholds = conformal_thresholds(
            p[part], seen.labels[part], taken[part], num_answers=len(seen.depths) + 1, miss_rate=self.miss_rate
        )
        sets = conformal_sets(p[self.test], taken[self.test], thresholds=thresholds)  # (m, C)
        held = sets.gather(1, seen.labels[self.test][:, None])[:, 0]
        size, missed = sets.sum(1).double().mean().item(), 1 - held.double().mean().item()
        return {"set_size": size, "missed": missed, "allowed": self.miss_rate}

    def shuffled(self, taken: Tensor) -> float:
        """Mean accuracy of random exits with the same histogram among the test texts."""
        generator = torch.Generator().manual_seed(self.seed)
        part, found = self.seen.select(self.test), []
        for _ in range(self.draws):
            dealt = shuffled_overall(taken[self.test][None], generator)[0]
            found.append(part.is_correct(dealt).double().mean().item())
        return sum(found) / len(found)

    def row(self, policy: Policy, score: str) -> dict:
        """Everything that is said of one rule at one value."""
        taken = self.seen.exits_under(policy)
        return self(taken, score=score) | {"shuffled_accuracy": self.shuffled(taken)} | self.conformal(taken)


def curve(judge: Judge, rule: Rule, points: int) -> list[dict]:
    """One rule at thresholds spread over the quantiles of its own scores."""
    score = score_of(rule)
    scores = judge.seen.scores[score]
    if rule is palbert:  # its threshold is on the cumulated probability
        scores = 1 - (1 - scores).cumprod(0)
    values = scores.flatten().double().quantile(torch.linspace(0, 1, points, dtype=torch.float64)).clamp(0, 1)
    return [{"value": value, **judge.row(rule(value), score)} for value in values.unique().tolist()]


def budgeted(judge: Judge, rule: Rule, budgets: list[float]) -> list[dict]:
    """Budgeted batches: for each fraction of the layers the safest threshold that meets it on the calibration texts, judged on the others.
    A budget that no threshold meets is left out."""
    score, found = score_of(rule), []
    trace = judge.seen.select(judge.calibration).trace(score)
    for budget in budgets:
        try:
            choice = value_for_budget(trace, rule, budget=budget, low=0.0, high=1.0)
        except ValueError:
            continue
        found.append({"budget": budget, **asdict(choice), **judge.row(rule(choice.value), score)})
    return found


def controls(judge: Judge, classifier: EarlyExitClassifier) -> dict:
    """Every constant depth (the anytime curve), the oracle, agreement at every patience, and PonderNet's drawn exits."""
    seen = judge.seen
    n, answers = len(seen.labels), (*seen.depths, seen.num_layers)
    constant = []
    for place, depth in enumerate(answers):
        taken = torch.full((n,), place)
        constant.append({"depth": depth, **judge(taken), **judge.conformal(taken)})
    found = {"constant_depth": constant, "oracle": judge(seen.oracle())}
    found["pabee"] = [{"patience": t, **judge.row(pabee(t), "agreement")} for t in range(1, len(seen.depths))]
    if classifier.exits.judge in ("halting", "linear_halting"):
        found["sampled"] = [
            judge(seen.exits_under(pondernet(judge.seed + draw)), score="learned_confidence")
            for draw in range(judge.draws)
        ]
    return found


def regression(judge: Judge) -> dict:
    """Every constant depth, and patience (PABEE) at tolerances spread over the steps from exit to exit."""
    seen = judge.seen
    n, answers = len(seen.labels), (*seen.depths, seen.num_layers)
    constant = [{"depth": depth, **judge(torch.full((n,), place))} for place, depth in enumerate(answers)]
    steps = -seen.scores["closeness"][1:].clamp(min=1e-9).log().flatten().double()
    rows = []
    for tolerance in (
        steps.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist() if len(steps) else []
    ):
        for patience in range(1, len(seen.depths)):
            taken = seen.exits_under(pabee_regression(patience, tolerance=max(tolerance, 1e-6)))
            rows.append({"patience": patience, "tolerance": tolerance, **judge(taken, score="closeness")})
    return {"constant_depth": constant, "pabee": rows}


def by_length(judge: Judge, policy: Policy, *, score: str) -> list[dict]:
    """Accuracy, layers and FLOPs in the shortest, middle and longest third of the test texts."""
    seen = judge.seen.select(judge.test)
    taken, order = seen.exits_under(policy), seen.tokens.argsort(stable=True)
    found = []
    for name, texts in zip(("short", "middle", "long"), order.tensor_split(3), strict=True):
        part, own = seen.select(texts), taken[texts]
        share = (part.cost(own, score=score).sum() / part.full.sum()).item()
        figures_there = {"texts": len(texts), "mean_tokens": part.tokens.double().mean().item()}
        found.append(
            {
                "third": name,
                **figures_there,
                "accuracy": part.is_correct(own).double().mean().item(),
                "accuracy_all_layers": part.is_correct(torch.full_like(own, len(part.depths))).double().mean().item(),
                "layers": part.layers(own).double().mean().item(),
                "flops_fraction": share,
            }
        )
    return found


@dataclass(frozen=True, eq=False)
class Candidate:
    """One setting of the knobs on all texts: its name, the rule's value, what it took, cost per text and loss per text (n,): 1 where it is
    wrong and the full model on all tokens is right."""

    name: dict
    cost: Tensor
    loss: Tensor


def candidates(
    looks: dict[float, ExitRecord], rule: Rule, values: list[float], *, reference: ExitRecord
) -> list[Candidate]:
    """Every value of the exit threshold with every pruning scale: looks by scale; `reference`: the look that prunes nothing."""
    own = reference.is_correct(torch.full_like(reference.labels, len(reference.depths)))
    score, found = score_of(rule), []
    for scale, seen in looks.items():
        for value in values:
            taken = seen.exits_under(rule(value))
            lost = (own & ~seen.is_correct(taken)).double()
            found.append(Candidate({"pruning_scale": scale, "value": value}, seen.cost(taken, score=score), lost))
    return found


def halves(texts: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """texts (n,) dealt out in two by a seeded draw, so that one half speaks for the other whatever the order they came in."""
    one, other = texts[shuffled(len(texts), seed=seed)].tensor_split(2)
    return one, other


def guarantee(
    offered: list[Candidate], full: Tensor, calibration: Tensor, test: Tensor, *, risk: float, delta: float, seed: int
) -> dict:
    """The cheapest setting that may be used, by four rules, and what it does to the test texts.

    One of the calibration texts' `halves` proposes (Pareto order), the other decides: `learn_then_test` over both knobs; on the line of the
    first pruning scale alone `conformal` (in expectation) and `bound` (UCB, the boldest run of candidates whose bound holds, each at delta
    divided by their number); `naive`: the cheapest whose mean is below the risk.
    """
    losses, costs = (
        torch.stack([one.loss for one in offered]),
        torch.stack([one.cost for one in offered]),
    )  # (K, n) twice
    proposing, deciding = halves(calibration, seed=seed)
    order = pareto_order(costs[:, proposing].mean(1), losses[:, proposing], risk=risk, delta=delta)
    passed = order[certified(losses[order][:, deciding], risk=risk, delta=delta)]
    scales = [one.name["pruning_scale"] for one in offered]
    line = torch.tensor([place for place, scale in enumerate(scales) if scale == scales[0]])
    line = line[costs[line][:, proposing].mean(1).argsort(descending=True)]  # safest first
    crc = in_expectation(losses[line][:, deciding], risk=risk)
    bounds = [upper_bound(losses[place, deciding], delta / len(line)) for place in line]
    held = [int(place) for place, bound in zip(line, bounds, strict=True) if bound <= risk]
    naive = (losses[:, deciding].mean(1) <= risk).nonzero()[:, 0].tolist()
    chosen = {
        "learn_then_test": passed.tolist(),
        "conformal": [] if crc is None else [int(line[crc])],
        "bound": held,
        "naive": naive,
    }
    found = {"risk": risk, "delta": delta, "candidates": len(offered), "pareto": len(order)}
    for name, places in chosen.items():
        if not places:
            found[name] = None
            continue
        best = min(places, key=lambda place: costs[place, proposing].mean().item())
        share = (costs[best, test].sum() / full[test].sum()).item()
        found[name] = offered[best].name | {"risk_on_test": losses[best, test].mean().item(), "flops_fraction": share}
    return found
