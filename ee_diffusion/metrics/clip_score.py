"""CLIP score by torchmetrics, with a CLIP of whatever version of transformers; and prompt files.

Here: values per image. Not here: loading a CLIP (the caller), "tower match", our own stand-in (retrieval.py).
n images, C, H, W pixels.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.multimodal import CLIPScore

PROMPT_FILES = (".tsv", ".csv", ".txt")
ANY_END = 2  # an end token of old configs, for which transformers reads at the largest id


class TensorCLIP(nn.Module):
    """A CLIPModel whose features are tensors: transformers 5 wraps them in an output, on which torchmetrics 1.9 fails
    (`BaseModelOutputWithPooling has no attribute norm`); the projected features are its `pooler_output`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return _tensor(self.model.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _tensor(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))


@torch.inference_mode()
def clip_scores(images: Tensor, prompts: Sequence[str], *, model: nn.Module, processor: Callable) -> Tensor:
    """`100 cos(E_image, E_prompt)` per image (Hessel et al., CLIPScore, arXiv 2104.08718, eq. 1 with w = 100 and without the cut at 0).

    images (n, 3, H, W) uint8 with a prompt each -> (n,) float64. torchmetrics' own figure is their mean, cut at 0. Prompts longer than the
    text model reads are cut, their end token kept (`cut_prompts` counts them).

    Raises:
        ValueError: no images, another dtype or number of channels, another number of prompts, a processor that ends a prompt without the
            token at which the model reads it.
    """
    if (
        images.ndim != 4
        or images.shape[1] != 3
        or images.dtype != torch.uint8
        or not len(images)
        or len(prompts) != len(images)
    ):
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)} with {len(prompts)} prompts, expected uint8 (n, 3, H, W) and n"
        )
    text = model.config.text_config
    cut = partial(_cut, processor, text.max_position_embeddings)
    if text.eos_token_id != ANY_END:
        ended = [text.eos_token_id in ids for ids in cut(text=list(prompts))["input_ids"]]
        if not all(ended):
            alone = prompts[ended.index(False)]
            raise ValueError(
                f"prompt {alone!r} comes without the end token {text.eos_token_id} of the model (all would read alike), "
                "expected the model's own processor"
            )
    metric = CLIPScore(lambda: (TensorCLIP(model).eval(), cut)).to(next(model.parameters()).device)
    scores = []
    for image, prompt in zip(images.to(metric.device), prompts, strict=True):
        metric.reset()
        metric.update(image, prompt)
        scores.append(metric.score.double().cpu())
    return torch.stack(scores)


def cut_prompts(prompts: Sequence[str], *, model: nn.Module, processor: Callable) -> int:
    """How many prompts are longer than the text model reads."""
    longest = model.config.text_config.max_position_embeddings
    return sum(len(ids) > longest for ids in processor(text=list(prompts))["input_ids"])


def read_prompts(path: str | Path, *, column: str) -> list[str]:
    """Prompts of a .tsv or .csv with a header (their `column`; PartiPrompts is such a .tsv) or of a .txt, one a line.

    Raises:
        ValueError: no such file, another kind, no such column, no prompts, an empty one.
    """
    path = Path(path)
    if path.suffix not in PROMPT_FILES or not path.is_file():
        raise ValueError(f"prompts {str(path)!r}, expected an existing file of the kind {PROMPT_FILES}")
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".txt":
            prompts = [line.strip() for line in file if line.strip()]
        else:
            style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            rows = csv.DictReader(file, **style)
            if column not in (rows.fieldnames or ()):
                raise ValueError(f"no column {column!r} in {path}, which has {rows.fieldnames}")
            prompts = [(row[column] or "").strip() for row in rows]
    if not prompts or not all(prompts):
        raise ValueError(
            f"{path} holds {len(prompts)} prompts, {prompts.count('')} of them empty, expected some, none empty"
        )
    return prompts


def _cut(processor: Callable, longest: int, **given: object) -> Mapping:
    """What the processor makes of it, no prompt longer than `longest` tokens. torchmetrics' own cut takes the end token off, at whose place
    the model reads the prompt: it would read the first token, which is the same for all prompts."""
    if given.get("text") is None:
        return processor(**given)
    return processor(**given, truncation=True, max_length=longest)


def _tensor(features: Tensor | object) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output
