"""Whatever does not fit ends in a ValueError that says what came and what was expected, before any work, and leaves nothing behind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from diffusers.utils import is_peft_available
from stock import dit_pipeline
from tiny_families import exits_for, forward, inputs_of, model_named
from tiny_pipelines import STOCK, call_of, pipeline_named
from torch import nn

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.distributed import JointDecision, gather_traces
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.distillation.collect import Exited, FreshStates, walk
from ee_diffusion.diffusion.distillation.dataset import States, row_inputs
from ee_diffusion.diffusion.distillation.objective import DistillationObjective, exit_errors, rows_of
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.hooks.attach import attach_exits, detach_exits, exit_summary, hook_of, transformer_of
from ee_diffusion.diffusion.hooks.attention import set_attention
from ee_diffusion.diffusion.hooks.block_runner import take_rows
from ee_diffusion.diffusion.hooks.truncate import truncate
from ee_diffusion.diffusion.model_specs import ModelSpec, blocks_of, model_spec_of, register_model, width_of
from ee_diffusion.diffusion.pipelines.stock import EarlyExitDiTPipeline
from ee_diffusion.diffusion.step_times import times_of
from ee_diffusion.training.lora import add_lora

NAME = "DiTTransformer2DModel"
POLICY = Policy(Threshold(0.5))
LINEAR = nn.Linear(2, 2)
COUNTS = (0, -1, 1.5, "2", True)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return model_named(NAME)


@pytest.fixture(scope="module")
def exits(model) -> AdapterExits:
    return exits_for(model)


@pytest.fixture(scope="module")
def pipe() -> DiTPipeline:
    return pipeline_named("dit")


ATTACH: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"heads": None}, "heads=None, expected exits"),
    "a module without exits": ({"heads": LINEAR}, "heads=Linear.*, expected exits"),
    "a number as policy": ({"policy": 0.3}, "policy=0.3, expected a Policy"),
    "the class as policy": ({"policy": Policy}, "expected a Policy"),
    "a vote by name": ({"joint_decision": "all"}, "joint_decision='all', expected JointDecision"),
    "no branches": ({"policy": POLICY, "num_steps": 3}, "needs rows_per_sample="),
    "no steps": ({"policy": POLICY, "rows_per_sample": 1}, "needs rows_per_sample="),
    "branches alone": ({"rows_per_sample": 2}, "without a policy"),
    "options by name": ({"compile_options": "inductor"}, "compile_options='inductor'"),
    **{
        f"branches {n!r}": ({"policy": POLICY, "rows_per_sample": n, "num_steps": 3}, "expected whole numbers")
        for n in COUNTS
    },
    **{
        f"steps {n!r}": ({"policy": POLICY, "rows_per_sample": 1, "num_steps": n}, "expected whole numbers")
        for n in COUNTS
    },
}


@pytest.mark.parametrize("case", ATTACH)
def test_attach(case: str, model, exits):
    given, told = ATTACH[case]
    before = [set(module.__dict__) for module in model.modules()]
    with pytest.raises(ValueError, match=told):
        attach_exits(model, **{"heads": exits} | given)
    assert [set(module.__dict__) for module in model.modules()] == before


@pytest.mark.parametrize(
    "function", [detach_exits, exit_summary, hook_of, transformer_of, lambda target: attach_exits(target, None)]
)
@pytest.mark.parametrize("target", [None, "dit", 3, [LINEAR]])
def test_what_is_no_pipeline_and_no_transformer(function: Callable, target: Any):
    with pytest.raises(ValueError, match="has no transformer"):
        function(target)


@pytest.mark.parametrize("function", [detach_exits, exit_summary, hook_of])
def test_what_nothing_is_attached_to(function: Callable, model, pipe):
    for target in (model, pipe):
        with pytest.raises(ValueError, match="no exits are attached to this DiTTransformer2DModel"):
            function(target)


@pytest.mark.parametrize("step", [None, "x", 0])
def test_a_step_that_is_none(step: Any, model, exits):
    with attach_exits(model, exits) as attachment:
        with pytest.raises(ValueError, match="expected a step session"), attachment.use(step):
            pytest.fail("entered")
        assert forward(model, inputs_of(NAME, [0])).isfinite().all()


START: dict[str, tuple[dict[str, Any], str]] = {
    "rows as a list": ({"rows": [0, 1]}, r"rows=\[0, 1\], expected a tensor"),
    "rows with a gap": ({"rows": torch.tensor([0, 2])}, "rows must name every sample"),
    "rows below 0": ({"rows": torch.tensor([-1, 0])}, "rows must name every sample"),
    "rows as fractions": ({"rows": torch.tensor([0.0, 1.0])}, "rows must name every sample"),
    "no rows": ({"rows": torch.arange(0)}, "the batch is empty"),
    "a table of rows": ({"rows": torch.zeros(2, 2).long()}, r"expected \(R,\)"),
    "steps as a fraction": ({"num_steps": 1.5}, "num_steps=1.5, expected a whole number"),
    "no steps": ({"num_steps": 0}, "num_steps=0, expected a whole number"),
    "ids of others": ({"samples": torch.arange(5)}, r"\(5,\) sample ids, expected \(2,\)"),
    "ids as a list": ({"samples": [0, 1]}, "expected a tensor of ids"),
    "ids as fractions": ({"samples": torch.tensor([0.5, 1.0])}, "expected a tensor of ids"),
}


@pytest.mark.parametrize("case", START)
def test_start(case: str, model, exits):
    given, told = START[case]
    with attach_exits(model, exits) as attachment, pytest.raises(ValueError, match=told):
        attachment.start(POLICY, **{"rows": torch.arange(2), "num_steps": 1} | given)


FAMILY: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"class_name": ""}, "class_name='', blocks='layers', expected names"),
    "no list": ({"blocks": ""}, "expected names"),
    "returns": ({"returns": "tokens"}, "returns='tokens', expected one of"),
    "guidance": ({"guidance": "both"}, "guidance='both', expected 'batch' or 'calls'"),
    "one name for a tuple": ({"row_arguments": "temb"}, "row_arguments='temb', expected tuples"),
    "two of them": ({"width": "hidden", "residuals": "r"}, "residuals='r', width='hidden', expected tuples"),
    "an unknown list": ({"concatenated": ("other",)}, r"concatenated=\('other',\), expected names among"),
    "time that stands still": ({"time": (0.0, 1.0)}, "a scale that is not 0"),
    "time by half": ({"time": (1.0,)}, r"expected \(scale, offset\)"),
}


@pytest.mark.parametrize("case", FAMILY)
def test_family(case: str):
    given, told = FAMILY[case]
    with pytest.raises(ValueError, match=told):
        ModelSpec(**{"class_name": "Mine", "blocks": "layers"} | given)


@pytest.mark.parametrize("what", [None, "Mine", ModelSpec])
def test_registering_something_else(what: Any):
    with pytest.raises(ValueError, match=r"expected Family\(\.\.\.\)"):
        register_model(what)


@pytest.mark.parametrize("function", [model_spec_of, blocks_of, width_of])
@pytest.mark.parametrize("what", [None, "dit", LINEAR])
def test_classes_without_a_family(function: Callable, what: Any):
    with pytest.raises(ValueError, match="no family for"):
        function(what)


DEPTHS = [(), (2, 1), (1, 1), (-1, 2), (1.5,), (True, 2), 2, "12", None, (5,), (1, 99)]


@pytest.mark.parametrize("depths", DEPTHS)
@pytest.mark.parametrize(
    "kind", [functools.partial(AdapterExits.for_transformer, rank=2), DenoisingExits.for_transformer]
)
def test_depths(kind: Callable, depths: Any, model):
    with pytest.raises(ValueError, match="depths"):
        kind(model, depths)


@pytest.mark.parametrize("rank", [-1, 1.5, "2", None, True])
def test_ranks(rank: Any, model):
    with pytest.raises(ValueError, match=r"rank=.* expected a whole number"):
        AdapterExits.for_transformer(model, (1,), rank=rank)
    if is_peft_available():
        with pytest.raises(ValueError, match=r"rank=.* expected a whole number, at least 1"):
            add_lora(model, ["transformer_blocks"], rank=rank)


@pytest.mark.parametrize("policy", [0.3, "deediff", Policy, {"criterion": None}])
def test_a_pipelines_policy(policy: Any, exits):
    made = EarlyExitDiTPipeline(**STOCK["dit"].make(), exits=exits)
    with pytest.raises(ValueError, match="expected a Policy, for example deediff"):
        made(**call_of("dit", [0]), exit_policy=policy)


WALK: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "no seeds": (([], []), {}, "0 seeds, 0 conditions"),
    "a condition too many": (([1], [0, 1]), {}, "1 seeds, 2 conditions"),
    "seeds by name": ((["a"], [0]), {}, r"seeds \['a'\], expected whole numbers"),
    "seeds as fractions": (([1.5], [0]), {}, "expected whole numbers"),
    "labels as fractions": (([1], [0.5]), {}, "expected class labels"),
    "labels and prompts": (([1, 2], [0, "a cat"]), {}, "not both"),
    "prompts for a class-conditional pipeline": (([1], ["a cat"]), {}, "takes no prompt"),
}


@pytest.mark.parametrize("case", WALK)
def test_walk(case: str, pipe):
    given, call, told = WALK[case]
    with pytest.raises(ValueError, match=told):
        walk(pipe, *given, num_inference_steps=1, **call)
    assert "forward" not in pipe.transformer.__dict__


OTHERS: dict[str, tuple[Callable[[Any, Any, Any], Any], str]] = {
    "walk nothing": (lambda model, exits, pipe: walk("dit", [1], [0]), "expected a diffusers pipeline"),
    "walk under a policy alone": (lambda model, exits, pipe: Exited(POLICY, None), "expected a Policy and exits"),
    "walk under a number": (lambda model, exits, pipe: Exited(0.3, exits), "expected a Policy and exits"),
    "walk under nothing": (lambda model, exits, pipe: Exited(Policy(), exits), "a policy that is off"),
    "fresh of no seeds": (lambda model, exits, pipe: FreshStates(pipe, [], [0]), "no seeds"),
    "truncate to half": (lambda model, exits, pipe: truncate(model, 1.5), "expected an integer in 1..4"),
    "attention of nothing": (lambda model, exits, pipe: set_attention(None, "native"), "has no transformer"),
    "attention by number": (lambda model, exits, pipe: set_attention(model, 3), "attention backend 3, expected one of"),
    "states of nothing": (lambda model, exits, pipe: States.from_tensors({}), r"tensors \[\], expected"),
    "states joined": (lambda model, exits, pipe: States.concatenate([]), "no states"),
    "inputs of nothing": (lambda model, exits, pipe: row_inputs({}), "called with"),
    "errors of nothing": (
        lambda model, exits, pipe: exit_errors(objective(model, exits), None, batch_size=1),
        "states=NoneType",
    ),
    "errors by none": (
        lambda model, exits, pipe: exit_errors(objective(model, exits), None, batch_size=0),
        "batch_size=0",
    ),
    "a batch of nothing": (lambda model, exits, pipe: rows_of({}), "expected at least hidden_states and timestep"),
    "a batch that is uneven": (
        lambda model, exits, pipe: rows_of(
            {"hidden_states": torch.zeros(2, 1, 4), "timestep": torch.zeros(2, 1), "class_labels": torch.zeros(3, 1)}
        ),
        r"\{'class_labels': \(3, 1\)\} beside timesteps \(2, 1\)",
    ),
    "an objective without exits": (
        lambda model, exits, pipe: objective(model, None),
        "exits=None, expected a module such as AdapterExits",
    ),
    "a vote of one process": (lambda model, exits, pipe: JointDecision(), "torch.distributed is not initialised"),
    "traces that are none": (lambda model, exits, pipe: gather_traces("trace"), "trace='trace', expected a Trace"),
    "rows of something else": (
        lambda model, exits, pipe: take_rows(torch.zeros(5, 2), torch.tensor([0]), 4, name="temb"),
        "'temb' has 5 entries, expected one for each of 4 rows",
    ),
    **{
        f"weights {weight!r}": (
            lambda model, exits, pipe, weight=weight: objective(model, exits, uncertainty_weight=weight),
            "expected finite numbers of at least 0",
        )
        for weight in (-1.0, float("nan"), float("inf"), "1")
    },
}


def objective(model: nn.Module, exits: Any, **weights: Any) -> DistillationObjective:
    return DistillationObjective(model, exits, **{"uncertainty_weight": 1.0, "layerwise_weight": 1.0} | weights)


@pytest.mark.parametrize("case", OTHERS)
def test_everything_else(case: str, model, exits, pipe):
    call, told = OTHERS[case]
    with pytest.raises(ValueError, match=told):
        call(model, exits, pipe)
    assert "forward" not in model.__dict__


def test_the_rows_of_stacked_arguments_are_those_of_every_stack():
    stacked = torch.arange(8).view(8, 1)  # two stacks of four rows
    assert take_rows(stacked, torch.tensor([1, 3]), 4, name="temb")[:, 0].tolist() == [1, 3, 5, 7]
    nested = take_rows({"a": (stacked, None)}, torch.tensor([2]), 4, name="kwargs")
    assert nested["a"][0][:, 0].tolist() == [2, 6]
    shared = torch.zeros(1, 2)  # one for all rows
    assert take_rows(shared, torch.tensor([1, 3]), 4, name="temb") is shared


def test_a_policy_calibrated_for_one_pipeline_is_refused_by_attach():
    pipe = dit_pipeline()
    exits = AdapterExits.for_transformer(pipe.transformer, (1, 2), rank=2)
    with pytest.raises(ValueError, match="calibrated for one pipeline"):
        attach_exits(pipe, exits, Policy(Threshold(0.5), made_for=(("weights", "x"),)))
    assert "forward" not in pipe.transformer.__dict__


def test_heads_of_another_dtype_are_refused_before_any_block():
    pipe = dit_pipeline()
    exits = AdapterExits.for_transformer(pipe.transformer, (1, 2), rank=2)
    pipe.transformer.to(torch.bfloat16)
    ran = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with attach_exits(pipe, exits, Policy(Threshold(0.5))):
        with pytest.raises(ValueError, match=r"heads are in torch.float32.*blocks in torch.bfloat16"):
            pipe([1], num_inference_steps=2)
    assert not ran


def test_an_image_of_the_null_class_is_no_branch_of_another():
    """Two images without guidance, the second of DiT's null class 1000: each is alone."""
    pipe = dit_pipeline()
    exits = AdapterExits.for_transformer(pipe.transformer, (1, 2), rank=2)
    for labels, samples in (([5, 1000], 2), ([5, 7], 2)):
        with attach_exits(pipe, exits, Policy(Threshold(0.5))) as attachment:
            pipe(labels, guidance_scale=1.0, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
            assert attachment.trace.depths.shape == (2, samples)
    with attach_exits(pipe, exits, Policy(Threshold(0.5))) as attachment:
        pipe([5], guidance_scale=4.0, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
        assert attachment.trace.rows.tolist() == [[2], [2]]


def test_a_row_whose_tokens_have_times_of_their_own_is_at_its_latest():
    family = model_spec_of(model_named(NAME))
    times = torch.tensor([[3.0, 900.0], [500.0, 20.0]])
    assert times_of(family, times, torch.zeros(2, 1)).tolist() == [900.0, 500.0]


def test_another_batch_begins_another_run_though_time_goes_down(model, exits):
    first, second = inputs_of(NAME, [0, 1], time=900.0), inputs_of(NAME, [0, 1, 2], time=600.0)
    first["class_labels"], second["class_labels"] = torch.tensor([1, 2]), torch.tensor([1, 2, 3])
    first["timestep"], second["timestep"] = torch.full((2,), 900), torch.full((3,), 600)
    with attach_exits(model, exits, POLICY, rows_per_sample=1, num_steps=2) as attachment:
        forward(model, first)
        assert attachment.trace.depths.shape == (1, 2)
        forward(model, second)
        assert attachment.trace.depths.shape == (1, 3)


def test_image_tokens_of_lumina_are_those_after_its_text_and_before_its_padding():
    model = model_named("Lumina2Transformer2DModel")
    size, latents = model.config.patch_size, torch.zeros(2, 1, 4, 4)
    count = (4 // size) ** 2
    arguments = {"encoder_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "hidden_states": latents}
    found = model_spec_of(model).image_tokens(model, arguments)
    assert found.shape == (2, 3 + count)
    assert [row.nonzero()[:, 0].tolist() for row in found] == [[*range(2, 2 + count)], [*range(3, 3 + count)]]
