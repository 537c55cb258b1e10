"""Every kind of rotary position codes that transformers has: answers are those of the model alone, or the kind is refused by name."""

from __future__ import annotations

import functools

import pytest
import torch
from factories import randomise
from language import EXITS, LAYERS, VOCABULARY, generate, plain
from split_parts import LIMITS
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.model_specs import model_spec_of
from ee_diffusion.decoding.self_speculative import self_speculative_generate
from ee_diffusion.edge_cloud.sessions import ContextManager
from ee_diffusion.edge_cloud.split import load_part, split_model

TRAINED, LENGTH = 16, 40  # positions that the model was trained on, and that are read here
KINDS = ("default", *ROPE_INIT_FUNCTIONS)
FIXED = ("default", "linear", "llama3", "proportional", "yarn")  # frequencies are those of every other call
NEVER = Policy(Threshold(1.0, "max_probability"), exits=EXITS)
OFTEN = Policy(Threshold(0.02, "margin"), exits=(EXITS[1],))


@functools.cache
def model_with(kind: str, name: str = "llama") -> PreTrainedModel:
    """A tiny model whose texts here are longer than what it was trained on."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": TRAINED}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0]} if kind == "longrope" else {}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": LAYERS}
    sizes |= {
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "rope_parameters": rope,
    }
    sizes |= {"max_position_embeddings": TRAINED if kind == "dynamic" else 64}
    if name == "neox":
        rope["partial_rotary_factor"] = 1.0
        model: PreTrainedModel = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    model = randomise(model, seed=11, gain=1.3).eval().double()
    model.generation_config.pad_token_id = 0
    return model


def prompt(row: int, length: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(row))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name,kind", [*(("llama", kind) for kind in KINDS), ("neox", "dynamic"), ("neox", "yarn")])
def test_it_says_what_the_model_says_or_is_refused_by_name(name: str, kind: str):
    model, options = model_with(kind, name), {"max_new_tokens": LENGTH - 5}
    drafts = {"custom_generate": self_speculative_generate, "exit_depth": 3, "draft_tokens": 5, "output_logits": False}
    ways = {
        "lossless": lambda inputs: plain(model, inputs, **drafts, **options),
        "propagate": lambda inputs: generate(model, NEVER, inputs, **options),
        "off": lambda inputs: generate(model, Policy(), inputs, **options),
    }
    if kind not in FIXED:
        for run in ways.values():
            with pytest.raises(ValueError, match=f"'{kind}'.*the longest position of a call"):
                run(prompt(0))
        with pytest.raises(ValueError, match=f"'{kind}'"):
            generate(model, OFTEN, prompt(0), exit_missing="recompute", **options)
        return
    stock = plain(model, prompt(0), **options).sequences
    assert stock.shape[1] == LENGTH
    for way, run in ways.items():
        assert torch.equal(run(prompt(0)).sequences, stock), way


@pytest.mark.parametrize("kind", FIXED)
def test_what_waited_is_recomputed_as_it_was(kind: str):
    """Every token read again with all others in one plain forward: the last one that went on says what it said."""
    model = model_with(kind)
    out = generate(model, OFTEN, prompt(3), exit_missing="recompute", max_new_tokens=LENGTH - 5)
    assert out.recomputed.any()
    steps = (out.trace.depths[:, 0] == LAYERS).nonzero()[:, 0].tolist()
    for step in steps[-3:]:
        logits = model(out.sequences[:, : 5 + step + 1]).logits[:, -1]
        torch.testing.assert_close(out.logits[step + 1], logits.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_cloud_a_short_session_beside_a_long_one(kind: str, tmp_path):
    model, exits = model_with(kind), (2, 4)
    if kind not in FIXED:
        with pytest.raises(ValueError, match=f"'{kind}'"):
            split_model(model, tmp_path, exits=exits)
        split_model(model_with("default"), tmp_path, exits=exits)
        _, part = load_part(tmp_path, "cloud", dtype=torch.float64)
        with pytest.raises(ValueError, match=f"'{kind}'"):
            ContextManager(model, part, limits=LIMITS)
        return
    split_model(model, tmp_path, exits=exits)
    cloud = ContextManager(*load_part(tmp_path, "cloud", dtype=torch.float64), limits=LIMITS)
    texts = [prompt(row, length)["input_ids"] for row, length in enumerate((5, LENGTH))]
    said = [int(model(ids).logits[0, -1].argmax()) for ids in texts]
    asked = []
    for ids in texts:
        session = cloud.open("a")
        states = model(ids, output_hidden_states=True).hidden_states[exits[0]][0].detach()
        cloud.upload("a", session, 0, hidden=states)
        asked.append(("a", session, ids.shape[1] - 1))
    assert cloud.answer(asked) == said


def test_codes_of_several_kinds_of_layers_are_all_looked_at():
    """Where a class has rotary parameters by the kind of its layers, one that depends on the length is enough."""
    model = model_with("default")
    config, before = model.config, model.config.rope_parameters
    config.rope_parameters = {"full_attention": before, "sliding_attention": before | {"rope_type": "dynamic"}}
    try:
        with pytest.raises(ValueError, match="'dynamic'"):
            model_spec_of(model)
    finally:
        config.rope_parameters = before
