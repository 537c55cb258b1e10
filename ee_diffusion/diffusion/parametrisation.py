"""What a denoiser's output means: the clean image behind it and back, under a variance-preserving noise schedule.

Here: the arithmetic of `x_t = a_t x_0 + s_t eps`. Not here: remembering (memory_exits.py), solvers (solver.py).
R rows, C, H, W image, T training timesteps.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Parametrised:
    """For modules with the table `alphas_cumprod` (T,) and a config that knows its `prediction_type`."""

    alphas_cumprod: Tensor

    def _log_snr(self, time: Tensor) -> Tensor:
        """log(a_t / s_t) at time (R,), which need not be whole: linear between the training timesteps."""
        table = self.alphas_cumprod.double().clamp(2**-24, 1 - 2**-24)  # finite at zero terminal SNR
        table = (table / (1 - table)).log() / 2  # (T,)
        time = time.clamp(0, len(table) - 1)
        below = time.floor().long()
        above = (below + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[below], table[above], time - below)

    def _signal_and_noise(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t (R, 1, 1, 1) of `x_t = a_t x_0 + s_t eps`, a_t^2 + s_t^2 = 1."""
        twice = 2 * self._log_snr(timestep.double())[:, None, None, None]
        return twice.sigmoid().sqrt(), (-twice).sigmoid().sqrt()

    def clean_of(self, sample: Tensor, output: Tensor, timestep: Tensor) -> Tensor:
        """The x_0 that a model's output means: sample, output (R, C, H, W), timestep (R,) -> (R, C, H, W)."""
        signal, noise = self._signal_and_noise(timestep)
        if self.config.prediction_type == "sample":
            return output
        if self.config.prediction_type == "epsilon":
            return (sample - noise * output) / signal
        return signal * sample - noise * output

    def output_of(self, sample: Tensor, clean: Tensor, timestep: Tensor) -> Tensor:
        """The output with which a model means the x_0 `clean`; the inverse of `clean_of`."""
        signal, noise = self._signal_and_noise(timestep)
        if self.config.prediction_type == "sample":
            return clean
        if self.config.prediction_type == "epsilon":
            return (sample - signal * clean) / noise
        return (signal * sample - clean) / noise
