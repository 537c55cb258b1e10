"""Texts: three kinds of files, padding, and data that is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from ee_diffusion.training.config import TextDataConfig
from ee_diffusion.training.text_datasets import TextSource, load_text_source, once

ROWS = [("good film", 1), ('a "bad', 0), ("so so\u00e9 la", 1)]


def encode(texts: list[str]) -> list[list[int]]:
    return [[1, *(len(word) for word in text.split()), 2] for text in texts]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(folder: Path, kind: str, rows=ROWS) -> TextDataConfig:
    path = folder / f"texts.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_dict({"text": [r[0] for r in rows], "label": [r[1] for r in rows]}).to_parquet(str(path))
    elif kind == "csv":
        lines = ['"' + text.replace('"', '""') + f'",{label}' for text, label in rows]
        path.write_text("\n".join(["text,label", *lines]))
    else:
        path.write_text("\n".join(["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]))
    return TextDataConfig(text_files=[str(path)])


def load(config: TextDataConfig, num_labels: int = 2, encode=encode) -> TextSource:
    return load_text_source(config, encode, num_labels=num_labels, pad=9)


@pytest.mark.parametrize("kind", ["tsv", "csv", "parquet"])
def test_the_same_texts_from_every_kind_of_file(tmp_path: Path, kind: str):
    source = load(write(tmp_path, kind))
    assert [ids.tolist() for ids in source.tokens] == encode([text for text, _ in ROWS])
    assert source.labels.tolist() == [1, 0, 1]


def test_a_batch_is_padded_to_its_longest(tmp_path: Path):
    source = load(write(tmp_path, "tsv"))
    batch = source.batch(torch.tensor([2, 0]), torch.tensor([5, 6]))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 2, 2], [1, 4, 4, 2, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [1, 1]
    assert batch["key"].tolist() == [5, 6]
    assert source.batch(torch.tensor([0]), torch.tensor([0]))["input_ids"].shape == (1, 4)


def test_the_fingerprint_names_the_content(tmp_path: Path):
    first = load(write(tmp_path, "tsv")).fingerprint()
    assert load(write(tmp_path, "csv")).fingerprint() == first
    assert load(write(tmp_path, "csv", [*ROWS[:2], ("so so la", 0)])).fingerprint() != first


def test_labels_that_start_at_one_several_columns_and_values(tmp_path: Path):
    path = tmp_path / "news.csv"
    path.write_text("kind,title,body,value\n1,a b,c,0.5\n4,d,e f,1.5\n")
    config = TextDataConfig(
        text_files=[str(path)], text_columns=["title", "body"], text_label_column="kind", first_label=1
    )
    source = load(config, 4)
    assert source.labels.tolist() == [0, 3]
    assert [len(ids) for ids in source.tokens] == [5, 5]
    values = TextDataConfig(text_files=[str(path)], text_columns=["title"], text_label_column="value")
    assert load(values, 1).labels.tolist() == [0.5, 1.5]


def test_files_without_a_header(tmp_path: Path):
    path = tmp_path / "news.csv"
    path.write_text('"3","a b","c"\n"1","d","e f"\n')
    names = {"column_names": ["kind", "title", "body"], "text_columns": ["title", "body"], "text_label_column": "kind"}
    source = load(TextDataConfig(text_files=[str(path)], first_label=1, **names), 3)
    assert source.labels.tolist() == [2, 0]
    assert [len(ids) for ids in source.tokens] == [5, 5]


def test_folds_share_out_the_rows_alike_every_time(tmp_path: Path):
    rows = [(f"{'a' * (i + 1)}", i % 2) for i in range(11)]
    config = write(tmp_path, "tsv", rows)
    parts = []
    for fold in range(3):
        held, rest = (load(replace(config, folds=3, fold=fold, held_out=held_out)) for held_out in (True, False))
        texts = [[int(ids[1]) for ids in part.tokens] for part in (held, rest)]  # the length of the one word
        assert sorted(texts[0] + texts[1]) == list(range(1, 12))
        assert all(
            (length - 1) % 2 == label
            for part, own in zip((held, rest), texts, strict=True)
            for length, label in zip(own, part.labels.tolist(), strict=True)
        )
        parts.append(texts[0])
        assert load(replace(config, folds=3, fold=fold, held_out=True)).fingerprint() == held.fingerprint()
    assert sorted(length for part in parts for length in part) == list(range(1, 12))
    assert parts != [sorted(part) for part in parts], "shuffled, so that the first so many are a draw"
    first = load(replace(config, folds=3, held_out=True, max_texts=3))
    assert [int(ids[1]) for ids in first.tokens] == parts[0][:3]


def test_once_gives_every_text_once_like_lengths_together():
    source = TextSource([[1] * n for n in (3, 1, 4, 1, 5)], torch.tensor([0, 1, 0, 1, 1]), pad=0)
    batches = list(once(source, 2))
    assert [batch["key"].tolist() for batch in batches] == [[1, 3], [0, 2], [4]]
    assert [batch["input_ids"].shape[1] for batch in batches] == [1, 4, 5]
    assert batches[1]["labels"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "rows, num_labels, words",
    [
        ([("a", 0), ("b", 2)], 2, r"span 0\.\.2, expected 0\.\.1"),
        ([("a", -1), ("b", 1)], 2, r"span -1\.\.1"),
        ([("a", 1), ("b", 1)], 2, "one class is nothing to learn"),
        ([("a", 0), (" ", 1)], 2, "row 1 has an empty text"),
        ([("a", "x"), ("b", "y")], 2, "expected integers"),
    ],
)
def test_bad_rows(tmp_path: Path, rows, num_labels: int, words: str):
    with pytest.raises(ValueError, match=words):
        load(write(tmp_path, "csv", rows), num_labels)


def test_bad_settings(tmp_path: Path):
    config = write(tmp_path, "tsv")
    with pytest.raises(ValueError, match="a text of 7 tokens, expected at most max_length=3"):
        load(TextDataConfig(text_files=config.text_files, max_length=3), encode=lambda texts: [[1] * 7 for _ in texts])
    with pytest.raises(ValueError, match="no column 'sentence'"):
        load(TextDataConfig(text_files=config.text_files, text_columns=["sentence"]))
    for changes, words in (
        ({"text_files": ["a.tsv", "b.csv"]}, "one kind"),
        ({"text_files": ["a.json"]}, "one kind"),
        ({"text_columns": []}, "text_columns"),
        ({"max_length": 0}, "max_length=0"),
        ({"folds": 1}, "folds=1, expected at least 2"),
        ({"folds": 2, "fold": 2}, "fold=2, held_out=False of folds=2"),
        ({"held_out": True}, "held_out=True of folds=None"),
        ({"text_files": ["a.parquet"], "column_names": ["a"]}, "name their columns themselves"),
    ):
        with pytest.raises(ValueError, match=words):
            TextDataConfig(**changes)
    with pytest.raises(ValueError, match="at least one file"):
        load(TextDataConfig())
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        TextSource([[1], []], torch.tensor([0, 1]), pad=0)
    with pytest.raises(ValueError, match="2 texts and labels"):
        TextSource([[1], [2]], torch.tensor([0]), pad=0)
