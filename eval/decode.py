"""Decoding a language model with exits: tokens per second, layers that ran, agreement with the full model, text scores.

python eval/decode.py --model MODEL --text testset_w_refs.csv --policies skip.json calm.json --output_dir runs/decode

Candidates: the plain model (`full`), the model at full depth under the exits' driver (`driver`), every policy file, lossless decoding and
transformers' `assistant_early_exit` (batch 1). Clock: every candidate generates the same number of tokens (no end of text) and they take
turns; the prompt's forward is timed apart and taken off. Layers are counted by hooks inside them, not by what the policy says. Text:
greedy, until the end of text, against the references of each meaning; perplexity is that of the written text under the full model.
The prompt is `--prompt` with {mr} replaced. Writes decode.json and decode.md.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from options import DTYPES, flag, parse
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.decoding.attach import running_modules
from ee_diffusion.decoding.families import layers_of
from ee_diffusion.decoding.generate import early_exit_generate
from ee_diffusion.decoding.lossless import lossless_generate
from ee_diffusion.measure.clocks import interleaved
from ee_diffusion.measure.tables import environment, markdown_table, write_json, write_text
from ee_diffusion.measure.texts import agreement, perplexity, text_scores


@dataclass(frozen=True)
class DecodeOptions:
    """What is decoded, with what, and how long to look."""

    model: str = flag("Folder or name of a causal language model.")
    gguf_file: str | None = flag("A GGUF file in that folder to load from.")
    tokenizer: str | None = flag("Folder or name of the tokenizer; none: the model's.")
    random_weights: bool = flag(
        "Only the model's config is read: for speed at a shape that is not at hand (--count 0).", False
    )
    text: str = flag("CSV with columns mr and ref; rows of one mr are its references.")
    output_dir: str = flag("Where decode.json and decode.md go.")
    policies: list[str] = field(default_factory=list, metadata={"help": "Files that Policy.save wrote."})
    exit_depth: int | None = flag("Lossless decoding drafts with so many layers; none: no lossless decoding.")
    draft_tokens: int | None = flag("Positions of a lossless cycle.")
    assistant: bool = flag("Time transformers' assistant_early_exit at exit_depth, too (batch 1).", False)
    prompt: str = flag(
        "What is asked; {mr} is replaced.", "Describe this restaurant in one sentence.\n{mr}\nDescription:"
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Sequences of a timed batch."})
    max_new_tokens: int = flag("Tokens of a generation.", 48)
    count: int = flag("Meanings whose text is scored; 0: none.", 64)
    repeats: int = flag("Counted runs of each candidate.", 5)
    dtype: str = flag("float32, bfloat16 or float16.", "float32")
    device: str | None = flag("cpu, cuda, ...; none: cuda if there is one.")
    seed: int = flag("Seed of the bootstrap.", 0)


class Decoder:
    """A model with its tokenizer, and what every candidate hands to `generate`."""

    def __init__(self, options: DecodeOptions):
        if options.dtype not in DTYPES:
            raise ValueError(f"dtype={options.dtype!r}, expected one of {sorted(DTYPES)}")
        source = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            options.tokenizer or options.model, padding_side="left", **({} if options.tokenizer else source)
        )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if options.random_weights:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model)).to(
                DTYPES[options.dtype]
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype], **source)
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model: PreTrainedModel = model.eval().to(self.device)
        self.options, self.num_layers = options, len(layers_of(self.model))
        self.candidates = self._candidates()

    def _candidates(self) -> dict[str, dict]:
        options, exits = self.options, {"custom_generate": early_exit_generate}
        found: dict[str, dict] = {
            "full": {},
            "driver": exits | {"exit_policy": Policy(schedule=FixedDepth(self.num_layers))},
        }
        for path in options.policies:
            if Path(path).stem in found:
                raise ValueError(f"two policies named {Path(path).stem!r}, expected distinct file names")
            found[Path(path).stem] = exits | {"exit_policy": Policy.load(path)}
        if options.exit_depth is not None:
            drafts = {"exit_depth": options.exit_depth, "draft_tokens": options.draft_tokens}
            found["lossless"] = {"custom_generate": lossless_generate, **drafts}
        if options.assistant:
            if options.exit_depth is None:
                raise ValueError("--assistant without --exit_depth, expected the layer to draft at")
            found["assistant"] = {"assistant_early_exit": options.exit_depth}
        return found

    def inputs(self, meanings: list[str]) -> dict[str, Tensor]:
        """Left-padded prompts (R, N) and their mask."""
        texts = [self.options.prompt.replace("{mr}", meaning) for meaning in meanings]
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
        return {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def generate(self, name: str, inputs: dict[str, Tensor], **more):
        """One generation of a candidate, greedy."""
        length = {"max_new_tokens": self.options.max_new_tokens, "pad_token_id": self.tokenizer.pad_token_id}
        return self.model.generate(
            **inputs, **length | {"do_sample": False, "return_dict_in_generate": True} | more, **self.candidates[name]
        )


def read_meanings(path: str) -> dict[str, list[str]]:
    """Meaning -> its references, in the file's order."""
    found: dict[str, list[str]] = {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not {"mr", "ref"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path} has columns {rows.fieldnames}, expected mr and ref")
        for row in rows:
            found.setdefault(row["mr"], []).append(row["ref"])
    return found


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
            }
        )
    return rows


def quality(decoder: Decoder, meanings: dict[str, list[str]]) -> list[dict]:
    """One row for each candidate: its text against the references and against the full model's."""
    options, chosen = decoder.options, list(meanings)[: decoder.options.count]
    wanted, rows, full = [meanings[meaning] for meaning in chosen], [], None
    for name in decoder.candidates:
        if name == "assistant":
            continue
        parts = [_written(decoder, name, chosen[start : start + 8]) for start in range(0, len(chosen), 8)]
        tokens = torch.cat([tokens for tokens, _ in parts])
        full = tokens if full is None else full
        texts = decoder.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        scores = text_scores([text.strip() for text in texts], wanted, resamples=1000, seed=options.seed)
        same = {f"same_{key}": value for key, value in agreement(tokens, full).items()}
        rows.append({"name": name, **scores, **same, "perplexity": sum(value for _, value in parts) / len(parts)})
    return rows


def _written(decoder: Decoder, name: str, meanings: list[str]) -> tuple[Tensor, float]:
    """Tokens (R, T), padded to the number that was asked for, and their perplexity under the full model."""
    inputs, pad = decoder.inputs(meanings), decoder.tokenizer.pad_token_id
    sequences, width = decoder.generate(name, inputs).sequences, inputs["input_ids"].shape[1]
    tokens = sequences[:, width:]
    mask = torch.cat([inputs["attention_mask"], (tokens != pad).long()], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = decoder.model(sequences, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1]
    told = perplexity(logits.float(), tokens.masked_fill(tokens == pad, -100))
    return torch.nn.functional.pad(tokens, (0, decoder.options.max_new_tokens - tokens.shape[1]), value=pad), told


def main() -> None:
    (options,) = parse(DecodeOptions, description=__doc__)
    for name in ("model", "text", "output_dir"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing")
    meanings, folder = read_meanings(options.text), Path(options.output_dir)
    decoder = Decoder(options)
    clock = [row for batch in options.batch_sizes for row in speed(decoder, list(meanings), batch)]
    text = quality(decoder, meanings) if options.count else []
    report = {"options": asdict(options), "environment": environment(decoder.device), "speed": clock, "quality": text}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "decode.json", report)
    write_text(folder / "decode.md", "\n\n".join(markdown_table(rows) for rows in (clock, text) if rows) + "\n")
    print(markdown_table(clock))


if __name__ == "__main__":
    main()
