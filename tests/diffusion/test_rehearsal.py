"""Recording a stock pipeline's own call: the same trajectory, gains and schedules as our own pipelines have, and what is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from factories import dit, randomise
from stock import LATENT_CHANNELS, dit_pipeline, tiny_vae
from tiny_pipelines import STOCK, images_of, pipeline_named
from tiny_pipelines import call_of as arguments_of
from tiny_pipelines import pipe as pipe_named

from ee_diffusion import attach_exits, fit_schedules
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.fingerprint import settings_of
from ee_diffusion.diffusion.methods import periodic_cache, static_cache_schedule
from ee_diffusion.diffusion.step_cache.error_propagation import error_weights, recorded_error_amplification
from ee_diffusion.diffusion.step_cache.recording import record_call
from ee_diffusion.diffusion.step_cache.schedule_search import gap_prices, search
from ee_diffusion.diffusion.step_cache.solver import local_error_gain
from ee_diffusion.diffusion.step_cache.trajectories import fit_prediction

STEPS, LABELS = 9, [0, 1]


def call_of(pipe: DiTPipeline, steps: int = STEPS, scale: float = 2.0, **more):
    """A call at its own generators; -> the latents (B, ...)."""

    def call() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipe(
            LABELS, generator=generators, num_inference_steps=steps, guidance_scale=scale, output_type="np", **more
        ).images

    return call


@pytest.fixture
def pipe() -> DiTPipeline:
    return dit_pipeline()


def exits_of(pipe: DiTPipeline, **more) -> CachedOutputExits:
    return CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, **more)


@pytest.mark.parametrize("kind", [None, DPMSolverMultistepScheduler])
def test_a_trajectory_is_what_the_transformer_was_asked_and_said(pipe: DiTPipeline, kind: type | None):
    if kind is not None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    exits, seen = exits_of(pipe), []
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args[0], kwargs["timestep"], output[0])), with_kwargs=True
    )
    trajectory = record_call(pipe, exits, call_of(pipe)).trajectory
    assert len(trajectory.times) == len(seen) == STEPS
    for step, (asked, times, said) in enumerate(seen):
        torch.testing.assert_close(trajectory.samples[step], asked)
        conditional, unconditional = said.chunk(2)
        guided = unconditional + 2.0 * (conditional - unconditional)
        clean = exits.clean_of(asked[:2], guided, times[:2]).float()
        torch.testing.assert_close(trajectory.clean[step][:2], clean, rtol=1e-3, atol=1e-4)
        assert float(trajectory.times[step]) == float(times[0])
    assert trajectory.scheduler == type(pipe.scheduler).__name__


def test_a_scaled_sample_is_seen_as_the_model_sees_it():
    """Euler's samples are not what its model is asked. PixArt has the unconditional rows first, and a variance after the noise."""
    stock = pipeline_named("pixart-sigma")
    stock.scheduler = EulerDiscreteScheduler.from_config(stock.scheduler.config)
    asked, said = list[torch.Tensor](), list[torch.Tensor]()
    stock.transformer.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    stock.transformer.register_forward_hook(lambda module, args, output: said.append(output[0]))
    exits = exits_of(stock)
    trajectory = record_call(
        stock, exits, lambda: images_of(stock, arguments_of("pixart-sigma", [0, 1], steps=STEPS))
    ).trajectory
    torch.testing.assert_close(trajectory.samples, torch.stack(asked)[:, :2])
    for step, output in enumerate(said):
        unconditional, conditional = output[:, :LATENT_CHANNELS].chunk(2)
        guided = unconditional + 3.0 * (conditional - unconditional)
        clean = exits.clean_of(trajectory.samples[step], guided, trajectory.times[step].expand(2)).float()
        torch.testing.assert_close(trajectory.clean[step], clean, rtol=1e-3, atol=1e-3)


def test_exits_of_another_noise_schedule_are_refused(pipe: DiTPipeline):
    exits = exits_of(pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.05)
    with pytest.raises(ValueError, match="another noise schedule"):
        record_call(pipe, exits, lambda: pytest.fail("the call was made"))


def test_watching_changes_nothing_and_goes_away(pipe: DiTPipeline):
    plain, call = call_of(pipe)(), call_of(pipe)
    kept = []
    record_call(pipe, exits_of(pipe), lambda: kept.append(call()))
    assert (kept[0] == plain).all()
    assert "step" not in vars(pipe.scheduler)
    with pytest.raises(RuntimeError, match="stop"):
        record_call(pipe, exits_of(pipe), lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    assert "step" not in vars(pipe.scheduler)


NOISY = {
    "eta": ("pixart-sigma", DDIMScheduler, {"eta": 1.0}),
    "ddpm": ("pixart-sigma", DDPMScheduler, {}),
    "ancestral": ("pixart-sigma", EulerAncestralDiscreteScheduler, {}),
}


@pytest.mark.parametrize("noisy", NOISY)
def test_what_a_solver_draws_it_draws_when_watched(noisy: str):
    """Pipelines look at the signature of `step` for `eta` and `generator`."""
    name, kind, more = NOISY[noisy]
    stock = pipeline_named(name)
    stock.scheduler = kind.from_config(stock.scheduler.config)

    def latents() -> torch.Tensor:
        return images_of(stock, arguments_of(name, [0, 1], steps=STEPS, **more))

    plain, kept = latents(), []
    exits = exits_of(stock)
    full = record_call(stock, exits, lambda: kept.append(latents()))
    assert torch.equal(kept[0], plain)
    assert all(gain > 0 for gain in recorded_error_amplification(stock, exits, latents, full, every=3))


@pytest.mark.parametrize("kind", [DDPMScheduler, LCMScheduler])
def test_noise_that_comes_from_elsewhere_is_refused_or_seeded(pipe: DiTPipeline, kind: type):
    """DiTPipeline gives its solver no generator."""
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"drew other noise .* begins with torch.manual_seed where"):
        fit_schedules(pipe, call_of(pipe))

    def seeded() -> None:
        torch.manual_seed(0)
        call_of(pipe)()

    assert fit_schedules(pipe, seeded)[1][5].schedule.depths.count(4) == 5


def test_a_compiled_transformer_is_fitted_as_it_is(pipe: DiTPipeline):
    plain = fit_schedules(pipe, call_of(pipe), every=4)[1]
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert fit_schedules(pipe, call_of(pipe), every=4)[1] == plain


def test_a_gain_is_the_final_distance_over_the_first(pipe: DiTPipeline):
    exits, call = exits_of(pipe, cached_type="epsilon"), call_of(pipe)
    full = record_call(pipe, exits, call)
    gains = recorded_error_amplification(pipe, exits, call, full, every=1)
    sensitivity = local_error_gain(exits, pipe.scheduler, STEPS)
    assert len(gains) == STEPS
    for skipped in (3, 6, 8):
        rest = [step for step in range(STEPS) if step != skipped]
        with attach_exits(pipe, exits, static_cache_schedule(rest, num_steps=STEPS, num_layers=4)) as attachment:
            erred = record_call(pipe, exits, call)
            assert attachment.report.mean_executed == pytest.approx(4 * (STEPS - 1) / STEPS)
        wrong = (
            (erred.trajectory.clean[skipped] - full.trajectory.clean[skipped]).flatten(1).square().mean(1).sqrt().mean()
        )
        apart = (erred.final - full.final).flatten(1).square().mean(1).sqrt().mean()
        assert gains[skipped] == pytest.approx(float(apart / wrong) / sensitivity[skipped], rel=1e-4)
    assert gains[8] == pytest.approx(1.0, rel=0.05)  # the last step's error is the final one


def test_schedules_are_those_of_the_search(pipe: DiTPipeline):
    exits, policies = fit_schedules(pipe, call_of(pipe), every=2, power=0.5)
    unfitted = exits_of(pipe, cached_type="epsilon")
    full = record_call(pipe, unfitted, call_of(pipe))
    weights = error_weights(
        local_error_gain(unfitted, pipe.scheduler, STEPS),
        recorded_error_amplification(pipe, unfitted, call_of(pipe), full, every=2),
        power=0.5,
    )
    fitted = fit_prediction(unfitted, full.trajectory)
    found = search(gap_prices(fitted, full.trajectory, weights), STEPS)
    assert policies == {
        count: static_cache_schedule(one.full, num_steps=STEPS, num_layers=4) for count, one in found.items()
    }
    torch.testing.assert_close(exits.prediction.moments, fitted.prediction.moments)
    _, others = fit_schedules(pipe, call_of(pipe), every=2, last_full=True)
    found = search(gap_prices(fitted, full.trajectory, weights), STEPS, last_full=True)
    assert others == {
        count: static_cache_schedule(one.full, num_steps=STEPS, num_layers=4) for count, one in found.items()
    }
    assert others != policies
    assert exits.config.fitted_scheduler == "DDIMScheduler"
    assert exits.config.fitted_steps == STEPS
    with attach_exits(pipe, exits, policies[5]) as attachment:
        call_of(pipe)()
        assert attachment.report.mean_executed == pytest.approx(4 * 5 / STEPS)


def test_a_fit_answers_better_than_the_line_where_it_was_fitted(pipe: DiTPipeline):
    exits, _ = fit_schedules(pipe, call_of(pipe))
    policy, line = periodic_cache(2, warmup_steps=2), exits_of(pipe, cached_type="epsilon")
    full = record_call(pipe, line, call_of(pipe))

    def missed(chosen: CachedOutputExits) -> float:
        with attach_exits(pipe, chosen, policy):
            return float((record_call(pipe, line, call_of(pipe)).final - full.final).square().mean())

    assert missed(exits) < missed(line)


def test_a_scheduler_that_reads_otherwise_is_refused_when_a_run_begins(pipe: DiTPipeline):
    exits, policies = fit_schedules(pipe, call_of(pipe))
    with attach_exits(pipe, exits, policies[5]):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
        with pytest.raises(ValueError, match="read 'epsilon', the scheduler 'v_prediction'"):
            call_of(pipe)()


def test_elsewhere_than_where_it_was_fitted_a_run_warns(pipe: DiTPipeline, recwarn):
    exits, _ = fit_schedules(pipe, call_of(pipe))
    policy, own = periodic_cache(2, warmup_steps=2), pipe.scheduler
    recwarn.clear()
    with attach_exits(pipe, exits, policy):
        call_of(pipe)()
        assert not [one for one in recwarn if "weighed for" in str(one.message)]
        with pytest.warns(
            UserWarning, match="weighed for DDIMScheduler, 9 steps, .* this run has DDIMScheduler, 7 steps"
        ):
            call_of(pipe, steps=7)()
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config)
        with pytest.warns(UserWarning, match="this run has DPMSolverMultistepScheduler, 9 steps"):
            call_of(pipe)()


def with_variance() -> DiTPipeline:
    """A DiT that predicts a variance, as the released one does: its pipeline drops it before the solver."""
    plain = dit_pipeline()
    config = dict(plain.transformer.config, out_channels=2 * LATENT_CHANNELS)
    transformer = randomise(type(plain.transformer).from_config(config), seed=5).eval()
    made = DiTPipeline(transformer, tiny_vae(), plain.scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def test_a_model_that_predicts_a_variance_remembers_without_it():
    """The same weights without the rows of the variance draw the same images, in full and from memory."""
    wide, plain = with_variance(), dit_pipeline()
    state = dict(wide.transformer.state_dict())
    for name in ("proj_out_2.weight", "proj_out_2.bias"):
        kept = state[name].unflatten(0, (4, 2 * LATENT_CHANNELS))[:, :LATENT_CHANNELS]  # patch pixels, channels
        state[name] = kept.flatten(0, 1)
    plain.transformer.load_state_dict(state)
    drawn = []
    for pipe in (wide, plain):
        exits, policies = fit_schedules(pipe, call_of(pipe), every=3)
        with attach_exits(pipe, exits, policies[5]) as attachment:
            drawn.append(torch.from_numpy(call_of(pipe)()))
            assert attachment.report.mean_executed == pytest.approx(4 * 5 / STEPS)
        assert exits.num_outputs == pipe.transformer.config.out_channels
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-4)


VARIANCE = ("dit", "pixart", "pixart-sigma", "hunyuandit")
REFUSED = {"lumina2": "turns the output's sign"}


@pytest.mark.parametrize("name", [name for name in STOCK if name not in REFUSED])
def test_stock_pipelines(name: str):
    """Guidance in either order or as two calls, tuples and outputs from the solver, prompts, tokens and frames, a variance, flow matching
    and its shifts: nearer to the full model than the line through the last two clean images."""
    stock = pipe_named(name)

    def latents() -> torch.Tensor:
        return images_of(stock, arguments_of(name, [0, 1, 2]) | {"num_inference_steps": STEPS})

    full = latents()
    exits, policies = fit_schedules(stock, latents, every=3)
    assert exits.num_outputs == (2 if name in VARIANCE else 1) * stock.transformer.config.in_channels
    apart = []
    for chosen in (exits, exits_of(stock)):
        with attach_exits(stock, chosen, policies[5]) as attachment:
            apart.append(float((latents() - full).square().mean()))
            layers = attachment.trace.planned.shape[1]
            assert attachment.report.mean_executed == pytest.approx(layers * 5 / STEPS)
    assert 0 < apart[0] < apart[1]
    assert torch.equal(latents(), full)


def test_in_half_precision_the_times_are_still_those_of_the_course(monkeypatch: pytest.MonkeyPatch):
    """Flux's transformer is given its times in its own dtype, where 0.8731 is 0.8750: memory goes by the scheduler's."""
    stock, arguments = pipeline_named("flux"), arguments_of("flux", [0, 1]) | {"num_inference_steps": STEPS}
    exits, policies = fit_schedules(stock, lambda: images_of(stock, arguments_of("flux", [0, 1], steps=STEPS)), every=3)
    stock.to(torch.bfloat16)
    arguments = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    weighed = exits.prediction.weights
    found: list[torch.Tensor] = []
    monkeypatch.setattr(exits.prediction, "weights", lambda *asked: found.append(weighed(*asked)) or found[-1])
    with attach_exits(stock, exits, policies[5]):
        images_of(stock, arguments)
    assert len(found) == 2 * (STEPS - 5), "two calls of every step that memory answers"
    assert not any(weights.isnan().any() for weights in found)


@pytest.mark.parametrize("name", REFUSED)
def test_stock_pipelines_that_are_refused(name: str):
    with pytest.raises(ValueError, match=REFUSED[name]):
        fit_schedules(pipe_named(name), lambda: None)


def test_a_scheduler_that_draws_with_the_variance_is_refused():
    pipe = with_variance()
    learned = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="learned_range")
    with pytest.raises(ValueError, match="variance_type='learned_range' draws with the predicted variance"):
        CachedOutputExits.for_pipeline(pipe.transformer, learned)
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    named = DDIMScheduler.from_config(learned.config)  # which knows nothing of it, but keeps the word
    assert named.config.variance_type == "learned_range"
    CachedOutputExits.for_pipeline(pipe.transformer, named)
    with pytest.raises(ValueError, match="it puts out 4 channels, they 8"):
        exits.check_fits(dit(4, channels=LATENT_CHANNELS, classes=1000))
    CachedOutputExits.for_pipeline(dit(4, channels=LATENT_CHANNELS, classes=1000), learned)  # which predicts none


def test_a_saved_memory_of_a_variance_comes_back(tmp_path):
    pipe = with_variance()
    exits, _ = fit_schedules(pipe, call_of(pipe), every=3)
    exits.save_pretrained(tmp_path)
    again = CachedOutputExits.from_pretrained(tmp_path)
    again.check_fits(pipe.transformer)
    assert again.num_outputs == 2 * LATENT_CHANNELS


def test_bad_input(pipe: DiTPipeline):
    exits, call = exits_of(pipe), call_of(pipe)
    with pytest.raises(ValueError, match="took no step"):
        fit_schedules(pipe, lambda: None)
    with pytest.raises(ValueError, match="cached_type='nothing'"):
        fit_schedules(pipe, call, cached_type="nothing")
    for name, wrong in {"every": 0, "power": 1.5, "cached_type": "nothing"}.items():
        with pytest.raises(ValueError, match=f"{name}="):
            fit_schedules(pipe, lambda: pytest.fail("the call was made"), **{name: wrong})
    with pytest.raises(ValueError, match="call=None, expected a function"):
        fit_schedules(pipe, None)
    with pytest.raises(ValueError, match="DiTTransformer2DModel, expected a diffusers pipeline around a transformer"):
        fit_schedules(pipe.transformer, call)
    with (
        attach_exits(pipe, exits, periodic_cache(2, warmup_steps=2)),
        pytest.raises(ValueError, match="attached to this pipeline already"),
    ):
        fit_schedules(pipe, lambda: pytest.fail("the call was made"))
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(ValueError, match="DiTPipeline has two transformers, expected one that takes all steps"):
        fit_schedules(pipe, lambda: pytest.fail("the call was made"))
    pipe.transformer_2 = None
    own = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(own.config)
    with pytest.raises(ValueError, match="hands EulerDiscreteScheduler samples that are scaled already"):
        fit_schedules(pipe, call)
    pipe.scheduler = DDIMScheduler.from_config(own.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="at zero terminal SNR noise says nothing"):
        fit_schedules(pipe, call)
    pipe.scheduler = own
    with pytest.raises(
        ValueError, match="the call took 18 steps from 888 to 0, expected the 9 that its scheduler is set to"
    ):
        fit_schedules(pipe, lambda: (call(), call()))
    full = record_call(pipe, exits, call)
    for every in (0, True, 1.5):
        with pytest.raises(ValueError, match="every="):
            recorded_error_amplification(pipe, exits, call, full, every=every)
    with pytest.raises(ValueError, match="a run of 3 steps, expected more than 3"):
        fit_schedules(pipe, call_of(pipe, steps=3))
    shared = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="drew other noise than the time before"):
        fit_schedules(pipe, lambda: pipe(LABELS, generator=shared, num_inference_steps=STEPS))
    stock = pipeline_named("pixart-sigma")
    stock.scheduler = HeunDiscreteScheduler.from_config(stock.scheduler.config)
    with pytest.raises(
        ValueError, match="HeunDiscreteScheduler asks the model 17 times in a run, at times that repeat"
    ):
        fit_schedules(stock, lambda: images_of(stock, arguments_of("pixart-sigma", [0], steps=STEPS)))

    def midway() -> None:
        pipe.scheduler.set_timesteps(8)
        sample = torch.zeros(1, LATENT_CHANNELS, 8, 8)
        for time in pipe.scheduler.timesteps[4:]:
            pipe.scheduler.step(sample, time, sample)

    with pytest.raises(ValueError, match="no image to image"):
        fit_schedules(pipe, midway)
    with pytest.raises(ValueError, match=r"got \(1, 8, 8, 8\) for a sample of"):
        record_call(pipe, exits, lambda: pipe.scheduler.step(torch.zeros(1, 8, 8, 8), 1, torch.zeros(1, 4, 8, 8)))
    assert "step" not in vars(pipe.scheduler)


def test_settings_of_earlier_exits_keep_their_fingerprint():
    """A policy that was calibrated before exits knew of variances is still theirs."""
    exits = CachedOutputExits(num_train_timesteps=10, sample_size=8)
    added = ("out_channels", "joint", "fitted_embedded_guidance", "fitted_shape", "model_weights")
    known = {name: value for name, value in exits.config.items() if name not in added}
    assert len(known) == len(exits.config) - len(added)
    assert settings_of(exits.config) == settings_of(known)
    assert settings_of(CachedOutputExits(num_train_timesteps=10, sample_size=8, out_channels=6).config) != settings_of(
        known
    )
    assert settings_of({"trained_betas": None}) != settings_of({}), "of schedulers nothing is left out"
