"""EarlyExitTextPipeline: images from prompts with a U-ViT that takes text tokens, its blocks stopping per image and per step.

Here: prompts, guidance by a negative prompt, latents and pictures. Not here: the loop (denoise.py), encoding words (prompts.py).
P prompts, B = P * num_images_per_prompt images, R = B rows, or 2B under guidance, T text tokens, V their width, C, H, W image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, SchedulerMixin
from torch import Tensor

from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.fingerprint import check_made_for
from ee_diffusion.diffusion.guidance import is_guided
from ee_diffusion.diffusion.hooks.in_use import in_turn
from ee_diffusion.diffusion.latents import decode
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel
from ee_diffusion.diffusion.pipelines.denoise import denoise
from ee_diffusion.diffusion.pipelines.prompts import encode_prompts
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline, EarlyExitPipelineOutput, check_numbers
from ee_diffusion.diffusion.step_cache.solver import accepted

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_SUPPLY = (
    "EarlyExitTextPipeline.from_pretrained(folder, text_encoder=AutoModel.from_pretrained(name), "
    "tokenizer=AutoTokenizer.from_pretrained(name)) with the encoder that the model card names"
)


class EarlyExitTextPipeline(EarlyExitPipeline):
    """Generate images from prompts.

    Components: `transformer` (a U-ViT with text tokens), `scheduler`, `exits` (None: no early exit), `vae` (AutoencoderTiny or
    AutoencoderKL; None: the transformer works on pixels), `text_encoder` and `tokenizer` (of transformers, those that the transformer was
    trained with; None: prompts come encoded, as `prompt_embeds`). Text encoders are large: a checkpoint may come without, and
    they are then given to `from_pretrained`.
    """

    _optional_components = ["exits", "vae", "text_encoder", "tokenizer"]
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer: UViTTransformer2DModel,
        scheduler: SchedulerMixin,
        exits: AdapterExits | DenoisingExits | CachedOutputExits | None = None,
        vae: AutoencoderTiny | AutoencoderKL | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
    ):
        DiffusionPipeline.__init__(self)
        if transformer.config.text_dim is None:
            raise ValueError("the transformer takes no text (text_dim=None), expected one with text tokens")
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            exits=exits,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )

    @in_turn
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        *,
        negative_prompt: str | list[str] | None = None,
        exit_policy: Policy | None = None,
        exit_threshold: float | None = None,
        num_images_per_prompt: int = 1,
        timesteps: list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image_ids: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> EarlyExitPipelineOutput | tuple:
        """Generate.

        Args:
            prompt: what to draw, one or P. negative_prompt: what guidance leads away from, one or P; None: the empty prompt, which
                the transformer was trained with. prompt_embeds, negative_prompt_embeds: both already encoded, (P, T, V) as
                `encode_prompts` makes them.
            num_inference_steps, timesteps, generator, latents, eta, num_images_per_prompt, output_type ("pil", "np", "pt",
                "latent"), return_dict, callback_on_step_end: as in diffusers.
            guidance_scale: classifier-free guidance above 1.
            exit_policy, exit_threshold, image_ids: as for `EarlyExitPipeline`.

        Raises:
            ValueError: inputs that do not fit or components that are missing, before any work; NaN uncertainty, after the step.
        """
        check_numbers(guidance_scale, eta, num_images_per_prompt=num_images_per_prompt)
        policy = self._check_call(
            exit_policy,
            exit_threshold,
            steps=num_inference_steps,
            timesteps=timesteps,
            output_type=output_type,
            output_types=OUTPUT_TYPES,
        )
        steps = num_inference_steps if timesteps is None else timesteps
        check_made_for(policy, self, num_inference_steps=steps, guidance_scale=guidance_scale, eta=eta)
        self._check_callback(callback_on_step_end_tensor_inputs)
        self._guidance_scale = float(guidance_scale)
        texts = self.encode_prompt(
            prompt,
            negative_prompt,
            guided=is_guided(guidance_scale),
            num_images_per_prompt=num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )  # (R, T, V)
        device = self._execution_device
        count = len(texts) // (2 if is_guided(guidance_scale) else 1)
        times = self._timesteps(num_inference_steps, timesteps, device)
        latents, trace = denoise(
            self,
            policy,
            times,
            latents=self._latents(count, generator, latents, device),
            conditions={"encoder_hidden_states": texts.to(device)},
            guidance_scale=guidance_scale,
            image_ids=image_ids,
            step_arguments=accepted(self.scheduler, generator=generator, eta=eta),
            on_step_end=callback_on_step_end,
            on_step_end_inputs=callback_on_step_end_tensor_inputs,
        )
        images = latents if output_type == "latent" else self._images(self._decoded(latents), output_type)
        self.maybe_free_model_hooks()
        return EarlyExitPipelineOutput(images=images, trace=trace) if return_dict else (images, trace)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        *,
        guided: bool,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> Tensor:
        """The transformer's text tokens (R, T, V), those of the prompts first, under guidance then those of the negative prompts.

        Raises:
            ValueError: a prompt and its embeddings both or neither, numbers that do not fit, no text encoder, or one of another width.
        """
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}, expected at least 1")
        texts = self._texts("prompt", prompt, prompt_embeds)  # (P, T, V)
        if not guided:
            if negative_prompt is not None or negative_prompt_embeds is not None:
                raise ValueError("a negative prompt was given, but guidance_scale is not above 1: it would be ignored")
            return texts.repeat_interleave(num_images_per_prompt, dim=0)
        nothing = "" if negative_prompt is None and negative_prompt_embeds is None else negative_prompt
        against = self._texts("negative_prompt", nothing, negative_prompt_embeds)  # (1 or P, T, V)
        if len(against) not in (1, len(texts)):
            raise ValueError(f"{len(against)} negative prompts, expected 1 or {len(texts)}, one for each prompt")
        both = torch.cat([texts, against.to(texts).expand_as(texts)])  # (2P, T, V)
        return both.repeat_interleave(num_images_per_prompt, dim=0)

    def _texts(self, name: str, prompt: str | list[str] | None, embeds: Tensor | None) -> Tensor:
        config = self.transformer.config
        if (prompt is None) == (embeds is None):
            raise ValueError(f"{name}={prompt!r} and {name}_embeds: give one of the two")
        if embeds is not None:
            if embeds.ndim != 3 or not len(embeds) or embeds.shape[1:] != (config.num_text_tokens, config.text_dim):
                expected = f"(P, {config.num_text_tokens}, {config.text_dim})"
                raise ValueError(f"{name}_embeds is {tuple(embeds.shape)}, expected {expected}")
            return embeds
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(f"this pipeline has no text encoder to read {name}={prompt!r} with; load it by {_SUPPLY}")
        if self.text_encoder.config.hidden_size != config.text_dim:
            raise ValueError(
                f"the text encoder is {self.text_encoder.config.hidden_size} wide, the transformer was trained with one of "
                f"{config.text_dim}; load the pipeline by {_SUPPLY}"
            )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return encode_prompts(self.tokenizer, self.text_encoder, prompts, num_tokens=config.num_text_tokens)

    def _decoded(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) as the transformer sees them -> pixels in [-1, 1]."""
        return latents if self.vae is None else decode(self.vae, latents.to(self.vae.dtype))
