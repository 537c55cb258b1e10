"""Questions to decoding that are no tables: is lossless decoding lossless, do batch-mates matter, which policy may be used at a risk."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ee_diffusion.core.risk_control import certified, in_expectation, p_value, upper_bound
from ee_diffusion.decoding.fingerprint import fingerprint_of
from ee_diffusion.metrics.splits import shuffled
from ee_diffusion.metrics.text import rouge_each
from eval.decoder import Decoder, parts_of, work_of
from eval.harness.options import flag

NEAR = 1e-4
LOSSES = ("consistency", "risk")


@dataclass(frozen=True)
class CalibrateOptions:
    """What is done, and what is promised by `--mode calibrate`."""

    mode: str = flag("tables, lossless, alone or calibrate.", "tables")
    loss: str = flag(
        "consistency: 1 - ROUGE-L to the full model's text; risk: what ROUGE-L to the references falls below it.",
        "consistency",
    )
    risk: float | None = flag("Most expected loss of a text.")
    delta: float | None = flag("Probability that the promise fails.")


def lossless(decoder: Decoder, meanings: dict[str, list[str]], options: CalibrateOptions) -> dict[str, list[dict]]:
    """Lossless decoding against greedy search at every batch size, on the first `--count` prompts: equal tokens, and where not, how near
    the full model's two best logits were at the first difference. `time`: median over batches of lossless over greedy, in turns."""
    if "lossless" not in decoder.candidates:
        raise ValueError("--mode lossless without --exit_depth and --draft_tokens, expected what drafts")
    chosen = list(meanings)[: decoder.options.count]
    if not chosen:
        raise ValueError(f"--mode lossless with count={decoder.options.count}, expected at least 1")
    return {"lossless": [_compared(decoder, chosen, batch) for batch in decoder.options.batch_sizes]}


def _compared(decoder: Decoder, chosen: list[str], batch: int) -> dict:
    row = {"batch": batch, "prompts": len(chosen), "equal": 0, "near": 0, "far": 0, "largest_gap": None}
    clocks: dict[str, list[float]] = {"full": [], "lossless": []}
    drafted = accepted = tokens = 0
    for turn, some in enumerate(parts_of(chosen, batch, called=f"batch {batch}")):
        inputs, outs = decoder.inputs(some), {}
        names = ["full", "lossless"] if turn % 2 == 0 else ["lossless", "full"]
        for name in names:
            begun = time.perf_counter()
            more = {"output_logits": True} if name == "full" else {}
            outs[name] = decoder.written(name, inputs, **more)
            clocks[name].append(time.perf_counter() - begun)
        (greedy, full), (other, drafts) = outs["full"], outs["lossless"]
        tokens += int((greedy != decoder.tokenizer.pad_token_id).sum())
        drafted, accepted = drafted + int(drafts.drafted.sum()), accepted + int(drafts.accepted.sum())
        _count(row, greedy, other, full.logits)
    ratios = [one / two for one, two in zip(clocks["lossless"], clocks["full"], strict=True)]
    facts = {"tokens": tokens, "drafted": drafted, "accepted": accepted, "accepted_share": accepted / max(drafted, 1)}
    return row | facts | {"time": median(ratios)}


def alone(decoder: Decoder, meanings: dict[str, list[str]], options: CalibrateOptions) -> dict[str, list[dict]]:
    """Every candidate on the first `--count` prompts in padded batches, and on each prompt alone: equal tokens, and where not, how near
    its two best logits were at the first difference."""
    size, chosen, rows = decoder.options.text_batch_size, list(meanings)[: decoder.options.count], []
    for name in decoder.candidates:
        if name == "assistant":  # takes no batch
            continue
        row = {"name": name, "prompts": len(chosen), "equal": 0, "near": 0, "far": 0, "largest_gap": None}
        for some in parts_of(chosen, size, called=name):
            batch, _ = decoder.written(name, decoder.inputs(some))
            for place, meaning in enumerate(some):
                seen = {} if name == "lossless" else {"output_logits": True}
                own, out = decoder.written(name, decoder.inputs([meaning]), **seen)
                _count(row, own, batch[place : place + 1], None if name == "lossless" else out.logits)
        rows.append(row)
    return {"alone": rows}


def _count(row: dict, one: Tensor, two: Tensor, logits: tuple[Tensor, ...] | None) -> None:
    """Add sequences (R, T) to a row's counts; without logits every difference is far."""
    if logits is None:
        differ = (one != two).any(1).tolist()
        gaps = [torch.inf if different else None for different in differ]
    else:
        gaps = gaps_at_differences(one, two, logits)
    for gap in gaps:
        row["equal" if gap is None else "near" if gap < NEAR else "far"] += 1
        if gap is not None:
            row["largest_gap"] = max(gap, row["largest_gap"] or 0.0)


def gaps_at_differences(greedy: Tensor, other: Tensor, logits: tuple[Tensor, ...]) -> list[float | None]:
    """For each sequence (R, T) the full model's gap between its two best logits (T tensors (R, V)) at the first difference; None: equal."""
    found: list[float | None] = []
    for row, (one, two) in enumerate(zip(greedy, other, strict=True)):
        places = (one != two).nonzero()
        if not len(places):
            found.append(None)
            continue
        best = logits[int(places[0])][row].topk(2).values
        found.append(float(best[0] - best[1]))
    return found


def calibrate(decoder: Decoder, meanings: dict[str, list[str]], options: CalibrateOptions) -> dict[str, list[dict]]:
    """Which policies (safest first) may be used so that a text's expected loss stays below `--risk`, with confidence 1 - delta.

    CALM's two promises (arXiv 2207.07061, sec. 4): textual consistency with the full model, or risk against the references; tested in
    their order (learn then test). Of the prompts, drawn by `--seed`, one half calibrates, the other says what became of the promise. The
    boldest certified policy is written to policy.json, for this model alone; where none is certified, none is left. `in_expectation`: the
    one that conformal risk control takes (the mean over calibrations is bounded, no single one).
    """
    if options.loss not in LOSSES:
        raise ValueError(f"loss={options.loss!r}, expected one of {LOSSES}")
    if options.risk is None or options.delta is None:
        raise ValueError(f"--mode calibrate with risk={options.risk}, delta={options.delta}, expected both numbers")
    if not 0 < options.risk < 1 or not 0 < options.delta < 1:
        raise ValueError(f"risk={options.risk}, delta={options.delta}, expected both within (0, 1)")
    names = [name for name in decoder.candidates if name not in ("full", "driver", "lossless", "assistant")]
    known = list(meanings)
    chosen = [known[place] for place in shuffled(len(known), seed=decoder.options.seed)[: decoder.options.count]]
    if not names or len(chosen) < 2:
        raise ValueError(f"{len(names)} policies and {len(chosen)} prompts, expected at least 1 and 2")
    wanted = [meanings[meaning] for meaning in chosen]
    target = Path(decoder.options.output_dir) / "policy.json"
    if target.resolve() in [Path(path).resolve() for path in decoder.options.policies]:
        raise ValueError(f"{target} is among the policies and would be written over, expected another output_dir")
    full, _ = _texts(decoder, "full", chosen)
    losses, layers = [], []
    for name in names:
        said, ran = _texts(decoder, name, chosen)
        losses.append(text_losses(said, full, wanted, kind=options.loss))
        layers.append(ran)
    table, half = torch.stack(losses), len(chosen) // 2  # (K, n)
    first, second = table[:, :half], table[:, half:]
    good = certified(first, risk=options.risk, delta=options.delta)
    expected = in_expectation(first, risk=options.risk)
    rows = [
        {
            "name": name,
            "layers": layers[k],
            "loss": float(first[k].mean()),
            "p_value": p_value(first[k], options.risk, delta=options.delta),
            "upper_bound": upper_bound(first[k], options.delta),
            "certified": bool(good[k]),
            "in_expectation": expected == k,
            "held_out_loss": float(second[k].mean()),
        }
        for k, name in enumerate(names)
    ]
    if any(good):
        boldest = names[int(good.nonzero()[-1])]
        policy = decoder.candidates[boldest]["exit_policy"]
        replace(policy, made_for=(("model", fingerprint_of(decoder.model)),)).save(target)
    else:
        target.unlink(missing_ok=True)  # of an earlier calibration
    return {"calibration": rows}


def text_losses(texts: list[str], full: list[str], references: list[list[str]], *, kind: str) -> Tensor:
    """(R,) in [0, 1]: `1 - ROUGE-L(text, full)`, or `max(0, ROUGE-L(full, references) - ROUGE-L(text, references))`."""
    if kind == "consistency":
        return 1 - rouge_each(texts, [[one] for one in full])
    return (rouge_each(full, references) - rouge_each(texts, references)).clamp(min=0)


def _texts(decoder: Decoder, name: str, chosen: list[str]) -> tuple[list[str], float]:
    """What a candidate writes, and the layers it ran per token that was read."""
    size, texts, ran, read = decoder.options.text_batch_size, [], 0, 0
    for some in parts_of(chosen, size, called=name):
        tokens, out = decoder.written(name, decoder.inputs(some))
        texts += decoder.texts(tokens)
        work = work_of(name, out)
        ran, read = ran + work[0], read + work[1]
    return texts, ran / read if read else float(decoder.num_layers)
