"""The training objective: its terms from scratch, which parameters each of them trains, modes and targets."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import DDPMScheduler
from factories import NULL_CLASS, exits_for, randomise, uvit

from ee_diffusion.diffusion.distillation.deediff_objective import DiffusionObjective
from ee_diffusion.diffusion.exits.deediff import DenoisingExits

DEPTHS = (1, 3, 5)
B = 4


def batch(**changes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {
        "images": torch.randn(B, 3, 8, 8, generator=generator),
        "noise": torch.randn(B, 3, 8, 8, generator=generator),
        "uniform": torch.tensor([0.0, 0.31, 0.62, 0.9999]),
        "class_labels": torch.tensor([0, 1, 2, 3]),
        "label_drop": torch.tensor([0.5, 0.05, 0.5, 0.0]),
    }
    return values | changes


def objective_of(
    mode: str, variant: str = "paper", prediction: str = "epsilon", kind: str = "class", last: bool = False, **options
):
    model = uvit(kind)
    exits = None if mode == "backbone" else exits_for(model, DEPTHS, variant)
    if last:
        exits = randomise(DenoisingExits.for_transformer(model, DEPTHS, variant, last_layer=True), seed=5)
    return DiffusionObjective(model, exits, DDPMScheduler(prediction_type=prediction), mode=mode, **options)


def groups(objective: DiffusionObjective) -> dict[str, list[torch.nn.Parameter]]:
    """Parameters by part; the last two blocks lie behind every exit, the tail is the model's own."""
    model, exits = objective.transformer, objective.exits
    tail = [*model.norm_out.parameters(), *model.proj_out.parameters(), *model.conv_out.parameters()]
    front = [*model.patch_embed.parameters(), model.pos_embed, model.class_embed.weight]
    shared = [p for block in model.transformer_blocks[:5] for p in block.parameters()]
    behind = [p for block in model.transformer_blocks[5:] for p in block.parameters()]
    return {
        "backbone": front + shared,
        "behind": behind,
        "tail": tail,
        "heads": list(exits.heads.parameters()),
        "uncertainty": list(exits.uncertainty_modules.parameters()),
    }


def trained(objective: DiffusionObjective, loss: torch.Tensor) -> set[str]:
    """The parts in which every parameter got gradient; a part in which only some did is an error."""
    for parameter in objective.parameters():
        parameter.grad = None
    loss.backward()
    found = set()
    for name, parameters in groups(objective).items():
        has = [p.grad is not None and bool(p.grad.any()) for p in parameters]
        assert all(has) or not any(has), name
        if any(has):
            found.add(name)
    return found


def test_l_simple_trains_backbone_and_tail():
    objective = objective_of("joint", uncertainty_weight=0.0, layerwise_weight=0.0)
    found = trained(objective, objective(batch())["loss"])
    assert found == {"backbone", "behind", "tail"}


@pytest.mark.parametrize(
    "variant,term,expected",
    [
        ("paper", "uncertainty", {"uncertainty", "backbone"}),
        ("paper", "layerwise", {"heads", "backbone"}),
        ("released", "uncertainty", {"uncertainty"}),
        ("released", "layerwise", {"backbone", "tail", "uncertainty"}),
        ("released, last", "uncertainty", {"uncertainty"}),
        ("released, last", "layerwise", {"backbone", "tail", "uncertainty", "behind"}),
    ],
)
def test_what_each_exit_term_trains(variant: str, term: str, expected: set[str]):
    objective = objective_of("joint", variant.split(",")[0], last="last" in variant)
    states = objective.transformer(
        batch()["images"], torch.tensor([1, 2, 3, 4]), batch()["class_labels"], output_hidden_states=True
    ).hidden_states
    weights = torch.ones(B)
    uncertainty, layerwise = objective._exit_terms(states, torch.tensor([1, 2, 3, 4]), batch()["noise"], weights)
    assert trained(objective, {"uncertainty": uncertainty, "layerwise": layerwise}[term]) == expected


@pytest.mark.parametrize(
    "variant,mode,expected",
    [
        ("paper", "joint", {"backbone", "behind", "tail", "heads", "uncertainty"}),
        ("released", "joint", {"backbone", "behind", "tail", "uncertainty"}),
        ("paper", "frozen", {"heads", "uncertainty"}),
        ("released", "frozen", {"uncertainty"}),
    ],
)
def test_what_the_joint_loss_trains(variant: str, mode: str, expected: set[str]):
    objective = objective_of(mode, variant)
    assert trained(objective, objective(batch())["loss"]) == expected
    for parameter in objective.transformer.parameters():
        assert parameter.requires_grad == (mode != "frozen")


READINGS = [("paper", False), ("released", False), ("released", True)]


def reading(
    objective: DiffusionObjective, given: dict, prediction: str, gamma: float | None
) -> dict[str, torch.Tensor]:
    """The terms of the loss in float64, exit by exit and sample by sample; their gradients are autograd's of these lines."""
    model, exits = objective.transformer, objective.exits
    times, labels = torch.tensor([0, 310, 620, 999]), torch.tensor([0, NULL_CLASS, 2, NULL_CLASS])
    alphas = objective.scheduler.alphas_cumprod[times].double()
    a, s = alphas.sqrt().view(B, 1, 1, 1), (1 - alphas).sqrt().view(B, 1, 1, 1)
    images, noise = given["images"].double(), given["noise"].double()
    target = noise if prediction == "epsilon" else a * noise - s * images
    output = model(a * images + s * noise, times, labels, output_hidden_states=True)
    snr = alphas / (1 - alphas)
    weights = torch.ones(B, dtype=torch.float64)
    if gamma is not None:
        weights = snr.clamp(max=gamma) / (snr + 1 if prediction == "v_prediction" else snr)
    simple = sum(weights[b] * (output.sample[b] - target[b]).square().mean() / B for b in range(B))
    states = [output.hidden_states[depth] for depth in DEPTHS]
    states += [output.hidden_states[-1]] if exits.config.last_layer else []
    uncertainty, errors, certainties, layerwise = 0.0, [], [], 0.0
    for exit, state in enumerate(states):
        answer = model.tail(state) if exits.space == "hidden" else exits.answer(exit, state, {})
        said, gap = exits.uncertainty_map(exit, state, times), torch.tanh((answer - target).abs()).detach()
        if exits.config.variant == "paper":
            for b in range(B):
                error = (1 - said[b].detach()) * (answer[b] - target[b]) ** 2
                uncertainty = uncertainty + (said[b] - gap[b]).square().mean() / B
                layerwise = layerwise + weights[b] * error.mean() / B
        else:
            uncertainty = uncertainty + (said - (1 - gap)).square().mean() / len(states)
            errors.append((answer - target).square().mean())
            certainties.append(said.mean())
    for confidence, error in zip(certainties, errors, strict=True):
        layerwise = layerwise + confidence / sum(certainties) * error
    return {"simple": simple, "uncertainty": uncertainty, "layerwise": layerwise}


@pytest.mark.parametrize("variant, last", READINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
@torch.no_grad()
def test_the_loss_from_scratch(variant: str, last: bool, prediction: str, gamma: float | None):
    options = {"uncertainty_weight": 0.7, "layerwise_weight": 0.3, "snr_gamma": gamma, "last": last}
    objective = objective_of("joint", variant, prediction, **options)
    found = objective(batch())
    expected = reading(copy.deepcopy(objective).double(), batch(), prediction, gamma)
    for name, term in expected.items():
        assert float(found[name]) == pytest.approx(float(term), rel=1e-3), name
    total = expected["simple"] + 0.7 * expected["uncertainty"] + 0.3 * expected["layerwise"]
    assert float(found["loss"]) == pytest.approx(float(total), rel=1e-3)


@pytest.mark.parametrize("variant, last", READINGS)
def test_every_gradient_of_the_exit_terms_is_that_of_a_float64_reading(variant: str, last: bool):
    objective = objective_of("joint", variant, last=last)
    slow = copy.deepcopy(objective).double()
    read = reading(slow, batch(), "epsilon", None)
    sum(read.values()).backward()
    objective(batch())["loss"].backward()
    for (name, parameter), wanted in zip(objective.named_parameters(), slow.parameters(), strict=True):
        scale = float(wanted.grad.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad.double(), wanted.grad, rtol=1e-3, atol=2e-4 * scale, msg=name)


def test_terms_are_numbers_and_the_frozen_loss_leaves_l_simple_out():
    objective = objective_of("frozen")
    with torch.no_grad():
        found = objective(batch())
    assert set(found) == {"loss", "simple", "uncertainty", "layerwise"}
    assert float(found["loss"]) == pytest.approx(float(found["uncertainty"] + found["layerwise"]), rel=1e-6)
    assert not objective(batch())["simple"].requires_grad
    assert set(objective_of("backbone")(batch())) == {"loss", "simple"}
    assert all(math.isfinite(float(value)) for value in found.values())


@torch.no_grad()
def test_exits_with_no_weight_are_no_exits():
    plain = objective_of("backbone")(batch())["loss"]
    joint = objective_of("joint", uncertainty_weight=0.0, layerwise_weight=0.0)(batch())["loss"]
    torch.testing.assert_close(joint, plain)


@torch.no_grad()
def test_samples_do_not_mix():
    objective = objective_of("backbone")
    whole = float(objective(batch())["loss"])
    alone = [float(objective({name: value[[b]] for name, value in batch().items()})["loss"]) for b in range(B)]
    assert whole == pytest.approx(sum(alone) / B, rel=1e-4)


def test_labels_and_text():
    objective = objective_of("backbone", class_drop=0.1)
    seen = []
    objective.transformer.class_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    objective(batch())
    objective.class_drop = 0.0
    objective(batch())
    assert seen == [[0, NULL_CLASS, 2, NULL_CLASS], [0, 1, 2, 3]]
    text = objective_of("backbone", kind="text")
    with_text = batch(encoder_hidden_states=torch.randn(B, 3, 6))
    assert text(with_text)["simple"] > 0
    objective_of("joint", kind="unconditional")(batch())["loss"].backward()


def test_what_makes_no_sense_is_refused():
    model, scheduler = uvit(), DDPMScheduler()
    exits = exits_for(model, DEPTHS)
    for mode, given in (("backbone", exits), ("joint", None), ("frozen", None), ("both", exits)):
        with pytest.raises(ValueError, match=f"mode='{mode}'"):
            DiffusionObjective(model, given, scheduler, mode=mode)
    with pytest.raises(ValueError, match=r"class_drop=0\.1 needs a null_class"):
        DiffusionObjective(uvit(null_class=None), None, scheduler, mode="backbone")
    DiffusionObjective(uvit(null_class=None), None, scheduler, mode="backbone", class_drop=0.0)
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        objective_of("backbone", prediction="sample")(batch())
