"""Decoding a language model with exits: tokens per second, layers that ran, agreement with the full model, text scores.

python -m eval.decode --model MODEL --text testset_w_refs.csv --policies skip.json calm.json --output_dir runs/decode

Candidates: the plain model (`full`), the model at full depth under the exits' driver (`driver`), every policy file, lossless decoding and
transformers' `assistant_early_exit` (batch 1). Clock: every candidate generates the same number of tokens (no end of text) and they take
turns; the prompt's forward is timed apart and taken off. Layers are counted by hooks inside them, not by what the policy says; `realised`
is the ideal time over the measured one (decode_parts.py). Text: greedy, until the end of text, against the references of each meaning;
perplexity is that of the written text under the full model. The prompt is `--prompt` with {mr} replaced. Writes decode.json, decode.md and
texts.json: what every candidate wrote, text by text, with its ROUGE-L (decode_table.py compares runs by it).

`--mode lossless`: lossless decoding against greedy search on `--count` prompts, token by token. `--mode alone`: every candidate in padded
batches against each prompt alone. `--mode calibrate`: which of the policies (safest first) may be used at a risk (decode_modes.py).
"""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.io import write_text
from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.hooks import running_modules
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from ee_diffusion.metrics.text import agreement, perplexity, rouge_each, text_scores
from ee_diffusion.metrics.timing import interleaved
from eval.decode_modes import CalibrateOptions, alone, calibrate, lossless
from eval.decode_parts import PartTimes
from eval.decoder import DecodeOptions, Decoder, parts_of, read_meanings, work_of
from eval.harness.options import parse


def layers_run(decoder: Decoder, name: str, inputs: dict[str, Tensor], tokens: int) -> float:
    """Layers x positions that really ran after the prompt, for each generated token, counted inside the layers."""
    counts: list[int] = []

    def hook(module, args) -> None:
        counts.append(args[0][..., 0].numel())

    handles = [module.register_forward_pre_hook(hook) for module in running_modules(decoder.model)]
    try:
        decoder.generate(name, inputs, eos_token_id=None)
    finally:
        for handle in handles:
            handle.remove()
    prompt = inputs["input_ids"].numel() * decoder.num_layers
    return (sum(counts) - prompt) / (len(inputs["input_ids"]) * (tokens - 1))


def speed(decoder: Decoder, meanings: list[str], batch: int) -> list[dict]:
    """One row for each candidate at a batch size."""
    options, tokens = decoder.options, decoder.options.max_new_tokens
    inputs = decoder.inputs((meanings * batch)[:batch])
    names = [name for name in decoder.candidates if batch == 1 or name != "assistant"]
    runs = {name: partial(decoder.generate, name, inputs, eos_token_id=None) for name in names}
    runs["prompt"] = partial(decoder.generate, "full", inputs, eos_token_id=None, max_new_tokens=1)
    timings = interleaved(
        runs, repeats=options.repeats, warmup=1, device=decoder.device, dtype=options.dtype, batch=batch
    )
    parts = PartTimes(decoder, inputs)
    rows, prompt = [], timings["prompt"].median
    for name in names:
        seconds = timings[name].median - prompt
        rows.append(
            {
                "name": name,
                "batch": batch,
                "tokens_per_second": batch * (tokens - 1) / seconds,
                "ms_per_token": 1e3 * seconds / (tokens - 1),
                "prompt_ms": 1e3 * prompt,
                "time": timings[name].ratio(timings["full"]),
                "layers": layers_run(decoder, name, inputs, tokens),
                **parts.of(name, seconds),
            }
        )
    return rows


def quality(decoder: Decoder, meanings: dict[str, list[str]]) -> list[dict]:
    """One row for each candidate: its text against the references and against the full model's. Writes texts.json."""
    options, chosen = decoder.options, list(meanings)[: decoder.options.count]
    wanted, rows, full, size = [meanings[meaning] for meaning in chosen], [], None, options.text_batch_size
    written: dict[str, dict] = {}
    for name in decoder.candidates:
        if name == "assistant":
            continue
        parts = [_written(decoder, name, some) for some in parts_of(chosen, size, called=name)]
        tokens = torch.cat([part.tokens for part in parts])
        ran, read = sum(part.ran for part in parts), sum(part.read for part in parts)
        layers = ran / read if read else float(decoder.num_layers) if name == "full" else None
        full = tokens if name == "full" else full
        texts = decoder.texts(tokens)
        each = rouge_each(texts, wanted)  # (R,)
        written[name] = {"texts": texts, "rougeL": each.tolist()}
        scores = text_scores(texts, wanted, resamples=1000, seed=options.seed, each=each)
        same = {} if full is None else {f"same_{key}": value for key, value in agreement(tokens, full).items()}
        likely = pooled([(part.perplexity, part.count) for part in parts])
        rows.append({"name": name, **scores, **same, "perplexity": likely, "layers": layers})
    write_json(Path(options.output_dir) / "texts.json", {"meanings": chosen, "candidates": written})
    return rows


def pooled(parts: list[tuple[float, int]]) -> float:
    """The perplexity of all tokens from those of some batches and how many tokens each had."""
    return math.exp(sum(count * math.log(value) for value, count in parts) / sum(count for _, count in parts))


class Written(NamedTuple):
    """What a candidate wrote of some meanings: `tokens` (R, T), padded to the number that was asked for; their `perplexity` under the full
    model and how many they are (`count`); layers that `ran` for them, of how many tokens that were `read`."""

    tokens: Tensor
    perplexity: float
    count: int
    ran: int
    read: int


def _written(decoder: Decoder, name: str, meanings: list[str]) -> Written:
    inputs, pad = decoder.inputs(meanings), decoder.tokenizer.pad_token_id
    padded, out = decoder.written(name, inputs)
    width = inputs["input_ids"].shape[1]
    tokens = out.sequences[:, width:]
    mask = torch.cat([inputs["attention_mask"], (tokens != pad).long()], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = decoder.model(
            out.sequences, attention_mask=mask, position_ids=positions, logits_to_keep=tokens.shape[1] + 1
        ).logits[:, :-1]
    targets = tokens.masked_fill(tokens == pad, -100)
    return Written(padded, perplexity(logits.float(), targets), int((targets >= 0).sum()), *work_of(name, out))


def tables(decoder: Decoder, meanings: dict[str, list[str]], options: CalibrateOptions) -> dict[str, list[dict]]:
    """The clock and the text, a table each."""
    sizes = decoder.options.batch_sizes if decoder.options.repeats else []
    clock = [row for batch in sizes for row in speed(decoder, list(meanings), batch)]
    return {"speed": clock, "quality": quality(decoder, meanings) if decoder.options.count else []}


MODES = {"tables": tables, "lossless": lossless, "alone": alone, "calibrate": calibrate}


def settings(options: DecodeOptions, mode: CalibrateOptions) -> dict:
    """What was asked, files by their names alone."""
    told = {name: value for name, value in (asdict(options) | asdict(mode)).items() if name != "output_dir"}
    names = {name: Path(told[name]).name for name in ("model", "tokenizer", "text", "exits") if told[name] is not None}
    return told | names | {"policies": [Path(path).stem for path in options.policies]}


def main() -> None:
    options, mode = parse(DecodeOptions, CalibrateOptions, description=__doc__)
    for name in ("model", "text", "output_dir"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing")
    if mode.mode == "tables" and options.repeats and options.max_new_tokens < 2:
        raise ValueError(
            f"max_new_tokens={options.max_new_tokens}, expected at least 2: the first token is the prompt's time"
        )
    if options.candidates and "full" not in options.candidates and (mode.mode != "tables" or options.repeats):
        raise ValueError(
            f"candidates {options.candidates} without full, expected it: clocks and agreement are beside it"
        )
    if mode.mode not in MODES:
        raise ValueError(f"mode={mode.mode!r}, expected one of {sorted(MODES)}")
    meanings, folder = read_meanings(options), Path(options.output_dir)
    decoder = Decoder(options)
    folder.mkdir(parents=True, exist_ok=True)
    found = MODES[mode.mode](decoder, meanings, mode)
    policies = {Path(path).stem: Policy.load(path).to_dict() for path in options.policies}
    facts = {"settings": settings(options, mode), "policies": policies, "environment": environment(decoder.device)}
    report = facts | found
    write_json(folder / "decode.json", report)
    text = "\n\n".join(markdown_table(rows) for rows in found.values() if rows) + "\n"
    write_text(folder / "decode.md", text)
    print(text)


if __name__ == "__main__":
    run_script(main)
