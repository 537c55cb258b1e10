"""Attach exits to a diffusers transformer or pipeline, take them off again, and see what they did.

Here: the user's interface. Not here: what an attachment does in a forward (transformer_hook.py), refusals of models (compatibility.py).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

from ee_diffusion.core.distributed import JointDecision
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.hooks.block_runner import layers_of
from ee_diffusion.diffusion.hooks.compatibility import require_attachable
from ee_diffusion.diffusion.hooks.compile import compiler_for, is_compiled, unwrapped
from ee_diffusion.diffusion.hooks.in_use import OneCall
from ee_diffusion.diffusion.hooks.other_work import Counted
from ee_diffusion.diffusion.hooks.parallel import require_parallel, vote_of
from ee_diffusion.diffusion.hooks.run_tracker import RunTracker
from ee_diffusion.diffusion.hooks.transformer_hook import TransformerHook
from ee_diffusion.diffusion.model_specs import blocks_of, model_spec_of
from ee_diffusion.diffusion.protocols import DenoiserHeads, ScheduledHeads
from ee_diffusion.diffusion.step_cache.run_setup import Watch, is_fitted

Target = nn.Module | DiffusionPipeline | ModularPipeline
_ATTACHING = threading.Lock()  # one looks whether exits are there and puts its own on before the next one looks


def attach_exits(
    target: Target,
    heads: DenoiserHeads,
    policy: Policy | None = None,
    *,
    rows_per_sample: int | None = None,
    num_steps: int | None = None,
    compile_options: Mapping[str, Any] | None = None,
    joint_decision: JointDecision | None = None,
) -> TransformerHook:
    """Attach exits to a diffusers transformer, or to the transformer of a pipeline.

    With a policy, calls of the pipeline run with exits from now on; `exit_summary(pipe)` tells what happened. On a bare
    transformer (in a loop of one's own) and on a modular pipeline, whose transformer is as good as bare, say `rows_per_sample` and
    `num_steps`.

    Args:
        policy: when to stop; None: only forwards inside `TransformerHook.use(step)` run with exits.
        branches: rows an image has in a forward (2: guidance in one batch). Default: read from the pipeline's call.
        num_steps: forwards of a run. Default: read from the pipeline's scheduler.
        compile_options: run compiled, with these options of `torch.compile` ({}: its own), see `compiled.Compiler`. Default: compiled if
            the transformer was (by `torch.compile`, `.compile()`, or its blocks alone).
        vote: the ranks that run this transformer together, each on a part of its tokens or weights; they decide together then. Default:
            those of its parallel config, if diffusers split it. Ranks that each generate images of their own need none.

    Raises:
        ValueError: an unknown class of model or block, an attachment already there, heads of another model (depth or width) or noise
            schedule, a diffusers cache that is active, blocks managed by FSDP, a policy on a bare transformer without `rows_per_sample` and
            `num_steps`, exits that cannot run on a part of the tokens, arguments of another kind.
    """
    wrapper = _held(target)
    transformer = unwrapped(wrapper)
    family = model_spec_of(transformer)
    if not isinstance(heads, DenoiserHeads):
        raise ValueError(
            f"heads={heads!r}, expected exits such as AdapterExits.for_transformer(transformer, depths, rank=...)"
        )
    if not isinstance(joint_decision, JointDecision | None):
        raise ValueError(f"joint_decision={joint_decision!r}, expected JointDecision(group)")
    pipeline = target if isinstance(target, DiffusionPipeline) else None
    _require_free(transformer)
    _check_arguments(transformer, policy, rows_per_sample, num_steps, bare=pipeline is None)
    num_layers = len(blocks_of(transformer))
    if heads.depths[-1] >= num_layers:
        raise ValueError(
            f"heads with an exit at depth {heads.depths[-1]}, the model has {num_layers} blocks: heads of another model?"
        )
    heads.check_fits(transformer)
    if pipeline is not None and isinstance(heads, ScheduledHeads):
        heads.check_scheduler(pipeline.scheduler)
    require_attachable(transformer, family)
    compiler = None
    if is_compiled(wrapper, blocks_of(transformer)) or compile_options is not None:
        options = {} if compile_options is None else compile_options
        compiler = compiler_for(transformer, heads, family, layers=layers_of(transformer, family), options=options)
    require_parallel(transformer, blocks_of(transformer), heads, compiled=compiler is not None)
    joint_decision = vote_of(transformer) if joint_decision is None else joint_decision
    held = None if wrapper is transformer else wrapper
    with _ATTACHING:
        _require_free(transformer)
        attachment = TransformerHook(
            transformer, heads, family, compiler=compiler, wrapper=held, joint_decision=joint_decision
        )
        if policy is not None:
            said = {
                "pipeline": pipeline,
                "rows_per_sample": rows_per_sample,
                "num_steps": num_steps,
                "renew": attachment.renew,
            }
            begins = functools.partial(_run_begins, attachment, pipeline)
            runs = RunTracker(policy, attachment.start, transformer, family, **said, begins=begins)
            counted = Counted(transformer, pipeline)
            attachment.watch = Watch(pipeline, heads) if pipeline is not None and is_fitted(heads) else None
            attachment.run_under(
                runs, counted, None if pipeline is None else OneCall(pipeline, attachment.require_not_compiled_since)
            )
        transformer.__dict__["_ee_hook"] = attachment
    return attachment


def _require_free(transformer: nn.Module) -> None:
    """Raises ValueError if exits are attached."""
    attachment = transformer.__dict__.get("_ee_hook")
    if attachment is None:
        return
    kind = type(transformer).__name__
    if attachment.thread == threading.get_ident():
        raise ValueError(f"exits are attached to this {kind} already; detach first")
    raise ValueError(
        f"this {kind} is in use: another thread attached exits to it (a pipeline with exits inside does so in each call); "
        "make one call at a time, detach there, or give each thread a pipeline and a transformer of its own"
    )


def _run_begins(attachment: TransformerHook, pipeline: DiffusionPipeline | None, num_steps: int) -> None:
    """The pipeline may have another scheduler now. Raises ValueError for one that the heads do not know."""
    attachment.counted.begin(attachment.runs)
    if pipeline is None:
        return
    heads, watch = attachment.heads, attachment.watch
    if isinstance(heads, ScheduledHeads):
        heads.check_scheduler(pipeline.scheduler)
    if watch is not None:
        watch.begin(num_steps)


def _check_arguments(
    transformer: nn.Module, policy: Policy | None, rows_per_sample: int | None, num_steps: int | None, *, bare: bool
) -> None:
    if policy is None:
        if rows_per_sample is not None or num_steps is not None:
            raise ValueError(
                f"rows_per_sample={rows_per_sample}, num_steps={num_steps} without a policy: they say how a policy is run"
            )
        return
    if not isinstance(policy, Policy):
        raise ValueError(f"policy={policy!r}, expected a Policy, for example deediff({policy!r})")
    if policy.made_for:
        raise ValueError(
            "the policy was calibrated for one pipeline and its settings, which are not looked at here: "
            "give it to the call of that pipeline (exit_policy=), or make it anew without made_for"
        )
    if bare and (rows_per_sample is None or num_steps is None):
        raise ValueError(
            f"a policy on a bare {type(transformer).__name__} needs rows_per_sample= (rows an image has in a forward) and num_steps=; "
            f"got {rows_per_sample} and {num_steps}"
        )
    for count in (rows_per_sample, num_steps):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(
                f"rows_per_sample={rows_per_sample!r}, num_steps={num_steps!r}, expected whole numbers, at least 1"
            )


def detach_exits(target: Target) -> None:
    """Remove what `attach_exits` did.

    Raises:
        ValueError: nothing is attached.
    """
    hook_of(target).detach()


def exit_summary(target: Target) -> str:
    """What is attached to a pipeline or transformer, and what its last run executed.

    Raises:
        ValueError: nothing is attached.
    """
    return hook_of(target).summary()


def hook_of(target: Target) -> TransformerHook:
    """The attachment on a pipeline's transformer or on a transformer.

    Raises:
        ValueError: nothing is attached.
    """
    transformer = transformer_of(target)
    if "_ee_hook" not in transformer.__dict__:
        raise ValueError(f"no exits are attached to this {type(transformer).__name__}")
    return transformer.__dict__["_ee_hook"]


def transformer_of(target: Target) -> nn.Module:
    """A pipeline's component `transformer`, or the transformer itself; out of what `torch.compile` made of it.

    Raises:
        ValueError: a pipeline without one, or something else.
    """
    return unwrapped(_held(target))


def _held(target: Target) -> nn.Module:
    if isinstance(target, nn.Module):
        return target
    found = target.components.get("transformer") if isinstance(target, DiffusionPipeline | ModularPipeline) else None
    if found is None:
        raise ValueError(
            f"{type(target).__name__} has no transformer; expected a diffusers transformer or a pipeline with one"
        )
    return found
