"""A forward of a pipeline's transformer on noise, and its ideal time, from those of its parts. Not here: what is compared (latency.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.hooks.transformer_hook import TransformerHook
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.metrics.timing import Places, executed_counts, ideal_seconds, medians, time_table

TIME = 500


class Forward:
    """One forward of the transformer on noise, with or without a policy."""

    def __init__(self, pipeline: EarlyExitPipeline, rows: int, seed: int):
        config, generator = pipeline.transformer.config, torch.Generator().manual_seed(seed)
        shape = (rows, config.in_channels, config.sample_size, config.sample_size)
        self.transformer = pipeline.transformer
        self.sample = torch.randn(shape, generator=generator).to(self.transformer.device, self.transformer.dtype)
        self.times = torch.tensor(TIME, device=self.transformer.device).expand(rows)  # as a pipeline gives it
        labels = torch.randint(config.num_classes, (rows,), generator=generator) if config.num_classes else None
        self.labels = labels if labels is None else labels.to(self.transformer.device)

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.transformer(self.sample, self.times, self.labels).sample

    def under(self, attachment: TransformerHook, policy: Policy, steps: int = 1) -> Trace:
        session = attachment.start(policy, rows=torch.arange(len(self.sample)), num_steps=steps)
        for index in range(steps):
            with attachment.use(session.step(index, TIME)):
                self()
        return session.trace()

    def plain(self, steps: int) -> None:
        for _ in range(steps):
            self()


class Ideal:
    """Ideal time of one forward's trace, from the median times of the parts that it executed at their numbers of rows.

    Called, it times every part once in its place, within whole forwards of the plain model on so many rows: a candidate that takes turns
    with the runs it explains.
    """

    def __init__(self, pipeline: EarlyExitPipeline, trace: Trace, forward: Forward):
        self.pipeline, self.transformer = pipeline, pipeline.transformer
        self.exits = pipeline.exits.packed()  # as in a run
        self.blocks = {f"block {layer}": block for layer, block in enumerate(self.transformer.transformer_blocks)}
        self.executed, rows = executed_counts(trace), len(forward.sample)
        through = int((trace.depths[0] == trace.planned.shape[1]).sum())
        self.executed.update({("embed", rows): 1} | ({("tail", through): 1} if through else {}))
        self.at = {count: self._places(count) for count in sorted({count for _, count in self.executed})}
        self.rounds: list[dict[int, dict[str, float]]] = []

    def __call__(self) -> None:
        self.rounds.append({count: places.round(forward) for count, (places, forward) in self.at.items()})

    def in_place(self, *, skip: int) -> float:
        """Seconds, from the rounds so far but the first `skip`."""
        counted = self.rounds[skip:]
        table = {
            (part, count): seconds
            for count in self.at
            for part, seconds in medians([one[count] for one in counted]).items()
        }
        return ideal_seconds(self.executed, table, 0.0)

    def alone(self, *, repeats: int) -> float:
        """Seconds, every part in a loop of its own, with its weights in the caches: what the parts would take in no model."""
        table = time_table(self._prepare(), self.executed, repeats=repeats, warmup=1)
        return ideal_seconds(self.executed, table, 0.0)

    def _places(self, rows: int) -> tuple[Places, Forward]:
        """Every part on so many rows."""
        forward, after = Forward(self.pipeline, rows, 0), {}
        context = self.exits.context(forward.times)
        for exit, depth in enumerate(self.exits.depths):
            for name, call in (("score", self.exits.confidence), ("head", self.exits.answer)):
                run = quiet(lambda hidden, call=call, exit=exit: call(exit, hidden, context))
                after[f"{name} {exit}"] = (f"block {depth - 1}", run)
        return Places(self.blocks, after, before="embed", behind="tail", device=forward.sample.device), forward

    def _prepare(self) -> dict[str, Callable[[int], Callable[[], object]]]:
        """Every part by itself: (part, rows) -> a call that runs it on noise."""
        parts = {name: partial(self._block, block) for name, block in self.blocks.items()}
        for exit in range(len(self.exits.depths)):
            parts[f"score {exit}"] = partial(self._head, self.exits.confidence, exit)
            parts[f"head {exit}"] = partial(self._head, self.exits.answer, exit)
        parts["tail"] = lambda rows: partial(quiet(self.transformer.tail), self._hidden(rows))
        return parts | {"embed": self._embed}

    def _block(self, block: nn.Module, rows: int) -> Callable[[], object]:
        return partial(quiet(block), *[self._hidden(rows)] * (1 if block.skip_linear is None else 2))

    def _head(self, head: Callable, exit: int, rows: int) -> Callable[[], object]:
        context = self.exits.context(Forward(self.pipeline, rows, 0).times)
        return partial(quiet(head), exit, self._hidden(rows), context)

    def _embed(self, rows: int) -> Callable[[], object]:
        forward = Forward(self.pipeline, rows, 0)
        return partial(quiet(self.transformer.embed), forward.sample, forward.times, forward.labels)

    def _hidden(self, rows: int) -> Tensor:
        tokens = self.transformer.pos_embed
        return torch.empty(rows, *tokens.shape[1:], dtype=tokens.dtype, device=tokens.device).normal_()


def quiet(call: Callable) -> Callable[..., object]:
    """The call without gradients."""

    def run(*arguments) -> object:
        with torch.no_grad():
            return call(*arguments)

    return run
