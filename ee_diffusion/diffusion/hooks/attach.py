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

from ee_diffusion.core.distributed import Vote
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.hooks.block_runner import layers_of
from ee_diffusion.diffusion.hooks.compatibility import require_attachable
from ee_diffusion.diffusion.hooks.compile import compiler_for, is_compiled, unwrapped
from ee_diffusion.diffusion.hooks.in_use import OneCall
from ee_diffusion.diffusion.hooks.other_work import Counted
from ee_diffusion.diffusion.hooks.parallel import require_parallel, vote_of
from ee_diffusion.diffusion.hooks.run_tracker import Runs
from ee_diffusion.diffusion.hooks.transformer_hook import Attachment
from ee_diffusion.diffusion.model_specs import blocks_of, family_of
from ee_diffusion.diffusion.protocols import DenoiserHeads, ScheduledHeads
from ee_diffusion.diffusion.step_cache.run_setup import Watch, is_fitted

Target = nn.Module | DiffusionPipeline | ModularPipeline
_ATTACHING = threading.Lock()  # one looks whether exits are there and puts its own on before the next one looks


def attach(
    target: Target,
    heads: DenoiserHeads,
    policy: Policy | None = None,
    *,
    branches: int | None = None,
    num_steps: int | None = None,
    compile_options: Mapping[str, Any] | None = None,
    vote: Vote | None = None,
) -> Attachment:
    """Attach exits to a diffusers transformer, or to the transformer of a pipeline.

    With a policy, calls of the pipeline run with exits from now on, without further code; `summary(pipe)` tells what happened. On a bare
    transformer (in a loop of one's own) and on a modular pipeline, whose transformer is as good as bare, say `branches` and `num_steps`.

    Args:
        policy: when to stop; None: only forwards inside `Attachment.use(step)` run with exits.
        branches: rows an image has in a forward (2: guidance in one batch). Default: read from the pipeline's call.
        num_steps: forwards of a run. Default: read from the pipeline's scheduler.
        compile_options: run compiled, with these options of `torch.compile` ({}: its own), see `compiled.Compiler`. Default: compiled if
            the transformer was (by `torch.compile`, `.compile()`, or its blocks alone).
        vote: the ranks that run this transformer together, each on a part of its tokens or weights; they decide together then. Default:
            those of its parallel config, if diffusers split it. Ranks that each generate images of their own need none.

    Raises:
        ValueError: an unknown class of model or block, an attachment already there, heads of another model (depth or width) or noise
            schedule, a diffusers cache that is active, blocks managed by FSDP, a policy on a bare transformer without `branches` and
            `num_steps`, exits that cannot run on a part of the tokens, arguments of another kind.
    """
    wrapper = _held(target)
    transformer = unwrapped(wrapper)
    family = family_of(transformer)
    if not isinstance(heads, DenoiserHeads):
        raise ValueError(
            f"heads={heads!r}, expected exits such as AdapterExits.for_transformer(transformer, depths, rank=...)"
        )
    if not isinstance(vote, Vote | None):
        raise ValueError(f"vote={vote!r}, expected Vote(group)")
    pipeline = target if isinstance(target, DiffusionPipeline) else None
    _require_free(transformer)
    _check_arguments(transformer, policy, branches, num_steps, bare=pipeline is None)
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
    vote = vote_of(transformer) if vote is None else vote
    held = None if wrapper is transformer else wrapper
    with _ATTACHING:
        _require_free(transformer)
        attachment = Attachment(transformer, heads, family, compiler=compiler, wrapper=held, vote=vote)
        if policy is not None:
            said = {"pipeline": pipeline, "branches": branches, "num_steps": num_steps, "renew": attachment.renew}
            begins = functools.partial(_run_begins, attachment, pipeline)
            runs = Runs(policy, attachment.start, transformer, family, **said, begins=begins)
            counted = Counted(transformer, pipeline)
            attachment.watch = Watch(pipeline, heads) if pipeline is not None and is_fitted(heads) else None
            attachment.run_under(
                runs, counted, None if pipeline is None else OneCall(pipeline, attachment.require_not_compiled_since)
            )
        transformer.__dict__["_ee_attachment"] = attachment
    return attachment


def _require_free(transformer: nn.Module) -> None:
    """Raises ValueError if exits are attached."""
    attachment = transformer.__dict__.get("_ee_attachment")
    if attachment is None:
        return
    kind = type(transformer).__name__
    if attachment.thread == threading.get_ident():
        raise ValueError(f"exits are attached to this {kind} already; detach first")
    raise ValueError(
        f"this {kind} is in use: another thread attached exits to it (a pipeline with exits inside does so in each call); "
        "make one call at a time, detach there, or give each thread a pipeline and a transformer of its own"
    )


def _run_begins(attachment: Attachment, pipeline: DiffusionPipeline | None, num_steps: int) -> None:
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
    transformer: nn.Module, policy: Policy | None, branches: int | None, num_steps: int | None, *, bare: bool
) -> None:
    if policy is None:
        if branches is not None or num_steps is not None:
            raise ValueError(
                f"branches={branches}, num_steps={num_steps} without a policy: they say how a policy is run"
            )
        return
    if not isinstance(policy, Policy):
        raise ValueError(f"policy={policy!r}, expected a Policy, for example deediff({policy!r})")
    if policy.made_for:
        raise ValueError(
            "the policy was calibrated for one pipeline and its settings, which are not looked at here: "
            "give it to the call of that pipeline (exit_policy=), or make it anew without made_for"
        )
    if bare and (branches is None or num_steps is None):
        raise ValueError(
            f"a policy on a bare {type(transformer).__name__} needs branches= (rows an image has in a forward) and num_steps=; "
            f"got {branches} and {num_steps}"
        )
    for count in (branches, num_steps):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"branches={branches!r}, num_steps={num_steps!r}, expected whole numbers, at least 1")


def detach(target: Target) -> None:
    """Remove what `attach` did.

    Raises:
        ValueError: nothing is attached.
    """
    attachment_of(target).detach()


def summary(target: Target) -> str:
    """What is attached to a pipeline or transformer, and what its last run executed.

    Raises:
        ValueError: nothing is attached.
    """
    return attachment_of(target).summary()


def attachment_of(target: Target) -> Attachment:
    """The attachment on a pipeline's transformer or on a transformer.

    Raises:
        ValueError: nothing is attached.
    """
    transformer = transformer_of(target)
    if "_ee_attachment" not in transformer.__dict__:
        raise ValueError(f"no exits are attached to this {type(transformer).__name__}")
    return transformer.__dict__["_ee_attachment"]


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
