"""Low-rank adapters: fresh ones change nothing, the teacher never sees them, merging keeps what they learned; without peft a clear word."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils import is_peft_available
from factories import dit, exits_for, images_of, uvit
from tiny_families import model_named

from ee_diffusion.diffusion.distillation.objective import DistillationObjective
from ee_diffusion.diffusion.model_specs import model_spec_of
from ee_diffusion.training import lora
from ee_diffusion.training.lora import add_lora, merged

needs_peft = pytest.mark.skipif(not is_peft_available(), reason="needs peft (ee-diffusion[lora])")
MODELS = {"uvit": uvit, "dit": dit}
BLOCKS = ["transformer_blocks"]


def inputs_of() -> dict[str, torch.Tensor]:
    drawn = images_of([0, 1, 2], 0, 1)
    return {"hidden_states": drawn["pixels"], "timestep": drawn["timestep"], "class_labels": drawn["labels"]}


def adapted(kind: str) -> torch.nn.Module:
    """With adapters that have learned something."""
    model = add_lora(MODELS[kind](), BLOCKS, rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


@needs_peft
@pytest.mark.parametrize("kind", MODELS)
def test_fresh_adapters_change_nothing_and_they_alone_train(kind: str):
    model = MODELS[kind]()
    before = model(**inputs_of()).sample
    add_lora(model, BLOCKS, rank=2)
    assert torch.equal(model(**inputs_of()).sample, before)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name and name.startswith("transformer_blocks.") for name in names)


@needs_peft
def test_a_second_list_of_blocks_adapts_too():
    model = model_named("FluxTransformer2DModel")
    add_lora(model, model_spec_of(model).lists, rank=2)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[0] for name in names} == {"transformer_blocks", "single_transformer_blocks"}


@needs_peft
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_merged_is_the_model_with_adapters(kind: str):
    before, model = MODELS[kind](), adapted(kind)
    plain, learned = before(**inputs_of()).sample, model(**inputs_of()).sample
    assert not torch.allclose(plain, learned, atol=1e-3)
    kept = merged(model)
    torch.testing.assert_close(kept(**inputs_of()).sample, learned, rtol=1e-4, atol=1e-5)
    assert kept.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(model(**inputs_of()).sample, learned), "the copy alone was merged"
    assert merged(before) is before


@needs_peft
@pytest.mark.parametrize("kind", MODELS)
def test_the_teacher_is_without_adapters_and_gradients_reach_adapters_and_exits(kind: str):
    model, batch = adapted(kind), {name: value[:, None] for name, value in inputs_of().items()}
    teacher = MODELS[kind]()(**inputs_of()).sample
    exits = exits_for(model, (1, 3))
    objective = DistillationObjective(model, exits, uncertainty_weight=1.0, layerwise_weight=1.0, adapted=True)
    found = objective(batch)
    assert torch.equal(objective.both(inputs_of())[0], teacher)
    assert not torch.equal(model(**inputs_of()).sample, teacher), "the adapters are on again"
    full = (model(**inputs_of()).sample - teacher).square().mean()
    assert float(found["full"]) == pytest.approx(full.item(), rel=1e-4)
    total = found["full"] + found["uncertainty"] + found["layerwise"]
    assert found["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    found["loss"].backward()
    for name, parameter in objective.named_parameters():
        trains = "lora_" in name or name.startswith("exits.")
        assert parameter.requires_grad == trains, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trains, name


@needs_peft
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="rank=0"):
        add_lora(uvit(), BLOCKS, rank=0)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(add_lora(uvit(), BLOCKS, rank=1), BLOCKS, rank=1)
    with pytest.raises(ValueError, match=r"layers of Linear hold no nn\.Linear"):
        add_lora(torch.nn.Linear(2, 2), ["layers"], rank=1)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lora, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=r"ee-diffusion\[lora\]"):
        add_lora(uvit(), BLOCKS, rank=1)
    model = uvit()
    assert merged(model) is model
