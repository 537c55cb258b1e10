"""Draws are functions of the sample's key alone, and look like what they claim to be. The order is a function of (seed, step)."""

from __future__ import annotations

import math

import pytest
import torch
from training.tiny_run import tiny_source

from ee_diffusion.training.order import Order
from ee_diffusion.training.rng import Stream, mix, normals, sample_keys, scalar_key, uniforms

MASK = (1 << 64) - 1


def splitmix64(word: int) -> int:
    """The published finaliser in unbounded integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def test_mix_is_splitmix64():
    words = torch.tensor([0, 1, -1, 2**62, -(2**63), 123456789])
    assert [int(word) & MASK for word in mix(words)] == [splitmix64(int(word) & MASK) for word in words]
    # the first output of the reference implementation for seed 0
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_a_draw_does_not_depend_on_batch_mates():
    keys = sample_keys(torch.arange(10), 0)
    together = normals(keys, Stream.NOISE, (3, 5, 5))
    for i in range(10):
        torch.testing.assert_close(normals(keys[i : i + 1], Stream.NOISE, (3, 5, 5))[0], together[i], rtol=0, atol=1e-6)
        assert uniforms(keys[i : i + 1], Stream.FLIP)[0] == uniforms(keys, Stream.FLIP)[i]


def test_normals_are_standard_normal_and_uncorrelated():
    keys = sample_keys(torch.arange(2000), 3)
    values = normals(keys, Stream.NOISE, (101,)).double()  # (B, odd)
    n = values.numel()
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / n)
    ordered, expected = values.flatten().sort().values, (torch.arange(n) + 0.5).double() / n
    assert (torch.special.ndtr(ordered) - expected).abs().max() < 2 / math.sqrt(n)  # Kolmogorov and Smirnov
    correlation = (values.T @ values) / len(values) - torch.eye(101)
    assert correlation.abs().max() < 6 / math.sqrt(len(values))
    neighbours = (values[1:] * values[:-1]).mean()
    assert abs(neighbours) < 5 / math.sqrt(n)


def test_uniforms_fill_the_interval_and_streams_differ():
    keys = sample_keys(torch.arange(20_000), 0)
    draws = {stream: uniforms(keys, stream).double() for stream in (Stream.TIMESTEP, Stream.LABEL_DROP, Stream.FLIP)}
    for values in draws.values():
        assert values.min() >= 0
        assert values.max() < 1
        gaps = (values.sort().values - torch.arange(20_000) / 20_000).abs().max()
        assert gaps < 2 / math.sqrt(20_000)
    columns = torch.stack(list(draws.values()))
    assert (torch.corrcoef(columns) - torch.eye(3)).abs().max() < 5 / math.sqrt(20_000)


def test_keys_differ_by_seed_and_position():
    keys = torch.cat([sample_keys(torch.arange(50_000), seed) for seed in range(3)])
    assert len(keys.unique()) == len(keys)
    numbers = {scalar_key(seed, stream, n) for seed in range(4) for stream in Stream for n in range(50)}
    assert len(numbers) == 4 * len(Stream) * 50


def test_a_source_draws_by_key_alone():
    source, keys = tiny_source(), sample_keys(torch.arange(6), 0)
    indices = torch.tensor([5, 9, 5, 0, 63, 1])
    whole, part = source.batch(indices, keys), source.batch(indices[2:4], keys[2:4])
    assert set(whole) == {"images", "noise", "uniform", "key", "class_labels", "label_drop"}
    for name, values in whole.items():
        torch.testing.assert_close(part[name], values[2:4], rtol=0, atol=1e-6)
    assert whole["images"].min() >= -1
    assert whole["images"].max() <= 1
    assert not torch.equal(whole["noise"][0], whole["noise"][2])  # the same image at two positions


def test_half_of_the_images_are_mirrored():
    source, keys = tiny_source(), sample_keys(torch.arange(1000), 0)
    images = source.batch(torch.zeros(1000, dtype=torch.int64), keys)["images"]
    plain = source.images[0].float() / 127.5 - 1
    mirrored = sum(torch.equal(image, plain.flip(-1)) for image in images)
    assert sum(torch.equal(image, plain) for image in images) == 1000 - mirrored
    assert 420 < mirrored < 580


def positions_of(order: Order, step: int) -> list[int]:
    parts = [order.positions(step, m, r) for m in range(order.micro_steps) for r in range(order.ranks)]
    return torch.cat(parts).tolist()


@pytest.mark.parametrize("ranks, micro_steps, batch", [(1, 1, 12), (2, 1, 6), (1, 3, 4), (3, 2, 2)])
def test_every_split_of_a_step_holds_the_same_samples(ranks, micro_steps, batch):
    order = Order(10, 5, batch, ranks=ranks, micro_steps=micro_steps)
    for step in (0, 3, 7):
        assert sorted(positions_of(order, step)) == list(range(12 * step, 12 * step + 12))


def test_every_epoch_is_a_permutation_of_its_own_and_pure():
    order, again = Order(10, 5, 4), Order(10, 5, 4)
    stream = torch.cat([order.indices(order.positions(step, 0, 0)) for step in range(10)])
    epochs = stream.reshape(4, 10).tolist()
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert again.indices(again.positions(7, 0, 0)).tolist() == stream[28:32].tolist()
    other = Order(10, 6, 4)
    assert other.indices(torch.arange(10)).tolist() != epochs[0]


@pytest.mark.parametrize("bad", [{"size": 0}, {"batch": 0}, {"ranks": 0}, {"micro_steps": 0}])
def test_order_refuses_empty(bad):
    arguments = {"size": 4, "seed": 0, "batch": 2, "ranks": 1, "micro_steps": 1} | bad
    with pytest.raises(ValueError, match="at least 1"):
        Order(arguments.pop("size"), arguments.pop("seed"), arguments.pop("batch"), **arguments)
