"""The pipeline that the options name. Not here: flags (options.py), what is measured."""

from __future__ import annotations

from dataclasses import replace

import torch

from ee_diffusion.checkpoints import checkpoint_path
from ee_diffusion.core.devices import device_named
from ee_diffusion.diffusion.pipelines.sampling import use_sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from eval.harness.options import SamplingOptions


def load(options: SamplingOptions) -> EarlyExitPipeline:
    """On its device, in its dtype, with its sampler."""
    pipeline = EarlyExitPipeline.from_pretrained(options.model or checkpoint_path())
    pipeline.set_progress_bar_config(disable=True)
    use_sampler(pipeline, options.sampler)
    pipeline = pipeline.to(device_named(options.device))
    return pipeline if options.dtype == "float32" else pipeline.to(getattr(torch, options.dtype))


def in_float32(pipeline: EarlyExitPipeline, options: SamplingOptions) -> EarlyExitPipeline:
    """The pipeline, or the same one loaded in float32. Whatever is fitted, measured or searched runs in float32: under half precision
    two runs that differ a little soon differ by its rounding, which passes for a large amplification of a small error."""
    return pipeline if options.dtype == "float32" else load(replace(options, dtype="float32"))
