"""Compiled with exits: same answers and records as without; one whole graph per distinct depth, or one per number of rows; no breaks.

Graphs are counted with the backend `eager` (dynamo's own part, no code generation); the slow test runs the real one.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from stock import dit_pipeline
from tiny_families import TINY, exits_for, forward, inner_modules, inputs_of, model_named, residuals_of
from torch._dynamo.utils import counters

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import DepthPerStep, FixedDepth, FixedLayers
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.hooks import compile as compiled
from ee_diffusion.diffusion.hooks.attach import attach_exits, detach_exits, exit_summary, hook_of
from ee_diffusion.diffusion.hooks.compile import bucket
from ee_diffusion.diffusion.methods import periodic_cache
from ee_diffusion.diffusion.model_specs import blocks_of

ROWS = [0, 1, 2, 3, 4, 5]
ONE, MANY = Policy(schedule=FixedDepth(2)), Policy(schedule=DepthPerStep(tuple(range(1, 13))))
COUNTED = {"backend": "eager"}
QUICK = ("DiTTransformer2DModel",)
# Its own forward asks the host how long each text is: no exit is needed to break that graph.
OPEN = ("Lumina2Transformer2DModel",)
MODEL_SPECS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TINY]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> tuple[int, int]:
    """Graphs made and graph breaks since the test began."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def generate(model, exits, policy: Policy, options: dict | None, *, steps: int = 3, residuals: bool = False):
    """A run of `steps` forwards -> outputs (S, R, ...), the trace, and rows x blocks of padding."""
    name, outputs = type(model).__name__, []
    with attach_exits(model, exits, compile_options=options) as attachment:
        session = attachment.start(policy, rows=torch.arange(len(ROWS)), num_steps=steps)
        for step in range(steps):
            extra = residuals_of(name, ROWS) if residuals and TINY[name].residuals else {}
            with attachment.use(session.step(step, 700.0 - step)):
                outputs.append(forward(model, inputs_of(name, ROWS, time=700.0 - step) | extra))
        return torch.stack(outputs), session.trace(), attachment.padded


def same(one: Trace, other: Trace) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("depths", "ran", "answered"))


@pytest.mark.parametrize("name", MODEL_SPECS)
def test_a_schedule_is_one_whole_graph_per_distinct_depth(name: str):
    if name in OPEN:
        pytest.skip("diffusers' own forward of this class cannot be one graph")
    model = model_named(name)
    layers = len(blocks_of(model))
    exits, policy = exits_for(model), Policy(schedule=DepthPerStep((1, layers, 1)))
    plain, trace, _ = generate(model, exits, policy, None, residuals=True)
    with attach_exits(model, exits, compile_options=COUNTED) as attachment:
        for run in range(2):
            session, outputs = attachment.start(policy, rows=torch.arange(len(ROWS)), num_steps=3), []
            for step in range(3):
                extra = residuals_of(name, ROWS) if TINY[name].residuals else {}
                with attachment.use(session.step(step, 700.0 - step)):
                    outputs.append(forward(model, inputs_of(name, ROWS, time=700.0 - step) | extra))
            torch.testing.assert_close(torch.stack(outputs), plain, rtol=1e-4, atol=1e-5)
            assert same(session.trace(), trace)
            assert graphs() == (2, 0), f"run {run}: one for depth 1, one for depth {layers}, none after the warm-up"


@pytest.mark.parametrize("name", MODEL_SPECS)
def test_a_threshold_compiles_blocks_one_graph_per_number_of_rows(name: str):
    model = model_named(name)
    layers = len(blocks_of(model))
    kinds = len({type(block) for block in blocks_of(model)})
    exits, policy = exits_for(model), Policy(DepthTable(((0, 1, 2, layers, layers, 1),) * 3))  # 5, 3 and 2 rows run
    plain, trace, _ = generate(model, exits, policy, None, residuals=True)
    again, record, padded = generate(model, exits, policy, COUNTED, residuals=True)
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)
    assert same(record, trace), "padding is not counted as an image's work"
    assert padded == 3 * (1 + 1), "5 rows run as 6 (the whole batch), 3 as 4, 2 as 2"
    made, breaks = graphs()
    # a class of block may hold blocks of several shapes (with or without a skip, the last one without text)
    assert 3 <= made <= 3 * kinds + 2
    assert breaks == 0


def test_rows_are_counted_inside_the_blocks():
    model, rows = model_named("DiTTransformer2DModel"), []
    exits, policy = exits_for(model), Policy(DepthTable(((0, 1, 2, 5, 5, 1),)))

    def count(module, args, kwargs) -> None:
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    hooks = [inner.register_forward_pre_hook(count, with_kwargs=True) for inner in inner_modules(model)]
    generate(model, exits, policy, {"backend": "eager", "fullgraph": False}, steps=1)
    assert rows == [6, 4, 2, 2, 2]
    for hook in hooks:
        hook.remove()


def test_rows_that_leave_within_one_size_of_padding():
    """4 rows, then 3 that run as 4: arguments by row follow the rows, not their number."""
    model = model_named("DiTTransformer2DModel")
    exits, policy = exits_for(model), Policy(DepthTable(((0, 0, 1, 5, 2, 5),)))
    plain, _, _ = generate(model, exits, policy, None, steps=1)
    again, _, padded = generate(model, exits, policy, COUNTED, steps=1)
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)
    assert padded == 1


def test_padding():
    assert [bucket(rows, 6) for rows in range(7)] == [0, 1, 2, 4, 4, 6, 6]
    assert [bucket(rows, 64) for rows in (1, 5, 33, 64)] == [1, 8, 64, 64]


@pytest.mark.parametrize("variant", ["paper", pytest.param("released", marks=pytest.mark.slow)])
def test_heads_with_a_tail_of_their_own_and_layers_left_out(variant: str):
    model = model_named("DiTTransformer2DModel")
    exits = DenoisingExits.for_transformer(model, (1, 3), variant).eval()
    policies = [Policy(schedule=DepthPerStep((1, 5, 3))), Policy(DepthTable(((1, 3, 5, 5, 1, 3),) * 3))]
    for policy in [*policies, Policy(schedule=FixedLayers((0, 2, 3)))]:
        plain, trace, _ = generate(model, exits, policy, None)
        again, record, _ = generate(model, exits, policy, COUNTED)
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)
        assert same(record, trace)
    assert graphs()[1] == 0


@pytest.mark.slow
def test_answers_from_memory_and_a_criterion_in_a_pipeline():
    pipe = dit_pipeline()
    call = {"class_labels": [0, 1, 2], "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    memory = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    adapters = exits_for(pipe.transformer)
    for exits, policy in ((memory, periodic_cache(2, warmup_steps=2)), (adapters, Policy(Threshold(0.5)))):
        images = []
        for options in (None, COUNTED):
            with attach_exits(pipe, exits, policy, compile_options=options) as attachment:
                drawn = pipe(generator=[torch.Generator().manual_seed(i) for i in range(3)], **call).images
                images.append((torch.from_numpy(drawn), attachment.trace))
                assert ("compiled;" in exit_summary(pipe)) == (options is not None)
        torch.testing.assert_close(images[0][0], images[1][0], rtol=1e-3, atol=1e-4)
        assert same(images[0][1], images[1][1])
    assert graphs()[1] == 0


def _wrapped(model):
    return torch.compile(model, backend="eager")


def _in_place(model):
    model.compile(backend="eager")
    return model


def _by_block(model):
    for block in blocks_of(model):
        block.compile(backend="eager")
    return model


@pytest.mark.parametrize("compile_it", [_wrapped, pytest.param(_in_place, marks=pytest.mark.slow), _by_block])
def test_attaching_to_what_is_compiled_already(compile_it):
    model, name = model_named("DiTTransformer2DModel"), "DiTTransformer2DModel"
    exits, policy = exits_for(model), Policy(schedule=FixedDepth(2))
    off = forward(model, inputs_of(name, ROWS))
    expected, trace, _ = generate(model, exits, policy, None, steps=1)
    held = compile_it(model)
    torch.testing.assert_close(forward(held, inputs_of(name, ROWS)), off)
    own = {one: one.__dict__.get("_compiled_call_impl") for one in (model, *blocks_of(model))}
    attachment = attach_exits(held, exits, compile_options=COUNTED)
    assert hook_of(held) is attachment
    torch.testing.assert_close(forward(held, inputs_of(name, ROWS)), off)
    session = attachment.start(policy, rows=torch.arange(len(ROWS)), num_steps=1)
    before = counters["stats"]["unique_graphs"]
    with attachment.use(session.step(0, 700.0)):
        found = forward(held, inputs_of(name, ROWS, time=700.0))
    assert counters["stats"]["unique_graphs"] == before + 1
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
    assert same(session.trace(), trace)
    detach_exits(held)
    assert {one: one.__dict__.get("_compiled_call_impl") for one in own} == own
    torch.testing.assert_close(forward(held, inputs_of(name, ROWS)), off)


def test_a_compiled_pipeline_stays_compiled_with_exits():
    pipe = dit_pipeline()
    exits, call = exits_for(pipe.transformer), {"num_inference_steps": 2, "output_type": "np"}
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with attach_exits(pipe, exits, Policy(schedule=FixedDepth(1))) as attachment:
        assert attachment.compiler is not None
        attachment.compiler.options |= COUNTED
        pipe([1, 2], **call)
        assert attachment.report.mean_executed == 1


@pytest.mark.parametrize(
    "policy", [Policy(schedule=DepthPerStep((1, 5))), Policy(DepthTable(((0, 1, 2, 5, 5, 1),) * 2))]
)
def test_attaching_again_makes_no_new_graph(policy: Policy):
    model = model_named("DiTTransformer2DModel")
    exits, made = exits_for(model), []
    for _ in range(10):
        generate(model, exits, policy, COUNTED, steps=2)
        made.append(graphs())
    assert set(made) == {made[0]}, "torch keeps 8 graphs of one function, and fails at the ninth"
    generate(model, exits_for(model), policy, COUNTED, steps=2)
    assert graphs()[0] == 2 * made[0][0], "other exits are other graphs"


@pytest.mark.slow
def test_many_depths_many_models():
    """Each depth and each model has code of its own: neither uses up what torch keeps of a function."""
    for _ in range(9):
        generate(model_named("DiTTransformer2DModel"), exits_for(model_named("DiTTransformer2DModel")), ONE, COUNTED)
    deep = model_named("DiTTransformer2DModel")
    for _ in range(9):
        deep.transformer_blocks.append(model_named("DiTTransformer2DModel").transformer_blocks[0])
    exits = exits_for(deep)
    plain, _, _ = generate(deep, exits, MANY, None, steps=12)
    again, _, _ = generate(deep, exits, MANY, COUNTED, steps=12)
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)


def test_a_compiler_does_not_keep_its_model():
    model = model_named("DiTTransformer2DModel")
    generate(model, exits_for(model), ONE, COUNTED)
    assert model in compiled._COMPILERS
    gone = weakref.ref(model)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("options", ["eager", 3, ["backend"]])
def test_options_that_are_none_are_refused(options):
    model = model_named("DiTTransformer2DModel")
    with pytest.raises(ValueError, match="compile_options"):
        attach_exits(model, exits_for(model), compile_options=options)
    assert "forward" not in model.__dict__


@pytest.mark.slow
def test_generated_code_says_the_same():
    model = model_named("DiTTransformer2DModel")
    exits = exits_for(model)
    for policy in (Policy(schedule=DepthPerStep((1, 5, 3))), Policy(DepthTable(((0, 1, 2, 5, 5, 1),) * 3))):
        plain, trace, _ = generate(model, exits, policy, None)
        again, record, _ = generate(model, exits, policy, {})
        torch.testing.assert_close(again, plain, rtol=1e-3, atol=1e-4)
        assert same(record, trace)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("kind", ["wrapped", "in place", "by block"])
def test_compiling_after_attaching_is_refused_and_the_way_is_said(kind: str, fullgraph: bool):
    pipe = dit_pipeline()
    exits, call = exits_for(pipe.transformer), {"num_inference_steps": 2, "output_type": "np"}
    plain = pipe([1], generator=torch.Generator().manual_seed(0), **call).images
    inner, policy = pipe.transformer, Policy(Threshold(0.5))
    attachment = attach_exits(pipe, exits, policy)
    options = {"backend": "eager", "fullgraph": fullgraph}
    if kind == "wrapped":
        pipe.transformer = torch.compile(inner, **options)
    else:
        for module in [inner] if kind == "in place" else blocks_of(inner):
            module.compile(**options)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"compiled after exits were attached: detach, then attach to the compiled one"
        ):
            pipe([1], **call)
    detach_exits(pipe)
    assert attachment.trace is None
    again = pipe([1], generator=torch.Generator().manual_seed(0), **call).images
    torch.testing.assert_close(torch.from_numpy(again), torch.from_numpy(plain))
    with attach_exits(pipe, exits, Policy(schedule=FixedDepth(1))) as attachment:
        attachment.compiler.options |= COUNTED
        pipe([1], **call)
        assert attachment.report.mean_executed == 1


def test_a_bare_transformer_compiled_after_attaching():
    name = "DiTTransformer2DModel"
    model = model_named(name)
    off = forward(model, inputs_of(name, ROWS))
    with attach_exits(model, exits_for(model)) as attachment:
        held = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(forward(held, inputs_of(name, ROWS)), off)
        assert graphs() == (1, 0), "without a step it is the plain model, in one graph"
        held = torch.compile(model, backend="eager")
        session = attachment.start(Policy(Threshold(0.5)), rows=torch.arange(len(ROWS)), num_steps=1)
        with (
            attachment.use(session.step(0, 700.0)),
            pytest.raises(ValueError, match="compiled after exits were attached"),
        ):
            forward(held, inputs_of(name, ROWS))
