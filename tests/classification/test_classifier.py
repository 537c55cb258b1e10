"""EarlyExitClassifier: off is the stock model, one folder holds everything, transformers' pipelines take it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertTokenizer, ViTImageProcessorPil, pipeline
from tree import ROOT, python_blocks

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import CLASSES, LAYERS, NAMES, ROWS, WORDS, batch_for, exits_for, model_named

from ee_diffusion.classification.attach import attach
from ee_diffusion.classification.classifier import EarlyExitClassifier, EarlyExitConfig
from ee_diffusion.classification.methods import confidence, fastbert, palbert, pondernet
from ee_diffusion.core.policy import Policy


def classifier_named(name: str, *, head: str = "pooled", judge: str = "none", **changes) -> EarlyExitClassifier:
    model = model_named(name, **changes)
    return EarlyExitClassifier.from_classifier(model, exits_for(model, head=head, judge=judge))


@pytest.mark.parametrize("name", NAMES)
def test_off_on_saved_and_loaded(name: str, tmp_path: Path):
    classifier = classifier_named(name)
    stock, batch = model_named(name), batch_for(name)
    with torch.no_grad():
        assert torch.equal(classifier(**batch).logits, stock(**batch).logits)
        classifier.policy = fastbert(0.6)
        with classifier.recording() as traces:
            live = classifier(**batch).logits
        with attach(stock, classifier.exits, fastbert(0.6)) as expected:
            assert torch.equal(stock(**batch).logits, live)
        classifier.save_pretrained(tmp_path)
        loaded = EarlyExitClassifier.from_pretrained(tmp_path)
        assert loaded.policy == fastbert(0.6)
        assert not loaded.training
        torch.testing.assert_close(
            loaded(**batch).logits, live, rtol=1e-5, atol=1e-5
        )  # weights lie elsewhere in memory
    assert torch.equal(traces[0].depths, expected[0].depths)
    for key, value in classifier.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_auto_classes_know_it(tmp_path: Path):
    classifier_named("Albert", head="shared", judge="halting").save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is EarlyExitClassifier
    assert (loaded.exits.head, loaded.exits.judge, loaded.config.num_labels) == ("shared", "halting", CLASSES)
    loaded.policy = palbert(0.5)


def test_a_stock_classifier_from_a_folder_keeps_its_attention_and_labels(tmp_path: Path):
    model_named(
        "Bert", id2label={0: "sad", 1: "odd", 2: "glad"}, label2id={"sad": 0, "odd": 1, "glad": 2}
    ).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    classifier = EarlyExitClassifier.from_classifier(model, exits_for(model, head="pooled", judge="none"))
    classifier.save_pretrained(tmp_path / "exits")
    loaded = EarlyExitClassifier.from_pretrained(tmp_path / "exits", attn_implementation="eager")
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.config.id2label == {0: "sad", 1: "odd", 2: "glad"}
    assert str(tmp_path) not in (tmp_path / "exits" / "config.json").read_text()


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS - 5))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_text_classification_pipeline(tokenizer: BertTokenizer, batch_size: int, caplog):
    classifier = classifier_named("Bert")
    classifier.policy = confidence(0.6)
    texts = ["w1 w2 w3", "w4", "w9 w8 w7 w6 w5", "w11 w12", "w30 w31 w32 w33"]
    classify = pipeline("text-classification", model=classifier, tokenizer=tokenizer)
    with classifier.recording() as traces:
        found = classify(texts, batch_size=batch_size, top_k=None)
    assert not caplog.records
    depths = torch.cat([trace.depths[0] for trace in traces])
    assert len(depths.unique()) > 1
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            p = classifier(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert {entry["label"] for entry in row} == {f"LABEL_{i}" for i in range(CLASSES)}
        assert row[0]["score"] == pytest.approx(float(p.max()), abs=1e-5)


def test_a_folder_in_a_fresh_process_as_the_docs_load_it(tokenizer: BertTokenizer, tmp_path: Path):
    classifier = classifier_named("Bert")
    classifier.policy = confidence(0.6)
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    folder = 'model="runs/palbert/model")'
    blocks = python_blocks((ROOT / "docs" / "classifiers.md").read_text(encoding="utf-8"))
    (block,) = [block for block in blocks if f'"text-classification", {folder}' in block]
    code = block.replace("runs/palbert/model", str(tmp_path)) + "print(classify.model.policy, classify('w1 w2'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "max_probability" in done.stdout
    assert "LABEL_" in done.stdout


def test_image_classification_pipeline(caplog):
    classifier = classifier_named("ViT", head="linear", judge="statistics")
    classifier.policy = confidence(0.5)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    draw = torch.Generator().manual_seed(0)
    images = [
        Image.fromarray(torch.randint(0, 256, (8, 8, 3), generator=draw, dtype=torch.uint8).numpy())
        for _ in range(ROWS)
    ]
    classify = pipeline("image-classification", model=classifier, image_processor=processor)
    with classifier.recording() as traces:
        found = classify(images, batch_size=3)
    assert not caplog.records
    assert len(found) == ROWS
    assert sum(int((trace.depths < LAYERS).sum()) for trace in traces) > 0


class TestRefused:
    def test_a_policy_that_these_exits_cannot_follow(self):
        with pytest.raises(ValueError, match="no learned judge"):
            classifier_named("Bert").policy = palbert(0.5)

    @pytest.mark.parametrize(
        "criterion, words",
        [
            ({"kind": "GatedExit", "threshold": [0.5, 0.6]}, r"GatedExit\.threshold=\(0\.5, 0\.6\)"),
            ({"kind": "Threshold", "threshold": 0.5, "score": "learned_confidence"}, "no learned judge"),
        ],
    )
    def test_a_folder_whose_policy_cannot_run(self, tmp_path: Path, criterion: dict, words: str):
        classifier_named("Bert").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["policy"]["criterion"] = criterion
        (tmp_path / "config.json").write_text(json.dumps(config))
        for kind in (EarlyExitClassifier, AutoModelForSequenceClassification):
            with pytest.raises(ValueError, match=f"{tmp_path}.*{words}"):
                kind.from_pretrained(tmp_path)

    def test_an_empty_config(self):
        with pytest.raises(ValueError, match="from_classifier"):
            EarlyExitClassifier(EarlyExitConfig())

    def test_a_base_outside_of_the_table(self):
        config = EarlyExitConfig(base={"architectures": ["GPT2Model"], "model_type": "gpt2"}, exits={"depths": [1]})
        with pytest.raises(ValueError, match="base is a GPT2Model"):
            EarlyExitClassifier(config)

    @pytest.mark.parametrize("change", ["missing", "foreign"])
    def test_a_checkpoint_with_other_weights(self, tmp_path: Path, change: str):
        classifier_named("Bert").save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        if change == "missing":
            del weights["exits.heads.0.classify.weight"]
        else:
            weights["exits.heads.9.classify.weight"] = torch.zeros(1)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError,
            match=f"no checkpoint of an EarlyExitClassifier.*{'missing' if change == 'missing' else 'unexpected'}",
        ):
            EarlyExitClassifier.from_pretrained(tmp_path)

    def test_text_longer_than_the_model_even_when_off(self):
        classifier = classifier_named("Bert")
        assert classifier.policy == Policy()
        with pytest.raises(ValueError, match="17 tokens"):
            classifier(input_ids=torch.ones(1, 17, dtype=torch.long))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ViT"])
def test_labels_that_the_stock_class_leaves_out(name: str):
    classifier, stock, batch = classifier_named(name), model_named(name), batch_for(name)
    left_out = (-100, -1) if name == "DebertaV2" else (-100,)
    for label in left_out:
        labels = torch.tensor([0, label, 2, 1, label, 0])
        expected = stock(**batch, labels=labels).loss
        for policy in (Policy(), confidence(1.0)):  # off; on, and nobody leaves
            classifier.policy = policy
            torch.testing.assert_close(classifier(**batch, labels=labels).loss, expected)
    classifier.policy = fastbert(0.6)
    output = classifier(**batch, labels=torch.tensor([0, -100, 2, 1, -100, 0]))
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(
        output.loss, torch.nn.functional.cross_entropy(output.logits[kept], torch.tensor([0, 2, 1, 0]))
    )


@pytest.mark.parametrize(("name", "changes"), [("ModernBert", {}), ("DebertaV2", {"position_biased_input": False})])
def test_texts_longer_than_positions_that_are_relative(name: str, changes: dict):
    """`max_position_embeddings` is 16 here and bounds nothing: the stock class takes any length."""
    classifier, stock = classifier_named(name, **changes), model_named(name, **changes)
    tokens = {"input_ids": torch.randint(3, WORDS, (2, 40), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        expected = stock(**tokens).logits
        for policy in (Policy(), confidence(1.0)):
            classifier.policy = policy
            assert torch.equal(classifier(**tokens).logits, expected)
        with pytest.raises(ValueError, match="no tokens"):
            classifier(input_ids=torch.ones(2, 0, dtype=torch.long))


class TestDrawnExits:
    """PonderNet's draws belong to the text: independent of one another, alike for a seed, whatever the batch."""

    TEXTS = 300

    @pytest.fixture
    def classifier(self) -> EarlyExitClassifier:
        return classifier_named("Bert", head="shared", judge="linear_halting")

    @staticmethod
    def depths(classify, texts: list[str], *, batch_size: int) -> torch.Tensor:
        with classify.model.recording() as traces:
            classify(texts, batch_size=batch_size)
        return torch.cat([trace.depths[0] for trace in traces]).double()

    def test_mean_depth_in_a_pipeline(self, classifier, tokenizer: BertTokenizer):
        draw = torch.Generator().manual_seed(0)
        words = torch.randint(0, WORDS - 5, (self.TEXTS, 6), generator=draw).tolist()
        texts = [" ".join(f"w{word}" for word in row[: 3 + place % 4]) for place, row in enumerate(words)]
        classify = pipeline("text-classification", model=classifier, tokenizer=tokenizer)
        classifier.policy = Policy(pondernet(0).criterion, record_all=True)
        with classifier.recording() as traces:
            classify(texts, batch_size=30)
        halting = torch.cat([trace.scores[0] for trace in traces], dim=1).double()  # (K, n)
        survival = torch.cat([torch.ones(1, self.TEXTS).double(), (1 - halting).cumprod(0)])  # (K + 1, n)
        chance = torch.cat([halting * survival[:-1], survival[-1:]])  # (A, n)
        answers = torch.tensor([*classifier.exits.depths, LAYERS]).double()[:, None]
        means = (chance * answers).sum(0)  # (n,)
        spread = ((chance * answers.square()).sum(0) - means.square()).sum().sqrt() / self.TEXTS
        found = {}
        for seed in range(6):
            classifier.policy = pondernet(seed)
            found[seed] = self.depths(classify, texts, batch_size=30)
            assert abs(found[seed].mean() - means.mean()) < 4 * spread, seed
        assert not torch.equal(found[0], found[1])
        classifier.policy = pondernet(0)
        assert torch.equal(self.depths(classify, texts, batch_size=1), found[0]), "alone as among others, and again"

    def test_ids_that_are_given_decide(self, classifier):
        classifier.policy, batch = pondernet(0), batch_for("Bert", [0])
        with torch.no_grad(), classifier.recording() as traces:
            for sample in range(40):
                classifier(**batch, sample_ids=torch.tensor([sample]))
        assert len({int(trace.depths[0, 0]) for trace in traces}) > 1

    @pytest.mark.parametrize("name", ["ViT", "Bert"])
    def test_images_and_embeddings_draw_by_what_they_hold(self, name: str):
        classifier, batch = classifier_named(name, head="shared", judge="linear_halting"), batch_for(name)
        classifier.policy = pondernet(0)
        if name == "Bert":
            batch |= {"inputs_embeds": classifier.get_input_embeddings()(batch.pop("input_ids"))}
        with torch.no_grad(), classifier.recording() as traces:
            classifier(**batch)
            for row in range(ROWS):
                classifier(**{key: value[[row]] for key, value in batch.items()})
        assert len(set(traces[0].samples.tolist())) == ROWS
        assert torch.equal(torch.cat([trace.depths[0] for trace in traces[1:]]), traces[0].depths[0])
