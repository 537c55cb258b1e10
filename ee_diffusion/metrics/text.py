"""Generated text against references and against the full model's text. Scores are torchmetrics'; intervals are bootstrapped over samples.

Here: numbers from texts and tokens. Not here: generating them (eval/decode.py). R sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.text import bleu_score, chrf_score, rouge_score
from torchmetrics.functional.text import perplexity as perplexity_of


def text_scores(
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    resamples: int,
    seed: int,
    each: Tensor | None = None,
) -> dict[str, float]:
    """ROUGE-L (F, the best of a text's references, mean over texts, with a 95 % bootstrap interval), BLEU and chrF of the corpus.

    each: `rouge_each` of the same texts (R,), where it is known; None: it is computed.

    Raises:
        ValueError: no texts, a text without a reference, or another number of them (or of `each`).
    """
    if not texts or len(texts) != len(references) or not all(references):
        raise ValueError(f"{len(texts)} texts, {len(references)} lists of references, expected as many and none empty")
    each = rouge_each(texts, references) if each is None else each  # (R,)
    if each.shape != (len(texts),):
        raise ValueError(f"each {tuple(each.shape)} for {len(texts)} texts, expected one number a text")
    low, high = bootstrap_interval(each, resamples=resamples, seed=seed)
    wanted = [list(one) for one in references]
    return {
        "rougeL": each.mean().item(),
        "rougeL_low": low,
        "rougeL_high": high,
        "bleu": bleu_score(list(texts), wanted).item(),
        "chrf": chrf_score(list(texts), wanted).item(),
    }


def rouge_each(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    """ROUGE-L (F, the best of a text's references) of each text, (R,). Raises ValueError for another number of references."""
    if len(texts) != len(references):
        raise ValueError(f"{len(texts)} texts, {len(references)} lists of references, expected as many")
    return torch.tensor([_rouge(text, list(wanted)) for text, wanted in zip(texts, references, strict=True)])


def bootstrap_interval(values: Tensor, *, resamples: int, seed: int) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of the mean of values (R,) under resampling.

    Raises:
        ValueError: fewer than one resample.
    """
    if resamples < 1:
        raise ValueError(f"resamples={resamples}, expected at least 1")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def bootstrap_ratio(values: Tensor, reference: Tensor, *, resamples: int, seed: int) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of mean(values) / mean(reference), both (R,), under resampling of the pairs.

    Raises:
        ValueError: other shapes, fewer than one resample, a reference whose mean is not positive, or not in every resample.
    """
    if values.shape != reference.shape or values.ndim != 1 or resamples < 1 or not reference.mean() > 0:
        raise ValueError(
            f"values {tuple(values.shape)}, reference {tuple(reference.shape)} of mean {reference.mean().item():.3g}, "
            f"resamples={resamples}, expected (R,) twice, a mean above 0 and at least 1"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    below = reference[drawn].mean(1)  # (resamples,)
    if not bool((below > 0).all()):
        raise ValueError(
            f"reference {tuple(reference.shape)} is 0 throughout some resamples, expected more values above 0"
        )
    ratios = values[drawn].mean(1) / below
    low, high = ratios.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def agreement(tokens: Tensor, reference: Tensor) -> dict[str, float]:
    """How far sequences (R, T) are those of the reference (R, T).

    `tokens`: mean share of places that agree; `prefix`: mean share of T before the first difference; `sequences`: share that are equal.

    Raises:
        ValueError: other shapes.
    """
    if tokens.shape != reference.shape or tokens.ndim != 2:
        raise ValueError(f"tokens {tuple(tokens.shape)} and {tuple(reference.shape)}, expected one shape (R, T)")
    same = tokens == reference  # (R, T)
    prefix = same.long().cumprod(1).sum(1) / same.shape[1]
    return {
        "tokens": same.double().mean().item(),
        "prefix": prefix.double().mean().item(),
        "sequences": same.all(1).double().mean().item(),
    }


def perplexity(logits: Tensor, targets: Tensor, *, ignored: int = -100) -> float:
    """`exp` of the mean negative log-likelihood of targets (R, T), those that are `ignored` left out, under logits (R, T, V)."""
    return perplexity_of(logits, targets, ignore_index=ignored).item()


def _rouge(text: str, references: list[str]) -> float:
    return float(rouge_score(text, [references], rouge_keys="rougeL", accumulate="best")["rougeL_fmeasure"])
