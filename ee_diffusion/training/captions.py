"""Captioned images for the loop: a split by caption, and encoded images with encoded captions and all that an objective draws.

Here: which caption belongs to which split, batches. Not here: the encoders of images and texts (a side, a script).
M images, Q distinct captions, T text tokens, V their width, B samples, C, H, W.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_diffusion.training.config import CaptionConfig, ImageDataConfig
from ee_diffusion.training.datasets import Source, load_image_source, read_table
from ee_diffusion.training.rng import Stream, normals, uniforms

SPLITS = ("train", "validation", "test")
_TONE = r"(?:default|(?:medium[ -])?(?:light|dark)|medium)"
_WORD = r"[^\W_]+|[#*]"


def subject(caption: str) -> str:
    """A caption without case, punctuation and skin tones: what images of one thing share, however their sets spell it.

    'Waving hand: medium-light skin tone' and 'waving hand medium light' are 'waving hand'.
    """
    text = re.sub(rf"\b{_TONE} skin tone\b", " ", caption.lower())
    text = re.sub(rf"(?:[\s:,]+{_TONE})+\s*$", "", text.rstrip(" :,"))
    return " ".join(re.findall(_WORD, text))


def names_skin_tone(caption: str) -> bool:
    """Whether a caption names a skin tone ('default' is none): sets with a thing in six tones would otherwise be mostly people."""
    text = re.sub(r"[\s:,]+default\s*$", "", caption.lower())
    return " ".join(re.findall(_WORD, text)) != subject(caption)


def split_of(caption: str, *, validation: float, test: float, seed: int) -> str:
    """'train', 'validation' or 'test': a function of the caption's subject and the seed alone, so never of an image or an order.

    `validation`, `test`: the shares of subjects that they get.

    Raises:
        ValueError: shares that are no probabilities or leave nothing to train on.
    """
    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(f"validation={validation}, test={test}, expected shares of at least 0 that sum to less than 1")
    digest = hashlib.sha256(f"{seed}:{subject(caption)}".encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64  # in [0, 1)
    return "test" if place < test else "validation" if place < test + validation else "train"


@dataclass(frozen=True, eq=False)
class Captioned:
    """Images (M, C, H, W) uint8 in the order of the data, with the caption and the split of each."""

    images: Tensor
    captions: tuple[str, ...]
    splits: tuple[str, ...]

    def part(self, split: str) -> Captioned:
        """The images of one split, in order. Raises ValueError for an unknown or an empty one."""
        kept = [index for index, name in enumerate(self.splits) if name == split]
        if not kept:
            raise ValueError(f"split {split!r} has no images, expected one of {sorted(set(self.splits))}")
        return Captioned(self.images[kept], tuple(self.captions[index] for index in kept), (split,) * len(kept))

    def distinct(self) -> tuple[list[str], Tensor]:
        """The Q distinct captions, sorted, and which of them each image has, (M,) int64."""
        captions = sorted(set(self.captions))
        numbers = {caption: number for number, caption in enumerate(captions)}
        return captions, torch.tensor([numbers[caption] for caption in self.captions])


def load_captioned(data: ImageDataConfig, config: CaptionConfig) -> Captioned:
    """Read and decode images and captions from parquet files.

    Raises:
        ValueError: no parquet files, no such column, a caption without a word, nothing left; shares as `split_of`.
    """
    if not data.train_data_files:
        raise ValueError(f"train_data_files={data.train_data_files}, expected parquet files of images with captions")
    table = read_table(data.train_data_files, [config.caption_column], kind="parquet")
    captions = list(table[config.caption_column])[: data.max_train_samples]
    empty = [index for index, caption in enumerate(captions) if not caption or not caption.strip()]
    if empty:
        raise ValueError(
            f"row {empty[0]} has a caption without a word: {captions[empty[0]]!r} ({len(empty)} such rows)"
        )
    kept = [index for index, caption in enumerate(captions) if config.skin_tones or not names_skin_tone(caption)]
    if not kept:
        raise ValueError(f"none of {len(captions)} captions is without a skin tone; set skin_tones to use them")
    shares = {"validation": config.validation_share, "test": config.test_share, "seed": config.split_seed}
    chosen = tuple(captions[index] for index in kept)
    images = load_image_source(data, None).images[kept]
    return Captioned(images, chosen, tuple(split_of(caption, **shares) for caption in chosen))


class CaptionTable:
    """`images` (M, C, H, W) uint8, the number of each one's caption (M,), sentence embeddings (Q, V)."""

    def __init__(self, images: Tensor, captions: Tensor, texts: Tensor):
        self.images, self.captions, self.texts = images, captions, texts

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, samples: Tensor) -> dict[str, Tensor]:
        captions = self.captions[samples]
        return {"images": self.images[samples], "captions": captions, "texts": self.texts[captions]}


class CaptionSource(Source):
    """Encoded images (M, C, H, W), the caption of each (M,), and encoded captions (Q, T, V) with the encoded empty one (T, V).

    `caption_drop`: probability that a sample gets the empty caption (classifier-free guidance, arXiv 2207.12598).

    Raises:
        ValueError: no images, tensors that do not fit together, captions out of range, a drop that is no probability.
    """

    def __init__(
        self, latents: Tensor, captions: Tensor, *, texts: Tensor, empty: Tensor, caption_drop: float, name: str
    ):
        fits = latents.ndim == 4 and len(latents) and captions.shape == latents.shape[:1]
        if not fits or captions.is_floating_point() or texts.ndim != 3 or empty.shape != texts.shape[1:]:
            raise ValueError(
                f"latents {tuple(latents.shape)}, captions {captions.dtype} {tuple(captions.shape)}, texts "
                f"{tuple(texts.shape)}, empty {tuple(empty.shape)}, expected (M, C, H, W), integers (M,), (Q, T, V), (T, V)"
            )
        if int(captions.min()) < 0 or int(captions.max()) >= len(texts):
            raise ValueError(
                f"captions span {int(captions.min())}..{int(captions.max())}, expected 0..{len(texts) - 1}"
            )
        if not 0 <= caption_drop <= 1:
            raise ValueError(f"caption_drop={caption_drop}, expected a probability")
        self.latents, self.captions, self.texts, self.empty = latents, captions, texts, empty
        self.caption_drop, self.name = caption_drop, name

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """`images` (the latents) and `noise` (B, C, H, W), `encoder_hidden_states` (B, T, V), float32; `uniform` (B,) in [0, 1); `key`."""
        dropped = uniforms(keys, Stream.LABEL_DROP) < self.caption_drop  # (B,)
        texts = self.texts[self.captions[indices]].to(keys.device)  # (B, T, V)
        texts = self.empty.to(keys.device).where(dropped[:, None, None], texts)
        return {
            "images": self.latents[indices].to(keys.device).float(),
            "noise": normals(keys, Stream.NOISE, tuple(self.latents.shape[1:])),
            "uniform": uniforms(keys, Stream.TIMESTEP),
            "encoder_hidden_states": texts.float(),
            "key": keys,
        }

    def fingerprint(self) -> str:
        return self.name
