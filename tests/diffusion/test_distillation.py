"""Distillation: the teacher is the full model bit for bit, every term trains its own part, errors are those of a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from factories import dit, exits_for, images_of, pipeline, randomise, uvit

from ee_diffusion.diffusion.distillation.collect import walk
from ee_diffusion.diffusion.distillation.dataset import States
from ee_diffusion.diffusion.distillation.objective import (
    DistillationObjective,
    exit_errors,
    observe,
    rows_of,
    through_tail,
)
from ee_diffusion.diffusion.exits.deediff import DenoisingExits

DEPTHS = (1, 3)
MODELS = {"uvit": uvit, "dit": dit}


def inputs_of(count: int = 4) -> dict[str, torch.Tensor]:
    drawn = images_of(list(range(count)), 0, 1)
    return {"hidden_states": drawn["pixels"], "timestep": drawn["timestep"], "class_labels": drawn["labels"]}


def batch_of(count: int = 4) -> dict[str, torch.Tensor]:
    """Two rows a sample."""
    return {name: value.unflatten(0, (count // 2, 2)) for name, value in inputs_of(count).items()}


def objective_of(kind: str = "uvit", variant: str = "paper", **options) -> DistillationObjective:
    model = MODELS[kind]()
    weights = {"uncertainty_weight": 0.7, "layerwise_weight": 0.3} | options
    return DistillationObjective(model, exits_for(model, DEPTHS, variant), **weights)


def hidden_at(model: torch.nn.Module, depths: tuple[int, ...], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What goes into block number `depth`, by a hook on that block."""
    seen = {}

    def keep(depth: int):
        return lambda module, args, kwargs: seen.update({depth: args[0] if args else kwargs["hidden_states"]})

    blocks = model.transformer_blocks
    hooks = [blocks[depth].register_forward_pre_hook(keep(depth), with_kwargs=True) for depth in depths]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return [seen[depth] for depth in depths]


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_observing_changes_nothing_and_hears_what_blocks_hear(kind: str):
    model, inputs = MODELS[kind](), inputs_of()
    prediction, heard = observe(model, (0, 1, 3), inputs)
    assert torch.equal(prediction, model(**inputs).sample)
    expected = hidden_at(model, (0, 1, 3), inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(heard, expected, strict=True))
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_the_tail_alone_runs_on_hidden_states(kind: str):
    model, inputs = MODELS[kind](), inputs_of()
    last, ran = [], []
    hook = model.transformer_blocks[-1].register_forward_hook(lambda module, args, output: last.append(output))
    full = model(**inputs).sample
    hook.remove()
    inner = "attn" if kind == "uvit" else "attn1"
    hooks = [getattr(b, inner).register_forward_pre_hook(lambda *_: ran.append(1)) for b in model.transformer_blocks]
    torch.testing.assert_close(through_tail(model, last[0], inputs), full, rtol=1e-5, atol=1e-5)
    assert not ran
    for one in hooks:
        one.remove()


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_the_target_is_the_full_models_prediction(kind: str):
    objective, inputs = objective_of(kind), inputs_of()
    teacher, _, hidden = objective.both(inputs)
    assert torch.equal(teacher, objective.transformer(**inputs).sample)
    answers, maps = objective.exits_on(hidden, inputs)
    context = {"timestep": inputs["timestep"]}
    for exit, state in enumerate(hidden_at(objective.transformer, DEPTHS, inputs)):
        assert torch.equal(answers[exit], objective.exits.answer(exit, state, context))
        assert torch.equal(maps[exit], objective.exits.uncertainty_map(exit, state, inputs["timestep"]))


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_the_loss_from_scratch(kind: str):
    objective, inputs = objective_of(kind), inputs_of()
    found = objective(batch_of())
    teacher = objective.transformer(**inputs).sample.double()
    uncertainty = layerwise = 0.0
    for exit, state in enumerate(hidden_at(objective.transformer, DEPTHS, inputs)):
        answer = objective.exits.answer(exit, state, {}).double()
        said = objective.exits.uncertainty_map(exit, state, inputs["timestep"]).double()
        for row in range(4):
            gap = (answer[row] - teacher[row]).abs()
            uncertainty += float((said[row] - gap.tanh()).square().mean()) / 4
            layerwise += float(((1 - said[row]) * gap.square()).mean()) / 4
    assert float(found["uncertainty"]) == pytest.approx(uncertainty, rel=1e-4)
    assert float(found["layerwise"]) == pytest.approx(layerwise, rel=1e-4)
    assert float(found["loss"]) == pytest.approx(0.7 * uncertainty + 0.3 * layerwise, rel=1e-4)
    assert set(found) == {"loss", "uncertainty", "layerwise"}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "variant, weights, expected",
    [
        ("paper", (1.0, 0.0), {"uncertainty_modules"}),
        ("paper", (0.0, 1.0), {"heads"}),
        ("paper", (1.0, 1.0), {"uncertainty_modules", "heads"}),
        ("released", (1.0, 1.0), {"uncertainty_modules"}),
    ],
)
def test_what_each_term_trains(kind: str, variant: str, weights: tuple, expected: set[str]):
    objective = objective_of(kind, variant, uncertainty_weight=weights[0], layerwise_weight=weights[1])
    assert not any(parameter.requires_grad for parameter in objective.transformer.parameters())
    objective(batch_of())["loss"].backward()
    reached = {name for name, p in objective.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {name.split(".")[1] for name in reached} == expected
    for part in expected:
        all_of_it = {f"exits.{part}.{name}" for name, _ in getattr(objective.exits, part).named_parameters()}
        assert all_of_it <= reached


def test_the_backbone_never_trains_and_a_fit_comes_nearer():
    objective = objective_of("dit")
    before = [parameter.clone() for parameter in objective.transformer.parameters()]
    assert not objective.train().transformer.training
    assert objective.exits.training
    optimizer = torch.optim.Adam(objective.exits.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective(batch_of())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(map(torch.equal, before, objective.transformer.parameters()))


@torch.no_grad()
def test_errors_are_those_of_a_slow_loop():
    pipe = pipeline()
    states = walk(pipe, [1, 2, 3, 4], [0, 1, 2, 3], num_inference_steps=2, guidance_scale=2.0)
    objective = DistillationObjective(pipe.transformer, pipe.exits, uncertainty_weight=1.0, layerwise_weight=1.0)
    errors, power = exit_errors(objective, states, batch_size=3)
    everything = rows_of(states[torch.arange(len(states))])  # T, J, G in this order
    teacher = pipe.transformer(**everything).sample.double()
    assert power == pytest.approx(float(teacher.square().mean()), rel=1e-4)
    for exit, hidden in enumerate(hidden_at(pipe.transformer, pipe.exits.depths, everything)):
        answer = pipe.exits.answer(exit, hidden, {}).double()
        said = pipe.exits.uncertainty_map(exit, hidden, everything["timestep"]).double().flatten(1).mean(1)
        gap = (answer - teacher).abs().tanh().flatten(1).mean(1)
        tail = pipe.transformer.tail(hidden).double()
        assert float(errors.error[exit]) == pytest.approx(float((answer - teacher).square().mean()), rel=1e-3)
        assert float(errors.tail_error[exit]) == pytest.approx(float((tail - teacher).square().mean()), rel=1e-3)
        assert float(errors.gap[exit]) == pytest.approx(float(gap.mean()), rel=1e-3)
        assert float(errors.said[exit]) == pytest.approx(float(said.mean()), rel=1e-3)
        assert float(errors.said_error[exit]) == pytest.approx(float((said - gap).abs().mean()), rel=1e-2)
        assert float(errors.rank_correlation[exit]) == pytest.approx(slow_correlation(said, gap), abs=1e-6)
    alone, _ = exit_errors(objective, States.concatenate([states]), batch_size=100)
    torch.testing.assert_close(alone.error, errors.error, rtol=1e-4, atol=1e-6)


def slow_correlation(said: torch.Tensor, gap: torch.Tensor) -> float:
    """Spearman over 4 trajectories at each of 2 calls and 2 branches."""
    total = 0.0
    for call in range(2):
        for branch in range(2):
            rows = [trajectory * 4 + call * 2 + branch for trajectory in range(4)]
            ranks = [[sorted(v[rows].tolist()).index(x) for x in v[rows].tolist()] for v in (said, gap)]
            apart = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
            total += (1 - 6 * apart / (4 * (16 - 1))) / 4
    return total


@torch.no_grad()
def test_few_images_have_no_rank_correlation():
    pipe = pipeline()
    states = walk(pipe, [1, 2], [0, 1], num_inference_steps=1)
    objective = DistillationObjective(pipe.transformer, pipe.exits, uncertainty_weight=1.0, layerwise_weight=0.0)
    errors, _ = exit_errors(objective, states, batch_size=8)
    assert errors.to_dict()["rank_correlation"] == [None] * len(pipe.exits.depths)
    assert all(math.isfinite(value) for value in errors.to_dict()["error"])
    with pytest.raises(ValueError, match="batch_size=0"):
        exit_errors(objective, states, batch_size=0)


@torch.no_grad()
def test_released_exits_say_certainty_and_answer_through_the_tail():
    objective = objective_of("dit", "released")
    inputs = inputs_of()
    _, _, hidden = objective.both(inputs)
    answers, maps = objective.exits_on(hidden, inputs)
    for exit in range(len(DEPTHS)):
        torch.testing.assert_close(answers[exit], through_tail(objective.transformer, hidden[exit], inputs))
    states = States({name: value[None, :, None] for name, value in inputs.items()}, {})
    errors, _ = exit_errors(objective, states, batch_size=4)
    torch.testing.assert_close(errors.error, errors.tail_error)
    torch.testing.assert_close(errors.said.float(), 1 - maps.flatten(1).mean(1))


def test_a_last_layer_that_is_the_teacher_is_not_trained():
    """Exits that a joint training made with `last_layer`: every parameter that is to be trained gets gradient."""
    model = objective_of("uvit", "released").transformer
    exits = DenoisingExits.for_transformer(model, DEPTHS, "released", last_layer=True)
    objective = DistillationObjective(model, exits, uncertainty_weight=1.0, layerwise_weight=1.0)
    objective(batch_of())["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in exits.uncertainty_modules[-1].parameters())


class TokenExits(torch.nn.Module):
    """Heads in space hidden that shift the hidden states, and say one uncertainty a token."""

    def __init__(self):
        super().__init__()
        self.depths, self.space, self.config = DEPTHS, "hidden", {}
        self.shifts = torch.nn.ParameterList(torch.nn.Parameter(torch.full((16,), 0.1)) for _ in DEPTHS)
        self.uncertainty_modules = torch.nn.ModuleList(torch.nn.Linear(16, 1) for _ in DEPTHS)

    def answer(self, exit: int, hidden: torch.Tensor, context) -> torch.Tensor:
        return hidden + self.shifts[exit]

    def uncertainty_map(self, exit: int, hidden: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.uncertainty_modules[exit](hidden.detach()))[..., 0]  # (R, N)

    def check_fits(self, model: torch.nn.Module) -> None:
        """Anything fits."""


@pytest.mark.parametrize("kind", MODELS)
def test_heads_before_the_tail_with_one_uncertainty_a_token(kind: str):
    model, inputs = MODELS[kind](), inputs_of()
    objective = DistillationObjective(model, TokenExits(), uncertainty_weight=0.7, layerwise_weight=0.3)
    found = objective(batch_of())
    found["loss"].backward()
    assert all(parameter.grad.any() for parameter in objective.exits.parameters())
    with torch.no_grad():
        teacher = model(**inputs).sample
        uncertainty = layerwise = 0.0
        for exit, hidden in enumerate(hidden_at(model, DEPTHS, inputs)):
            answer = through_tail(model, hidden + 0.1, inputs)
            said = objective.exits.uncertainty_map(exit, hidden, inputs["timestep"])
            for row in range(4):
                u, apart = float(said[row].mean()), (answer[row] - teacher[row]).abs()
                uncertainty += (u - float(apart.tanh().mean())) ** 2 / 4
                layerwise += (1 - u) * float(apart.square().mean()) / 4
    assert float(found["uncertainty"]) == pytest.approx(uncertainty, rel=1e-3)
    assert float(found["layerwise"]) == pytest.approx(layerwise, rel=1e-3)


def test_what_makes_no_sense_is_refused():
    model = uvit()
    exits = exits_for(model, DEPTHS)
    for weights in ((0.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="weights"):
            DistillationObjective(model, exits, uncertainty_weight=weights[0], layerwise_weight=weights[1])
    with pytest.raises(ValueError, match="heads of another model"):
        DistillationObjective(randomise(dit(), seed=1), exits, uncertainty_weight=1.0, layerwise_weight=1.0)
    objective = objective_of()
    for batch in ({}, {"hidden_states": torch.zeros(1, 1, 3, 8, 8)}, inputs_of()):
        with pytest.raises(ValueError, match="expected at least hidden_states and timestep"):
            objective(batch)
    with pytest.raises(ValueError, match="no family for Linear"):
        observe(torch.nn.Linear(2, 2), (1,), inputs_of())
    with pytest.raises(ValueError, match="exit at depth 7"):
        observe(model, (7,), inputs_of())
