"""Text scores on texts whose scores are known, agreement counted by hand, intervals that hold the mean."""

from __future__ import annotations

import math

import pytest
import torch

from ee_diffusion.metrics.text import agreement, bootstrap_interval, bootstrap_ratio, perplexity, text_scores


def lcs(one: list[str], two: list[str]) -> int:
    if not one or not two:
        return 0
    if one[0] == two[0]:
        return 1 + lcs(one[1:], two[1:])
    return max(lcs(one[1:], two), lcs(one, two[1:]))


def test_rouge_is_the_longest_common_subsequence_of_the_best_reference():
    text, references = "the cat sat on a mat", ["a dog ran", "the cat lay on the mat"]
    found = text_scores([text, "same words"], [references, ["same words"]], resamples=200, seed=0)
    best = 0.0
    for reference in references:
        common = lcs(text.split(), reference.split())
        precision, recall = common / len(text.split()), common / len(reference.split())
        best = max(best, 2 * precision * recall / (precision + recall) if common else 0.0)
    assert found["rougeL"] == pytest.approx((best + 1) / 2, abs=1e-6)
    assert found["rougeL_low"] <= found["rougeL"] <= found["rougeL_high"]
    known = {"each": torch.tensor([0.25, 0.75]), "resamples": 200, "seed": 0}
    assert text_scores([text, "same words"], [references, ["same words"]], **known)["rougeL"] == 0.5
    perfect = text_scores(["one two three four"], [["one two three four"]], resamples=10, seed=0)
    assert (perfect["rougeL"], perfect["bleu"], perfect["chrf"]) == pytest.approx((1.0, 1.0, 1.0))


def test_agreement_by_hand():
    tokens, reference = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[1, 2, 3, 4], [5, 0, 7, 8]])
    assert agreement(tokens, reference) == {"tokens": 7 / 8, "prefix": (1 + 1 / 4) / 2, "sequences": 0.5}


def test_perplexity_is_its_formula():
    logits, targets = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[0, 4, -100], [2, -100, 1]])
    total, count = 0.0, 0
    for row, place in [(0, 0), (0, 1), (1, 0), (1, 2)]:
        values = logits[row, place].tolist()
        total -= values[int(targets[row, place])] - math.log(sum(math.exp(value) for value in values))
        count += 1
    assert perplexity(logits, targets) == pytest.approx(math.exp(total / count), rel=1e-6)


def test_a_ratio_is_resampled_in_pairs():
    reference = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.1
    low, high = bootstrap_ratio(0.8 * reference, reference, resamples=100, seed=0)
    assert (low, high) == pytest.approx((0.8, 0.8), abs=1e-6), "every resample has the same meanings on both sides"
    low, high = bootstrap_ratio(reference.flip(0), reference, resamples=2000, seed=0)
    assert low < 1 < high
    drawn = torch.randint(50, (2000, 50), generator=torch.Generator().manual_seed(0))
    ratios = sorted(float(reference.flip(0)[row].mean() / reference[row].mean()) for row in drawn)
    assert (low, high) == pytest.approx((ratios[50], ratios[1949]), abs=5e-3)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="expected as many"):
        text_scores(["a"], [["a"], ["b"]], resamples=1, seed=0)
    with pytest.raises(ValueError, match="expected as many"):
        text_scores(["a"], [[]], resamples=1, seed=0)
    with pytest.raises(ValueError, match="expected one number a text"):
        text_scores(["a"], [["a"]], resamples=1, seed=0, each=torch.ones(2))
    with pytest.raises(ValueError, match="resamples=0"):
        bootstrap_interval(torch.ones(3), resamples=0, seed=0)
    ones = torch.ones(3)
    for values, reference, resamples in ((ones, ones[:2], 9), (ones, 0 * ones, 9), (ones, ones, 0)):
        with pytest.raises(ValueError, match=r"expected \(R,\) twice"):
            bootstrap_ratio(values, reference, resamples=resamples, seed=0)
    few = torch.tensor([0.0, 0.0, 0.7])
    with pytest.raises(ValueError, match="0 throughout some resamples"):
        bootstrap_ratio(few, few, resamples=200, seed=0)
    with pytest.raises(ValueError, match="one shape"):
        agreement(torch.zeros(2, 3), torch.zeros(2, 4))
