"""Scripts that draw from prompts: CLIP score with a tiny CLIP, retrieval with a tiny tower; their parts against direct calls."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partialmethod
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from stock import tiny_vae
from tiny_texts import CAPTIONS, WIDTH, WORDS, save_encoder, text_pipeline, tiny_encoder, tiny_tokenizer
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.methods import deediff
from ee_diffusion.diffusion.pipelines.text_to_image import EarlyExitTextPipeline
from ee_diffusion.metrics.clip_score import TensorCLIP, clip_scores, cut_prompts, read_prompts
from ee_diffusion.metrics.retrieval import ImageTower, save_tower
from ee_diffusion.training.captions import Captioned, split_of
from ee_diffusion.training.config import CaptionConfig
from eval import clip_score, retrieval
from eval.diffusion_results import matching
from eval.harness import prompting
from train import export


def save_clip(folder: Path, words: tuple[str, ...]) -> Path:
    """A tiny CLIP with random weights, that reads 16 tokens, and its processor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": words.index("[SEP]"), "bos_token_id": words.index("[CLS]")}
    text = sizes | ends | {"vocab_size": len(words), "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    model = CLIPModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embedding" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tiny_tokenizer(words)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """One whose end token is 2, as of old configs."""
    return save_clip(tmp_path_factory.mktemp("clip"), WORDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny text pipeline on disk, without its text encoder."""
    folder = tmp_path_factory.mktemp("text")
    text_pipeline(text_encoder=None, tokenizer=None).save_pretrained(folder / "pipe")
    save_encoder(folder / "encoder")
    deediff(0.6).save(folder / "policy.json")
    return folder


def call(monkeypatch, script, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *(str(word) for word in words)])
    script.main()


def judge(folder: Path) -> dict:
    return {"model": CLIPModel.from_pretrained(folder), "processor": CLIPProcessor.from_pretrained(folder)}


def test_scores_are_the_cosine_and_their_mean_is_that_of_torchmetrics(clip: Path):
    images = torch.randint(0, 256, (4, 3, 20, 24), dtype=torch.uint8)
    prompts = list(CAPTIONS[:4])
    parts = judge(clip)
    found = clip_scores(images, prompts, **parts)
    for image, prompt, value in zip(images, prompts, found, strict=True):
        inputs = parts["processor"](text=[prompt], images=[image], return_tensors="pt")
        with torch.no_grad():
            output = parts["model"].eval()(**inputs)  # the model's own projected features
        left, right = output.image_embeds[0].double(), output.text_embeds[0].double()
        cosine = sum(left * right) / (sum(left**2) ** 0.5 * sum(right**2) ** 0.5)
        assert abs(100 * cosine - value) < 1e-3
    metric = CLIPScore(lambda: (TensorCLIP(parts["model"]).eval(), parts["processor"]))
    with torch.no_grad():
        metric.update(images, prompts)
    assert abs(metric.compute() - found.mean().clamp(min=0)) < 1e-3
    assert found.std() > 0.1, "a judge that tells images apart"
    with pytest.raises(ValueError, match="with 3 prompts, expected uint8"):
        clip_scores(images, prompts[:3], **parts)
    with pytest.raises(ValueError, match=r"images are torch\.float32"):
        clip_scores(images.float(), prompts, **parts)


LONG = [" ".join(["a red apple"] * 8), " ".join(["a blue car"] * 8), " ".join(["green hat flag"] * 5 + ["car"] * 9)]


@pytest.mark.parametrize(
    "words", [WORDS, (*WORDS[:2], WORDS[3], "[SEP]", *WORDS[4:])], ids=["old end token", "end token"]
)
def test_long_prompts_are_cut_before_their_end_token(words, tmp_path):
    """What a longer text model of the same weights says of the prompt's first words and the end token."""
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(3, -1, -1, -1)
    parts = judge(save_clip(tmp_path, words))
    found = clip_scores(images, LONG, **parts)
    short = [" ".join(prompt.split()[:14]) for prompt in LONG]  # 14 words and two special tokens
    torch.testing.assert_close(found, clip_scores(images, short, **parts))
    assert (found[:, None] - found).abs().fill_diagonal_(1).min() > 0.01, "prompts are told apart"
    if words != WORDS:  # under an old end token the model reads at the largest id, which may stand before the last word
        shorter = [" ".join(prompt.split()[:13]) for prompt in LONG]
        assert (found - clip_scores(images, shorter, **parts)).abs().min() > 0.01, "no word that fits is cut"
    assert cut_prompts([*LONG, *short, "a hat"], **parts) == 3


def test_an_end_token_that_only_old_configs_name_wrongly_is_read_at_its_place(tmp_path):
    """OpenAI's CLIPs say 2, and their tokenizer ends with the largest id, where transformers then reads."""
    words = (*(word for word in WORDS if word != "[SEP]"), "[SEP]")
    folder = save_clip(tmp_path, words)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    known = clip_scores(images, LONG, **judge(folder))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(clip_scores(images, LONG, **judge(folder)), known)


def test_a_processor_without_the_models_end_token_is_refused(clip, tmp_path):
    other = judge(save_clip(tmp_path, (*WORDS[:2], WORDS[3], "[SEP]", *WORDS[4:])))
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="without the end token 3"):
        clip_scores(images, ["red apple"], model=other["model"], processor=judge(clip)["processor"])
    with pytest.raises(ValueError, match=r"expected uint8 \(n, 3, H, W\)"):
        clip_scores(images[:, :1], ["red apple"], **other)


def test_prompt_files(tmp_path: Path):
    (tmp_path / "a.tsv").write_text('Prompt\tCategory\na "red" apple\tFood\nblue car\tVehicles\n')
    assert read_prompts(tmp_path / "a.tsv", column="Prompt") == ['a "red" apple', "blue car"]
    (tmp_path / "a.csv").write_text('id,text\n1,"a car, blue"\n')
    assert read_prompts(tmp_path / "a.csv", column="text") == ["a car, blue"]
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert read_prompts(tmp_path / "a.txt", column="ignored") == ["one", "two"]
    for name, content, column, told in (
        ("b.tsv", "Prompt\nx\n", "text", "no column 'text'"),
        ("b.tsv", "Prompt\n", "Prompt", "holds 0 prompts"),
        ("b.csv", "a,b\n,1\n", "a", "1 of them empty"),
        ("b.json", "{}", "a", "expected an existing file of the kind"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=told):
            read_prompts(tmp_path / name, column=column)
    with pytest.raises(ValueError, match="expected an existing file"):
        read_prompts(tmp_path / "none.txt", column="a")


@pytest.mark.data
def test_party_prompts_are_read(data_folder: Path):
    prompts = read_prompts(data_folder / "text" / "PartiPrompts.tsv", column="Prompt")
    assert (len(prompts), prompts[0]) == (1632, "bond")


def test_clip_score_from_folder_to_report(clip, model, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    flags = ["--model", model / "pipe", "--text_encoder", model / "encoder", "--prompts", tmp_path / "prompts.txt"]
    flags += ["--clip", clip, "--num_inference_steps", 2, "--count", 5, "--batch_size", 3, "--device", "cpu"]
    call(monkeypatch, clip_score, *flags, "--output_dir", tmp_path / "full")
    call(monkeypatch, clip_score, *flags, "--output_dir", tmp_path / "exits", "--exit_policy", model / "policy.json")
    full, exits = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("full", "exits"))
    assert full["prompts_cut"] == 0
    assert full["clip_score"]["count"] == full["clip_score_shuffled"]["count"] == 5
    assert "share_of_blocks" not in full
    assert 0 < exits["share_of_blocks"] < 1
    images = load_file(tmp_path / "full" / "images.safetensors")["images"]
    scores = clip_scores(images, list(CAPTIONS[:5]), **judge(clip))
    assert abs(scores.mean() - full["clip_score"]["mean"]) < 1e-4
    assert images.shape == (5, 3, 32, 32)


def test_images_do_not_depend_on_the_batch(model):
    pipe = prompting.load_text_pipeline(
        str(model / "pipe"), text_encoder=str(model / "encoder"), device=torch.device("cpu")
    )
    options = {"num_inference_steps": 2, "guidance_scale": 2.0}
    together, _ = prompting.draw(pipe, CAPTIONS[:3], [1, 2, 3], batch_size=3, **options)
    apart, trace = prompting.draw(pipe, CAPTIONS[:3], [1, 2, 3], batch_size=2, **options)
    assert trace is None
    assert (together.int() - apart.int()).abs().max() <= 1
    with pytest.raises(ValueError, match="3 prompts, 2 seeds"):
        prompting.draw(pipe, CAPTIONS[:3], [1, 2], batch_size=3)
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        prompting.load_text_pipeline("nowhere", text_encoder=None, device=torch.device("cpu"))


ALL = ["--model", "a", "--prompts", "b", "--clip", "c", "--output_dir", "d"]


@pytest.mark.parametrize("words, told", [([], "--model is missing"), ([*ALL, "--count", "1"], "count=1")])
def test_clip_score_refuses(words, told, monkeypatch):
    with pytest.raises(ValueError, match=told):
        call(monkeypatch, clip_score, *words)


# --- retrieval


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images of every caption, and a tower that has learned nothing."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    draw, rows = np.random.default_rng(0), {"image": [], "text": []}
    for caption in [*CAPTIONS, *CAPTIONS, "red apple: dark skin tone"]:
        rows["image"].append(Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
        rows["text"].append(caption)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "part.parquet")
    facts = asdict(CaptionConfig(test_share=0.4, validation_share=0.3)) | {"text_encoder": "tiny"}
    save_tower(tmp_path / "tower.safetensors", ImageTower(WIDTH, (8,), torch.zeros(WIDTH)), facts)
    return tmp_path


def test_retrieval_from_folder_to_table(data, model, monkeypatch):
    (data / "policies").mkdir()
    deediff(0.6).save(data / "policies" / "some.json")
    flags = ["--model", model / "pipe", "--text_encoder", model / "encoder", "--tower", data / "tower.safetensors"]
    flags += ["--data_files", data / "part.parquet", "--num_inference_steps", 3, "--fewer_steps", 2, "--device", "cpu"]
    call(monkeypatch, retrieval, *flags, "--policies", data / "policies", "--output_dir", data / "out")
    report = json.loads((data / "out" / "report.json").read_text())
    rows = {row["images of"]: row for row in report["rows"]}
    shares = {"validation": 0.3, "test": 0.4, "seed": 0}
    held_out = [caption for caption in CAPTIONS if split_of(caption, **shares) == "test"]
    assert len(held_out) > 1
    assert {row["captions"] for row in rows.values()} == {len(held_out)}
    assert {name: row["images"] for name, row in rows.items()} == dict.fromkeys(rows, 2 * len(held_out))
    assert list(rows) == [
        "real images",
        "real images through the autoencoder",
        "full depth",
        "2 steps",
        "some",
        "some, static",
        "some, random per step",
        "full depth, prompts dealt out anew",
    ]
    assert rows["full depth"]["share of blocks"] == 1
    assert 0 < rows["some"]["share of blocks"] < 1
    assert abs(rows["some, random per step"]["share of blocks"] - rows["some"]["share of blocks"]) < 1e-6
    drawn = load_file(data / "out" / "samples.safetensors")
    assert drawn["full depth"].shape == (2 * len(held_out), 3, 32, 32)
    assert not torch.equal(drawn["full depth"], drawn["some"])
    assert "full depth" in matching(report)


def test_a_gallery_has_one_caption_a_subject_and_all_its_images():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 4)
    captions = ("b cat", "a dog", "B cat default", "a dog", "c")
    texts, real, own = retrieval.gallery(Captioned(images, captions, ("test",) * 5), 2)
    assert texts == ["a dog", "B cat default"]
    assert real[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert own.tolist() == [1, 0, 1, 0]


def test_retrieval_refuses(monkeypatch):
    words = ["--model", "a", "--text_encoder", "b", "--tower", "c", "--output_dir", "d"]
    with pytest.raises(ValueError, match="--model is missing"):
        call(monkeypatch, retrieval)
    with pytest.raises(ValueError, match="split='train'"):
        call(monkeypatch, retrieval, *words, "--split", "train")


def test_export_and_load_again(data, model, monkeypatch):
    tiny_vae(times=3).save_pretrained(data / "vae")
    monkeypatch.setattr(CaptionConfig, "__init__", partialmethod(CaptionConfig.__init__, validation_share=0.5))
    flags = ["--model", model / "pipe", "--vae", data / "vae", "--text_encoder", model / "encoder", "--count", 5]
    flags += ["--data_files", data / "part.parquet", "--num_inference_steps", 3, "--batch_size", 4]
    call(monkeypatch, export, *flags, "--budgets", 0.7, "--output_dir", data / "ship")
    words = {"text_encoder": tiny_encoder(), "tokenizer": tiny_tokenizer()}
    pipe = EarlyExitTextPipeline.from_pretrained(data / "ship", **words)
    pipe.set_progress_bar_config(disable=True)
    assert (
        load_file(data / "ship" / "transformer" / "diffusion_pytorch_model.safetensors")["pos_embed"].dtype
        == torch.float16
    )
    assert not (data / "ship" / "text_encoder").exists()
    assert not any("_name_or_path" in path.read_text() for path in (data / "ship").glob("**/*.json"))
    policy = Policy.load(data / "ship" / "policies" / "blocks-70.json")
    assert pipe(["red apple"] * 2, 3, exit_policy=policy, output_type="pt").trace is not None
