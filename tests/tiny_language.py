"""A folder with a tiny causal language model, its tokeniser and prompts with answers. Used by the tests of scripts."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path

from language import VOCABULARY, model_named
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def text_folder(folder: Path) -> Path:
    """Write `model`, `texts.json` (ask, more, answer) and `texts.csv` (mr, ref) into `folder`, and return it."""
    copy.deepcopy(model_named("llama")).float().save_pretrained(folder / "model")
    words = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="w2"
    ).save_pretrained(folder / "model")
    rows = [
        {"ask": f"w{i} w{i + 3}", "more": f"w{i + 1}", "answer": f"w{2 * i + 2} w{i + 5} w{i + 2}"}
        for i in range(2, 20)
    ]
    (folder / "texts.json").write_text(json.dumps(rows))
    with (folder / "texts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        writer.writerows([[f"w{i} w{i + 7} w{i + 9}", f"w{i + 4} w{i + 6}"] for i in range(2, 14)])
    return folder
