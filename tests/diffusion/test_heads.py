"""Exits as a component: the UEM against slow loops, both variants, saving, heads of other models, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from factories import SIZE, dit, exits_for, uvit

from ee_diffusion.diffusion.exits.deediff import DenoisingExits

R, P, D, PREFIX = 3, 16, 16, 2
DEPTHS = (0, 3, 5)


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(R, PREFIX + P, D, generator=torch.Generator().manual_seed(0))
    return hidden, torch.tensor([3, 420, 999])


@pytest.mark.parametrize("variant", ["paper", "released"])
@torch.no_grad()
def test_the_uncertainty_module_is_its_formula(variant: str):
    exits = exits_for(uvit(), DEPTHS, variant)
    hidden, times = drawn()
    for exit in range(len(DEPTHS)):
        linear = exits.uncertainty_modules[exit]
        weight, bias = linear.weight.double(), linear.bias.double()
        found = exits.uncertainty_map(exit, hidden, times)
        assert found.shape == (R, 3, SIZE, SIZE)
        for row in range(R):
            image = torch.zeros(3, SIZE, SIZE, dtype=torch.float64)
            angles = [float(times[row]) * 10000 ** (-k / 8) for k in range(8)]
            time = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
            for patch in range(P):
                tokens = hidden[row, PREFIX + patch].double()
                seen = torch.cat([tokens, time]) if variant == "paper" else tokens
                values = 1 / (1 + (-(weight @ seen + bias)).exp())
                for place, value in enumerate(values):
                    down, right, channel = place // 6, place // 3 % 2, place % 3
                    image[channel, 2 * (patch // 4) + down, 2 * (patch % 4) + right] = value
            torch.testing.assert_close(found[row].double(), image, rtol=1e-4, atol=1e-5)
            mean = float(image.mean())
            expected = 1 - mean if variant == "paper" else mean
            for context in ({"timestep": times}, exits.context(times)):
                said = exits.confidence(exit, hidden, context)
                assert float(said[row]) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_packed_exits_say_the_same():
    _, times = drawn()
    odd = {"num_attention_heads": 3, "attention_head_dim": 5}
    for kind, config in (("class", {}), ("unconditional", {}), ("text", {}), ("class", odd)):
        model = uvit(kind, **config)
        exits = exits_for(model, DEPTHS)
        tokens = torch.randn(R, model.num_prefix_tokens + P, model.inner_dim)
        packed = exits.packed()
        assert (packed.depths, packed.space) == (exits.depths, exits.space)
        for exit in range(len(DEPTHS)):
            expected = exits.confidence(exit, tokens, {"timestep": times})
            said = packed.confidence(exit, tokens, packed.context(times))
            torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-6)
            alone = packed.confidence(exit, tokens[1:2], packed.context(times[1:2]))
            torch.testing.assert_close(alone[0], said[1], rtol=1e-6, atol=1e-6)
            assert torch.equal(packed.answer(exit, tokens, {}), exits.answer(exit, tokens, {}))
            together = times[1:2].expand(len(tokens))  # all rows at one time
            assert isinstance(packed.context(together)["time_part"], tuple), "made once, not for each row"
            expected = exits.confidence(exit, tokens, {"timestep": together})
            for context in (packed.context(together), packed.context(together.contiguous())):
                torch.testing.assert_close(packed.confidence(exit, tokens, context), expected, rtol=1e-5, atol=1e-6)
    for same in (exits_for(uvit(), DEPTHS, "released"), exits.to(torch.bfloat16)):
        assert same.packed() is same


def test_prefix_tokens_are_not_looked_at_and_time_only_by_the_paper():
    hidden, times = drawn()
    other = torch.cat([hidden[:, :PREFIX] + 1, hidden[:, PREFIX:]], 1)
    for variant in ("paper", "released"):
        exits = exits_for(uvit(), DEPTHS, variant)
        said = exits.confidence(1, hidden, {"timestep": times})
        assert torch.equal(exits.confidence(1, other, {"timestep": times}), said)
        later = exits.confidence(1, hidden, {"timestep": times + 100})
        assert torch.equal(later, said) == (variant == "released")


def test_spaces_and_answers():
    hidden, times = drawn()
    paper, released = exits_for(uvit(), DEPTHS), exits_for(uvit(), DEPTHS, "released")
    assert (paper.space, released.space) == ("output", "hidden")
    answer = paper.answer(1, hidden, {"timestep": times})
    assert answer.shape == (R, 3, SIZE, SIZE)
    assert not torch.equal(paper.answer(0, hidden, {"timestep": times}), answer), "a head of its own for every exit"
    assert released.answer(1, hidden, {"timestep": times}) is hidden
    assert (len(paper.heads), len(released.heads)) == (3, 0)


def test_gradients_of_the_released_uncertainty_stop_at_the_tokens():
    for variant in ("paper", "released"):
        exits = exits_for(uvit(), DEPTHS, variant)
        hidden, times = drawn()
        exits.uncertainty_map(1, hidden.requires_grad_(), times).sum().backward()
        assert (hidden.grad is None) == (variant == "released")
        assert exits.uncertainty_modules[1].weight.grad.any()


@pytest.mark.parametrize("variant", ["paper", "released"])
@torch.no_grad()
def test_save_and_load(variant: str, tmp_path):
    exits, (hidden, times) = exits_for(uvit(), DEPTHS, variant), drawn()
    exits.save_pretrained(tmp_path)
    assert "DenoisingExits.from_pretrained" in (tmp_path / "README.md").read_text()
    loaded = DenoisingExits.from_pretrained(tmp_path)
    assert (loaded.depths, loaded.space, loaded.config.variant) == (exits.depths, exits.space, variant)
    for exit in range(len(DEPTHS)):
        context = {"timestep": times}
        assert torch.equal(loaded.confidence(exit, hidden, context), exits.confidence(exit, hidden, context))
        assert torch.equal(loaded.answer(exit, hidden, context), exits.answer(exit, hidden, context))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(dtype):
    hidden, times = drawn()
    for variant in ("paper", "released"):
        exits = exits_for(uvit(), DEPTHS, variant)
        full = exits.confidence(1, hidden, {"timestep": times})
        exits = exits.to(dtype)
        said = exits.confidence(1, hidden.to(dtype), exits.context(times))
        assert said.dtype == dtype
        torch.testing.assert_close(said.float(), full, rtol=0, atol=0.02)
        assert exits.answer(1, hidden.to(dtype), {}).dtype == dtype


@pytest.mark.parametrize(
    "config",
    [
        {"depths": ()},
        {"depths": (3, 1)},
        {"depths": (1, 1)},
        {"depths": (-1, 2)},
        {"variant": "mine"},
        {"last_layer": True},
    ],
    ids=str,
)
def test_sizes_that_make_no_sense_are_refused(config):
    with pytest.raises(ValueError, match="expected"):
        DenoisingExits(hidden_dim=16, **config)


@pytest.mark.parametrize("depths", [(7,), (1, 8)], ids=str)
def test_an_exit_beyond_the_last_block_is_refused(depths):
    with pytest.raises(ValueError, match="below 7"):
        DenoisingExits.for_transformer(uvit(), depths)


def test_unknown_transformers_are_refused():
    with pytest.raises(ValueError, match="no family for Linear"):
        DenoisingExits.for_transformer(torch.nn.Linear(2, 2), (1,))


@pytest.mark.parametrize("change", [{"num_layers": 7, "attention_head_dim": 4}, {"patch_size": 4}, {"in_channels": 1}])
def test_heads_of_another_model_are_refused(change):
    exits = exits_for(uvit(), DEPTHS)
    exits.check_fits(uvit())
    with pytest.raises(ValueError, match="heads of another model"):
        exits.check_fits(uvit(**change))
    with pytest.raises(ValueError, match="num_prefix_tokens is 2, the model's is 1"):
        exits.check_fits(uvit("unconditional"))
    with pytest.raises(ValueError, match="heads of another model"):
        exits.check_fits(dit())


def damaged(folder, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "config.json"])
@pytest.mark.parametrize("make", [lambda: exits_for(uvit(), DEPTHS), uvit], ids=["exits", "uvit"])
def test_a_truncated_checkpoint_is_an_error(make, name: str, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    damaged(tmp_path, name)
    with pytest.raises((OSError, ValueError)):
        type(model).from_pretrained(tmp_path)


def test_a_foreign_checkpoint_is_an_error(tmp_path):
    uvit().save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        DenoisingExits.from_pretrained(tmp_path)


def test_a_foreign_checkpoint_is_an_error_for_the_transformer_too(tmp_path):
    exits_for(uvit(), DEPTHS).save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        type(uvit()).from_pretrained(tmp_path)
