"""Latents: TAESD from its two files, encoding as a pipeline decodes, noised data as states, PSNR against its formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, HeunDiscreteScheduler
from factories import NULL_CLASS, pipeline
from safetensors.torch import save_file
from stock import dit_pipeline, tiny_vae

from ee_diffusion.diffusion.latents import NoisedStates, decode, encode, enlarged, load_taesd, psnr


def batch(size: int) -> dict[str, torch.Tensor]:
    return {
        "images": torch.randn(3, 3, size, size).clamp(-1, 1),
        "noise": torch.randn(3, 3, size, size),
        "uniform": torch.tensor([0.0, 0.5, 0.999]),
        "class_labels": torch.tensor([0, 1, 2]),
        "label_drop": torch.tensor([0.9, 0.05, 0.9]),
        "key": torch.tensor([1, 2, 3]),
    }


def test_psnr_and_size():
    images = torch.zeros(2, 3, 4, 4)
    others = images + torch.tensor([0.2, 0.02])[:, None, None, None]
    expected = [20 * math.log10(2 / 0.2), 20 * math.log10(2 / 0.02)]
    assert psnr(images, others).tolist() == pytest.approx(expected, rel=1e-5)
    large = enlarged(torch.randn(2, 3, 4, 4).clamp(-1, 1), 16)
    assert large.shape == (2, 3, 16, 16)
    assert large.abs().max() <= 1


@torch.no_grad()
def test_encoding_is_the_inverse_scaling_of_decoding():
    vae, images = tiny_vae(), torch.randn(2, 3, 16, 16).clamp(-1, 1)
    vae.register_to_config(scaling_factor=0.5)
    latents = encode(vae, images)
    torch.testing.assert_close(latents, vae.encode(images).latents * 0.5)
    torch.testing.assert_close(decode(vae, latents), vae.decode(vae.encode(images).latents).sample.clamp(-1, 1))
    kl = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).eval()
    expected = kl.encode(images).latent_dist.mode() * kl.config.scaling_factor
    assert torch.equal(encode(kl, images), expected)
    with pytest.raises(ValueError, match="Linear, expected AutoencoderTiny"):
        encode(torch.nn.Linear(2, 2), images)


@pytest.mark.data
@torch.no_grad()
def test_taesd_brings_images_back(data_folder: Path):
    if not (data_folder / "vae").is_dir():
        pytest.skip("needs vae/ in the data folder")
    vae = load_taesd(data_folder / "vae")
    ramp = torch.linspace(-0.8, 0.8, 64)
    image = torch.stack([ramp[None].expand(64, -1), ramp[:, None].expand(-1, 64), torch.zeros(64, 64)])[None]
    latents = encode(vae, image)
    assert latents.shape == (1, 4, 8, 8)
    assert float(psnr(image, decode(vae, latents))) > 25


def test_folders_that_hold_no_taesd(tmp_path: Path):
    with pytest.raises(ValueError, match=r"lacks .*taesd_decoder"):
        load_taesd(tmp_path)
    for name in ("encoder", "decoder"):
        save_file({"0.weight": torch.zeros(2)}, tmp_path / f"taesd_{name}.safetensors")
    with pytest.raises(ValueError, match="holds no TAESD"):
        load_taesd(tmp_path)
    (tmp_path / "taesd_encoder.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="holds no TAESD"):
        load_taesd(tmp_path)


def test_the_diffusers_layout(tmp_path: Path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path)
    loaded = load_taesd(tmp_path)
    assert all(map(torch.equal, vae.parameters(), loaded.parameters()))


@torch.no_grad()
def test_noised_pixels():
    given, pipe = batch(8), pipeline()
    states = NoisedStates(pipe, class_drop=0.1)(given)
    times = torch.tensor([0, 500, 999])
    expected = DDIMScheduler().add_noise(given["images"], given["noise"], times)
    torch.testing.assert_close(states["hidden_states"][:, 0], expected)
    assert states["timestep"][:, 0].tolist() == times.tolist()
    assert states["class_labels"][:, 0].tolist() == [0, NULL_CLASS, 2]
    assert torch.equal(states["key"], given["key"])
    unconditional = NoisedStates(pipeline("unconditional"), class_drop=0.0)
    assert "class_labels" not in unconditional(
        {n: v for n, v in given.items() if n not in ("class_labels", "label_drop")}
    )


def test_the_noise_is_that_of_the_pipelines_schedule_whatever_its_class():
    """A scheduler left at its class's defaults, which are not DDPM's."""
    pipe = pipeline()
    pipe.scheduler = HeunDiscreteScheduler()
    table = NoisedStates(pipe, class_drop=0.0).scheduler.alphas_cumprod
    torch.testing.assert_close(table, pipe.scheduler.alphas_cumprod)


@torch.no_grad()
def test_noised_latents():
    given, pipe = batch(16), dit_pipeline()
    states = NoisedStates(pipe, class_drop=0.1)(given)
    assert states["hidden_states"].shape == (3, 1, 4, 8, 8)
    assert states["class_labels"][:, 0].tolist() == [0, 1000, 2]
    clean = encode(pipe.vae, given["images"])
    alpha = pipe.scheduler.alphas_cumprod[500]
    noise = (states["hidden_states"][1, 0] - alpha.sqrt() * clean[1]) / (1 - alpha).sqrt()
    torch.testing.assert_close(noise.flatten(), given["noise"][1].flatten()[:256], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drop, kind", [(-0.1, "class"), (1.5, "class"), (0.1, "unconditional")])
def test_drops_that_make_no_sense(drop: float, kind: str):
    with pytest.raises(ValueError, match=f"class_drop={drop}"):
        NoisedStates(pipeline(kind), class_drop=drop)
