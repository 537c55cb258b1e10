"""What the decoding scripts share: a model with its tokenizer and candidates, and texts with references. Not here: what they measure."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ee_diffusion.core.devices import device_named
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.decoding.generate import early_exit_generate
from ee_diffusion.decoding.heads import LearnedExits
from ee_diffusion.decoding.model_specs import layers_of
from ee_diffusion.decoding.self_speculative import self_speculative_generate
from eval.harness.options import DTYPES, flag

RESERVED = {"full", "driver", "lossless", "assistant", "prompt"}  # what is measured beside the policies


@dataclass(frozen=True)
class DecodeOptions:
    """What is decoded, with what, and how long to look.

    Raises:
        ValueError: numbers out of range, a policy file with the name of another candidate.
    """

    model: str = flag("Folder or name of a causal language model.")
    gguf_file: str | None = flag("A GGUF file in that folder to load from.")
    tokenizer: str | None = flag("Folder or name of the tokenizer; none: the model's.")
    random_weights: bool = flag(
        "Only the model's config is read: for speed at a shape that is not at hand (--count 0).", False
    )
    text: str = flag("CSV, JSON or JSON lines with the columns below; rows of one meaning are its references.")
    meaning_column: str = flag("Column of what is asked.", "mr")
    reference_columns: list[str] = field(
        default_factory=lambda: ["ref"], metadata={"help": "Columns of a row's references."}
    )
    output_dir: str = flag("Where decode.json and decode.md go.")
    policies: list[str] = field(default_factory=list, metadata={"help": "Files that Policy.save wrote."})
    candidates: list[str] = field(
        default_factory=list,
        metadata={"help": "Of full, driver, policies by file name, lossless, assistant; none: all."},
    )
    exits: str | None = flag("Learned exits (train/train_lm_exits.py); none: the model's own tail.")
    exit_depth: int | None = flag("Lossless decoding drafts with so many layers; none: no lossless decoding.")
    draft_tokens: int | None = flag("Positions of a lossless cycle.")
    assistant: bool = flag("Time transformers' assistant_early_exit at exit_depth, too (batch 1).", False)
    prompt: str = flag(
        "What is asked; {mr} is replaced, \\n is a line break.",
        "Describe this restaurant in one sentence.\n{mr}\nDescription:",
    )
    chat: bool = flag("Ask through the tokenizer's chat template.", False)
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Sequences of a timed batch."})
    max_new_tokens: int = flag("Tokens of a generation.", 48)
    count: int = flag("Meanings whose text is looked at; 0: none.", 64)
    text_batch_size: int = flag("Sequences per batch where text is looked at.", 8)
    repeats: int = flag("Counted runs of each candidate; 0: no clock.", 5)
    dtype: str = flag("float32, bfloat16 or float16.", "float32")
    device: str | None = flag("cpu, cuda, ...; none: cuda if there is one.")
    seed: int = flag("Seed of the bootstrap, and of the draw of prompts that calibrate.", 0)

    def __post_init__(self):
        least = {"max_new_tokens": 1, "count": 0, "text_batch_size": 1, "repeats": 0}
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise ValueError(f"{name}={value}, expected at least {low}")
        if min(self.batch_sizes, default=0) < 1:
            raise ValueError(f"batch_sizes={self.batch_sizes}, expected numbers of sequences, at least 1")
        taken = sorted(RESERVED & {Path(path).stem for path in self.policies})
        if taken:
            raise ValueError(f"policy files named {taken}, names of other candidates; expected others")


class Decoder:
    """A model with its tokenizer, and what every candidate hands to `generate`."""

    def __init__(self, options: DecodeOptions):
        if options.dtype not in DTYPES:
            raise ValueError(f"dtype={options.dtype!r}, expected one of {DTYPES}")
        source = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            options.tokenizer or options.model, padding_side="left", **({} if options.tokenizer else source)
        )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if options.random_weights:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model)).to(
                getattr(torch, options.dtype)
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype), **source)
        self.device = device_named(options.device)
        self.model: PreTrainedModel = model.eval().to(self.device)
        self.options, self.num_layers = options, len(layers_of(self.model))
        self.heads: LearnedExits | None = None
        if options.exits is not None:
            self.heads = (
                LearnedExits.load(options.exits).to(self.device, getattr(torch, options.dtype)).bind(self.model)
            )
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
            policy = Policy.load(path)
            heads = {} if self.heads is None or policy.exits is None else {"exit_heads": self.heads}
            found[Path(path).stem] = exits | {"exit_policy": policy} | heads
        if options.exit_depth is not None:
            drafts = {"exit_depth": options.exit_depth, "draft_tokens": options.draft_tokens}
            found["lossless"] = {"custom_generate": self_speculative_generate, "exit_heads": self.heads, **drafts}
        if options.assistant:
            if options.exit_depth is None:
                raise ValueError("--assistant without --exit_depth, expected the layer to draft at")
            found["assistant"] = {"assistant_early_exit": options.exit_depth}
        unknown = [name for name in options.candidates if name not in found]
        if unknown:
            raise ValueError(f"candidates {unknown}, expected some of {list(found)}")
        return {name: call for name, call in found.items() if not options.candidates or name in options.candidates}

    def inputs(self, meanings: list[str]) -> dict[str, Tensor]:
        """Left-padded prompts (R, N) and their mask."""
        prompt, special = self.options.prompt.replace("\\n", "\n"), {}
        texts = [prompt.replace("{mr}", meaning) for meaning in meanings]
        if self.options.chat:
            asked = [[{"role": "user", "content": text}] for text in texts]
            texts = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            special = {"add_special_tokens": False}
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True, **special)
        return {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def generate(self, name: str, inputs: dict[str, Tensor], **more):
        """One generation of a candidate, greedy."""
        length = {"max_new_tokens": self.options.max_new_tokens, "pad_token_id": self.tokenizer.pad_token_id}
        return self.model.generate(
            **inputs, **length | {"do_sample": False, "return_dict_in_generate": True} | more, **self.candidates[name]
        )

    def written(self, name: str, inputs: dict[str, Tensor], **more):
        """Tokens (R, T) that a candidate writes until the end of text, padded to the number that was asked for, and all it returns."""
        out, width = self.generate(name, inputs, **more), inputs["input_ids"].shape[1]
        tokens, most = out.sequences[:, width:], self.options.max_new_tokens
        pad = self.tokenizer.pad_token_id
        return torch.nn.functional.pad(tokens, (0, most - tokens.shape[1]), value=pad), out

    def texts(self, tokens: Tensor) -> list[str]:
        """Tokens (R, T) as text."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def parts_of(meanings: list[str], size: int, *, called: str) -> Iterator[list[str]]:
    """The meanings, `size` at a time, with a progress bar."""
    for start in tqdm(range(0, len(meanings), size), desc=called, leave=False):
        yield meanings[start : start + size]


def work_of(name: str, out) -> tuple[int, int]:
    """Of what a candidate returned: layers that ran after the prompt, and tokens that were read; (0, 0) where nothing says it."""
    if name in ("full", "lossless", "assistant") or out.trace is None:
        return 0, 0
    return int(out.trace.ran.sum()), int((out.trace.depths >= 0).sum())


def read_meanings(options: DecodeOptions) -> dict[str, list[str]]:
    """Meaning -> its references, in the file's order.

    Raises:
        ValueError: a file of another kind, without the columns, with something else than text in them, or without rows.
    """
    path, wanted = Path(options.text), (options.meaning_column, *options.reference_columns)
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(file))
        elif path.suffix == ".json":
            rows = json.load(file)
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in file if line.strip()]
        else:
            raise ValueError(f"text={options.text!r}, expected .csv, .json or .jsonl")
    found: dict[str, list[str]] = {}
    for row in rows:
        if any(name not in row for name in wanted):
            raise ValueError(f"{path} has columns {list(row)}, expected {' and '.join(wanted)}")
        if any(not isinstance(row[name], str) for name in wanted):
            raise ValueError(f"{path} has the row {row}, expected text in {' and '.join(wanted)}")
        found.setdefault(row[wanted[0]], []).extend(row[name] for name in wanted[1:])
    if not found:
        raise ValueError(f"{path} has no rows, expected at least one")
    return found
