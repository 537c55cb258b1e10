"""EarlyExitPipeline: pixel-space generation with a transformer whose blocks stop per image and per step.

Here: the call as diffusers users know it. Not here: the loop over steps (denoise.py), prompts (text_to_image.py), deciding (core).
B images, R = B rows, or 2B under guidance (conditional rows first), C, H, W image, S scheduler steps.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Report, Trace
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.exits.loading import keep_exits
from ee_diffusion.diffusion.fingerprint import check_made_for
from ee_diffusion.diffusion.guidance import is_guided
from ee_diffusion.diffusion.hooks.in_use import in_turn
from ee_diffusion.diffusion.methods import deediff
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel
from ee_diffusion.diffusion.pipelines.denoise import denoise
from ee_diffusion.diffusion.protocols import ScheduledHeads
from ee_diffusion.diffusion.step_cache.solver import accepted, check_step

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class EarlyExitPipelineOutput(BaseOutput):
    """`images`: PIL images, a numpy array (B, H, W, C) or a tensor (B, C, H, W) in [0, 1]; `trace`: what ran, None if exits were off."""

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    trace: Trace | None = None

    @property
    def report(self) -> Report | None:
        """The trace in a few numbers; `print(output.report.summary())`."""
        return None if self.trace is None else self.trace.report()


def check_numbers(guidance_scale: float, eta: float = 0.0, **counts: int) -> None:
    """Raises ValueError for a guidance scale that is no finite number, an eta outside [0, 1], or a count that is none of 1, 2, ..."""
    for name, value in (("guidance_scale", guidance_scale), ("eta", eta)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r}, expected a finite number")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}, expected a number in [0, 1]")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}, expected an integer of at least 1")


@keep_exits
class EarlyExitPipeline(DiffusionPipeline):
    """Generate images with a U-ViT, every image deciding at every step how many blocks it needs.

    Components: `transformer` (UViTTransformer2DModel), `scheduler` (any that predicts what the transformer was trained on), `exits`
    (DenoisingExits, or CachedOutputExits; None: no early exit).
    """

    _optional_components = ["exits"]
    model_cpu_offload_seq = "transformer"
    _exclude_from_cpu_offload = ["exits"]  # used inside the transformer's forward, wherever that runs
    _callback_tensor_inputs = ["latents"]
    _guidance_scale = 1.0

    def __init__(
        self,
        transformer: UViTTransformer2DModel,
        scheduler: SchedulerMixin,
        exits: AdapterExits | DenoisingExits | CachedOutputExits | None = None,
    ):
        super().__init__()
        if "num_classes" not in transformer.config:
            raise ValueError(
                f"the transformer is a {type(transformer).__name__}, expected a UViTTransformer2DModel; for diffusers' own there are "
                "attach_exits(pipe, exits, policy), "
                "EarlyExitDiTPipeline, EarlyExitPixArtPipeline, EarlyExitSD3Pipeline, EarlyExitFluxPipeline"
            )
        if transformer.config.text_dim is not None:
            raise ValueError("the transformer takes text, expected one without; it draws by EarlyExitTextPipeline")
        self.register_modules(transformer=transformer, scheduler=scheduler, exits=exits)

    @property
    def guidance_scale(self) -> float:
        """Of the call that goes on, or else of the last one; 1 before the first."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether an image of that call has a second row, as diffusers' pipelines say it."""
        return is_guided(self._guidance_scale)

    @in_turn
    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        *,
        exit_policy: Policy | None = None,
        exit_threshold: float | None = None,
        batch_size: int = 1,
        num_images_per_prompt: int = 1,
        timesteps: list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        image_ids: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> EarlyExitPipelineOutput | tuple:
        """Generate.

        Args:
            class_labels: one class per image, for class-conditional models (None for unconditional ones); the null class: no class.
            num_inference_steps, timesteps, generator, latents, eta, num_images_per_prompt, output_type ("pil", "np", "pt"), return_dict,
                callback_on_step_end: as in diffusers.
            guidance_scale: classifier-free guidance above 1; needs a transformer with a null class.
            exit_policy: when to stop; None: off. exit_threshold: short for `deediff(threshold)`: answer where the mean uncertainty of
                an image is below it. Neither given: the plain model.
            batch_size: number of images of an unconditional model.
            image_ids: (B,) ids of the images, for policies that hold a plan per image; default 0..B-1.

        Raises:
            ValueError: inputs that do not fit, before any work; NaN uncertainty, after the step it occurred in.
        """
        check_numbers(guidance_scale, eta, batch_size=batch_size, num_images_per_prompt=num_images_per_prompt)
        labels = self.check_labels(class_labels, batch_size, num_images_per_prompt)  # (B,) or None
        count = batch_size * num_images_per_prompt if labels is None else len(labels)
        guided = is_guided(guidance_scale)
        if guided and self.transformer.config.null_class is None:
            raise ValueError(
                "guidance_scale > 1 needs a transformer trained with a null class (null_class in its config)"
            )
        policy = self._check_call(
            exit_policy,
            exit_threshold,
            steps=num_inference_steps,
            timesteps=timesteps,
            output_type=output_type,
        )
        steps = num_inference_steps if timesteps is None else timesteps
        check_made_for(policy, self, num_inference_steps=steps, guidance_scale=guidance_scale, eta=eta)
        self._check_callback(callback_on_step_end_tensor_inputs)
        self._guidance_scale = float(guidance_scale)
        device = self._execution_device
        times = self._timesteps(num_inference_steps, timesteps, device)
        latents = self._latents(count, generator, latents, device)
        labels = labels if labels is None else labels.to(device)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.config.null_class)])  # (2B,)
        step_arguments = accepted(self.scheduler, generator=generator, eta=eta)

        latents, trace = denoise(
            self,
            policy,
            times,
            latents=latents,
            conditions={} if labels is None else {"class_labels": labels},
            guidance_scale=guidance_scale,
            image_ids=image_ids,
            step_arguments=step_arguments,
            on_step_end=callback_on_step_end,
            on_step_end_inputs=callback_on_step_end_tensor_inputs,
        )
        images = self._images(latents, output_type)
        self.maybe_free_model_hooks()
        return EarlyExitPipelineOutput(images=images, trace=trace) if return_dict else (images, trace)

    def check_labels(self, labels: Any, batch_size: int = 1, per_prompt: int = 1) -> Tensor | None:
        """The class of every image (B,), None for unconditional models. Raises ValueError for labels that this model does not have."""
        num_classes = self.transformer.config.num_classes
        if (labels is None) != (num_classes is None):
            wants = "takes no class_labels" if num_classes is None else f"needs class_labels, {self._classes()}"
            raise ValueError(f"this transformer {wants}, got {labels!r}")
        if labels is None:
            return None
        if batch_size != 1:
            raise ValueError(
                f"batch_size={batch_size} is for unconditional models; here there is one image per class label"
            )
        try:
            labels = torch.as_tensor(labels).reshape(-1)
        except (TypeError, ValueError) as unfit:
            raise ValueError(f"class_labels {labels!r}, expected {self._classes()}") from unfit
        if len(labels) == 0:
            raise ValueError("class_labels is empty, expected at least one class")
        if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
            raise ValueError(f"class_labels {labels.tolist()}, expected {self._classes()}")
        return labels.long().repeat_interleave(per_prompt)  # (B,)

    def _classes(self) -> str:
        """The class labels there are, in words."""
        num_classes, null_class = self.transformer.config.num_classes, self.transformer.config.null_class
        if null_class is None or null_class != num_classes - 1:
            return f"integers in 0..{num_classes - 1}"
        return f"integers in 0..{num_classes - 2}, or {null_class} for no class"

    def _check_call(
        self,
        policy: Policy | None,
        threshold: float | None,
        *,
        steps: int,
        timesteps: list[int] | None,
        output_type: str,
        output_types: tuple[str, ...] = OUTPUT_TYPES,
    ) -> Policy:
        if not isinstance(policy, Policy | None):
            raise TypeError(
                f"exit_policy is a {type(policy).__name__}, expected a Policy (a number goes to exit_threshold, a file to Policy.load)"
            )
        if policy is not None and threshold is not None:
            raise ValueError("give exit_policy or exit_threshold, not both")
        if threshold is not None:
            if isinstance(threshold, bool) or not isinstance(threshold, int | float):
                raise ValueError(f"exit_threshold={threshold!r}, expected a number in [0, 1]")
            policy = deediff(threshold)
        policy = policy or Policy()
        if not policy.is_off and not hasattr(self.exits, "depths") and self.exits is not None:
            raise ValueError(f"exits is a {type(self.exits).__name__}, expected exits such as DenoisingExits")
        if not policy.is_off and self.exits is None:
            raise ValueError(
                "an exit policy was given, but this pipeline has no exits; load or train some (component `exits`)"
            )
        if not policy.is_off and isinstance(self.exits, ScheduledHeads):
            self.exits.check_scheduler(self.scheduler)
        if timesteps is None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"num_inference_steps={steps}, expected an integer of at least 1")
        if timesteps is not None and not hasattr(timesteps, "__len__"):
            raise ValueError(f"timesteps={timesteps!r}, expected a list of them")
        if timesteps is not None and len(timesteps) == 0:
            raise ValueError("timesteps is empty, expected at least one")
        if output_type not in output_types:
            raise ValueError(f"output_type={output_type!r}, expected one of {output_types}")
        check_step(self.scheduler)
        return policy

    def _check_callback(self, names: tuple[str, ...]) -> None:
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {unknown}, expected among {self._callback_tensor_inputs}"
            )

    def _timesteps(self, steps: int, timesteps: list[int] | None, device: torch.device) -> Tensor:
        if timesteps is None:
            self.scheduler.set_timesteps(steps, device=device)
        elif "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(self.scheduler).__name__} takes no custom timesteps, only num_inference_steps")
        else:
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        return self.scheduler.timesteps

    def _latents(self, count: int, generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
        config = self.transformer.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators, expected one for each of {count} images")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif not isinstance(latents, Tensor) or latents.shape != shape:
            came = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents is {came}, expected a tensor {shape}")
        elif not bool(latents.isfinite().all()):
            raise ValueError("latents hold numbers that are not finite")
        return latents.to(device) * self.scheduler.init_noise_sigma

    def _images(self, latents: Tensor, output_type: str) -> Any:
        images = (latents.float() / 2 + 0.5).clamp(0, 1).cpu()  # (B, C, H, W)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
        return array if output_type == "np" else self.numpy_to_pil(array)
