"""What learns: an objective's trainable weights with optimizer, learning-rate schedule and moving average, as one state.

Here: one gradient, one update, the state of both. Not here: which batch comes when, logging, files (loop.py, checkpointing.py).
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


def block_matrices(objective: nn.Module) -> list[nn.Parameter]:
    """The trainable weights of the linear layers within repeated blocks (an `nn.ModuleList` at any height)."""
    lists = [module for module in objective.modules() if isinstance(module, nn.ModuleList)]
    layers = {layer for blocks in lists for layer in blocks.modules() if isinstance(layer, nn.Linear)}
    return [m.weight for m in objective.modules() if m in layers and m.weight.requires_grad]


def build_optimizers(objective: nn.Module, config: TrainConfig, *, fused: bool) -> list[torch.optim.Optimizer]:
    """AdamW alone, or with `config.optimizer == "muon"` AdamW and Muon (https://kellerjordan.github.io/posts/muon), whose steps are
    scaled to the size of AdamW's, so that one learning rate serves both.

    Raises:
        ValueError: muon on a torch that has none, or without a matrix to train.
    """
    matrices: list[nn.Parameter] = []
    if config.optimizer == "muon":
        if getattr(torch.optim, "Muon", None) is None:
            raise ValueError(
                f"optimizer='muon' with torch {torch.__version__}, expected torch 2.9 or newer, or 'adamw'"
            )
        matrices = block_matrices(objective)
        if not matrices:
            raise ValueError("optimizer='muon', but no linear layer within repeated blocks trains; expected 'adamw'")
    chosen = {id(matrix) for matrix in matrices}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [p for p in objective.parameters() if p.requires_grad and id(p) not in chosen],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
            fused=fused,
        )
    ]
    if matrices:
        scaled = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
        optimizers.append(torch.optim.Muon(matrices, **scaled, adjust_lr_fn="match_rms_adamw"))
    return optimizers


class Learner:
    """The optimizers of the parameters of `objective` that require a gradient. Moves and wraps the objective for `accelerator`."""

    def __init__(self, objective: nn.Module, config: TrainConfig, accelerator: Accelerator):
        self.objective, self.config, self.accelerator = objective, config, accelerator
        objective.to(accelerator.device).train()
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        optimizers = build_optimizers(objective, config, fused=accelerator.device.type in ("cpu", "cuda"))
        self.schedules = [
            get_scheduler(
                config.lr_scheduler,
                optimizer,
                num_warmup_steps=config.lr_warmup_steps,
                num_training_steps=config.max_train_steps,
            )
            for optimizer in optimizers
        ]
        self.average = EMAModel(self.parameters, decay=config.ema_decay, foreach=True) if config.use_ema else None
        if config.compile:  # the plain forward, inside accelerate's autocast; state_dict keys stay as they are
            objective.forward = torch.compile(objective.forward)
        self.model, *self.optimizers = accelerator.prepare(objective, *optimizers)

    @property
    def learning_rate(self) -> float:
        return self.schedules[0].get_last_lr()[0]

    def accumulate(self, batch: dict[str, Tensor], *, last: bool) -> dict[str, Tensor]:
        """Add a micro-step's gradient; ranks exchange gradients only in the `last`. Returns the objective's scalars."""
        exchange = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
        with exchange, self._attention():
            terms = self.model(batch)
            self.accelerator.backward(terms["loss"] / self.config.gradient_accumulation_steps)
        return terms

    def update(self) -> None:
        """One optimizer step with the accumulated gradient."""
        if self.config.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradient overflowed
            return
        for schedule in self.schedules:
            schedule.step()
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
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "lr": [schedule.state_dict() for schedule in self.schedules],
            "ema": None if self.average is None else self.average.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state(self, state: dict) -> None:
        self.objective.load_state_dict(state["objective"])
        for part, saved in zip(self.optimizers, state["optimizers"], strict=True):
            part.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["lr"], strict=True):
            schedule.load_state_dict(saved)
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
            self.average.to(self.accelerator.device)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
