"""The step cache as an exit: before the first block, the output is extrapolated from those of the last compute steps.

Here: the exit at depth 0 and its uncertainty. Not here: when to stop (core), the arithmetic of extrapolation (core/history.py), which
models and schedulers can be cached (cached_inputs.py).
R rows, C, H, W image, O channels of an output, M cached predictions, T training timesteps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ee_diffusion.core.exits import Space
from ee_diffusion.core.history import OutputHistory, weighted
from ee_diffusion.core.schedules import Schedule, full_steps_of
from ee_diffusion.diffusion.exits.cached_inputs import check_noise, check_variance, noise_of, outputs_of, sizes_of
from ee_diffusion.diffusion.exits.linear_predictor import LinearPrediction, RunWeights
from ee_diffusion.diffusion.exits.loading import load_strictly
from ee_diffusion.diffusion.exits.parameterization import PREDICTION_TYPES, Parametrised
from ee_diffusion.diffusion.exits.saved_names import todays_config, todays_tensor

CACHED_TYPES = ("sample", "epsilon")
FEATURES = 4  # log expected error, log distance to the newest memory, log-SNR, its square


def small_mlp(inputs: int, hidden_dim: int) -> nn.Sequential:
    """(n, inputs) -> (n, 1), 0 until it is trained. Made everywhere alike: a policy may have been made for unfitted exits."""
    made = nn.Sequential(nn.Linear(inputs, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, 1))
    start = torch.randn(hidden_dim, inputs, generator=torch.Generator().manual_seed(0)) / math.sqrt(inputs)
    with torch.no_grad():
        made[0].weight.copy_(start)
    for zero in (made[0].bias, made[2].weight, made[2].bias):
        nn.init.zeros_(zero)
    return made


class CachedOutputExits(Parametrised, ModelMixin, ConfigMixin):
    """One exit at depth 0: the output is extrapolated in time from the last `length` compute steps of the same row.

    With `x_t = a_t x_0 + s_t eps`, the output of each compute step is read as a prediction of `x_0` and cached; extrapolated to t it is
    turned back into what the model would have output. `length=1`: the last prediction again; 2: linear extrapolation from the last two.

    The uncertainty is the expected root mean square error of the extrapolated `x_0` (data in [-1, 1]; 1 or more is worthless):
    `u = exp(log e + MLP(log e, log distance, log-SNR))` where `e` is what the interpolation's remainder predicts from the error that this
    very row's last compute step revealed. Untrained, the MLP is 0 and `u = e`. `confidence = 1 - min(u, 1)`; 0 until the cache is full.

    `cached_type`: what is cached and extrapolated. `sample`: x_0, and the extrapolated x_0 knows nothing of the present sample; `epsilon`:
    eps, so that `x_0 = (x_t - s_t eps) / a_t` follows the sample, and an error of eps counts s_t / a_t times: less and less towards the
    data.

    `fitted_steps`: S above 0, linear extrapolation gives way to least squares along trajectories of S steps
    (`trajectories.fit_prediction`); at times that are not theirs it stays. u remains that of linear extrapolation. `fitted_scheduler`,
    `fitted_guidance` (of all steps or of each), `fitted_embedded_guidance`, `fitted_shape` (of a sample), `model_weights`
    (`fingerprint.weights_of` the transformer): what these trajectories were of; a pipeline that runs something else warns
    (`run_setup.warn_of_setup`). `joint`: True where the error weights of the steps are known: under a static schedule the cached outputs of
    a run are then fitted by joint least squares (`LinearPrediction.joint_weights`), else each step by itself.

    `out_channels`: what the model outputs; twice `in_channels` where it predicts a variance too, which is cached as 0: pipelines of such
    models drop it before the solver.

    Made by `for_pipeline`, which fills in the noise schedule the model was trained on; its table stays in float32. Samples may be images,
    packed tokens (R, N, D) or frames, under a variance-preserving schedule or flow matching (FlowMatchEulerDiscreteScheduler).

    Raises:
        ValueError: a length below 1, an unknown prediction_type or cached_type; out_channels that are neither in_channels nor twice as
            many; fitted_steps below 0; joint without fitted_steps.
    """

    space: Space = "output"
    depths = (0,)
    _keep_in_fp32_modules = ["alphas_cumprod", "error_estimator", "prediction"]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        in_channels: int = 3,
        sample_size: int | None = 32,
        length: int = 2,
        hidden_dim: int = 32,
        cached_type: str = "sample",
        fitted_steps: int = 0,
        fitted_scheduler: str | None = None,
        fitted_guidance: float | Sequence[float | None] | None = None,
        out_channels: int | None = None,
        joint: bool | None = None,
        fitted_embedded_guidance: float | None = None,
        fitted_shape: Sequence[int] | None = None,
        model_weights: str | None = None,
    ):
        super().__init__()
        if out_channels not in (None, in_channels, 2 * in_channels):
            raise ValueError(
                f"the model puts out {out_channels} channels, expected the {in_channels} of its input, or twice as many with a variance"
            )
        if length < 1:
            raise ValueError(f"length={length}, expected at least 1 remembered prediction")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={prediction_type!r}, expected one of {PREDICTION_TYPES}")
        if cached_type not in CACHED_TYPES:
            raise ValueError(f"cached_type={cached_type!r}, expected one of {CACHED_TYPES}")
        if fitted_steps < 0:
            raise ValueError(f"fitted_steps={fitted_steps}, expected at least 0")
        if joint and not fitted_steps:
            raise ValueError("joint=True with fitted_steps=0, expected a trajectory")
        self.error_estimator = small_mlp(FEATURES, hidden_dim)
        self.prediction = LinearPrediction(fitted_steps, joint=bool(joint)) if fitted_steps else None
        self._run: RunWeights | None = None  # of the schedule that runs
        unknown = 0.0 if prediction_type == "flow" else torch.nan  # of flow matching there is nothing to know
        self.register_buffer("alphas_cumprod", torch.full((num_train_timesteps,), unknown))

    @classmethod
    def for_pipeline(
        cls,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        *,
        length: int = 2,
        cached_type: str = "sample",
    ) -> CachedOutputExits:
        """Exits for a transformer and the noise schedule that it was trained on. They work unfitted.

        Raises:
            ValueError: a length below 1; a scheduler that is neither variance-preserving (`alphas_cumprod`) nor
                FlowMatchEulerDiscreteScheduler, predicts something unknown or draws with a predicted variance; a model that puts out
                something else than its input's channels (and a variance), or whose output is not what the solver gets.
        """
        model, noise = sizes_of(transformer), noise_of(scheduler)
        exits = cls(**model, **noise, length=length, cached_type=cached_type)
        if noise["prediction_type"] != "flow":
            exits.alphas_cumprod.copy_(scheduler.alphas_cumprod)
        exits.check_fits(transformer)
        exits.check_scheduler(scheduler)
        return exits.to(transformer.device)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """As diffusers' `from_config`; a config of an earlier version is read under today's names."""
        return super().from_config(todays_config(config), return_unused_kwargs, **kwargs)

    def _fix_state_dict_keys_on_load(self, state_dict):
        """As diffusers' own: keys of an earlier version take today's names, in place."""
        for name in list(state_dict):
            state_dict[todays_tensor(name)] = state_dict.pop(name)
        return super()._fix_state_dict_keys_on_load(state_dict)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' `from_pretrained`, but a file of another model is a ValueError, not a warning."""
        return load_strictly(super().from_pretrained, cls.__name__, pretrained_model_name_or_path, **kwargs)

    def check_fits(self, model: nn.Module) -> None:
        """Raises ValueError if these exits were made for another model's sizes."""
        for name in ("in_channels", "sample_size"):
            if self.config[name] not in (None, model.config.get(name)):
                raise ValueError(
                    f"heads of another model: {name} is {self.config[name]}, the model's is {model.config.get(name)}"
                )
        outputs = outputs_of(model) or self.config.in_channels
        if outputs != self.num_outputs:
            raise ValueError(f"heads of another model: it puts out {outputs} channels, they {self.num_outputs}")
        if self.prediction is not None and not self.prediction.is_fitted:
            raise ValueError("these exits know no trajectory; make them with trajectories.fit_prediction")
        if bool(self.alphas_cumprod.isnan().any()):
            raise ValueError("these exits know no noise schedule; make them with CachedOutputExits.for_pipeline")

    @property
    def num_outputs(self) -> int:
        """Channels of an answer."""
        return self.config.out_channels or self.config.in_channels

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """Raises ValueError if these exits know another noise schedule than the scheduler's, or read the model's output in another way, or
        if it draws with a predicted variance, which they do not remember."""
        if self.num_outputs > self.config.in_channels:
            check_variance(scheduler)
        check_noise(scheduler, self.alphas_cumprod, prediction_type=self.config.prediction_type)

    def _apply(self, fn, recurse=True):
        table = self.alphas_cumprod
        super()._apply(fn, recurse)
        if self.alphas_cumprod.dtype != table.dtype:  # half precision rounds 0.9999 to 1, and its log-SNR to infinity
            self.alphas_cumprod = table.to(self.alphas_cumprod.device)
        return self

    def along(self, schedule: Schedule, *, num_steps: int, num_layers: int) -> CachedOutputExits:
        """The same exits (weights and tables are shared) for a run under a static schedule of full steps and answers from memory: weighed
        together, where they know how. For all else, themselves. Raises ValueError for a schedule that does not fit the run."""
        if self.prediction is None or not self.config.joint or num_steps != self.config.fitted_steps:
            return self
        full = full_steps_of(schedule, self.prediction.times.tolist(), num_layers=num_layers)
        if full is None or full[:1] != (0,):
            return self
        made = copy.copy(self)
        made._run = self.prediction.joint_weights(full, self.config.length)
        return made

    def context(self, timestep: Tensor) -> dict[str, Tensor]:
        """Without a memory there is nothing but the time."""
        return {"timestep": timestep}

    @torch.no_grad()
    def extrapolate(self, memory: OutputHistory | None, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """What the exit at depth 0 looks at: sample (R, C, H, W), timestep (R,) -> `extrapolated` (R, O, H, W), the output that follows
        from memory, `num_cached` (R,), how many predictions, and `features` (R, F) of the uncertainty."""
        if memory is None:
            memory = OutputHistory.empty(sample.float(), length=self.config.length)
        time = timestep.double()
        value = weighted(memory.values, self.weights_of(memory, time))
        output = self.output_of(sample, self.clean_from(sample, value, timestep), timestep).to(sample.dtype)
        if self.num_outputs > self.config.in_channels:
            output = torch.cat([output, torch.zeros_like(output)], 1)
        return {
            "timestep": timestep,
            "extrapolated": output,
            "num_cached": memory.count,
            "features": self._features(memory, time),
        }

    @torch.no_grad()
    def append(
        self, memory: OutputHistory | None, rows: Tensor, *, sample: Tensor, timestep: Tensor, output: Tensor
    ) -> OutputHistory:
        """The memory after `rows` (r,) of the batch ran to the end: sample (R, C, H, W), timestep (R,), output (R, O, H, W)."""
        if memory is None:
            memory = OutputHistory.empty(sample.float(), length=self.config.length)
        rows = rows.to(sample.device)
        sample, timestep, output = (tensor.index_select(0, rows) for tensor in (sample, timestep, output))
        if self.num_outputs > self.config.in_channels:  # images: what follows is their variance
            output = output[:, : self.config.in_channels]
        value = self.value_of(sample, self.clean_of(sample, output, timestep), timestep)
        return memory.append(rows, value.to(memory.values.dtype), timestep.double())

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """The extrapolated output (R, O, H, W).

        Raises:
            ValueError: a row that remembers nothing: its first step must be a full one.
        """
        if "extrapolated" not in context or bool((context["num_cached"] == 0).any()):
            raise ValueError("an answer from memory before the first full step; let the first steps run to the end")
        return context["extrapolated"]

    def confidence(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """`1 - min(u, 1)` (R,); 0 where memory is not full yet or was never put to the test; NaN where what it remembers is not finite."""
        error = self.expected_error(context["features"])
        finite = context["extrapolated"].flatten(1).isfinite().all(1)  # (R,)
        return torch.where(error.isnan(), 0.0, 1 - error.clamp(max=1.0)).where(finite, torch.nan)

    def expected_error(self, features: Tensor) -> Tensor:
        """features (R, F) -> u (R,), root mean square error of the extrapolated clean image; NaN where nothing is known."""
        known = features.nan_to_num(0.0).to(self.error_estimator[0].weight.dtype)
        return torch.exp(features[:, 0] + self.error_estimator(known)[:, 0])

    def weights_of(self, memory: OutputHistory, time: Tensor) -> Tensor:
        """What each remembered value counts at time (R,) -> (R, M)."""
        line = memory.weights(time)
        if self.prediction is None:
            return line
        best = self.prediction.weights(memory.times, time, self._run)
        return torch.where(best.isnan(), line, best)

    def _features(self, memory: OutputHistory, time: Tensor) -> Tensor:
        snr = self._log_snr(time)  # (R,)
        expected = memory.expected_error(time).clamp(min=1e-6).log()
        if self.config.cached_type == "epsilon":  # of the clean image that follows from it
            expected = expected - snr
        distance = (time - memory.times[:, 0]).abs().clamp(min=1.0).log()
        return torch.stack([expected, distance - math.log(20.0), snr / 5, (snr / 5).square()], 1).float()  # (R, F)

    def value_of(self, sample: Tensor, clean: Tensor, timestep: Tensor) -> Tensor:
        """What is remembered of a clean image (R, C, H, W) that was meant at `sample`, as `cached_type` has it."""
        if self.config.cached_type == "sample":
            return clean
        signal, noise = self._signal_and_noise(timestep, sample)
        return (sample - signal * clean) / noise

    def clean_per_value(self, timestep: Tensor) -> Tensor:
        """How far the clean image moves per unit of a extrapolated value at timestep (T,) -> (T,). Where there is no signal: very far."""
        if self.config.cached_type == "sample":
            return torch.ones(len(timestep), dtype=torch.float64)
        signal, noise = self._signal_and_noise(timestep.to(self.alphas_cumprod.device), timestep)  # (T,)
        return (noise / signal).double().cpu()

    def clean_from(self, sample: Tensor, value: Tensor, timestep: Tensor) -> Tensor:
        """The clean image that a extrapolated value means at `sample`; the inverse of `value_of`."""
        if self.config.cached_type == "sample":
            return value
        signal, noise = self._signal_and_noise(timestep, sample)
        return (sample - noise * value) / signal
