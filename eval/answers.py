"""A chat model's own greedy answers to prompts, as JSON: what exits learn from, and what early answers are compared with.

python -m eval.answers --model MODEL --text_folder text --sets alpaca dialogsum --split train --count 200 --max_new_tokens 40 \\
    --output answers.json

Rows: `name`, `prompt` (through the model's chat template), `text`, `answer`, `reference`. Goes on where a stopped run left off.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.io import write_text
from eval.harness.options import flag, parse
from eval.prompt_sets import Prompt, read_prompts


@dataclass(frozen=True)
class AnswersOptions:
    """Who answers what."""

    model: str = flag("Folder or name of a causal language model with a chat template.")
    gguf_file: str | None = flag("A GGUF file in that folder to load from.")
    text_folder: str = flag("Folder of the text sets.")
    sets: list[str] = field(default_factory=lambda: ["alpaca"], metadata={"help": "alpaca, dialogsum, truthfulqa."})
    split: str = flag("train or test.", "train")
    count: int = flag("Prompts of each set, evenly spaced.", 100)
    max_prompt_tokens: int = flag("Longer prompts are left out.", 256)
    max_new_tokens: int = flag("Tokens of an answer.", 48)
    batch_size: int = flag("Prompts at once.", 8)
    dtype: str = flag("float32, bfloat16 or float16.", "float32")
    output: str = flag("The JSON file to write.")


def chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A user's text as the model's chat template puts it."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )


def evenly(prompts: list[Prompt], count: int) -> list[Prompt]:
    """At most `count` of them, evenly spaced."""
    most = min(count, len(prompts))
    return [prompts[place * len(prompts) // most] for place in range(most)]


def choose(tokenizer: PreTrainedTokenizerBase, options) -> list[Prompt]:
    """The prompts that options name, none longer than allowed."""
    chosen = []
    for name in options.sets:
        found = read_prompts(options.text_folder, name, split=options.split)
        lengths = [
            len(ids)
            for ids in tokenizer([chat(tokenizer, one.text) for one in found], add_special_tokens=False)["input_ids"]
        ]
        fitting = [one for one, length in zip(found, lengths, strict=True) if length <= options.max_prompt_tokens]
        chosen += evenly(fitting, options.count)
    return chosen


def answer(model, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], *, max_new_tokens: int) -> list[dict]:
    """One row for each prompt."""
    asked = [chat(tokenizer, one.text) for one in prompts]
    inputs = tokenizer(asked, add_special_tokens=False, return_tensors="pt", padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    said = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
    texts = tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)
    return [
        asdict(one) | {"prompt": words, "answer": text.strip()}
        for one, words, text in zip(prompts, asked, texts, strict=True)
    ]


def main() -> None:
    (options,) = parse(AnswersOptions, description=__doc__)
    for name in ("model", "text_folder", "output"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing")
    source = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left", **source)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype), **source).eval()
    path = Path(options.output)
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    done = {row["name"] for row in rows}
    waiting = [one for one in choose(tokenizer, options) if one.name not in done]
    waiting.sort(key=lambda one: len(one.text))  # little padding
    with torch.inference_mode():
        for start in range(0, len(waiting), options.batch_size):
            batch = waiting[start : start + options.batch_size]
            rows += answer(model, tokenizer, batch, max_new_tokens=options.max_new_tokens)
            write_text(path, json.dumps(rows, indent=1) + "\n")
            print(f"{len(rows)} answers", flush=True)


if __name__ == "__main__":
    run_script(main)
