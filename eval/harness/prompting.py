"""What scripts share that draw from prompts: any text pipeline from its folder, and images from prompts with a seed each.

Here: loading and drawing. Not here: what is measured. n prompts, C, H, W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import ee_diffusion
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.pipelines.text_to_image import EarlyExitTextPipeline
from ee_diffusion.metrics.files import to_bytes


def load_text_pipeline(model: str, *, text_encoder: str | None, device: torch.device) -> DiffusionPipeline:
    """A pipeline of this package or of diffusers, in float32. `text_encoder`: for folders that come without one.

    Raises:
        ValueError: no pipeline folder.
    """
    index = Path(model) / "model_index.json"
    if not index.is_file():
        raise ValueError(f"no pipeline at {model!r} (no model_index.json)")
    name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    kind = getattr(ee_diffusion, name) if name in ee_diffusion.__all__ else DiffusionPipeline
    words = {}
    if text_encoder is not None:
        encoder = AutoModel.from_pretrained(text_encoder, dtype=torch.float32).eval()
        words = {"text_encoder": encoder, "tokenizer": AutoTokenizer.from_pretrained(text_encoder)}
    pipeline = kind.from_pretrained(model, torch_dtype=torch.float32, **words).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], *, batch_size: int, **call
) -> tuple[Tensor, Trace | None]:
    """One image for each prompt from its own seed: (n, C, H, W) uint8, and the trace, if exits were on. `call` goes to the pipeline.

    Raises:
        ValueError: no prompts, another number of seeds, a batch size below 1.
    """
    if not prompts or len(seeds) != len(prompts) or batch_size < 1:
        raise ValueError(
            f"{len(prompts)} prompts, {len(seeds)} seeds, batch_size={batch_size}: expected some, as many, at least 1"
        )
    images, traces = [], []
    for first in range(0, len(prompts), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + batch_size]]
        chosen = list(prompts[first : first + batch_size])
        ids = (
            {"image_ids": torch.arange(first, first + len(chosen))}
            if isinstance(pipeline, EarlyExitTextPipeline)
            else {}
        )
        output = pipeline(prompt=chosen, generator=generators, output_type="pt", **ids, **call)
        images.append(to_bytes(output.images.float().cpu()))
        traces.append(output.get("trace"))
    return torch.cat(images), None if traces[0] is None else Trace.concatenate(traces)
