"""The pipeline as users call it: every argument, every scheduler that fits, and a ValueError before any block for whatever does not fit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from factories import CLASSES, dit, exits_for, pipeline, uvit

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import DepthPerStep, FixedDepth, FixedLayers, PiecewiseDepth
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.methods import deediff, periodic_cache
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline, EarlyExitPipelineOutput

SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
}


@pytest.fixture(scope="module")
def pipe() -> EarlyExitPipeline:
    return pipeline()


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def call(pipe: EarlyExitPipeline, labels=(0, 1, 2), steps: int = 2, guidance: float = 1.0, **more):
    defaults = {"output_type": "pt"}
    if "generator" not in more and labels is not None:
        defaults["generator"] = generators(len(labels) * more.get("num_images_per_prompt", 1))
    return pipe(None if labels is None else list(labels), steps, guidance, **(defaults | more))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_that_fits(name: str):
    pipe = pipeline()
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    plain = call(pipe, guidance=1.5)
    output = call(pipe, guidance=1.5, exit_threshold=0.6)
    assert output.images.isfinite().all()
    assert len(output.trace.times) == len(pipe.scheduler.timesteps) == (3 if name == "heun" else 2)
    assert output.trace.times.tolist() == [float(time) for time in pipe.scheduler.timesteps]
    assert not torch.equal(output.images, plain.images)
    assert len(output.trace.depths.unique()) >= 2
    again = call(pipe, guidance=1.5, exit_threshold=0.6)
    assert torch.equal(again.images, output.images)


def test_output_types(pipe):
    tensor = call(pipe, exit_threshold=0.6)
    assert isinstance(tensor, EarlyExitPipelineOutput)
    assert tensor.images.shape == (3, 3, 8, 8)
    assert ((tensor.images >= 0) & (tensor.images <= 1)).all()
    array = call(pipe, exit_threshold=0.6, output_type="np").images
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, tensor.images.permute(0, 2, 3, 1).numpy())
    pictures = call(pipe, exit_threshold=0.6, output_type="pil").images
    assert isinstance(pictures[0], PIL.Image.Image)
    np.testing.assert_array_equal(np.array(pictures[1]), (array[1] * 255).round().astype("uint8"))
    images, trace = call(pipe, exit_threshold=0.6, return_dict=False)
    assert torch.equal(images, tensor.images)
    assert torch.equal(trace.depths, tensor.trace.depths)
    assert "executed blocks per sample and step" in tensor.report.summary()


def test_labels_numbers_and_images_per_prompt(pipe):
    one = call(pipe, labels=[4], num_images_per_prompt=2)
    assert torch.equal(one.images, call(pipe, labels=[4, 4]).images)
    tensor = pipe(torch.tensor([4, 4]), 2, generator=generators(2), output_type="pt").images
    assert torch.equal(tensor, one.images)
    number = pipe(4, 2, generator=generators(1), output_type="pt").images
    assert number.shape == (1, 3, 8, 8)
    two = call(pipe, labels=[1, 2], num_images_per_prompt=2)
    assert torch.equal(two.images, call(pipe, labels=[1, 1, 2, 2]).images)


def test_latents_generators_and_ids(pipe):
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=one) for one in generators(3)])
    drawn = call(pipe).images
    assert torch.equal(call(pipe, latents=noise, generator=None).images, drawn)
    single = torch.Generator().manual_seed(3)
    assert call(pipe, generator=single).images.shape == (3, 3, 8, 8)
    plan = Policy(DepthTable(((0, 2, 5, 7, 3),) * 2))
    trace = call(pipe, exit_policy=plan, image_ids=torch.tensor([4, 0, 3])).trace
    assert trace.depths.tolist() == [[3, 0, 7]] * 2
    assert trace.samples.tolist() == [4, 0, 3]


def test_custom_timesteps(pipe):
    ddpm = EarlyExitPipeline(pipe.transformer, DDPMScheduler(), pipe.exits)
    ddpm.set_progress_bar_config(disable=True)
    trace = call(ddpm, exit_threshold=0.5, timesteps=[900, 400, 10]).trace
    assert trace.times.tolist() == [900, 400, 10]
    with pytest.raises(ValueError, match="DDIMScheduler takes no custom timesteps"):
        call(pipe, timesteps=[900, 400])


def test_eta_reaches_the_scheduler(pipe):
    assert not torch.equal(call(pipe, eta=1.0).images, call(pipe).images)
    assert torch.equal(call(pipe, eta=1.0).images, call(pipe, eta=1.0).images)


def test_callback(pipe):
    seen = []

    def on_step_end(pipeline, index, time, shown):
        assert pipeline is pipe
        seen.append((index, int(time), tuple(shown["latents"].shape)))
        return {"latents": torch.zeros_like(shown["latents"])}

    output = call(pipe, callback_on_step_end=on_step_end, exit_threshold=0.5)
    assert seen == [(index, int(time), (3, 3, 8, 8)) for index, time in enumerate(pipe.scheduler.timesteps)]
    assert (output.images == 0.5).all(), "what the callback returns goes on"
    untouched = call(pipe, callback_on_step_end=lambda *args: {})
    assert torch.equal(untouched.images, call(pipe).images)


def test_unconditional():
    pipe = pipeline("unconditional")
    output = call(pipe, None, batch_size=2, num_images_per_prompt=2, exit_threshold=0.6, generator=generators(4))
    assert output.images.shape == (4, 3, 8, 8)
    assert output.trace.samples.tolist() == [0, 1, 2, 3]


def test_guidance_is_its_formula(pipe):
    """At scale 1 the null rows are not computed; above, `null + scale (conditional - null)`."""
    rows = []
    hook = pipe.transformer.patch_embed.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    call(pipe)
    assert rows == [3, 3]
    rows.clear()
    guided = call(pipe, steps=1, guidance=3.0)
    hook.remove()
    assert rows == [6]
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=one) for one in generators(3)])
    (time,) = pipe.scheduler.timesteps
    with torch.no_grad():
        conditional = pipe.transformer(noise, time, torch.tensor([0, 1, 2])).sample
        null = pipe.transformer(noise, time, torch.full((3,), CLASSES)).sample
    prediction = null + 3.0 * (conditional - null)
    latents = pipe.scheduler.step(prediction, time, noise).prev_sample
    torch.testing.assert_close(guided.images, (latents / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_apart_without_guidance_is_one_row_an_image(pipe):
    apart = call(pipe, exit_policy=Policy(Threshold(0.4), cfg_exit="separate"), image_ids=torch.tensor([3, 4, 5]))
    together = call(pipe, exit_policy=Policy(Threshold(0.4)))
    assert apart.trace.samples.tolist() == [3, 4, 5]
    assert torch.equal(apart.images, together.images)


def test_exit_threshold_is_deediff(pipe):
    assert torch.equal(call(pipe, exit_threshold=0.6).images, call(pipe, exit_policy=deediff(0.6)).images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_half_precision(name: str, dtype):
    pipe = pipeline()
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    pipe.to(dtype)
    output = call(pipe, guidance=1.5, exit_threshold=0.6)
    assert output.images.dtype == torch.float32
    assert output.images.isfinite().all()


def test_a_nan_raises_after_the_step_and_leaves_the_transformer_whole(pipe):
    before = call(pipe).images
    noise = torch.randn(3, 3, 8, 8)
    noise[1] = 3e38  # finite, but no block's output is
    with pytest.raises(ValueError, match="NaN score at step 0"):
        call(pipe, latents=noise, exit_threshold=0.6)
    assert "forward" not in pipe.transformer.__dict__
    assert torch.equal(call(pipe).images, before)


def test_from_pipe_shares_the_components(pipe):
    other = EarlyExitPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    assert other.exits is pipe.exits


def test_without_exits_only_the_plain_model(tmp_path):
    pipe = EarlyExitPipeline(uvit(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    before = call(pipe).images
    with pytest.raises(ValueError, match="this pipeline has no exits"):
        call(pipe, exit_threshold=0.5)
    pipe.save_pretrained(tmp_path)
    loaded = EarlyExitPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.exits is None
    assert torch.equal(call(loaded).images, before)


# --- what does not fit


def refused(pipe: EarlyExitPipeline, match: str, **arguments) -> None:
    ran = []
    parts = [pipe.transformer.patch_embed, *pipe.transformer.transformer_blocks]
    hooks = [part.register_forward_pre_hook(lambda module, args: ran.append(module)) for part in parts]
    try:
        with pytest.raises(ValueError, match=match):
            call(pipe, **arguments)
    finally:
        for hook in hooks:
            hook.remove()
    assert not ran, "a block ran before the error"
    assert "forward" not in pipe.transformer.__dict__


STEP_PLAN = Policy(DepthTable(((0, 2, 5),) * 2))


@pytest.mark.parametrize(
    "match,arguments",
    [
        ("class_labels", {"labels": [0, CLASSES + 1]}),
        ("class_labels", {"labels": [-1]}),
        ("class_labels", {"labels": [0.5]}),
        ("class_labels", {"labels": []}),
        ("needs class_labels", {"labels": None}),
        ("at least 1", {"num_images_per_prompt": 0, "generator": None}),
        ("batch_size", {"batch_size": 0}),
        ("batch_size", {"batch_size": 3}),
        ("num_inference_steps=0", {"steps": 0}),
        ("num_inference_steps=-2", {"steps": -2}),
        (r"num_inference_steps=2\.0", {"steps": 2.0}),
        ("timesteps is empty", {"timesteps": []}),
        ("output_type='jpg'", {"output_type": "jpg"}),
        ("2 generators", {"generator": generators(2)}),
        ("latents is", {"latents": torch.zeros(2, 3, 8, 8)}),
        ("latents is", {"latents": torch.zeros(3, 3, 4, 4)}),
        ("callback_on_step_end_tensor_inputs", {"callback_on_step_end_tensor_inputs": ("noise",)}),
        ("not both", {"exit_threshold": 0.5, "exit_policy": Policy()}),
        ("expected a number in", {"exit_threshold": True}),
        ("expected a number in", {"exit_threshold": "0.2"}),
        ("guidance_scale=nan", {"guidance": float("nan")}),
        ("guidance_scale='4'", {"guidance": "4"}),
        ("eta=2", {"eta": 2}),
        ("eta=nan", {"eta": float("nan")}),
        ("num_images_per_prompt=2.5", {"num_images_per_prompt": 2.5, "generator": None}),
        ("num_inference_steps=True", {"steps": True}),
        ("timesteps=5", {"timesteps": 5}),
        ("not finite", {"latents": torch.full((3, 3, 8, 8), torch.nan)}),
        ("expected a tensor", {"latents": [1]}),
        ("expected integers", {"labels": ["cat"]}),
        ("mean uncertainty in", {"exit_threshold": 1.5}),
        ("mean uncertainty in", {"exit_threshold": -0.5}),
        ("mean uncertainty in", {"exit_threshold": float("nan")}),
        ("3 thresholds, expected one for each of 4 exits", {"exit_policy": Policy(Threshold((0.5,) * 3))}),
        ("thresholds for 3 steps", {"exit_policy": Policy(Threshold(((0.5,) * 4,) * 3))}),
        ("the policy exits at depths", {"exit_policy": Policy(Threshold(0.5), exits=(2, 9))}),
        ("the policy exits at depths", {"exit_policy": Policy(Threshold(0.5), exits=(1,))}),
        ("within 0..7", {"exit_policy": Policy(schedule=FixedDepth(9))}),
        ("stops at depth 1", {"exit_policy": Policy(schedule=FixedDepth(1))}),
        ("has 3 depths, this run has 2", {"exit_policy": Policy(schedule=DepthPerStep((7, 7, 7)))}),
        ("stops at depth 1", {"exit_policy": Policy(schedule=DepthPerStep((7, 1)))}),
        ("stops at depth 1", {"exit_policy": Policy(schedule=PiecewiseDepth((300.0,), (1, 7)))}),
        ("holes", {"exit_policy": Policy(Threshold(0.5), FixedLayers((0, 3)))}),
        ("the plan has 1 steps", {"exit_policy": Policy(DepthTable(((0, 2, 5),)))}),
        ("column", {"exit_policy": Policy(DepthTable(((0, 2),) * 2))}),
        ("column", {"exit_policy": STEP_PLAN, "image_ids": torch.tensor([0, 1, 5])}),
        ("sample ids", {"exit_policy": STEP_PLAN, "image_ids": torch.tensor([0, 1])}),
        (
            "image_ids name images",
            {"guidance": 2.0, "image_ids": torch.arange(3), "exit_policy": Policy(Threshold(0.5), cfg_exit="separate")},
        ),
    ],
)
def test_bad_input_is_refused_before_any_block(pipe, match: str, arguments):
    refused(pipe, match, **arguments)


def test_models_that_cannot_do_it(pipe):
    no_null = EarlyExitPipeline(uvit(null_class=None), DDIMScheduler())
    refused(no_null, "guidance_scale > 1 needs a transformer trained with a null class", guidance=2.0)
    refused(pipeline("unconditional"), "takes no class_labels", labels=[0, 1])
    other = EarlyExitPipeline(pipe.transformer, DDIMScheduler(), exits_for(uvit(attention_head_dim=4), (2,)))
    refused(other, "heads of another model", exit_threshold=0.5)
    deep = EarlyExitPipeline(uvit(num_layers=3), DDIMScheduler(), exits_for(uvit(), (1, 5)))
    refused(deep, "an exit at depth 5, the model has 3 blocks", exit_threshold=0.5)
    with pytest.raises(ValueError, match="the transformer takes text"):
        pipeline("text")
    with pytest.raises(ValueError, match="is a DiTTransformer2DModel, expected a UViTTransformer2DModel"):
        EarlyExitPipeline(dit(), DDIMScheduler())
    other.exits = torch.nn.Linear(1, 1)
    refused(other, "exits is a Linear", exit_threshold=0.5)
    wrong = CachedOutputExits.for_pipeline(pipe.transformer, DDIMScheduler(prediction_type="v_prediction"))
    memory = EarlyExitPipeline(pipe.transformer, DDIMScheduler(), wrong)
    refused(memory, "read 'v_prediction', the scheduler 'epsilon'", exit_policy=periodic_cache(2, warmup_steps=1))
    wrong = CachedOutputExits.for_pipeline(pipe.transformer, DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
    memory = EarlyExitPipeline(pipe.transformer, DDIMScheduler(), wrong)
    refused(memory, "know another noise schedule", exit_policy=periodic_cache(2, warmup_steps=1))


def test_scores_of_other_models_are_refused_before_any_block(pipe):
    refused(pipe, "looks at logits or tokens", exit_policy=Policy(Threshold(0.5, "max_probability")))


def test_another_threads_forward_is_the_plain_model_and_harms_nobody(pipe):
    inputs = (torch.zeros(1, 3, 8, 8), torch.tensor([5]), torch.tensor([0]))
    plain = pipe.transformer(*inputs).sample
    with attach_exits(pipe.transformer, pipe.exits) as attachment:
        session = attachment.start(Policy(schedule=FixedDepth(2)), rows=torch.arange(1), num_steps=1)
        with attachment.use(session.step(0, 5.0)), ThreadPoolExecutor(1) as other:
            assert torch.equal(other.submit(pipe.transformer, *inputs).result().sample, plain)
            assert not torch.equal(pipe.transformer(*inputs).sample, plain)
    assert session.trace().depths.tolist() == [[2]]


def test_autocast_runs_with_exits(pipe):
    with torch.autocast("cpu", torch.bfloat16):
        assert call(pipe, exit_threshold=0.3).trace is not None


def test_exits_that_come_later_are_saved(tmp_path):
    made = pipeline()
    delayed = EarlyExitPipeline(made.transformer, made.scheduler)
    delayed.exits = made.exits
    delayed.save_pretrained(tmp_path / "delayed")
    again = EarlyExitPipeline.from_pretrained(tmp_path / "delayed")
    assert again.exits.depths == made.exits.depths
    delayed.exits = None
    delayed.save_pretrained(tmp_path / "none")
    assert EarlyExitPipeline.from_pretrained(tmp_path / "none").exits is None


@pytest.mark.parametrize("policy", [0.3, "policy.json"])
def test_what_is_no_policy_is_named(pipe: EarlyExitPipeline, policy):
    with pytest.raises(TypeError, match=f"exit_policy is a {type(policy).__name__}, expected a Policy"):
        call(pipe, exit_policy=policy)
