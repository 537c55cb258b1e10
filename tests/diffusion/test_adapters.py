"""Exits for any class: the formulas, what is saved and loaded, what is refused; and what attaching refuses of models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig, LayerSkipConfig
from diffusers.hooks import apply_layer_skip
from factories import randomise, uvit
from tiny_families import forward, inputs_of, model_named
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.adapter import TIME_WIDTH, AdapterExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.models.uvit import timestep_embedding


def exits_for(model: nn.Module, depths: tuple[int, ...] = (1, 3), rank: int = 3) -> AdapterExits:
    return randomise(AdapterExits.for_transformer(model, depths, rank=rank), seed=3).eval()


def test_formulas_by_a_slow_loop():
    exits = exits_for(model_named("SD3Transformer2DModel")).double()
    hidden, timestep = torch.randn(2, 4, 16, dtype=torch.float64), torch.tensor([900, 30])
    time = timestep_embedding(timestep, TIME_WIDTH).double()
    answers, certainties = torch.zeros_like(hidden), torch.zeros(2, dtype=torch.float64)
    adapter, linear = exits.heads[1], exits.uncertainty_modules[1]
    for row in range(2):
        for token in range(4):
            state = hidden[row, token]
            normal = (state - state.mean()) / torch.sqrt(((state - state.mean()) ** 2).mean() + 1e-5)
            inside = (
                adapter.down.weight @ normal + adapter.down.bias + adapter.time.weight @ time[row] + adapter.time.bias
            )
            inside = inside * 0.5 * (1 + torch.erf(inside / math.sqrt(2)))
            answers[row, token] = state + adapter.up.weight @ inside + adapter.up.bias
            logit = linear.weight[0] @ torch.cat([state, time[row]]) + linear.bias[0]
            certainties[row] -= torch.sigmoid(logit) / 4
    for context in (exits.context(timestep), {"timestep": timestep}):
        torch.testing.assert_close(exits.answer(1, hidden, context), answers, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(exits.confidence(1, hidden, context), 1 + certainties, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(1 - exits.uncertainty_map(1, hidden, timestep).mean(1), 1 + certainties)


def test_certainty_looks_at_image_tokens_alone():
    exits, hidden = exits_for(model_named("SD3Transformer2DModel")), torch.randn(2, 4, 16)
    context = exits.context(torch.tensor([5, 6])) | {"image_tokens": torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]]).bool()}
    expected = [1 - exits.uncertainty_map(0, hidden, torch.tensor([5, 6]))[0, 1:3].mean()]
    expected.append(1 - exits.uncertainty_map(0, hidden, torch.tensor([5, 6]))[1, :2].mean())
    torch.testing.assert_close(exits.confidence(0, hidden, context), torch.stack(expected))
    prefixed = exits_for(uvit())
    assert prefixed.uncertainty_map(0, torch.randn(2, 18, 16), torch.tensor([5, 6])).shape == (2, 16)


def test_untrained_and_without_adapters_an_answer_is_the_hidden_state():
    model, hidden = model_named("SD3Transformer2DModel"), torch.randn(2, 4, 16)
    for rank in (0, 5):
        exits = AdapterExits.for_transformer(model, (1, 3), rank=rank)
        assert torch.equal(exits.answer(0, hidden, exits.context(torch.tensor([5, 6]))), hidden)


def test_gradients_reach_adapters_and_uncertainty_modules():
    exits, hidden = exits_for(model_named("SD3Transformer2DModel")), torch.randn(2, 4, 16)
    context = exits.context(torch.tensor([5, 6]))
    (exits.answer(1, hidden, context).sum() + exits.confidence(1, hidden, context).sum()).backward()
    used = [*exits.heads[1].parameters(), exits.uncertainty_modules[1].weight]
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in used)


def test_saved_and_loaded(tmp_path: Path):
    exits = exits_for(model_named("FluxTransformer2DModel"), (0, 2, 5))
    exits.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "FluxTransformer2DModel" in card
    assert "after 0, 2, 5 blocks" in card
    loaded = AdapterExits.from_pretrained(tmp_path)
    assert (loaded.depths, loaded.space, dict(loaded.config)["rank"]) == ((0, 2, 5), "hidden", 3)
    for name, value in exits.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    (tmp_path / "README.md").write_text("my own")
    exits.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own"
    other = tmp_path / "other"
    exits_for(model_named("FluxTransformer2DModel"), (0, 2, 5), rank=0).save_pretrained(other)
    (other / "config.json").write_text((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="is no checkpoint of a AdapterExits"):
        AdapterExits.from_pretrained(other)


def test_bad_exits_are_refused():
    model = model_named("SD3Transformer2DModel")
    with pytest.raises(ValueError, match=r"exits at depths \(1, 5\), expected below 5"):
        AdapterExits.for_transformer(model, (1, 5), rank=2)
    with pytest.raises(ValueError, match="rank=-1"):
        AdapterExits.for_transformer(model, (1,), rank=-1)
    with pytest.raises(ValueError, match="expected ascending distinct"):
        AdapterExits.for_transformer(model, (2, 1), rank=2)
    with pytest.raises(
        ValueError, match="transformer_class is SD3Transformer2DModel, the model's is DiTTransformer2DModel"
    ):
        attach_exits(model_named("DiTTransformer2DModel"), exits_for(model))
    with pytest.raises(ValueError, match="hidden_dim is 16, the model's is 32"):
        attach_exits(model_named("FluxTransformer2DModel"), exits_for(model))


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "Lumina2Transformer2DModel"])
def test_heads_of_square_patches_do_not_fit_everything(name: str):
    with pytest.raises(
        ValueError, match=f"square patches of images of one size, which a {name} has not; use AdapterExits"
    ):
        DenoisingExits.for_transformer(model_named(name), (1,))


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"])
def test_half_precision(name: str):
    model = model_named(name).to(torch.bfloat16)
    exits = exits_for(model, tuple(range(5))).to(torch.bfloat16)
    inputs = inputs_of(name, [0, 1, 2, 3])
    inputs = {key: value.to(torch.bfloat16) if key != "timestep" else value for key, value in inputs.items()}
    with attach_exits(
        model, exits, Policy(Threshold(0.5), record_all=True), rows_per_sample=1, num_steps=1
    ) as attachment:
        plain = forward(model, inputs)
        scores = attachment.trace.scores
    assert scores.dtype == torch.float32
    best = scores[0].amax(0)  # (E,) the best score an image ever has
    policy = Policy(Threshold(float(best.min() + best.max()) / 2))
    with attach_exits(model, exits, policy, rows_per_sample=1, num_steps=1) as attachment:
        found = forward(model, inputs)
        assert len(attachment.trace.depths.unique()) >= 2
    assert found.dtype == plain.dtype == torch.bfloat16
    assert found.isfinite().all()
    assert "executed blocks per sample and step" in attachment.summary(), "also after it was detached"


# --- models that exits are not attached to


def refused(model: nn.Module, match: str) -> None:
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(ValueError, match=match):
        attach_exits(model, exits_for(model))
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_an_active_cache():
    flux = model_named("FluxTransformer2DModel")
    flux.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    refused(flux, r"a cache is enabled on this FluxTransformer2DModel.*disable_cache\(\)")
    flux.disable_cache()
    attach_exits(flux, exits_for(flux)).detach()
    dit = model_named("DiTTransformer2DModel")
    apply_layer_skip(dit, LayerSkipConfig(indices=[1], fqn="transformer_blocks"))
    refused(dit, "the diffusers hook 'layer_skip_hook' is on transformer_blocks.1")


def test_a_block_nobody_has_looked_at():
    model = model_named("DiTTransformer2DModel")

    class Mine(type(model.transformer_blocks[1])):
        pass

    model.transformer_blocks[1].__class__ = Mine
    refused(model, r"transformer_blocks\[1\] is a Mine; the table knows BasicTransformerBlock in DiTTransformer2DModel")


def test_blocks_that_fsdp_manages(tmp_path: Path):
    model = model_named("DiTTransformer2DModel")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model.transformer_blocks[0], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"transformer_blocks\[0\] is managed by FSDP"):
            attach_exits(model, exits_for(model))
    finally:
        torch.distributed.destroy_process_group()


def test_heads_on_another_device():
    model = model_named("DiTTransformer2DModel")
    exits = exits_for(model).to("meta")
    with attach_exits(model, exits) as attachment:
        session = attachment.start(Policy(), rows=torch.arange(2), num_steps=1)
        with attachment.use(session.step(0, 1.0)), pytest.raises(ValueError, match=r"the heads are on meta, .* on cpu"):
            model(torch.zeros(2, 4, 8, 8), timestep=torch.tensor([1]), class_labels=torch.tensor([0, 1]))
