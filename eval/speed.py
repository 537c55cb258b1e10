"""The clock of one forward: overhead of exits that are attached but off, or on but never taken; and realised over ideal time.

python eval/speed.py --output_dir runs/speed

Overhead: the plain model, the model with exits attached but off, and on with a threshold that no score can pass (every uncertainty
module and every sync runs) take turns; ratios of pairwise medians. Realised over ideal: rows of one batch leave at different exits, by
their own learned scores, at thresholds set so that the mean depth is the one asked for. Ideal = fixed part (embedding, tail) + for every
executed block its own median time at its number of rows + uncertainty modules and heads at theirs. Inputs are noise: time does not depend
on content. And the cost of a training step (bfloat16 autocast, AdamW) with all exits over the same backbone without.
Writes speed.json and speed.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median

import torch
from options import SamplingOptions, flag, load, parse, results_folder
from torch import Tensor

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.attach import attach
from ee_diffusion.diffusion.attachment import Attachment
from ee_diffusion.diffusion.generation import sampler
from ee_diffusion.diffusion.objective import DiffusionObjective
from ee_diffusion.diffusion.pipeline import EarlyExitPipeline
from ee_diffusion.measure.clocks import executed_counts, ideal_seconds, interleaved, time_table
from ee_diffusion.measure.tables import environment, markdown_table, write_json, write_text

TIME = 500


@dataclass(frozen=True)
class SpeedOptions:
    """How long to look."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 64], metadata={"help": "Rows per forward."})
    mean_depths: list[float] = field(default_factory=lambda: [0.75, 0.4], metadata={"help": "Fractions of the blocks."})
    repeats: int = flag("Counted runs of each candidate.", 9)
    steps: int = flag("Forwards of a run, under one session: what a generation does once is shared among them.", 10)
    pool: int = flag("Rows from which thresholds are set.", 256)
    training_batch: int = flag("Samples of a training step.", 64)


class Forward:
    """One forward of the transformer on noise, with or without a policy."""

    def __init__(self, pipeline: EarlyExitPipeline, rows: int, seed: int):
        config, generator = pipeline.transformer.config, torch.Generator().manual_seed(seed)
        shape = (rows, config.in_channels, config.sample_size, config.sample_size)
        self.transformer = pipeline.transformer
        self.sample = torch.randn(shape, generator=generator).to(self.transformer.device, self.transformer.dtype)
        self.times = torch.full((rows,), TIME, device=self.transformer.device)
        labels = torch.randint(config.num_classes, (rows,), generator=generator) if config.num_classes else None
        self.labels = labels if labels is None else labels.to(self.transformer.device)

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.transformer(self.sample, self.times, self.labels).sample

    def under(self, attachment: Attachment, policy: Policy, steps: int = 1) -> Trace:
        session = attachment.start(policy, rows=torch.arange(len(self.sample)), num_steps=steps)
        for index in range(steps):
            with attachment.use(session.step(index, TIME)):
                self()
        return session.trace()

    def plain(self, steps: int) -> None:
        for _ in range(steps):
            self()


def overhead(pipeline: EarlyExitPipeline, rows: int, options: SpeedOptions, seed: int) -> dict:
    """Median of pairwise ratios to the plain model: attached but off, on but never exiting; a run of `options.steps` forwards each."""
    forward, never, steps = Forward(pipeline, rows, seed), Policy(Threshold(1.0)), options.steps

    def attached_off() -> None:
        with attach(pipeline.transformer, pipeline.exits):
            forward.plain(steps)

    def never_exits() -> None:
        with attach(pipeline.transformer, pipeline.exits) as attachment:
            forward.under(attachment, never, steps)

    candidates: dict[str, Callable[[], object]] = {
        "plain": lambda: forward.plain(steps),
        "off": attached_off,
        "never": never_exits,
    }
    timings = interleaved(candidates, repeats=options.repeats, warmup=2)
    ratios = {name: timings[name].ratio(timings["plain"]) for name in ("off", "never")}
    return {"batch": rows, "plain_ms": 1e3 * timings["plain"].median / steps, **ratios}


def thresholds_for(trace: Trace, fraction: float) -> tuple[float, ...]:
    """One threshold per exit, so that the same share of the remaining rows leaves at each exit and the mean depth is as asked."""
    scores, depths, num_layers = trace.scores[0], trace.exits.tolist(), trace.planned.shape[1]

    def tried(share: float) -> tuple[float, tuple[float, ...]]:
        alive, found, total = torch.ones(scores.shape[1], dtype=torch.bool), [], 0.0
        for exit, depth in enumerate(depths):
            found.append(float(scores[exit][alive].quantile(1 - share)) if alive.any() else 1.0)
            leaves = alive & (scores[exit] > found[-1])
            total += depth * int(leaves.sum())
            alive &= ~leaves
        return (total + num_layers * int(alive.sum())) / scores.shape[1] / num_layers, tuple(found)

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if tried(middle)[0] > fraction else (low, middle)
    return tried(low)[1]


class Ideal:
    """Ideal time of a forward from the median times of its parts, each measured once at each number of rows."""

    def __init__(self, pipeline: EarlyExitPipeline, repeats: int):
        self.transformer, self.exits, self.repeats = (
            pipeline.transformer,
            pipeline.exits.packed(),
            repeats,
        )  # as in a run
        self.table: dict[tuple[str, int], float] = {}
        self.parts = {f"block {layer}": self._block(layer) for layer in range(len(self.transformer.transformer_blocks))}
        for exit in range(len(self.exits.depths)):
            self.parts[f"score {exit}"] = self._head(self.exits.certainty, exit)
            self.parts[f"head {exit}"] = self._head(self.exits.answer, exit)
        self.parts["tail"] = lambda rows: quiet(self.transformer.tail, self._hidden(rows))

    def seconds(self, trace: Trace, forward: Forward) -> float:
        executed, rows = executed_counts(trace), len(forward.sample)
        through = int((trace.depths[0] == trace.planned.shape[1]).sum())
        executed.update({("embed", rows): 1} | ({("tail", through): 1} if through else {}))
        parts = self.parts | {
            "embed": lambda _: quiet(self.transformer.embed, forward.sample, forward.times, forward.labels)
        }
        self.table = time_table(parts, executed, repeats=self.repeats, warmup=2, known=self.table)
        return ideal_seconds(executed, self.table, 0.0)

    def _block(self, layer: int) -> Callable[[int], Callable[[], object]]:
        block = self.transformer.transformer_blocks[layer]
        inputs = 1 if block.skip_linear is None else 2
        return lambda rows: quiet(block, *[self._hidden(rows)] * inputs)

    def _head(self, head: Callable, exit: int) -> Callable[[int], Callable[[], object]]:
        return lambda rows: quiet(head, exit, self._hidden(rows), self.exits.context(torch.full((rows,), TIME)))

    def _hidden(self, rows: int) -> Tensor:
        tokens = self.transformer.pos_embed
        return torch.empty(rows, *tokens.shape[1:], dtype=tokens.dtype, device=tokens.device).normal_()


def quiet(call: Callable, *arguments) -> Callable[[], object]:
    """The call with its arguments, without gradients."""

    def run() -> object:
        with torch.no_grad():
            return call(*arguments)

    return run


def realised(
    pipeline: EarlyExitPipeline, rows: int, fraction: float, options: SpeedOptions, *, ideal: Ideal, seed: int
) -> dict:
    """Ideal over measured time at a mean depth, over several batches whose rows leave at different exits."""
    steps, plain, taken, best, traces = options.steps, [], [], [], []
    with attach(pipeline.transformer, pipeline.exits) as attachment:
        recorded = Forward(pipeline, options.pool, seed + 1).under(attachment, Policy(Threshold(1.0), record_all=True))
    policy = Policy(Threshold(thresholds_for(recorded, fraction)))
    for batch in range(16 if rows == 1 else 2):
        forward = Forward(pipeline, rows, seed + 2 + batch)

        def exiting(forward: Forward = forward) -> None:
            with attach(pipeline.transformer, pipeline.exits) as attachment:
                forward.under(attachment, policy, steps)

        candidates = {"plain": lambda forward=forward: forward.plain(steps), "exiting": exiting}
        timings = interleaved(candidates, repeats=max(3, options.repeats // 3), warmup=1)
        with attach(pipeline.transformer, pipeline.exits) as attachment:
            traces.append(forward.under(attachment, policy))
        plain.append(timings["plain"].median / steps)
        taken.append(timings["exiting"].median / steps)
        best.append(ideal.seconds(traces[-1], forward))
    depths = torch.cat([trace.depths[0] for trace in traces]).float()
    return {
        "batch": rows,
        "asked": fraction,
        "mean_depth": float(depths.mean()) / traces[0].planned.shape[1],
        "distinct_depths_per_batch": median(len(trace.depths[0].unique()) for trace in traces),
        "measured_ms": 1e3 * sum(taken) / len(taken),
        "ideal_ms": 1e3 * sum(best) / len(best),
        "realised_over_ideal": sum(best) / sum(taken),
        "time_over_plain": sum(taken) / sum(plain),
    }


def training_step(pipeline: EarlyExitPipeline, mode: str, batch: dict[str, Tensor]) -> Callable[[], object]:
    """One optimiser step of a copy of the model, with or without exits."""
    transformer = copy.deepcopy(pipeline.transformer).float().train()
    exits = None if mode == "backbone" else copy.deepcopy(pipeline.exits).float().train()
    class_drop = 0.1 if transformer.config.null_class is not None else 0.0
    noise = sampler("ddpm", like=pipeline.scheduler)
    objective = DiffusionObjective(transformer, exits, noise, mode=mode, class_drop=class_drop)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-6, fused=True)
    device = transformer.device.type

    def run() -> object:
        with torch.autocast(device, torch.bfloat16):
            loss = objective(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return run


def training_cost(pipeline: EarlyExitPipeline, options: SpeedOptions, seed: int) -> dict:
    """Median of pairwise ratios of a step with exits to one without."""
    forward, rows = Forward(pipeline, options.training_batch, seed), options.training_batch
    uniform = torch.linspace(0, 0.999, rows, device=forward.sample.device)
    images = forward.sample.float()
    batch = {"images": images, "noise": images.flip(0), "uniform": uniform, "label_drop": uniform.flip(0)}
    batch |= {} if forward.labels is None else {"class_labels": forward.labels}
    steps = {mode: training_step(pipeline, mode, batch) for mode in ("backbone", "joint")}
    timings = interleaved(steps, repeats=options.repeats, warmup=2)
    found = {"batch": rows, "backbone_ms": 1e3 * timings["backbone"].median, "joint_ms": 1e3 * timings["joint"].median}
    return found | {"joint_over_backbone": timings["joint"].ratio(timings["backbone"])}


def main() -> None:
    sampling, options = parse(SamplingOptions, SpeedOptions, description=__doc__)
    folder, pipeline = results_folder(sampling), load(sampling)
    ideal = Ideal(pipeline, options.repeats)
    overheads = [overhead(pipeline, rows, options, sampling.seed) for rows in options.batch_sizes]
    gains = [
        realised(pipeline, rows, fraction, options, ideal=ideal, seed=sampling.seed)
        for rows in options.batch_sizes
        for fraction in options.mean_depths
    ]
    cost = training_cost(pipeline, options, sampling.seed)
    facts = {"settings": asdict(sampling) | asdict(options), "environment": environment()}
    write_json(folder / "speed.json", facts | {"overhead": overheads, "realised": gains, "training": cost})
    text = "\n".join(markdown_table(part) for part in (overheads, gains, [cost]))
    write_text(folder / "speed.md", text)
    print(text)


if __name__ == "__main__":
    main()
