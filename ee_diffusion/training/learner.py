"""What learns: an objective's trainable weights with optimiser, learning-rate schedule and moving average, as one state.

Here: one gradient, one update, the state of both. Not here: which batch comes when, logging, files (loop.py, checkpoints.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ee_diffusion.training.config import TrainConfig


class Learner:
    """AdamW on the parameters of `objective` that require a gradient. Moves and wraps the objective for `accelerator`."""

    def __init__(self, objective: nn.Module, config: TrainConfig, accelerator: Accelerator):
        self.objective, self.config, self.accelerator = objective, config, accelerator
        objective.to(accelerator.device).train()
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.schedule = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.average = EMAModel(self.parameters, decay=config.ema_decay, foreach=True) if config.use_ema else None
        if config.compile:  # the plain forward, inside accelerate's autocast; state_dict keys stay as they are
            objective.forward = torch.compile(objective.forward)
        self.model, self.optimizer = accelerator.prepare(objective, optimizer)

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def accumulate(self, batch: dict[str, Tensor], *, last: bool) -> dict[str, Tensor]:
        """Add a micro-step's gradient; ranks exchange gradients only in the `last`. Returns the objective's scalars."""
        exchange = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
        with exchange, self._attention():
            terms = self.model(batch)
            self.accelerator.backward(terms["loss"] / self.config.gradient_accumulation_steps)
        return terms

    def update(self) -> None:
        """One optimiser step with the accumulated gradient."""
        if self.config.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradient overflowed
            return
        self.schedule.step()
        if self.average is not None:
            self.average.step(self.parameters)

    def _attention(self) -> contextlib.AbstractContextManager:
        """On CPUs in bf16 the backward of scaled_dot_product_attention is about twice as fast with the math backend on short
        sequences; elsewhere torch chooses."""
        slow = self.accelerator.device.type == "cpu" and self.config.mixed_precision == "bf16"
        return sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Within: the objective in eval mode, without gradients, with averaged weights. After: bit for bit as it was."""
        if self.average is not None:
            self.average.store(self.parameters)
            self.average.copy_to(self.parameters)
        self.objective.eval()
        try:
            with torch.no_grad():
                yield self.objective
        finally:
            self.objective.train()
            if self.average is not None:
                self.average.restore(self.parameters)

    def state(self) -> dict:
        """Everything that the next step depends on, beside the step's number."""
        scaler = self.accelerator.scaler
        return {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr": self.schedule.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state(self, state: dict) -> None:
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["lr"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
            self.average.to(self.accelerator.device)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
