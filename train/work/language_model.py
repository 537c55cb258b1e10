"""A causal language model, its tokenizer, and prompts with answers as its tokens, from the settings."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ee_diffusion.training.config import LanguageModelConfig, PromptDataConfig
from ee_diffusion.training.prompts import PromptSource, load_prompt_source


def load_model(config: LanguageModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer. Raises ValueError for chat without a template, or a tokenizer without an end token."""
    source = {} if config.gguf_file is None else {"gguf_file": config.gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(config.model, **source)
    if config.chat and not tokenizer.chat_template:
        raise ValueError(f"chat=True, but the tokenizer of {config.model} has no chat template")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {config.model} has no end-of-text token, expected one: answers end with it")
    attention = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32, **source, **attention)
    return (model if config.gguf_file is None else without_quantization(model)).eval(), tokenizer


def load_prompts(
    config: LanguageModelConfig, tokenizer: PreTrainedTokenizerBase, data: PromptDataConfig
) -> PromptSource:
    """The prompts and answers as tokens. Raises ValueError as `load_prompt_source` does."""

    def encode_prompts(texts: list[str]) -> list[list[int]]:
        if not config.chat:
            return tokenizer(texts)["input_ids"]
        messages = [[{"role": "user", "content": text}] for text in texts]
        prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(prompts, add_special_tokens=False)["input_ids"]

    def encode_answers(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    encoders = {"encode_prompts": encode_prompts, "encode_answers": encode_answers}
    return load_prompt_source(data, **encoders, end=end, pad=end if pad is None else pad)


def without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """A model read from GGUF as one that can be saved: transformers marks it as quantized although its weights are not."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    made = type(model)(type(model.config).from_dict(values))
    made.load_state_dict(model.state_dict())
    made.generation_config = model.generation_config
    made.set_attn_implementation(model.config._attn_implementation)
    return made.to(model.dtype)
