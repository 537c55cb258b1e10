"""What the scripts for causal language models share: the flags of a model, loading it, its tokens, saying where a run took place."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ee_diffusion.training.config import PromptDataConfig
from ee_diffusion.training.prompts import PromptSource, load_prompt_source


def flag(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """The causal language model and how it is asked."""

    model: str | None = flag("Folder or name of a causal language model.")
    gguf_file: str | None = flag("A GGUF file in that folder to load from.")
    attn_implementation: str | None = flag("Attention: sdpa, eager, ...; none: transformers' choice.")
    chat: bool = flag("Ask through the tokenizer's chat template; else prompts are read as they are.", False)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model in float32 and its tokenizer. Raises ValueError without a model, or with chat and no template."""
        if not self.model:
            raise ValueError(f"model={self.model!r}, expected the folder or name of a causal language model")
        source = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        tokenizer = AutoTokenizer.from_pretrained(self.model, **source)
        if self.chat and not tokenizer.chat_template:
            raise ValueError(f"chat=True, but the tokenizer of {self.model} has no chat template")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {self.model} has no end-of-text token, expected one: answers end with it"
            )
        attention = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32, **source, **attention)
        return (model if self.gguf_file is None else plain(model)).eval(), tokenizer

    def source(self, tokenizer: PreTrainedTokenizerBase, data: PromptDataConfig) -> PromptSource:
        """The prompts and answers as tokens. Raises ValueError as `load_prompt_source` does."""

        def encode_prompts(texts: list[str]) -> list[list[int]]:
            if not self.chat:
                return tokenizer(texts)["input_ids"]
            asked = [[{"role": "user", "content": text}] for text in texts]
            told = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            return tokenizer(told, add_special_tokens=False)["input_ids"]

        def encode_answers(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False)["input_ids"]

        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        encoders = {"encode_prompts": encode_prompts, "encode_answers": encode_answers}
        return load_prompt_source(data, **encoders, end=end, pad=end if pad is None else pad)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model that was read from GGUF as one that can be saved: transformers takes it for quantised, although its weights are not."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    made = type(model)(type(model.config).from_dict(values))
    made.load_state_dict(model.state_dict())
    made.generation_config = model.generation_config
    made.set_attn_implementation(model.config._attn_implementation)
    return made.to(model.dtype)


def machine() -> dict[str, str | int]:
    """Facts for the report."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"device": device, "torch": torch.__version__}
