"""Stock pipelines of diffusers around tiny transformers, and their calls for some images. Used by tests/diffusion/test_stock*.py.

Here: constructors and arguments. Not here: what must hold. B images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    FluxPipeline,
    HunyuanDiTPipeline,
    HunyuanVideoPipeline,
    LTXPipeline,
    Lumina2Pipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
)
from factories import randomise
from tiny_families import TEXT, TINY, model_named
from torch import Tensor

STEPS = 3


@dataclass(frozen=True)
class Stock:
    """`make` the components of a pipeline of a class; `texts`: prompt arguments -> shape of one image's; `plain` and `guided` arguments.
    `calls`: forwards of a guided step; `rows` of an image in each."""

    kind: type[DiffusionPipeline]
    make: Callable[[], dict[str, Any]]
    texts: dict[str, tuple[int, ...]]
    plain: dict[str, Any]
    guided: dict[str, Any]
    always: dict[str, Any]
    calls: int = 1
    rows: int = 2


def vae(channels: int = 4) -> AutoencoderKL:
    """An autoencoder that changes no size."""
    made = AutoencoderKL(
        block_out_channels=(4,), latent_channels=channels, norm_num_groups=2, sample_size=8, shift_factor=0.0
    )
    return randomise(made, seed=5).eval()


def _dit() -> dict[str, Any]:
    config = TINY["DiTTransformer2DModel"].config | {"num_embeds_ada_norm": 1000}  # the pipeline's null class is 1000
    transformer = randomise(DiTTransformer2DModel(**config), seed=2).eval()
    return {"transformer": transformer, "vae": vae(), "scheduler": DDIMScheduler(clip_sample=False)}


def _text(name: str, *absent: str, channels: int = 4, **scheduler: Any) -> dict[str, Any]:
    parts = {"transformer": model_named(name), "vae": vae(channels), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return parts | dict.fromkeys(absent) | scheduler


def _bare(name: str, **scheduler: Any) -> dict[str, Any]:
    """Without text encoder and autoencoder."""
    return _text(name, "tokenizer", "text_encoder", "vae", **scheduler)


_SIZE = {"height": 8, "width": 8}
_LARGE = {"height": 64, "width": 64}  # pipelines without an autoencoder take its factor for 8
_MASKED = {"prompt_embeds": (TEXT, 6), "prompt_attention_mask": (TEXT,)}
_SCALES = ({"guidance_scale": 1.0}, {"guidance_scale": 3.0})

STOCK: dict[str, Stock] = {
    "dit": Stock(DiTPipeline, _dit, {}, {"guidance_scale": 1.0}, {"guidance_scale": 3.0}, {}),
    "pixart": Stock(
        PixArtAlphaPipeline,
        lambda: _text("PixArtTransformer2DModel", "tokenizer", "text_encoder", scheduler=DPMSolverMultistepScheduler()),
        {"prompt_embeds": (TEXT, 6), "prompt_attention_mask": (TEXT,)},
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0},
        _SIZE | {"use_resolution_binning": False, "negative_prompt": None},
    ),
    "pixart-sigma": Stock(
        PixArtSigmaPipeline,
        lambda: _text("PixArtTransformer2DModel", "tokenizer", "text_encoder", scheduler=DDIMScheduler()),
        {"prompt_embeds": (TEXT, 6), "prompt_attention_mask": (TEXT,)},
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0},
        _SIZE | {"use_resolution_binning": False, "negative_prompt": None},
    ),
    "sd3": Stock(
        StableDiffusion3Pipeline,
        lambda: _text(
            "SD3Transformer2DModel",
            *("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3"),
        ),
        {"prompt_embeds": (TEXT, 6), "pooled_prompt_embeds": (7,)},
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0},
        _SIZE,
    ),
    "flux": Stock(
        FluxPipeline,
        lambda: _text(
            "FluxTransformer2DModel", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", channels=1
        ),
        {"prompt_embeds": (TEXT, 6), "pooled_prompt_embeds": (7,)},
        {"true_cfg_scale": 1.0},
        {"true_cfg_scale": 2.0},
        _SIZE,
        calls=2,
        rows=1,
    ),
    "wan": Stock(
        WanPipeline,
        lambda: _text("WanTransformer3DModel", "tokenizer", "text_encoder") | {"vae": None},
        {"prompt_embeds": (TEXT, 6)},
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0},
        {"height": 32, "width": 32, "num_frames": 5},
        calls=2,
        rows=1,
    ),
    "sana": Stock(
        SanaPipeline,
        lambda: (
            _text("SanaTransformer2DModel", "tokenizer", "text_encoder", scheduler=DPMSolverMultistepScheduler())
            | {"vae": None}
        ),
        _MASKED,
        *_SCALES,
        {"height": 128, "width": 128, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "hunyuandit": Stock(
        HunyuanDiTPipeline,
        lambda: (
            _bare("HunyuanDiT2DModel", scheduler=DDIMScheduler())
            | {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        ),
        _MASKED | {"prompt_embeds_2": (TEXT, 8), "prompt_attention_mask_2": (TEXT,)},
        *_SCALES,
        _LARGE | {"use_resolution_binning": False},
    ),
    "cogvideox": Stock(
        CogVideoXPipeline,
        lambda: _bare("CogVideoXTransformer3DModel", scheduler=CogVideoXDDIMScheduler()),
        {"prompt_embeds": (TEXT, 6)},
        *_SCALES,
        _LARGE | {"num_frames": 5},
    ),
    "ltx": Stock(
        LTXPipeline,
        lambda: _bare("LTXVideoTransformer3DModel"),
        _MASKED,
        *_SCALES,
        {"height": 128, "width": 128, "num_frames": 1},
    ),
    "lumina2": Stock(
        Lumina2Pipeline, lambda: _bare("Lumina2Transformer2DModel"), _MASKED, *_SCALES, _LARGE, calls=2, rows=1
    ),
    "qwenimage": Stock(
        QwenImagePipeline,
        lambda: _bare("QwenImageTransformer2DModel"),
        {"prompt_embeds": (TEXT, 6), "prompt_embeds_mask": (TEXT,)},
        {"true_cfg_scale": 1.0},
        {"true_cfg_scale": 2.0},
        _LARGE,
        calls=2,
        rows=1,
    ),
    "hunyuanvideo": Stock(
        HunyuanVideoPipeline,
        lambda: _bare("HunyuanVideoTransformer3DModel") | {"tokenizer_2": None, "text_encoder_2": None},
        _MASKED | {"pooled_prompt_embeds": (7,)},
        {"true_cfg_scale": 1.0},
        {"true_cfg_scale": 2.0},
        _LARGE | {"num_frames": 5},
        calls=2,
        rows=1,
    ),
    "flux2": Stock(  # guided by distillation alone: there is no second prediction
        Flux2Pipeline,
        lambda: _bare("Flux2Transformer2DModel"),
        {"prompt_embeds": (TEXT, 6)},
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.0},
        _LARGE,
        rows=1,
    ),
}


def pipeline_named(name: str) -> DiffusionPipeline:
    """A stock pipeline around a tiny transformer."""
    made = STOCK[name].kind(**STOCK[name].make())
    made.set_progress_bar_config(disable=True)
    return made


@functools.cache
def pipe(name: str) -> DiffusionPipeline:
    """Made once; every test leaves it as it was."""
    return pipeline_named(name)


def call_of(name: str, images: list[int], *, guided: bool = True, steps: int = STEPS, **more: Any) -> dict[str, Any]:
    """Arguments of a call for some images; an image is always the same, whatever images are beside it."""
    stock = STOCK[name]
    made: dict[str, Any] = {"class_labels": [image % 1000 for image in images]} if name == "dit" else {}
    two = guided and name != "dit" and stock.calls * stock.rows == 2
    made |= _prompts(stock, images, "") | (_prompts(stock, images, "negative_") if two else {})
    made["generator"] = [torch.Generator().manual_seed(image) for image in images]
    made |= {"num_inference_steps": steps, "output_type": "pt" if name == "dit" else "latent"}
    return made | stock.always | (stock.guided if guided else stock.plain) | more


def _prompts(stock: Stock, images: list[int], prefix: str) -> dict[str, Tensor]:
    drawn = [torch.Generator().manual_seed(500 + image + (50 if prefix else 0)) for image in images]
    made = {}
    for argument, shape in stock.texts.items():
        if "mask" in argument:
            made[prefix + argument] = torch.stack([(torch.arange(TEXT) < 2 + image % 4).long() for image in images])
        else:
            made[prefix + argument] = torch.stack([torch.randn(shape, generator=one) for one in drawn])
    return made


def images_of(pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> Tensor:
    """(B, ...) images or latents of a call."""
    made = pipeline(**arguments, return_dict=False)[0]
    return made if isinstance(made, Tensor) else torch.as_tensor(made)
