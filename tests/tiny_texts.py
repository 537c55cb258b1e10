"""A tiny text encoder with its tokenizer and a tiny text-to-image pipeline around them. Used by the tests of prompts and captions.

Here: constructors. Not here: what must hold. V the encoder's width.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import DDIMScheduler
from factories import exits_for, randomise, uvit
from stock import tiny_vae
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from ee_diffusion.diffusion.pipelines.text_to_image import EarlyExitTextPipeline

WIDTH, TOKENS = 12, 4
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "green", "blue", "apple", "car", "hat", "flag")
CAPTIONS = ("red apple", "a blue car", "green hat", "red flag", "blue hat", "a green apple", "red car", "blue flag")


def tiny_tokenizer(words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    """Whole words, [CLS] before and [SEP] behind, as BERT's."""
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(*((word, words.index(word)) for word in ("[SEP]", "[CLS]")))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def tiny_encoder(places: int = 80) -> BertModel:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(
        BertConfig(vocab_size=len(WORDS), max_position_embeddings=places, **sizes), add_pooling_layer=False
    )
    return randomise(model, seed=6).eval()


def save_encoder(folder: Path) -> Path:
    tiny_encoder().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def text_pipeline(**components) -> EarlyExitTextPipeline:
    """All components; `components` replace some."""
    transformer = uvit("text", text_dim=WIDTH, num_text_tokens=TOKENS, in_channels=4, sample_size=4)
    parts = {
        "transformer": transformer,
        "scheduler": DDIMScheduler(clip_sample=False),
        "exits": exits_for(transformer, (0, 2, 3, 5), bias=-2.6),
        "vae": tiny_vae(times=3),
        "text_encoder": tiny_encoder(),
        "tokenizer": tiny_tokenizer(),
    }
    made = EarlyExitTextPipeline(**(parts | components))
    made.set_progress_bar_config(disable=True)
    return made
