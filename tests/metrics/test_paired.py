"""Values per image against slow float64 loops; properties of LPIPS."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ee_diffusion.metrics.image import PSNR_CAP, psnr, relative_squared_error, ssim, summary
from ee_diffusion.metrics.perceptual import LPIPS, load_lpips, lpips


def images(count: int, size: int = 16, *, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def noisy(clean: torch.Tensor, sigma: float) -> torch.Tensor:
    return (clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(9))).clamp(0, 1)


def slow_psnr(image: np.ndarray, other: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(image.ravel(), other.ravel(), strict=True):
        total += (a - b) ** 2
    return 10 * math.log10(1 / (total / image.size))


def slow_ssim(image: np.ndarray, other: np.ndarray) -> float:
    """Windows that reach over the border see the mirrored image (torchmetrics' choice, as scikit-image's `gaussian_weights`)."""
    radius = 5
    line = np.exp(-((np.arange(11) - radius) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    c1, c2, found = 0.01**2, 0.03**2, []
    for x, y in zip(image, other, strict=True):
        x, y = (np.pad(plane, radius, mode="reflect") for plane in (x, y))
        for row in range(image.shape[1]):
            for column in range(image.shape[2]):
                a, b = (plane[row : row + 11, column : column + 11] for plane in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
                found.append(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(found))


def test_psnr_equals_a_slow_loop():
    left = images(3)
    right = noisy(left, 0.1)
    slow = [slow_psnr(a, b) for a, b in zip(left.double().numpy(), right.double().numpy(), strict=True)]
    np.testing.assert_allclose(psnr(left, right).numpy(), slow, rtol=1e-6)  # torchmetrics takes log(10) in float32


def test_psnr_of_identical_images_is_the_cap_and_of_one_bit_below_it():
    left = (images(2) * 255).round() / 255
    right = left.clone()
    right[1, 0, 0, 0] += 1 / 255 if right[1, 0, 0, 0] < 0.5 else -1 / 255
    values = psnr(left, right)
    assert values[0] == PSNR_CAP
    assert values[1] == pytest.approx(20 * math.log10(255) + 10 * math.log10(3 * 16 * 16), abs=1e-3)
    assert values.dtype == torch.float64


def test_ssim_equals_a_slow_loop():
    left = images(2, 13)
    right = noisy(left, 0.2)
    slow = [slow_ssim(a, b) for a, b in zip(left.double().numpy(), right.double().numpy(), strict=True)]
    np.testing.assert_allclose(ssim(left, right).numpy(), slow, rtol=1e-6)


@pytest.mark.parametrize("measure", [psnr, ssim, relative_squared_error])
def test_values_do_not_depend_on_batch_mates(measure):
    left, right = images(5), images(5, seed=1)
    together = measure(left, right)
    alone = torch.cat([measure(left[i : i + 1], right[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert together.shape == (5,)


def test_ssim_of_more_images_than_one_chunk(monkeypatch: pytest.MonkeyPatch):
    left, right = images(5), images(5, seed=1)
    whole = ssim(left, right)
    monkeypatch.setattr("ee_diffusion.metrics.image._CHUNK", 2)
    torch.testing.assert_close(ssim(left, right), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ssim(left, left), torch.ones(5, dtype=torch.float64))


def test_relative_squared_error_equals_a_slow_loop():
    left, right = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    for i, found in enumerate(relative_squared_error(left, right).tolist()):
        pairs = list(zip(left[i].double().flatten().tolist(), right[i].double().flatten().tolist(), strict=True))
        assert found == pytest.approx(sum((a - b) ** 2 for a, b in pairs) / sum(b**2 for _, b in pairs), rel=1e-12)
    right[1] = 0
    with pytest.raises(ValueError, match="reference 1 is zero"):
        relative_squared_error(left, right)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_bad_pairs_are_refused(measure):
    left = images(2)
    with pytest.raises(ValueError, match="equal shapes"):
        measure(left, images(3))
    with pytest.raises(ValueError, match="equal shapes"):
        measure(left[:0], left[:0])
    with pytest.raises(ValueError, match="reference span "):
        measure(left, left * 2 - 1)
    with pytest.raises(ValueError, match="images span nan"):
        measure(left * math.nan, left)
    with pytest.raises(ValueError, match="expected float"):
        measure((left * 255).byte(), (left * 255).byte())


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match="11x11"):
        ssim(images(2, 10), images(2, 10))


def test_summary_equals_a_slow_loop():
    values = torch.tensor([1.0, 2.0, 4.0, 7.0])
    found = summary(values)
    mean = (1 + 2 + 4 + 7) / 4
    deviation = math.sqrt(sum((v - mean) ** 2 for v in (1, 2, 4, 7)) / 3)
    assert found.mean == pytest.approx(mean)
    assert found.high - found.mean == pytest.approx(1.959964 * deviation / 2)
    assert found.mean - found.low == pytest.approx(1.959964 * deviation / 2)
    assert found.count == 4
    assert (summary(values[:1]).low, summary(values[:1]).high) == (None, None)
    for bad in (values[:0], values[None], torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="values"):
            summary(bad)


def test_summary_covers_the_truth_as_often_as_it_says():
    draws = torch.randn(2000, 40, generator=torch.Generator().manual_seed(3)) + 5
    inside = [(s := summary(row)).low <= 5 <= s.high for row in draws]
    assert 0.925 < sum(inside) / len(inside) < 0.965


# --- LPIPS

WIDTHS = (4, 3, 2, 3, 2)


def small_lpips() -> LPIPS:
    torch.manual_seed(4)
    network = LPIPS(WIDTHS)
    with torch.no_grad():
        for index in range(5):
            network.get_submodule(f"lin{index}").weight.abs_()
    return network.eval()


def slow_convolution(planes: np.ndarray, weight: np.ndarray, bias: np.ndarray, *, stride: int, padding: int):
    planes = np.pad(planes, ((0, 0), (padding, padding), (padding, padding)))
    kernel = weight.shape[-1]
    side = (planes.shape[1] - kernel) // stride + 1
    out = np.zeros((len(weight), side, side))
    for channel in range(len(weight)):
        for row in range(side):
            for column in range(side):
                patch = planes[:, row * stride : row * stride + kernel, column * stride : column * stride + kernel]
                out[channel, row, column] = (patch * weight[channel]).sum() + bias[channel]
    return np.maximum(out, 0)


def slow_pool(planes: np.ndarray) -> np.ndarray:
    side = (planes.shape[1] - 3) // 2 + 1
    out = np.zeros((len(planes), side, side))
    for row in range(side):
        for column in range(side):
            out[:, row, column] = planes[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].max(axis=(1, 2))
    return out


def slow_lpips(state: dict[str, np.ndarray], image: np.ndarray, other: np.ndarray) -> float:
    settings = [(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    maps = [((2 * planes - 1) - shift[:, None, None]) / scale[:, None, None] for planes in (image, other)]
    total = 0.0
    for index, (stride, padding) in enumerate(settings):
        if index in (1, 2):
            maps = [slow_pool(planes) for planes in maps]
        weight, bias = state[f"conv{index}.weight"], state[f"conv{index}.bias"]
        maps = [slow_convolution(planes, weight, bias, stride=stride, padding=padding) for planes in maps]
        side, terms = maps[0].shape[1], []
        for row in range(side):
            for column in range(side):
                a, b = (planes[:, row, column] for planes in maps)
                a, b = (v / (math.sqrt((v**2).sum()) + 1e-10) for v in (a, b))
                terms.append((state[f"lin{index}.weight"][0, :, 0, 0] * (a - b) ** 2).sum())
        total += sum(terms) / len(terms)
    return total


@pytest.mark.parametrize("size", [32, 40])
def test_lpips_equals_a_slow_reading(size: int):
    network = small_lpips().double()
    left, right = images(2, size).double(), images(2, size, seed=1).double()
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    slow = [slow_lpips(state, a, b) for a, b in zip(left.numpy(), right.numpy(), strict=True)]
    found = lpips(network, left, right, batch_size=1)
    assert min(slow) > 1e-3
    np.testing.assert_allclose(found.numpy(), slow, rtol=1e-6)  # shift and scale are float32 constants


def test_bad_pairs_for_lpips_are_refused():
    network = small_lpips()
    with pytest.raises(ValueError, match="31x31"):
        network(images(1, 30), images(1, 30))
    with pytest.raises(ValueError, match="reference span "):
        network(images(1, 32), images(1, 32) * 2)
    with pytest.raises(ValueError, match="equal shapes"):
        lpips(network, images(2, 32), images(1, 32))
    black = torch.zeros(2, 3, 32, 32)
    for odd in (torch.uint8, torch.int64):  # black in whatever dtype lies in [0, 1]
        with pytest.raises(ValueError, match=f"reference are {odd}, expected floating point"):
            lpips(network, black, black.to(odd))
    seen = []
    network.register_forward_pre_hook(lambda *_: seen.append(1))
    with pytest.raises(ValueError, match="images span 0 to 2"):
        lpips(network, torch.cat([black, black + 2]), torch.cat([black, black]), batch_size=2)
    assert not seen, "refused before any work"


@pytest.mark.data
def test_lpips_is_zero_for_identical_images_and_grows_with_noise(data_folder: Path):
    network = load_lpips(data_folder)
    clean = images(4, 32)
    assert lpips(network, clean, clean).abs().max() == 0
    values = torch.stack([lpips(network, noisy(clean, sigma), clean) for sigma in (0.02, 0.05, 0.1, 0.2)])
    assert (values[1:] > values[:-1]).all()
    torch.testing.assert_close(
        lpips(network, noisy(clean, 0.1), clean), lpips(network, clean, noisy(clean, 0.1)), rtol=1e-5, atol=1e-7
    )
