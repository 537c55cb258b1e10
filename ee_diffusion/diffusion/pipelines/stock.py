"""Stock pipelines of diffusers with a component `exits` and a call argument `exit_policy`; all else is the stock pipeline's.

Here: four classes, each its stock class plus one component. Not here: what runs with exits (attach.py, run_tracker.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from diffusers import DiffusionPipeline, DiTPipeline, FluxPipeline, PixArtAlphaPipeline, StableDiffusion3Pipeline

from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.exits.loading import keep_exits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.hooks.in_use import in_turn
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipelineOutput

Exits = AdapterExits | DenoisingExits | None


def _parameters_of(stock: type) -> Callable[[Callable], Callable]:
    """Give an `__init__` the parameters of the stock class's, and `exits`: diffusers reads a pipeline's components off there."""

    def annotate(init: Callable) -> Callable:
        signature = inspect.signature(stock.__init__)
        exits = inspect.Parameter("exits", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Exits)
        named = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        rest = [one for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD]
        init.__signature__ = signature.replace(parameters=[*named, exits, *rest])
        init.__annotations__ = get_type_hints(stock.__init__) | {"exits": Exits}
        return init

    return annotate


@keep_exits
class EarlyExitDiTPipeline(DiTPipeline):
    """`DiTPipeline` with exits: class-conditional images, every image deciding at every step how many blocks it needs."""

    _optional_components = ["exits"]
    _exclude_from_cpu_offload = ["exits"]  # used inside the transformer's forward, wherever that runs

    @_parameters_of(DiTPipeline)
    def __init__(self, *args, exits=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_modules(exits=exits)
        given = inspect.signature(DiTPipeline.__init__).bind(self, *args, **kwargs).arguments
        self.register_to_config(id2label=given.get("id2label"))  # the stock pipeline loses it when it is saved

    @in_turn
    def __call__(self, *args, exit_policy: Policy | None = None, **kwargs) -> EarlyExitPipelineOutput | tuple:
        """As `DiTPipeline`, under `exit_policy` (None: the plain model). Returns images and, with exits, the trace."""
        return _call(super().__call__, self, exit_policy, args, kwargs)


@keep_exits
class EarlyExitPixArtPipeline(PixArtAlphaPipeline):
    """`PixArtAlphaPipeline` with exits. A PixArt-Sigma pipeline is attached to instead: `attach_exits(pipe, exits, policy)`."""

    _optional_components = ["tokenizer", "text_encoder", "exits"]
    _exclude_from_cpu_offload = ["exits"]

    @_parameters_of(PixArtAlphaPipeline)
    def __init__(self, *args, exits=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_modules(exits=exits)

    @in_turn
    def __call__(self, *args, exit_policy: Policy | None = None, **kwargs) -> EarlyExitPipelineOutput | tuple:
        """As `PixArtAlphaPipeline`, under `exit_policy` (None: the plain model). Returns images and, with exits, the trace."""
        return _call(super().__call__, self, exit_policy, args, kwargs)


@keep_exits
class EarlyExitSD3Pipeline(StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with exits."""

    _optional_components = ["image_encoder", "feature_extractor", "exits"]
    _exclude_from_cpu_offload = ["exits"]

    @_parameters_of(StableDiffusion3Pipeline)
    def __init__(self, *args, exits=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_modules(exits=exits)

    @in_turn
    def __call__(self, *args, exit_policy: Policy | None = None, **kwargs) -> EarlyExitPipelineOutput | tuple:
        """As `StableDiffusion3Pipeline`, under `exit_policy` (None: the plain model). Returns images and, with exits, the trace."""
        return _call(super().__call__, self, exit_policy, args, kwargs)


@keep_exits
class EarlyExitFluxPipeline(FluxPipeline):
    """`FluxPipeline` with exits; with `true_cfg_scale` the second call of a step follows the depths of the first."""

    _optional_components = ["image_encoder", "feature_extractor", "exits"]
    _exclude_from_cpu_offload = ["exits"]

    @_parameters_of(FluxPipeline)
    def __init__(self, *args, exits=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_modules(exits=exits)

    @in_turn
    def __call__(self, *args, exit_policy: Policy | None = None, **kwargs) -> EarlyExitPipelineOutput | tuple:
        """As `FluxPipeline`, under `exit_policy` (None: the plain model). Returns images and, with exits, the trace."""
        return _call(super().__call__, self, exit_policy, args, kwargs)


def _call(
    stock: Callable[..., Any],
    pipeline: DiffusionPipeline,
    policy: Policy | None,
    args: tuple,
    kwargs: dict[str, Any],
) -> EarlyExitPipelineOutput | tuple:
    """The stock call, its transformer under the policy.

    Raises:
        ValueError: a policy, but no exits; and whatever `attach_exits` and the policy refuse.
    """
    as_output = inspect.signature(stock).bind(*args, **kwargs).arguments.get("return_dict", True)
    trace = None
    if not isinstance(policy, Policy | None):
        raise ValueError(f"exit_policy={policy!r}, expected a Policy, for example deediff({policy!r})")
    if policy is None or policy.is_off:
        output = stock(*args, **kwargs)
    elif pipeline.exits is None:
        raise ValueError(
            "an exit policy was given, but this pipeline has no exits; load or train some (component `exits`)"
        )
    else:
        with attach_exits(pipeline, pipeline.exits, policy) as attachment:
            output = stock(*args, **kwargs)
            trace = attachment.trace
    images = output.images if as_output else output[0]
    return EarlyExitPipelineOutput(images=images, trace=trace) if as_output else (images, trace)
