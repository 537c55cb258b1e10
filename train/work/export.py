"""Write a pipeline as a checkpoint and find its policies by replay of one run at full depth."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from transformers import AutoModel, AutoTokenizer

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import value_for_budget
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.latents import load_taesd
from ee_diffusion.diffusion.pipelines.sampling import classes_of, generate, use_sampler
from ee_diffusion.diffusion.pipelines.text_to_image import EarlyExitTextPipeline
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.training.captions import load_captioned
from ee_diffusion.training.checkpointing import write_json
from ee_diffusion.training.config import CaptionConfig, ImageDataConfig
from ee_diffusion.training.datasets import find_data_files
from train.export import ExportConfig

RECORD_ALL = Policy(Threshold(1.0), record_all=True)


def forget_origin(path: Path) -> None:
    """Drop the folder that the weights were loaded from: it means nothing elsewhere."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.pop("_name_or_path", None) is not None:
        write_json(path, values)


def write_policies(folder: Path, trace: Trace, budgets: list[float]) -> None:
    """policies/blocks-80.json, ...: for each share of the blocks the threshold that takes it when the trace is replayed."""
    (folder / "policies").mkdir(exist_ok=True)
    for budget in budgets:
        choice = value_for_budget(trace, lambda value: Policy(Threshold(value)), budget=budget, low=0.0, high=1.0)
        Policy(Threshold(choice.value)).save(folder / "policies" / f"blocks-{round(100 * budget)}.json")
        print(f"budget {budget}: threshold {choice.value:.5f}; replayed share of blocks {choice.fraction:.3f}")


def record_classes(config: ExportConfig, pipeline: EarlyExitPipeline, guidance_scale: float) -> Trace:
    """A run at full depth on classes in turn, all scores recorded."""
    return generate(
        pipeline,
        seeds("calibrate", config.count),
        balanced_labels(config.count, classes_of(pipeline, guidance_scale)),
        batch_size=config.batch_size,
        num_inference_steps=config.num_inference_steps or 50,
        guidance_scale=guidance_scale,
        exit_policy=RECORD_ALL,
    ).trace


def record_captions(config: ExportConfig, pipeline: EarlyExitTextPipeline, guidance_scale: float) -> Trace:
    """A run at full depth on validation captions, all scores recorded."""
    data = ImageDataConfig(train_data_files=[config.data_files], label_column=None, resolution=64, random_flip=False)
    captions, _ = load_captioned(data, CaptionConfig()).part("validation").distinct()
    chosen, traces = seeds("calibrate", config.count), []
    for places in torch.arange(config.count).split(config.batch_size):
        output = pipeline(
            [captions[place % len(captions)] for place in places.tolist()],
            config.num_inference_steps or 25,
            guidance_scale,
            generator=[torch.Generator().manual_seed(chosen[place]) for place in places.tolist()],
            image_ids=places,
            output_type="latent",
            exit_policy=RECORD_ALL,
        )
        traces.append(output.trace)
    return Trace.concatenate(traces)


def run(config: ExportConfig) -> None:
    """Raises ValueError for a text-to-image pipeline without its encoders, or encoders for another pipeline."""
    folder, texts = Path(config.output_dir), config.text_encoder is not None
    kind = EarlyExitTextPipeline if texts else EarlyExitPipeline
    came = DiffusionPipeline.load_config(config.model)["_class_name"]
    if came != kind.__name__:
        raise ValueError(
            f"{config.model} is of {came} with text_encoder={config.text_encoder!r}, expected {kind.__name__}"
        )
    guidance_scale = (3.0 if texts else 4.0) if config.guidance_scale is None else config.guidance_scale
    vae = {"vae": load_taesd(find_data_files(config.vae)[0])} if texts else {}
    pipeline = kind.from_pretrained(config.model, **vae)
    if not texts:
        classes_of(pipeline, guidance_scale)  # refuses guidance that the model cannot have
        use_sampler(pipeline, "ddim")
    pipeline.to(torch.float16).save_pretrained(folder, max_shard_size=config.max_shard_size)
    for path in folder.glob("**/*.json"):
        forget_origin(path)
    encoder = {}
    if texts:
        encoder["text_encoder"] = AutoModel.from_pretrained(config.text_encoder).eval()
        encoder["tokenizer"] = AutoTokenizer.from_pretrained(config.text_encoder)
    pipeline = kind.from_pretrained(folder, **encoder)  # what users will load decides
    pipeline.set_progress_bar_config(disable=True)
    trace = (record_captions if texts else record_classes)(config, pipeline, guidance_scale)
    write_policies(folder, trace, config.budgets)
