"""What a denoiser's output means: the clean image behind it and back, under the noise schedule of a scheduler.

Here: the arithmetic of `x_t = a_t x_0 + s_t eps`. Not here: caching (cached.py), solvers (solver.py).
R rows, T training timesteps; ... is what a sample is: (C, H, W), tokens (N, D), frames.
"""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
LEAST = 2**-24  # a_t^2 and s_t^2 are no nearer to 0: finite at zero terminal SNR


def prediction_type_of(scheduler: SchedulerMixin) -> str | None:
    """How a scheduler reads a model's output; None: it does not say, or its times are not its sigmas (flow sigmas of a solver whose times
    are whole numbers, sigmas turned around)."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return None if scheduler.config.invert_sigmas else "flow"
    return None if scheduler.config.get("use_flow_sigmas") else scheduler.config.get("prediction_type")


class Parametrised:
    """For modules with the table `alphas_cumprod` (T,) and a config that knows its `prediction_type`.

    Variance-preserving: a_t^2 = alphas_cumprod_t, s_t^2 = 1 - a_t^2. `flow` (flow matching): a_t = 1 - t / T, s_t = t / T, whatever the
    scheduler's shift, for its times are its sigmas; the output is eps - x_0, and the table says nothing.
    """

    alphas_cumprod: Tensor

    def _log_snr(self, time: Tensor) -> Tensor:
        """log(a_t / s_t) at time (R,), which need not be whole: linear between the training timesteps."""
        length, time = len(self.alphas_cumprod), time.to(self.alphas_cumprod.device)
        if self.config.prediction_type == "flow":
            return -(time.double() / length).clamp(LEAST, 1 - LEAST).logit()
        table = self.alphas_cumprod.double().clamp(LEAST, 1 - LEAST)
        table = (table / (1 - table)).log() / 2  # (T,)
        time = time.clamp(0, length - 1)
        below = time.floor().long()
        above = (below + 1).clamp(max=length - 1)
        return torch.lerp(table[below], table[above], time - below)

    def _signal_and_noise(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t of timestep (R,), with as many axes as `like` (R, ...)."""
        snr = self._log_snr(timestep.double()).reshape(-1, *[1] * (like.ndim - 1))
        if self.config.prediction_type == "flow":
            return snr.sigmoid(), (-snr).sigmoid()
        return (2 * snr).sigmoid().sqrt(), (-2 * snr).sigmoid().sqrt()

    def clean_of(self, sample: Tensor, output: Tensor, timestep: Tensor) -> Tensor:
        """The x_0 that a model's output means: sample, output (R, ...), timestep (R,) -> (R, ...)."""
        signal, noise = self._signal_and_noise(timestep, sample)
        if self.config.prediction_type == "flow":
            return sample - noise * output
        if self.config.prediction_type == "sample":
            return output
        if self.config.prediction_type == "epsilon":
            return (sample - noise * output) / signal
        return signal * sample - noise * output

    def output_of(self, sample: Tensor, clean: Tensor, timestep: Tensor) -> Tensor:
        """The output with which a model means the x_0 `clean`; the inverse of `clean_of`."""
        signal, noise = self._signal_and_noise(timestep, sample)
        if self.config.prediction_type == "flow":
            return (sample - clean) / noise
        if self.config.prediction_type == "sample":
            return clean
        if self.config.prediction_type == "epsilon":
            return (sample - signal * clean) / noise
        return (signal * sample - clean) / noise
