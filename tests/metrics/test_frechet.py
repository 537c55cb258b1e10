"""Distances of feature sets against slow float64 readings of the papers; statistics kept on disk."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ee_diffusion.metrics import references
from ee_diffusion.metrics.distribution import (
    Statistics,
    frechet_distance,
    frechet_interval,
    kernel_distance,
    paired_difference,
)
from ee_diffusion.metrics.features import ResNetFeatures, extract, fingerprint
from ee_diffusion.metrics.reference_models import CifarResNet
from ee_diffusion.metrics.references import reference, reference_path


def features(count: int, width: int = 4, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mix + shift


def slow_moments(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = rows.double().numpy()
    count, width = values.shape
    mean = np.array([sum(values[:, i]) / count for i in range(width)])
    covariance = np.zeros((width, width))
    for row in values:
        for i in range(width):
            for j in range(width):
                covariance[i, j] += (row[i] - mean[i]) * (row[j] - mean[j]) / (count - 1)
    return mean, covariance


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(values.clip(min=0))) @ vectors.T


def slow_frechet(left: torch.Tensor, right: torch.Tensor) -> float:
    (mean, first), (other, second) = slow_moments(left), slow_moments(right)
    root = symmetric_root(first)
    cross = symmetric_root(root @ second @ root)
    return float(((mean - other) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * np.trace(cross))


def slow_kid(left: torch.Tensor, right: torch.Tensor) -> float:
    """The unbiased estimate over all samples: diagonal terms are left out of the within-set sums only."""
    x, y = left.double().numpy(), right.double().numpy()
    m, n, width = len(x), len(y), x.shape[1]

    def kernel(a, b):
        return (sum(a[i] * b[i] for i in range(width)) / width + 1) ** 3

    within_x = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    across = sum(kernel(a, b) for a in x for b in y) / (m * n)
    return float(within_x + within_y - 2 * across)


def test_statistics_equal_a_slow_loop():
    rows = features(9)
    found, (mean, covariance) = Statistics.of(rows), slow_moments(rows)
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(found.covariance.numpy(), covariance, rtol=1e-12)
    assert found.count == 9
    assert found.mean.dtype == found.covariance.dtype == torch.float64


def test_frechet_distance_equals_a_slow_reading():
    left, right = features(40, shift=0.3), features(31, seed=1)
    found = frechet_distance(left, Statistics.of(right))
    assert found.value == pytest.approx(slow_frechet(left, right), rel=1e-9)
    assert (found.count, found.reference_count, found.num_features) == (40, 31, 4)


def test_frechet_distance_survives_large_offsets():
    left, right = features(40, shift=1e4), features(31, seed=1, shift=1e4)
    assert frechet_distance(left, Statistics.of(right)).value == pytest.approx(slow_frechet(left, right), rel=1e-4)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_a_shift_adds_its_square():
    rows = features(50)
    same = Statistics.of(rows)
    assert frechet_distance(rows, same).value == pytest.approx(0, abs=1e-6)
    assert frechet_distance(rows + 0.5, same).value == pytest.approx(4 * 0.25, abs=1e-5)


def test_more_features_than_one_chunk(monkeypatch: pytest.MonkeyPatch):
    left, right = features(40), Statistics.of(features(31, seed=1))
    whole = frechet_distance(left, right).value
    monkeypatch.setattr("ee_diffusion.metrics.distribution.CHUNK", 7)
    assert frechet_distance(left, right).value == pytest.approx(whole, rel=1e-9)


def test_kernel_distance_equals_a_slow_reading():
    left, right = features(12), features(12, seed=1, shift=0.4)
    found = kernel_distance(left, right, subsets=3, subset_size=12, seed=0)  # subsets of everything: all alike
    assert found.mean == pytest.approx(slow_kid(left, right), rel=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9)
    assert (found.count, found.reference_count, found.subset_size, found.subsets) == (12, 12, 12, 3)


def test_kernel_distance_follows_its_seed_and_leaves_the_global_generator():
    left, right = features(30), features(30, seed=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = kernel_distance(left, right, subsets=4, subset_size=10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert kernel_distance(left, right, subsets=4, subset_size=10, seed=3) == first
    assert kernel_distance(left, right, subsets=4, subset_size=10, seed=4) != first


@pytest.mark.parametrize("bad", [torch.zeros(1, 4), torch.zeros(5), torch.full((5, 4), math.nan)])
def test_bad_features_are_refused(bad: torch.Tensor):
    with pytest.raises(ValueError, match="features"):
        frechet_distance(bad, Statistics.of(features(9)))
    with pytest.raises(ValueError, match="features"):
        Statistics.of(bad)


def test_misfits_are_refused():
    with pytest.raises(ValueError, match=r"expected \(M, 4\)"):
        frechet_distance(features(9, 3), Statistics.of(features(9)))
    with pytest.raises(ValueError, match="F differs"):
        kernel_distance(features(9, 3), features(9), subsets=1, subset_size=4, seed=0)
    with pytest.raises(ValueError, match=r"2\.\.9"):
        kernel_distance(features(9), features(12), subsets=1, subset_size=10, seed=0)


# --- statistics on disk


@pytest.fixture
def network() -> ResNetFeatures:
    torch.manual_seed(1)
    return ResNetFeatures(CifarResNet(1)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def test_reference_is_computed_once(tmp_path: Path, network, images, monkeypatch: pytest.MonkeyPatch):
    path = reference_path(tmp_path / "cache", "set", network)
    first = reference(path, images, network, keep=4, batch_size=2)
    assert first.origin == f"computed: no file at {path}"
    expected = extract(network, images, batch_size=6)
    torch.testing.assert_close(first.features, expected[:4])
    torch.testing.assert_close(first.statistics.mean, expected.double().mean(0))
    monkeypatch.setattr(references, "extract", lambda *a, **k: pytest.fail("computed again"))
    second = reference(path, images, network, keep=3, batch_size=2)
    assert second.origin == "cache"
    assert torch.equal(second.features, first.features[:3])
    assert torch.equal(second.statistics.mean, first.statistics.mean)
    assert torch.equal(second.statistics.covariance, first.statistics.covariance)
    assert second.statistics.count == 6
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_another_fingerprint_is_computed_anew(tmp_path: Path, network, images):
    path = tmp_path / "set.safetensors"
    reference(path, images, network, keep=0, batch_size=3)
    other = images.clone()
    other[5, 2, 31, 31] ^= 1
    assert "other images" in reference(path, other, network, keep=0, batch_size=3).origin
    assert "other images" in reference(path, images[:5], network, keep=0, batch_size=3).origin
    with torch.no_grad():
        network.classifier.layer3[0].conv1.weight[0, 0, 0, 0] += 1e-3
    assert "other images" in reference(path, images[:5], network, keep=0, batch_size=3).origin
    network.preprocessing += " "
    assert "other images" in reference(path, images[:5], network, keep=0, batch_size=3).origin
    assert reference(path, images[:5], network, keep=0, batch_size=3).origin == "cache"


def test_more_features_than_kept_are_computed_anew(tmp_path: Path, network, images):
    path = tmp_path / "set.safetensors"
    reference(path, images, network, keep=2, batch_size=3)
    assert "keeps 2 features, 5 are asked for" in reference(path, images, network, keep=5, batch_size=3).origin


def test_damaged_caches_are_computed_anew(tmp_path: Path, network, images):
    path = tmp_path / "set.safetensors"
    sound = reference(path, images, network, keep=2, batch_size=3)
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for content in (whole[:-40], whole[:5], b"", flipped):
        path.write_bytes(content)
        again = reference(path, images, network, keep=2, batch_size=3)
        assert "damaged" in again.origin
        assert torch.equal(again.statistics.mean, sound.statistics.mean)
        assert reference(path, images, network, keep=2, batch_size=3).origin == "cache"
    save_file(load_file(path), path)
    assert "format None" in reference(path, images, network, keep=2, batch_size=3).origin


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    code = (
        "import os, sys; from ee_diffusion.core.io import write_whole\n"
        "def fill(beside):\n    beside.write_text('half'); os._exit(9)\n"
        "write_whole(sys.argv[1], fill)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 9
    assert path.read_text() == "old"


def test_fingerprint_needs_bytes(network, images):
    with pytest.raises(ValueError, match="uint8"):
        fingerprint(images.float(), network)
    with pytest.raises(ValueError, match=r"keep=7, expected 0\.\.6"):
        reference("unused", images, network, keep=7, batch_size=1)


def test_extract_does_not_depend_on_the_batch_size_and_runs_the_progress_bar(network: nn.Module, images):
    seen = []

    def bar(batches):
        for batch in batches:
            seen.append(batch)
            yield batch

    whole = extract(network, images, batch_size=6)
    torch.testing.assert_close(extract(network, images, batch_size=4, progress=bar), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(extract(network, images.float() / 255, batch_size=6), whole)
    assert seen == [0, 4]
    assert whole.dtype == torch.float32
    with pytest.raises(ValueError, match="expected at least one"):
        extract(network, images[:0], batch_size=4)


def test_the_bootstrap_interval_has_the_width_of_fresh_draws():
    known = Statistics.of(features(2000, shift=0.3))
    fresh = [frechet_distance(features(4000)[order], known).value for order in torch.arange(4000).split(100)]
    found, low, high = frechet_interval(features(4000)[:100], known, resamples=60, seed=0)
    assert found == frechet_distance(features(4000)[:100], known)
    assert low < found.value < high
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(fresh, ddof=1), rel=0.5)
    assert frechet_interval(features(4000)[:100], known, resamples=60, seed=0) == (found, low, high)
    with pytest.raises(ValueError, match="resamples=1, expected at least 2"):
        frechet_interval(features(100), known, resamples=1, seed=0)


def test_what_pairs_share_cancels_in_their_difference():
    """Against fresh pairs; an interval that forgot the pairing would be several times wider."""
    known, one = Statistics.of(features(2000, shift=1.0)), features(16_000)
    two = one + 0.3 * features(16_000, seed=5)
    pairs = [(one[order], two[order]) for order in torch.arange(16_000).split(400)]
    fresh = [frechet_distance(b, known).value - frechet_distance(a, known).value for a, b in pairs]
    low, high = paired_difference(two[:400], one[:400], known, resamples=60, seed=0)
    assert (low + high) / 2 == pytest.approx(fresh[0])
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(fresh, ddof=1), rel=0.5)
    alone = [np.std([frechet_distance(pair[side], known).value for pair in pairs], ddof=1) for side in (0, 1)]
    assert high - low < 1.96 * np.hypot(*alone)
    assert paired_difference(one[:400], one[:400], known, resamples=5, seed=0) == (0, 0)
    with pytest.raises(ValueError, match="expected pairs"):
        paired_difference(one[:400], two[:399], known, resamples=5, seed=0)
    with pytest.raises(ValueError, match="resamples=1, expected at least 2"):
        paired_difference(one[:400], two[:400], known, resamples=1, seed=0)
