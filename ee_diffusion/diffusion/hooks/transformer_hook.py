"""TransformerHook: exits on one transformer. Its blocks run on the rows that are still going; no forward is copied.

Here: the driver of step sessions. Not here: the user's interface (attach.py), facts about classes (model_specs.py), rows on their way
(block_runner.py), the heads of a session (session_heads.py), which forwards of a stock pipeline make a run (run_tracker.py), decisions
(core). R rows of the batch, L layers.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from ee_diffusion.core.active_batch import ActiveBatch
from ee_diffusion.core.distributed import JointDecision
from ee_diffusion.core.patch import ForwardPatch, restore_all
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.session import Session, StepSession, begin
from ee_diffusion.core.trace import Report, Trace
from ee_diffusion.diffusion.hooks.block_runner import BlockRunner, layers_of, signature_of
from ee_diffusion.diffusion.hooks.compatibility import require_no_cache
from ee_diffusion.diffusion.hooks.compile import (
    Compiler,
    bucket,
    is_compiled,
    refuse_compiling_after_attaching,
    unwrapped,
)
from ee_diffusion.diffusion.hooks.gradient_checkpointing import blocks_called_directly, checkpoint_of
from ee_diffusion.diffusion.hooks.in_use import OneCall
from ee_diffusion.diffusion.hooks.other_work import Counted
from ee_diffusion.diffusion.hooks.run_tracker import RunTracker
from ee_diffusion.diffusion.hooks.session_heads import SessionHeads
from ee_diffusion.diffusion.model_specs import ModelSpec, blocks_of
from ee_diffusion.diffusion.protocols import DenoiserHeads
from ee_diffusion.diffusion.step_cache.run_setup import Watch
from ee_diffusion.diffusion.step_times import times_of

OF_OTHER_MODELS = frozenset(
    [
        "max_probability",
        "margin",
        "negative_entropy",
        "saturation",
        "learned_confidence",
        "agreement",
        "closeness",
        "pruned_probability",
    ]
)


class _Now(threading.local):
    """What a thread is doing: the step that its next forward runs under, and the forward that goes on."""

    step: StepSession | None = None
    passage: BlockRunner | None = None
    plain: str = ""  # why the forward that goes on runs without exits


class TransformerHook:
    """Exits on a transformer. With a policy, every forward runs with exits; without one, those inside `use(step)` do, and all others
    compute exactly what they did before. Each thread has its own step and forward.

    A context manager: leaving it detaches, unless that was done within. Made by `attach_exits`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        heads: DenoiserHeads,
        family: ModelSpec,
        *,
        compiler: Compiler | None = None,
        wrapper: nn.Module | None = None,
        joint_decision: JointDecision | None = None,
    ):
        """wrapper: what `torch.compile(transformer)` returned, if the caller holds that. vote: ranks that decide together."""
        self.transformer, self.heads, self.family, self.joint_decision = transformer, heads, family, joint_decision
        self.blocks = blocks_of(transformer)
        self.layers = layers_of(transformer, family)
        self.compiler, self._held = compiler, wrapper
        self.padded = 0  # rows x blocks that ran for no image
        self._runs: RunTracker | None = None
        self._latest: RunTracker | None = None  # in which the last forward ran
        self.counted: Counted | None = None  # with a policy: what the call does beside
        self.watch: Watch | None = None
        self.one_call: OneCall | None = None  # with a policy on a pipeline
        self._session_heads = SessionHeads(heads, self.blocks)
        self._now = _Now()
        self._uses = 0  # contexts of `use` that are open: a compiled forward guards on this, but not on what a thread keeps for itself
        self.thread = threading.get_ident()  # which attached them
        self._alone = threading.RLock()  # for forwards that replace more than we did: compiled or checkpointed ones
        self._signature = signature_of(type(transformer))
        self._interceptions = [
            ForwardPatch(block, functools.partial(self._block, layer)) for layer, block in enumerate(self.blocks)
        ]
        self._interceptions.append(ForwardPatch(getattr(transformer, family.tail), self._tail))
        self._interceptions.append(ForwardPatch(transformer, self._forward))
        if isinstance(transformer, CacheMixin):
            self._interceptions.append(ForwardPatch(transformer, self._enable_cache, name="enable_cache"))
        if wrapper is not None:
            self._interceptions.append(ForwardPatch(wrapper, self._wrapper))
        self._suspended = {
            module: call
            for module in (transformer, *self.blocks)
            if (call := module.__dict__.pop("_compiled_call_impl", None)) is not None
        }

    def start(
        self,
        policy: Policy,
        *,
        rows: Tensor,
        num_steps: int,
        samples: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Session:
        """Begin a generation: `session.begin` with this transformer's layers and exits; `device`: where it runs, default where its
        weights are. Raises ValueError as `session.begin` does, for a score of classes or tokens, which a denoiser has not, and for a cache
        of diffusers that was enabled since the exits were attached."""
        require_no_cache(self.transformer)
        score = getattr(policy.criterion, "score", None)
        if score in OF_OTHER_MODELS:
            raise ValueError(f"score {score!r} looks at logits or tokens, a denoiser has none: expected 'confidence'")
        return begin(
            policy,
            len(self.blocks),
            self.heads.depths,
            rows=rows,
            num_steps=num_steps,
            samples=samples,
            device=next(self.transformer.parameters()).device if device is None else device,
            keeps_exited_rows=self.family.keeps_exited_rows,
            joint_decision=self.joint_decision,
        )

    @contextmanager
    def use(self, step: StepSession) -> Iterator[None]:
        """One forward of the transformer inside this context runs under the step session, and closes it. Raises ValueError for else."""
        if not isinstance(step, StepSession):
            raise ValueError(f"use({step!r}), expected a step session: session.step(index, time)")
        self._now.step = step
        with self._alone:
            self._uses += 1
        try:
            yield
        finally:
            with self._alone:
                self._uses -= 1
            self._now.step, self._now.passage = None, None

    @property
    def runs(self) -> RunTracker | None:
        """This thread's; None without a policy."""
        return None if self._runs is None else self._runs.of_this_thread()

    def require_not_compiled_since(self, held: nn.Module) -> None:
        """Raises ValueError if the transformer that a pipeline holds was compiled after the exits were attached."""
        around = held is not self.transformer and unwrapped(held) is self.transformer and held is not self._held
        if around or is_compiled(self.transformer, self.blocks):
            refuse_compiling_after_attaching()

    def run_under(self, runs: RunTracker, counted: Counted, one_call: OneCall | None) -> None:
        """From now on every forward runs under a policy. Called by `attach_exits`."""
        self._runs = self._latest = runs
        self.counted, self.one_call = counted, one_call

    def detach(self) -> None:
        """Restore the transformer (and pipeline) as it was.

        Raises:
            ValueError: that was done already.
            RuntimeError: something replaced a forward after the exits were attached; they stay on then.
        """
        if not self._attached:
            raise ValueError(f"these exits were detached from their {type(self.transformer).__name__} already")
        for interception in self._interceptions:
            interception.require_outermost()
        for part in (self.one_call, self.watch, self.counted, self._runs):
            if part is not None:
                part.detach()
        restore_all(self._interceptions)
        self._interceptions = []
        for module, call in self._suspended.items():
            module._compiled_call_impl = call
        self._suspended = {}
        del self.transformer.__dict__["_ee_hook"]

    def renew(self) -> None:
        """Intercept again what something else has replaced meanwhile (offload hooks are renewed after every call of a pipeline)."""
        for interception in self._interceptions:
            interception.renew()

    @property
    def trace(self) -> Trace | None:
        """What happened in the run that goes on, or else in the last one; None before the first, or without a policy."""
        runs = self.runs
        if runs is None:
            return None
        if runs.trace is None and self._latest is not None:  # another thread's
            runs = self._latest
        return None if runs.trace is None else replace(runs.trace, beside=self.counted.seen(runs))

    @property
    def report(self) -> Report | None:
        """The trace in a few numbers."""
        return None if self.trace is None else self.trace.report()

    def summary(self) -> str:
        """What is attached to what, and the last run's report, for a person."""
        lists = " + ".join(str(len(getattr(self.transformer, name))) for name in self.family.lists)
        stopped = f"carried along ({self.family.keeps_exited_rows})" if self.family.keeps_exited_rows else "dropped"
        lines = [
            f"exits after {', '.join(map(str, self.heads.depths))} of {lists} blocks of {type(self.transformer).__name__}, "
            f"answers in space {self.heads.space!r}; rows that stop are {stopped}",
        ]
        if self._runs is None:
            lines.append("no policy: only forwards inside use(step) run with exits")
        else:
            if self.compiler is not None:
                lines.append(f"compiled; {self.padded} rows x blocks were padding since it was attached")
            lines.append(f"policy: {self._runs.policy}")
            lines.append("no run yet" if self.trace is None else self.trace.report().summary())
        return "\n".join(lines)

    def __enter__(self) -> TransformerHook:
        return self

    def __exit__(self, *exception) -> None:
        if self._attached:
            self.detach()

    @property
    def _attached(self) -> bool:
        return self.transformer.__dict__.get("_ee_hook") is self

    def _enable_cache(self, original, *args, **kwargs):
        raise ValueError(
            f"exits are attached to this {type(self.transformer).__name__}: a cache answers from earlier steps what exits decide anew; "
            "detach first"
        )

    def _forward(self, original, *args, **kwargs):
        """The transformer's forward: open a block runner, let the parent run, put the outputs of the exits back."""
        if torch.compiler.is_compiling() and (self._uses or self._runs is not None):
            refuse_compiling_after_attaching()
        now = self._now
        if now.step is None and (self._runs is None or not self._interceptions or now.passage is not None):
            with self._alone_if(self.compiler is not None and not torch.compiler.is_compiling()):
                return original(*args, **kwargs)  # no exits wanted, detached, or called again by a hook that wraps us
        arguments = self._signature.bind(self.transformer, *args, **kwargs).arguments
        reasons = [name for name in self.family.plain_if if arguments.get(name) is not None]
        if now.step is not None:
            if reasons:
                raise ValueError(f"a forward with {reasons[0]} runs without exits: call it outside of use(step)")
            return self._run(now.step, original, arguments, args, kwargs)
        if self.one_call is not None:
            self.one_call.enter()
        runs = self._latest = self.runs
        if reasons:
            with self._plain(reasons[0]):
                return original(*args, **kwargs)
        sample = arguments["hidden_states"]
        step = runs.step(
            arguments, times_of(self.family, arguments["timestep"], sample), shape=sample.shape, device=sample.device
        )
        with runs.forgotten_if_it_fails():
            try:
                return self._run(step, original, arguments, args, kwargs)
            finally:
                now.passage = None

    def _run(self, step: StepSession, original, arguments: dict[str, Any], args: tuple, kwargs: dict[str, Any]):
        if self._now.passage is not None:
            raise ValueError(
                "a second forward under one step session: begin a step for each forward of the transformer"
            )
        sample = arguments["hidden_states"]
        self._check(step, sample)
        timestep = times_of(self.family, arguments["timestep"], sample)  # (R,)
        if self._session_heads.caching and self._runs is not None:
            # the scheduler's own: the model's is rounded in half precision
            timestep = torch.full_like(timestep, step.time, dtype=torch.float32)
        heads = self._session_heads.of(step.session, sample)
        context = self._session_heads.context(heads, step, sample, timestep)
        if step.measures and self.family.image_tokens is not None:
            context["image_tokens"] = self.family.image_tokens(self.transformer, arguments)  # (R, N)
        output = self._through(step, original, (heads, arguments, context), args, kwargs)
        if self._session_heads.caching and not step.finished:
            model_output = output[0] if isinstance(output, tuple) else output.sample
            self._session_heads.append(step, sample, timestep, model_output)
        step.close()
        return output

    def _through(self, step: StepSession, original, given: tuple, args: tuple, kwargs: dict[str, Any]):
        """The forward with its exits: as one graph where that is compiled, else through a passage. given: heads, arguments, context."""
        heads, arguments, context = given
        checkpoint = checkpoint_of(self.transformer)
        if self.compiler is not None and self.compiler.takes(step) and checkpoint is None:
            places = self._interceptions[: len(self.blocks) + 1]
            given = {"given": (arguments, context), "call": (args, kwargs)}
            with self._alone:
                output, answer = self.compiler.whole(step, original, places, **given)
            return output if answer is None or self.heads.space == "hidden" else _with(output, lambda _: answer)
        padding = self.compiler is not None and (self.runs is None or not self.runs.perturbed)
        lane, rows_for = ActiveBatch(step, heads, context), bucket if padding else None
        passage = BlockRunner(lane, self.family, self.layers, arguments, rows_for=rows_for, checkpoint=checkpoint)
        self._now.passage = passage
        with self._alone_if(self.compiler is not None or checkpoint is not None):
            if checkpoint is None:
                output = original(*args, **kwargs)
            else:
                with blocks_called_directly(self.transformer, self.blocks):
                    output = original(*args, **kwargs)
            self.padded += passage.padded
        return _with(output, passage.answers) if self.heads.space == "output" else output

    @contextmanager
    def _plain(self, reason: str) -> Iterator[None]:
        """Within, a forward of a call runs without exits; it is counted."""
        if self.counted is not None:
            self._now.plain = reason
            self.counted.forward(self.runs, reason)
        try:
            yield
        finally:
            self._now.plain = ""

    def _alone_if(self, needed: bool) -> AbstractContextManager[Any]:
        """Where it is needed, other threads' forwards of this kind wait."""
        return self._alone if needed else nullcontext()

    def _check(self, step: StepSession, sample: Tensor) -> None:
        expected = len(step.session.rows)
        if len(sample) != expected:
            raise ValueError(f"the transformer got {len(sample)} rows, the session was started for {expected}")
        if step.session.num_layers != len(self.blocks):
            raise ValueError(f"a session for {step.session.num_layers} blocks, the transformer has {len(self.blocks)}")
        step.session.require_open(step)

    def _wrapper(self, original, *args, **kwargs):
        """What `torch.compile` returned is called: exits are on the module inside; without exits, as compiled as ever."""
        idle = self._now.step is None and self._runs is None
        return original(*args, **kwargs) if idle else self.transformer(*args, **kwargs)

    def _block(self, layer: int, original, *args, **kwargs):
        passage = self._now.passage
        if passage is None:
            if self._now.plain:
                self.counted.block(
                    self.runs, self._now.plain, len(args[0] if args else kwargs[self.layers[layer].names[0]])
                )
            return original(*args, **kwargs)
        if torch.compiler.is_compiling():
            refuse_compiling_after_attaching()
        if self.compiler is not None:
            original = self.compiler.block(layer, original)
        return passage.block(layer, original, args, kwargs)

    def _tail(self, original, hidden: Tensor, *args, **kwargs):
        passage = self._now.passage
        if passage is not None:
            hidden = passage.to_tail(hidden)
        return original(hidden, *args, **kwargs)


def _with(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A forward's output with another sample."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    output.sample = change(output.sample)
    return output
