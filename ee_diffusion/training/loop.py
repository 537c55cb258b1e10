"""The one training loop: it minimizes `objective(batch)["loss"]` for any `nn.Module` and any Source, and resumes exactly.

Here: when to step, log, checkpoint, validate, export, stop. Not here: models and losses (an objective), weights (learner.py), data.
A step's data and draws depend on (seed, step) alone; the global generator, for dropout and the like, is reseeded by (seed, step, rank).
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers.optimization import SchedulerType
from torch import Tensor, nn
from tqdm.auto import tqdm

from ee_diffusion.training import checkpointing as checkpoints
from ee_diffusion.training.config import TrainConfig
from ee_diffusion.training.datasets import Source
from ee_diffusion.training.learner import Learner
from ee_diffusion.training.logging import Clock, Journal
from ee_diffusion.training.order import Order
from ee_diffusion.training.rng import Stream, sample_keys, scalar_key

Batch = dict[str, Tensor]

logger = get_logger(__name__)
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
STEPS_BETWEEN_VOTES = 10


@dataclass(frozen=True)
class TrainReport:
    """What a run did. All but `resumed_from` count the whole run, parts before a resume included; `seconds` are of training steps
    alone (no checkpoints, no validation); `losses` are the means of the last log line."""

    finished: bool
    steps: int
    samples: int
    seconds: float
    samples_per_second: float
    resumed_from: int | None
    trainable_parameters: int
    losses: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains `objective` on `source` as `config` says.

    Args:
        objective: `objective(batch) -> dict` of scalars; "loss" is minimized and must be a mean over the batch (see `units`), the
            others are logged. Only its parameters with `requires_grad` train; all of its state goes into checkpoints.
        save: `save(directory, objective)` writes the result (averaged weights applied) into an empty directory; each entry it
            wrote is then moved into `output_dir`, whole. Main process only. A stopped run exports too.
        validate: `validate(step, objective)`, every `validation_steps`, in eval mode with averaged weights. Main process only.
        units: `units(batch) -> (U,)`, for an objective whose means are over something that batches hold different numbers of (tokens).
            It then gets `batch["units"]` (U,) float64, the mean of these numbers over all parts of a step (ranks and micro-steps), and
            divides its sums by that: the mean over the parts is the mean over all units of the step. None: over samples. So a run may be
            resumed with another split of the same global batch (docs/architecture.md has what a split changes).
        identity: further facts (JSON values) that a checkpoint must share with the run that resumes from it.

    Raises:
        ValueError: no output_dir, an empty source, nothing to train, an unknown scheduler or tracker, an unsupported distribution.
    """

    def __init__(
        self,
        objective: nn.Module,
        source: Source,
        config: TrainConfig,
        *,
        save: Callable[[Path, nn.Module], None],
        validate: Callable[[int, nn.Module], None] | None = None,
        units: Callable[[Batch], Tensor] | None = None,
        identity: dict | None = None,
    ):
        _check(objective, source, config, validate)
        self.source, self.config, self.save, self.validate, self.units = source, config, save, validate, units
        self.directory = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(str(self.directory), str(self.directory / config.logging_dir)),
        )
        if self.accelerator.distributed_type not in SUPPORTED:
            came, expected = self.accelerator.distributed_type.value, [kind.value for kind in SUPPORTED]
            raise ValueError(f"distributed type {came}, expected one of {expected}")
        if (slow := slow_in_bfloat16(config, self.accelerator.device)) and self.accelerator.is_main_process:
            logger.warning(slow)
        self.order = Order(
            len(source),
            config.seed,
            config.train_batch_size,
            ranks=self.accelerator.num_processes,
            micro_steps=config.gradient_accumulation_steps,
        )
        self.learner = Learner(objective, config, self.accelerator)
        self.identity = config.maths() | self._identity() | (identity or {})
        self.clock = Clock()
        self.journal = Journal(self.directory, self.accelerator, self.clock, samples_per_step=self.order.global_batch)

    def fit(self) -> TrainReport:
        """Train to `max_train_steps` or until the time is up, checkpoint, export, and report what happened.

        Raises:
            ValueError: a checkpoint that does not fit, or an output_dir that holds another run's.
            FloatingPointError: the loss is not finite.
        """
        config, started = self.config, time.monotonic()
        first, line = self._start()
        done, stop = first, False
        bar = self._progress_bar(first)
        while done < config.max_train_steps and not stop:
            self._step(done)
            done += 1
            bar.update()
            stop = self._time_is_up(done, started)
            checkpoint = stop or done == config.max_train_steps or done % config.checkpointing_steps == 0
            if checkpoint or done % config.logging_steps == 0:
                line = self.journal.write(done, self.learner.learning_rate)
                rate = f"{line['samples_per_second']:.0f}/s"
                bar.set_postfix(loss=f"{line['loss']:.4f}", rate=rate, refresh=False)
            if checkpoint:
                self._checkpoint(done, line)
            if config.validation_steps and done % config.validation_steps == 0:
                with self._main_alone(), self.learner.averaged() as objective:
                    self._on_main(lambda objective=objective, done=done: self.validate(done, objective))
        bar.close()
        with self._main_alone(), self.learner.averaged() as objective:
            self._on_main(lambda: checkpoints.write_entries(self.directory, lambda to: self.save(to, objective)))
        self.accelerator.end_training()
        return self._report(first, done, line)

    def _identity(self) -> dict:
        objective = self.learner.objective
        shapes = [(name, tuple(value.shape)) for name, value in objective.state_dict().items()]
        trained = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
        model = f"{type(objective).__name__}-{hashlib.sha256(repr((shapes, trained)).encode()).hexdigest()[:16]}"
        return {"global_batch": self.order.global_batch, "data": self.source.fingerprint(), "model": model}

    def _start(self) -> tuple[int, dict]:
        """Clean up, resume if asked to; returns (the step to continue from, the last log line before it)."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            self.directory.mkdir(parents=True, exist_ok=True)
            for name in checkpoints.clean(self.directory):
                print(f"cleaned up {name}, left by a killed run")
        accelerator.wait_for_everyone()
        path, state, run, damaged = checkpoints.resume(self.directory, config.resume_from_checkpoint, self.identity)
        step, line, seconds = 0, {}, 0.0
        if path is not None:
            if damaged:
                accelerator.print(f"going on from {path.name}: {'; '.join(damaged)}")
            step, line, seconds = run["step"], run["line"], run["seconds"]
            if step > config.max_train_steps:
                raise ValueError(f"{path} is at step {step}, beyond max_train_steps={config.max_train_steps}")
            self.learner.load_state(state)
            self._on_main(lambda: checkpoints.prune(self.directory, config.checkpoints_total_limit, spare=path))
        elif config.resume_from_checkpoint:
            accelerator.print(f"no checkpoint in {self.directory} yet: starting at step 0")
        accelerator.init_trackers("ee_diffusion", {name: str(value) for name, value in asdict(config).items()})
        self.clock.set(seconds)
        self.journal.begin(step)
        return step, line

    def _step(self, step: int) -> None:
        """One optimizer step on the global batch number `step`."""
        seed, rank, micro_steps = self.config.seed, self.accelerator.process_index, self.order.micro_steps
        torch.manual_seed(scalar_key(seed, Stream.STEP, step * self.order.ranks + rank))
        batches: Iterable[Batch] = (self._batch(step, micro_step) for micro_step in range(micro_steps))
        if self.units is not None:
            batches = self._with_units(list(batches), self.units)
        for micro_step, batch in enumerate(batches):
            self.journal.add(self.learner.accumulate(batch, last=micro_step + 1 == micro_steps))
        self.learner.update()

    def _batch(self, step: int, micro_step: int) -> Batch:
        """This rank's samples of a micro-step."""
        positions = self.order.positions(step, micro_step, self.accelerator.process_index)  # (B,)
        keys = sample_keys(positions, self.config.seed).to(self.accelerator.device)
        return self.source.batch(self.order.indices(positions), keys)

    def _with_units(self, batches: list[Batch], units: Callable[[Batch], Tensor]) -> list[Batch]:
        """The batches of a step, with the mean number of units of its parts."""
        mine = torch.stack([units(batch) for batch in batches]).sum(0)  # (U,)
        mean = self.accelerator.reduce(mine, reduction="sum").double() / (len(batches) * self.order.ranks)
        return [batch | {"units": mean} for batch in batches]

    def _time_is_up(self, done: int, started: float) -> bool:
        """Whether `max_train_minutes` have passed; ranks decide together, every few steps, so that they stop at the same one."""
        if self.config.max_train_minutes is None:
            return False
        over = time.monotonic() - started >= 60 * self.config.max_train_minutes
        if self.order.ranks == 1:
            return over
        if done % STEPS_BETWEEN_VOTES:
            return False
        joint_decision = torch.tensor(float(over), device=self.accelerator.device)
        return bool(self.accelerator.reduce(joint_decision, reduction="sum").item() > 0)

    def _checkpoint(self, step: int, line: dict) -> None:
        with self._main_alone():
            run = {
                "identity": self.identity,
                "config": asdict(self.config),
                "line": line,
                "seconds": self.clock.seconds(),
            }
            keep, state = self.config.checkpoints_total_limit, self.learner.state()
            self._on_main(lambda: checkpoints.save_checkpoint(self.directory, step, state, run=run, keep=keep))

    @contextlib.contextmanager
    def _main_alone(self) -> Iterator[None]:
        """The clock stands, and the other ranks wait at the end."""
        self.clock.pause()
        yield
        self.accelerator.wait_for_everyone()
        self.clock.resume()

    def _on_main(self, action: Callable[[], object]) -> None:
        if self.accelerator.is_main_process:
            action()

    def _progress_bar(self, first: int) -> tqdm:
        quiet = not self.accelerator.is_main_process
        pause = 0.5 if sys.stderr.isatty() else 60.0  # seconds; in a file each refresh is a line
        return tqdm(initial=first, total=self.config.max_train_steps, disable=quiet, mininterval=pause, desc="steps")

    def _report(self, first: int, done: int, line: dict) -> TrainReport:
        seconds, samples = self.clock.seconds(), done * self.order.global_batch
        return TrainReport(
            finished=done == self.config.max_train_steps,
            steps=done,
            samples=samples,
            seconds=round(seconds, 3),
            samples_per_second=round(samples / seconds, 3),
            resumed_from=first or None,
            trainable_parameters=sum(parameter.numel() for parameter in self.learner.parameters),
            losses={name: value for name, value in line.items() if name not in ("step", "lr", "samples_per_second")},
        )


def slow_in_bfloat16(config: TrainConfig, device: torch.device) -> str:
    """A warning for a CPU that computes in bfloat16 without instructions for it; empty: none."""
    if device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ""
    wanted = ["--mixed_precision bf16"] if config.mixed_precision == "bf16" else []
    wanted += (
        ["--optimizer muon"] if config.optimizer == "muon" else []
    )  # it orthogonalises in bfloat16, whatever the precision
    if not wanted:
        return ""
    return (
        f"this CPU has no bfloat16 of its own: {' and '.join(wanted)} may make steps tens of times slower; "
        "--mixed_precision no --optimizer adamw does not use it"
    )


def _check(objective: nn.Module, source: Source, config: TrainConfig, validate: Callable | None) -> None:
    if not config.output_dir:
        raise ValueError(f"output_dir={config.output_dir!r}, expected the folder to write to")
    if not len(source):
        raise ValueError("the source has no samples, expected at least one")
    if not any(parameter.requires_grad for parameter in objective.parameters()):
        raise ValueError(f"no parameter of {type(objective).__name__} requires a gradient: there is nothing to train")
    names = [kind.value for kind in SchedulerType]
    if config.lr_scheduler not in names:
        raise ValueError(f"lr_scheduler={config.lr_scheduler!r}, expected one of {names}")
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if config.report_to != "none" and config.report_to not in trackers:
        raise ValueError(f"report_to={config.report_to!r} is not installed, expected none or one of {trackers}")
    if config.validation_steps and validate is None:
        raise ValueError(f"validation_steps={config.validation_steps}, but no `validate` was given")
