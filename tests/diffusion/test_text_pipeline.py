"""Images from prompts: words to text tokens, the call as diffusers users know it, loading in a fresh process, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import uvit
from safetensors.torch import load_file
from tiny_texts import TOKENS, WIDTH, save_encoder, text_pipeline, tiny_encoder, tiny_tokenizer
from tree import ROOT

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.diffusion.latents import decode
from ee_diffusion.diffusion.methods import deediff
from ee_diffusion.diffusion.pipelines.prompts import encode_prompts
from ee_diffusion.diffusion.pipelines.text_to_image import EarlyExitTextPipeline

PROMPTS = ["red apple", "a blue car", "green hat"]
POLICY = deediff(0.6)


@pytest.fixture(scope="module")
def pipe() -> EarlyExitTextPipeline:
    return text_pipeline()


def call(pipe: EarlyExitTextPipeline, prompts=tuple(PROMPTS), *, guidance: float = 2.0, first: int = 0, **more):
    count = len(prompts) * more.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(first + number) for number in range(count)]
    options = {"generator": generators, "output_type": "pt"} | more
    return pipe(list(prompts), 3, guidance, **options)


def embeds(*prompts: str) -> torch.Tensor:
    return encode_prompts(tiny_tokenizer(), tiny_encoder(), prompts, num_tokens=TOKENS)


def test_prompts_become_a_mean_and_first_states_against_a_slow_loop():
    tokenizer, encoder = tiny_tokenizer(), tiny_encoder()
    texts = ["red", "a blue car", "a red apple a green hat a blue flag"]
    found = encode_prompts(tokenizer, encoder, texts, num_tokens=TOKENS)
    assert (found.shape, found.dtype) == ((3, TOKENS, WIDTH), torch.float32)
    for text, rows in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            states = encoder(ids).last_hidden_state[0].double()  # alone, so without padding
        wanted = [sum(states) / len(states), *states][:TOKENS]
        wanted = [row / (sum(value**2 for value in row) / WIDTH) ** 0.5 for row in wanted]
        expected = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
        for place, row in enumerate(wanted):
            expected[place] = row
        torch.testing.assert_close(rows.double(), expected, rtol=0, atol=2e-5)
    assert not encode_prompts(tokenizer, encoder, ["red"], num_tokens=6)[0, 4:].any()


def test_a_prompt_does_not_depend_on_its_batch_mates():
    both = embeds("red", "a red apple a green hat")
    torch.testing.assert_close(both[:1], embeds("red"), rtol=0, atol=2e-5)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("places", [16, 80])
def test_long_prompts_are_cut_to_what_the_encoder_reads_with_a_warning(places):
    """To 77 tokens, and to fewer where the encoder has fewer places."""
    encoder, tokenizer = tiny_encoder(places), tiny_tokenizer()
    longest = min(places, 77)
    fits = " ".join((["red", "apple"] * 40)[: longest - 2])  # with two special tokens
    with pytest.warns(UserWarning, match=f"1 of the prompts are longer than the {longest} tokens"):
        found = encode_prompts(tokenizer, encoder, [fits + " car", "hat"], num_tokens=TOKENS)
    assert torch.equal(found, encode_prompts(tokenizer, encoder, [fits, "hat"], num_tokens=TOKENS))


def test_the_prompt_decides(pipe):
    images = call(pipe).images
    assert images.shape == (3, 3, 32, 32)
    assert ((images >= 0) & (images <= 1)).all()
    other = call(pipe, ["blue flag", *PROMPTS[1:]]).images
    assert (other[0] - images[0]).abs().max() > 1e-3
    torch.testing.assert_close(other[1:], images[1:], rtol=0, atol=1e-4)


def test_guidance_is_the_formula_and_leads_away_from_the_negative_prompt(pipe):
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    shown = {"output_type": "latent", "latents": noise}
    found = pipe("red apple", 1, 2.5, negative_prompt="blue car", **shown).images
    time = torch.tensor([int(pipe.scheduler.timesteps[0])])
    with torch.no_grad():
        towards = pipe.transformer(noise, time, encoder_hidden_states=embeds("red apple")).sample
        away = pipe.transformer(noise, time, encoder_hidden_states=embeds("blue car")).sample
    guided = away + 2.5 * (towards - away)
    expected = pipe.scheduler.step(guided, time[0], noise).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = pipe("red apple", 1, 2.5, **shown).images
    assert torch.equal(plain, pipe("red apple", 1, 2.5, negative_prompt="", **shown).images)
    assert not torch.allclose(plain, found, atol=1e-3)
    alone = pipe("red apple", 1, 1.0, **shown).images
    torch.testing.assert_close(alone, pipe.scheduler.step(towards, time[0], noise).prev_sample, rtol=1e-4, atol=1e-4)


def test_embeddings_in_place_of_words_and_images_per_prompt(pipe):
    without = text_pipeline(text_encoder=None, tokenizer=None)
    given = {"prompt_embeds": embeds(*PROMPTS), "negative_prompt_embeds": embeds("blue")}
    generators = [torch.Generator().manual_seed(number) for number in range(6)]
    found = without(None, 3, 2.0, num_images_per_prompt=2, generator=generators, output_type="pt", **given).images
    expected = call(pipe, num_images_per_prompt=2, negative_prompt="blue").images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    single = call(pipe, [PROMPTS[1]], first=3, negative_prompt="blue").images
    torch.testing.assert_close(single[0], expected[3], rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_exits_stop_work_and_off_is_off(pipe, guidance):
    full, output = call(pipe, guidance=guidance), call(pipe, guidance=guidance, exit_policy=POLICY)
    assert full.trace is None
    assert len(output.trace.depths.unique()) >= 2
    assert torch.equal(call(pipe, guidance=guidance, exit_threshold=0.6).trace.depths, output.trace.depths)
    alone = [call(pipe, [prompt], guidance=guidance, first=n, exit_policy=POLICY) for n, prompt in enumerate(PROMPTS)]
    assert torch.equal(torch.cat([one.trace.depths for one in alone], dim=1), output.trace.depths)
    torch.testing.assert_close(torch.cat([one.images for one in alone]), output.images, rtol=0, atol=1e-3)
    never = call(pipe, guidance=guidance, exit_policy=deediff(0.0))
    assert torch.equal(call(pipe, guidance=guidance, exit_policy=Policy()).images, full.images)
    torch.testing.assert_close(never.images, full.images, rtol=0, atol=1e-4)
    assert "forward" not in pipe.transformer.__dict__


def test_output_types_callback_and_no_vae(pipe):
    tensor = call(pipe).images
    array = call(pipe, output_type="np").images
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    picture = call(pipe, output_type="pil", return_dict=False)[0][0]
    np.testing.assert_array_equal(np.array(picture), (array[0] * 255).round().astype("uint8"))
    latents = call(pipe, output_type="latent").images
    torch.testing.assert_close((decode(pipe.vae, latents) / 2 + 0.5).clamp(0, 1), tensor)
    seen = []

    def stop(pipeline, index, time, shown):
        seen.append(index)
        return {"latents": shown["latents"] * 0}

    assert call(pipe, callback_on_step_end=stop, output_type="latent").images.abs().max() == 0
    assert seen == [0, 1, 2]
    pixels = text_pipeline(vae=None)
    assert call(pixels).images.shape == (3, 4, 4, 4)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"prompt": None}, "prompt=None and prompt_embeds: give one of the two"),
        ({"prompt_embeds": torch.zeros(1, TOKENS, WIDTH)}, "give one of the two"),
        ({"prompt": []}, r"prompts \[\], expected at least one"),
        ({"prompt": ["red", 3]}, "each a str"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, TOKENS, 5)}, r"expected \(P, 4, 12\)"),
        ({"negative_prompt": ["a", "b"], "prompt": PROMPTS}, "2 negative prompts, expected 1 or 3"),
        ({"negative_prompt": "a", "guidance_scale": 1.0}, "it would be ignored"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"output_type": "jpeg"}, "output_type='jpeg', expected one of"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents is \(1, 4, 8, 8\)"),
        ({"generator": [torch.Generator()] * 2}, "2 generators, expected one for each of 1"),
        ({"exit_policy": POLICY, "exit_threshold": 0.1}, "not both"),
        ({"callback_on_step_end_tensor_inputs": ("noise",)}, "expected among"),
        ({"exit_policy": Policy(schedule=FixedDepth(99))}, "99"),
    ],
)
def test_bad_input_ends_in_words_before_any_block(pipe, change, told):
    ran = []
    handle = pipe.transformer.transformer_blocks[0].attn.register_forward_hook(lambda *facts: ran.append(facts))
    try:
        with pytest.raises(ValueError, match=told):
            pipe(**({"prompt": "red", "num_inference_steps": 1} | change))
    finally:
        handle.remove()
    assert not ran


def test_missing_or_foreign_components_are_named(pipe):
    with pytest.raises(ValueError, match=r"no text encoder to read prompt='red'.*text_encoder=AutoModel"):
        text_pipeline(text_encoder=None, tokenizer=None)("red", 1)
    wide = tiny_encoder()
    wide.config.hidden_size = 20
    with pytest.raises(ValueError, match="the text encoder is 20 wide, the transformer was trained with one of 12"):
        text_pipeline(text_encoder=wide)("red", 1)
    with pytest.raises(ValueError, match="this pipeline has no exits"):
        text_pipeline(exits=None)("red", 1, exit_policy=POLICY)
    with pytest.raises(ValueError, match="takes no text"):
        EarlyExitTextPipeline(uvit("unconditional"), pipe.scheduler)


ROUTES = {
    "direct": "pipe = EarlyExitTextPipeline.from_pretrained(folder, **words)",
    "custom": "pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline='pipelines/early_exit_text_pipeline.py', "
    "trust_remote_code=True, **words)",
}
SCRIPT = """
import sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer
from ee_diffusion import EarlyExitTextPipeline
from ee_diffusion.diffusion.methods import deediff
folder, encoder = sys.argv[1:]
words = {{}} if encoder == "inside" else {{
    "text_encoder": AutoModel.from_pretrained(encoder), "tokenizer": AutoTokenizer.from_pretrained(encoder)
}}
{route}
assert type(pipe) is EarlyExitTextPipeline
pipe.set_progress_bar_config(disable=True)
generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
out = pipe({prompts}, 3, 2.0, generator=generators, output_type="pt", exit_policy=deediff(0.6))
save_file({{"images": out.images, "depths": out.trace.depths}}, folder + "/found.safetensors")
"""


@pytest.mark.parametrize(
    "route, inside", [("direct", False), pytest.param("custom", True, marks=pytest.mark.slow)], ids=["direct", "custom"]
)
def test_saved_and_loaded_in_a_fresh_process(pipe, route, inside, tmp_path: Path):
    saved = pipe if inside else text_pipeline(text_encoder=None, tokenizer=None)
    saved.save_pretrained(tmp_path / "pipe")
    encoder = "inside" if inside else str(save_encoder(tmp_path / "encoder"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(route=ROUTES[route], prompts=PROMPTS), str(tmp_path / "pipe"), encoder],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = load_file(tmp_path / "pipe" / "found.safetensors"), call(pipe, exit_policy=POLICY)
    assert torch.equal(found["depths"], expected.trace.depths)
    torch.testing.assert_close(found["images"], expected.images, rtol=0, atol=1e-4)
