"""Tiny causal language models of every family, prompts of different lengths, and policies that split a batch. Used by tests/decoding.

Here: things to test with. R sequences, S decode steps, L layers, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from factories import between, randomise, splitting
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.streamers import BaseStreamer

from ee_diffusion.core.criteria import DecayingThreshold, Patience, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import DepthPerStep
from ee_diffusion.decoding.generate import EarlyExitDecoderOnlyOutput, early_exit_generate
from ee_diffusion.decoding.methods import (
    d3,
    depth_per_request,
    early_termination,
    skipdecode,
    uniform_skipping,
)
from ee_diffusion.decoding.model_specs import layers_of

LAYERS, VOCABULARY, TOKENS, EXITS = 6, 61, 7, (1, 2, 4)
LENGTHS = (7, 4, 6, 2)  # of the prompts

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_ROTARY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_GROUPED = _ROTARY | {"num_key_value_heads": 2}
_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED, head_dim=8)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_OPT)),
    "opt-post": lambda: OPTForCausalLM(OPTConfig(**_OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False})),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=LAYERS, n_head=4, **_SPECIAL)
    ),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_ROTARY)),
}
_OPT = {name: value for name, value in _ROTARY.items() if name != "intermediate_size"} | {
    "ffn_dim": 40,
    "word_embed_proj_dim": 32,
}
MODELS = tuple(_MODELS)


@functools.cache
def model_named(name: str) -> PreTrainedModel:
    """One of `MODELS` with large random weights, so that layers and tokens differ; made once, for nobody changes it.

    In double precision, so that what is equal up to rounding shows as such, and no rounding decides about a token or an exit.
    """
    model = randomise(_MODELS[name](), seed=11, gain=1.3).eval().double()
    model.generation_config.pad_token_id = 0
    return model


@functools.cache
def prompts() -> dict[str, Tensor]:
    """Left-padded prompts (R, N) of different lengths with their mask."""
    generator = torch.Generator().manual_seed(12)
    ids = torch.randint(2, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.stack([torch.arange(max(LENGTHS)) >= max(LENGTHS) - length for length in LENGTHS]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def alone(row: int) -> dict[str, Tensor]:
    """One prompt without padding."""
    return {name: value[row : row + 1, -LENGTHS[row] :] for name, value in prompts().items()}


FULL = {
    "max_new_tokens": TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "eos_token_id": None,
}


def generate(model: PreTrainedModel, policy: Policy, inputs: dict | None = None, **more) -> EarlyExitDecoderOnlyOutput:
    """Generate under a policy, greedily and without an end, unless told otherwise."""
    inputs = prompts() if inputs is None else inputs
    return model.generate(**inputs, custom_generate=early_exit_generate, exit_policy=policy, **FULL | more)


def plain(model: PreTrainedModel, inputs: dict | None = None, **more):
    """Generate with transformers alone."""
    return model.generate(**prompts() if inputs is None else inputs, **FULL | more)


def new_tokens(output) -> Tensor:
    """(R, T) the generated tokens."""
    return output.sequences[:, -len(output.logits) :]


@functools.cache
def recorded(name: str, score: str):
    """The trace of a decode with every exit measured and nobody stopped."""
    return generate(model_named(name), Policy(Threshold(0.5, score), exits=EXITS, record_all=True)).trace


def _split(name: str, score: str, make: Callable) -> Policy:
    trace = recorded(name, score)
    return Policy(splitting(trace, make, between(trace.scores, 8)), exits=EXITS)


_POLICIES: dict[str, Callable[[str], Policy]] = {
    "softmax": lambda name: _split(name, "max_probability", lambda value: Threshold(value, "max_probability")),
    "margin": lambda name: _split(name, "margin", lambda value: Threshold(value, "margin")),
    "saturation": lambda name: _split(name, "saturation", lambda value: Threshold(value, "saturation")),
    "calm": lambda name: _split(name, "margin", lambda value: DecayingThreshold(value, TOKENS, score="margin")),
    "pruned": lambda name: _split(name, "pruned_probability", lambda value: Threshold(value, "pruned_probability")),
    "delayed": lambda name: replace(_POLICIES["margin"](name), delayed=True),
    "late-softmax": lambda name: replace(_POLICIES["softmax"](name), delayed=True),
    "patience": lambda name: _split(name, "margin", lambda value: Patience(value, (1, 2, 2), "margin")),
    "requests": lambda name: depth_per_request((4, 1, 6, 2), exits=EXITS),
    "skipdecode": lambda name: skipdecode(warm_up=1, least=2, most=5, horizon=5),
    "termination": lambda name: early_termination(least=2, most=5, horizon=5),
    "d3": lambda name: d3(0.9, first=2, least=3),
    "uniform": lambda name: uniform_skipping(3, num_layers=LAYERS),
    "up-and-down": lambda name: Policy(schedule=DepthPerStep((3, 6, 2, 5, 1, 6))),
}
POLICIES = tuple(_POLICIES)
SCHEDULED = ("skipdecode", "termination", "d3", "uniform")  # layers only drop out


@functools.cache
def policy_named(policy: str, model: str) -> Policy:
    """One of `POLICIES`, with numbers that split the batch of that model."""
    return _POLICIES[policy](model)


@functools.cache
def run(model: str, policy: str) -> EarlyExitDecoderOnlyOutput:
    """A run of all prompts; made once, for nobody changes it."""
    return generate(model_named(model), policy_named(policy, model))


@contextmanager
def discarding(model: PreTrainedModel, depths: list[int], holes: list[tuple[bool, ...]] | None) -> Iterator[None]:
    """The slow way for one sequence: at decode step t every layer runs, and above `depths[t]` all that is kept of it is what it wrote to
    the cache. With `holes`, (S, L) layers that may run: the others do not run at all. The first forward is the prompt's."""
    calls = [0] * LAYERS

    def patched(layer: int, original: Callable) -> Callable:
        def forward(hidden, *args, **kwargs):
            step = calls[layer] - 1
            calls[layer] += 1
            if step >= 0 and holes is not None and not holes[step][layer]:
                return hidden
            output = original(hidden, *args, **kwargs)
            return hidden if step >= 0 and layer >= depths[step] else output

        return forward

    for layer, module in enumerate(layers_of(model)):
        module.__dict__["forward"] = patched(layer, module.forward)
    try:
        yield
    finally:
        for module in layers_of(model):
            del module.__dict__["forward"]


class Listener(BaseStreamer):
    """Keeps what it gets."""

    def __init__(self):
        self.heard, self.done = [], 0

    def put(self, value):
        self.heard.append(value.reshape(-1).tolist())

    def end(self):
        self.done += 1
