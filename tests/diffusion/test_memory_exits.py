"""Exits that remember: exact where the clean image is a line in time, under every scheduler; the laws; nothing outlives a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, KarrasVeScheduler, UniPCMultistepScheduler
from factories import CLASSES, NULL_CLASS, pipeline, uvit
from tiny_families import model_named
from torch import Tensor

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.history import OutputHistory
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth, Periodic
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.methods import per_step_error_threshold
from ee_diffusion.diffusion.pipelines.sampling import SAMPLERS, sampler, use_sampler
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from ee_diffusion.diffusion.step_cache.solver import local_error_gain

STEPS = 8


@pytest.fixture(scope="module")
def pipe() -> EarlyExitPipeline:
    made = pipeline()
    made.exits = CachedOutputExits.for_pipeline(made.transformer, made.scheduler)
    return made


def draw(pipe: EarlyExitPipeline, policy: Policy | None, images: tuple[int, ...] = (0, 1, 2)) -> tuple[Tensor, Trace]:
    generators = [torch.Generator().manual_seed(image) for image in images]
    labels = [image % CLASSES for image in images]
    made = pipe(labels, STEPS, 2.0, exit_policy=policy, generator=generators, output_type="pt")
    return made.images, made.trace


def variety(pipe: EarlyExitPipeline) -> Policy:
    """A threshold under which images stop at different steps."""
    certainties = draw(pipe, Policy(Threshold(1.0)))[1].scores  # (S, K, E)
    return Policy(Threshold(certainties[certainties > 0].median().item()))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_recall_is_exact_where_the_clean_image_is_a_line_in_time(name: str, prediction_type: str):
    """A model whose clean image moves linearly in t, asked as the scheduler asks: extrapolated outputs equal its own."""
    like = sampler("ddpm", like=pipeline().scheduler)
    like.register_to_config(prediction_type=prediction_type)
    scheduler = sampler(name, like=like)
    scheduler.set_timesteps(6)
    exits = CachedOutputExits.for_pipeline(uvit(), like)
    start, slope = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    memory, rows, checked = None, torch.tensor([0, 1]), 0
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * scheduler.init_noise_sigma
    for place, time in enumerate(scheduler.timesteps):
        asked = scheduler.scale_model_input(sample, time)
        timestep = time.expand(2)
        true = exits.output_of(asked, start + slope * time / 1000, timestep).to(asked.dtype)
        if place > 2:
            extrapolated = exits.extrapolate(memory, asked, timestep)["extrapolated"]
            torch.testing.assert_close(extrapolated, true, rtol=1e-3, atol=1e-3 * true.abs().max().item())
            checked += 1
        memory = exits.append(memory, rows, sample=asked, timestep=timestep, output=true)
        sample = scheduler.step(true, time, sample).prev_sample
    assert checked >= 3


@torch.no_grad()
def test_noise_is_recalled_as_a_line_and_read_at_the_sample_of_now(pipe: EarlyExitPipeline):
    """Four outputs of noise that move linearly in t, at samples that do not: each is extrapolated as it will be."""
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type="epsilon")
    start, slope = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    memory, rows = None, torch.tensor([0, 1])
    for time in (900.0, 800.0, 650.0):
        sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(int(time)))
        timestep, output = torch.full((2,), time), start + slope * time / 1000
        if time == 650.0:
            torch.testing.assert_close(
                exits.extrapolate(memory, sample, timestep)["extrapolated"], output, rtol=1e-4, atol=1e-4
            )
        memory = exits.append(memory, rows, sample=sample, timestep=timestep, output=output)
    missed = OutputHistory(memory.values, memory.times, torch.full((2,), 2e-6, dtype=torch.float64))
    said = exits.expected_error(exits.extrapolate(missed, sample, torch.full((2,), 600.0))["features"])
    alpha = pipe.scheduler.alphas_cumprod[600].double()
    expected = 2e-6 * 50 * 200 * ((1 - alpha) / alpha).sqrt()  # of the clean image that the noise means
    torch.testing.assert_close(said.double(), expected.expand(2), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="expected one of"):
        CachedOutputExits(cached_type="velocity")


def test_off_and_never_are_the_plain_model(pipe: EarlyExitPipeline):
    plain = draw(pipe, None)[0]
    assert torch.equal(draw(pipe, Policy(Threshold(1.0)))[0], plain)
    assert torch.equal(draw(pipe, Policy(schedule=Periodic(1, 0)))[0], plain)


def test_steps_from_memory_execute_no_block_and_follow_the_line_through_the_last_two(pipe: EarlyExitPipeline):
    """Counted inside the blocks; the same images come from a loop that spells the extrapolation out."""
    seen: list[int] = []
    hooks = [
        block.attn.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        for block in pipe.transformer.transformer_blocks
    ]
    try:
        images, trace = draw(pipe, Policy(schedule=Periodic(3, 2)))
    finally:
        for hook in hooks:
            hook.remove()
    layers, full = len(pipe.transformer.transformer_blocks), [0, 1, 4, 7]
    assert seen == [6] * layers * len(full)
    assert [int(step) for step in range(STEPS) if (trace.depths[step] == layers).all()] == full
    torch.testing.assert_close(images, spelled_out(pipe, full), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def spelled_out(pipe: EarlyExitPipeline, full: list[int]) -> Tensor:
    scheduler = sampler("ddim", like=pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    latents = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(image)) for image in range(3)])
    labels = torch.tensor([0, 1, 2, *[NULL_CLASS] * 3])
    past: list[tuple[float, Tensor]] = []
    for step, time in enumerate(scheduler.timesteps):
        alpha = scheduler.alphas_cumprod[time]
        rows = torch.cat([latents, latents])
        if step in full:
            output = pipe.transformer(rows, time.expand(6), labels).sample
            past.append((float(time), (rows - (1 - alpha).sqrt() * output) / alpha.sqrt()))
        else:
            (t_1, x_1), (t_0, x_0) = past[-2:]
            clean = x_0 + (float(time) - t_0) / (t_1 - t_0) * (x_1 - x_0)
            output = (rows - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        conditional, unconditional = output.chunk(2)
        latents = scheduler.step(unconditional + 2.0 * (conditional - unconditional), time, latents).prev_sample
    return (latents / 2 + 0.5).clamp(0, 1)


def test_batch_mates_do_not_matter(pipe: EarlyExitPipeline):
    policy = variety(pipe)
    images, trace = draw(pipe, policy)
    assert len({tuple(column) for column in trace.depths.T.tolist()}) > 1  # the images differ in their exits
    for image in range(3):
        alone, own = draw(pipe, policy, (image,))
        assert torch.equal(own.depths[:, 0], trace.depths[:, image])
        torch.testing.assert_close(alone[0], images[image], rtol=1e-4, atol=1e-4)


def test_memory_ends_with_its_run(pipe: EarlyExitPipeline):
    """A second generation, also after one that broke off in the middle, is like the first."""
    policy = variety(pipe)
    images = draw(pipe, policy)[0]

    def interrupt(pipe, index, time, values):
        if index == 4:
            raise RuntimeError("stop")
        return values

    draw(pipe, policy, (5, 6))
    with pytest.raises(RuntimeError, match="stop"):
        pipe([3], STEPS, 2.0, exit_policy=policy, callback_on_step_end=interrupt)
    assert torch.equal(draw(pipe, policy)[0], images)
    assert "_ee_hook" not in pipe.transformer.__dict__


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_from_memory(name: str):
    pipe = pipeline()
    pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    use_sampler(pipe, name)
    images, trace = draw(pipe, Policy(schedule=Periodic(2, 2)))
    assert images.isfinite().all()
    assert (trace.depths == 0).any()


def test_an_answer_before_the_first_full_step_is_refused(pipe: EarlyExitPipeline):
    for policy in (Policy(schedule=FixedDepth(0)), Policy(schedule=Periodic(2, 0))):
        with pytest.raises(ValueError, match="an answer from memory before the first full step"):
            draw(pipe, policy)


def test_certainty_is_zero_until_memory_was_put_to_the_test(pipe: EarlyExitPipeline):
    scores = draw(pipe, Policy(Threshold(1.0)))[1].scores[:, 0]  # (S, E)
    assert (scores[:3] == 0).all()
    assert (scores[3:] > 0).any()


def test_save_and_load_keep_decisions(pipe: EarlyExitPipeline, tmp_path: Path):
    policy = variety(pipe)
    with torch.no_grad():
        pipe.exits.error_estimator[2].bias.fill_(0.1)
    try:
        images, trace = draw(pipe, policy)
        pipe.save_pretrained(tmp_path)
        policy.save(tmp_path / "policy.json")
        again = EarlyExitPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert isinstance(again.exits, CachedOutputExits)
        loaded, its_trace = draw(again, Policy.load(tmp_path / "policy.json"))
    finally:
        with torch.no_grad():
            pipe.exits.error_estimator[2].bias.zero_()
    assert torch.equal(loaded, images)
    assert torch.equal(its_trace.depths, trace.depths)


def test_the_expected_error_starts_as_the_remainder_says(pipe: EarlyExitPipeline):
    memory = OutputHistory(
        torch.zeros(2, 2, 3, 8, 8),
        torch.tensor([[500.0, 520.0], [500.0, 540.0]]).double(),
        torch.tensor([1e-4, 2e-4]).double(),
    )
    time = torch.tensor([480, 480])
    context = pipe.exits.extrapolate(memory, torch.zeros(2, 3, 8, 8), time)
    expected = torch.tensor([1e-4 * 20 * 40, 2e-4 * 20 * 60])
    torch.testing.assert_close(pipe.exits.expected_error(context["features"]), expected)
    torch.testing.assert_close(pipe.exits.confidence(0, None, context), 1 - expected)


@torch.no_grad()
def test_the_second_call_of_guidance_has_a_memory_of_its_own(pipe: EarlyExitPipeline):
    model, exits, sample = pipe.transformer, pipe.exits, torch.randn(2, 3, 8, 8)
    times, labels = (900, 800, 700), (torch.tensor([0, 1]), torch.full((2,), NULL_CLASS))
    with attach_exits(model, exits) as attachment:
        session = attachment.start(Policy(schedule=Periodic(3, 2)), rows=torch.arange(2), num_steps=3)
        for index, time in enumerate(times):
            with attachment.use(session.step(index, time)):
                model(sample, torch.full((2,), time), labels[0])
            with attachment.use(session.follow()):
                said = model(sample, torch.full((2,), time), labels[1]).sample
    memory = None
    for time in times[:2]:
        timestep = torch.full((2,), time)
        output = model(sample, timestep, labels[1]).sample
        memory = exits.append(memory, torch.tensor([0, 1]), sample=sample, timestep=timestep, output=output)
    torch.testing.assert_close(session.histories[1].values, memory.values)
    assert not torch.allclose(session.histories[0].values, memory.values)
    torch.testing.assert_close(said, exits.extrapolate(memory, sample, torch.full((2,), 700))["extrapolated"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(dtype: torch.dtype, tmp_path: Path):
    """The schedule's table and what is remembered are not rounded: their logarithm and small differences matter."""
    pipe = pipeline()
    pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    sensitivity = local_error_gain(pipe.exits, pipe.scheduler, STEPS)
    pipe.exits.save_pretrained(tmp_path)
    loaded = CachedOutputExits.from_pretrained(tmp_path, torch_dtype=dtype)
    pipe = pipe.to(dtype)
    rows, time, zero = torch.tensor([0, 1]), torch.tensor([9, 9]), torch.zeros(2, 3, 8, 8, dtype=dtype)
    for exits in (pipe.exits, loaded):
        assert exits.alphas_cumprod.dtype == torch.float32
        assert local_error_gain(exits, pipe.scheduler, STEPS) == sensitivity
        assert exits.append(None, rows, sample=zero, timestep=time, output=zero).values.dtype == torch.float32
    pipe.exits = loaded
    images, trace = draw(pipe, per_step_error_threshold(0.5, local_gains=sensitivity))
    assert images.isfinite().all()
    assert (trace.depths == 0).any()


def test_a_solvers_second_question_at_one_time_is_answered_in_full():
    pipe = pipeline()
    pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    use_sampler(pipe, "heun")
    trace = draw(pipe, Policy(Threshold(0.0)))[1]
    again = [step for step in range(1, len(trace.times)) if trace.times[step] == trace.times[step - 1]]
    after_full = [(step, image) for step in again for image in range(3) if trace.depths[step - 1, image] > 0]
    assert after_full
    assert all(trace.depths[step, image] > 0 for step, image in after_full)


def test_a_broken_output_is_not_remembered_in_silence(pipe: EarlyExitPipeline):
    """A model that says NaN at its second step: the score of the next is NaN and raises, instead of full steps that hide it."""
    calls = []

    def nan_once(module, args, output):
        calls.append(len(args[0]))
        return output * torch.nan if len(calls) == 2 else output

    hook = pipe.transformer.proj_out.register_forward_hook(nan_once)
    try:
        with pytest.raises(ValueError, match="NaN score at step 2"):
            draw(pipe, Policy(Threshold(0.5)))
    finally:
        hook.remove()
    assert calls == [6, 6, 6]


def test_the_features_by_hand(pipe: EarlyExitPipeline):
    """log(bend |t - t_0| |t - t_1|), log(|t - t_0| / 20), l / 5 and its square, l = log(a_t / s_t)."""
    memory = OutputHistory(
        torch.zeros(1, 2, 3, 8, 8), torch.tensor([[520.0, 560.0]]).double(), torch.tensor([1e-4]).double()
    )
    said = pipe.exits.extrapolate(memory, torch.zeros(1, 3, 8, 8), torch.tensor([480]))["features"]
    alpha = pipe.scheduler.alphas_cumprod[480].double()
    ratio = (alpha / (1 - alpha)).log() / 2 / 5
    expected = torch.stack(
        [torch.tensor(1e-4 * 40 * 80).double().log(), torch.tensor(2.0).double().log(), ratio, ratio**2]
    )
    torch.testing.assert_close(said[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_zero_terminal_snr_is_finite():
    pipe = pipeline()
    scheduler = type(pipe.scheduler)(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False)
    pipe.register_modules(scheduler=scheduler)
    pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, scheduler)
    assert draw(pipe, Policy(schedule=Periodic(2, 2)))[0].isfinite().all()
    last = OutputHistory(
        torch.zeros(1, 2, 3, 8, 8), torch.tensor([[1019.0, 1039.0]]).double(), torch.tensor([1e-4]).double()
    )
    said = pipe.exits.extrapolate(last, torch.zeros(1, 3, 8, 8), torch.tensor([999]))
    assert said["features"].isfinite().all()
    assert said["extrapolated"].isfinite().all()


def test_unfitted_exits_are_the_same_wherever_they_are_made():
    pipe = pipeline()
    torch.manual_seed(1)
    one = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler).state_dict()
    torch.manual_seed(2)
    other = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(one["error_estimator.0.weight"].unique()) > 100


def test_bad_input(pipe: EarlyExitPipeline):
    with pytest.raises(ValueError, match="length=0, expected at least 1"):
        CachedOutputExits(length=0)
    with pytest.raises(ValueError, match="prediction_type='score', expected one of"):
        CachedOutputExits(prediction_type="score")
    with pytest.raises(ValueError, match="sample_size is 16, the model's is 8"):
        CachedOutputExits(sample_size=16).check_fits(pipe.transformer)
    with pytest.raises(ValueError, match="know no noise schedule"):
        CachedOutputExits(sample_size=8).check_fits(pipe.transformer)
    flow = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(
        ValueError,
        match="UniPCMultistepScheduler with prediction_type='flow_prediction', use_flow_sigmas=True: expected",
    ):
        CachedOutputExits.for_pipeline(pipe.transformer, flow)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler with prediction_type=None"):
        CachedOutputExits.for_pipeline(pipe.transformer, FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ValueError, match="KarrasVeScheduler with prediction_type=None"):
        CachedOutputExits.for_pipeline(pipe.transformer, KarrasVeScheduler())
    with pytest.raises(ValueError, match="turns the output's sign and its times around"):
        CachedOutputExits.for_pipeline(model_named("Lumina2Transformer2DModel"), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="read 'flow', the scheduler 'epsilon'"):
        CachedOutputExits.for_pipeline(pipe.transformer, FlowMatchEulerDiscreteScheduler()).check_scheduler(
            pipe.scheduler
        )
    with pytest.raises(ValueError, match="another noise schedule"):
        CachedOutputExits(prediction_type="flow").check_scheduler(
            FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
        )
    with pytest.raises(ValueError, match="puts out 5 channels, expected the 3"):
        CachedOutputExits.for_pipeline(
            DiTTransformer2DModel(2, 8, 3, 5, num_layers=1, sample_size=8, patch_size=2), pipe.scheduler
        )


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 5, 4), (2, 3, 2, 4, 4)])
@pytest.mark.parametrize("cached_type", ["sample", "epsilon"])
def test_flow_matching_is_the_line_from_noise_to_data(shape: tuple[int, ...], cached_type: str):
    """x = (1 - s) x_0 + s eps, the output eps - x_0, s = t / 1000, for images, tokens, frames; both cached types lead back to it."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    exits = CachedOutputExits(prediction_type="flow", in_channels=shape[1], sample_size=None, cached_type=cached_type)
    for time in (1000.0, 723.5, 31.25):
        sigma, timestep = time / 1000, torch.full((2,), time)
        sample, said = (1 - sigma) * clean + sigma * noise, noise - clean
        found = exits.clean_of(sample, said, timestep)
        torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(exits.output_of(sample, found, timestep), said, rtol=1e-4, atol=1e-4)
        value = exits.value_of(sample, found, timestep)
        torch.testing.assert_close(value, clean if cached_type == "sample" else noise, rtol=1e-4, atol=1e-4)
        if sigma < 1:  # at s = 1 the sample says nothing of the clean image
            torch.testing.assert_close(exits.clean_from(sample, value, timestep), clean, rtol=1e-3, atol=1e-3)


def test_a_line_in_time_is_recalled_exactly_under_flow_matching():
    """Two full steps of a velocity whose noise moves along a line in time, then one from memory."""
    exits = CachedOutputExits(prediction_type="flow", in_channels=3, sample_size=None, cached_type="epsilon")
    generator = torch.Generator().manual_seed(1)
    start, slope, sample = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    memory = None
    for time in (900.0, 850.0, 700.0):
        sigma, timestep = time / 1000, torch.full((2,), time)
        noise = start + slope * sigma
        said = (noise - sample) / (1 - sigma)  # eps - x_0, x_0 = (x - s eps) / (1 - s)
        if time < 800:
            torch.testing.assert_close(
                exits.extrapolate(memory, sample, timestep)["extrapolated"], said, rtol=1e-4, atol=1e-3
            )
        memory = exits.append(memory, torch.arange(2), sample=sample, timestep=timestep, output=said)
