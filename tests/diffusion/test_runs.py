"""Forwards of a bare transformer as runs, and what attaching with a policy refuses."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from tiny_families import exits_for, forward, inner_modules, inputs_of, model_named
from tiny_pipelines import STEPS, call_of, images_of, pipe

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.session import Session, begin
from ee_diffusion.diffusion.hooks.attach import attach_exits, detach_exits, exit_summary, hook_of
from ee_diffusion.diffusion.hooks.run_tracker import RunTracker
from ee_diffusion.diffusion.model_specs import model_spec_of

IMAGES = [0, 1, 2]


def _broken(*args, **kwargs):
    raise RuntimeError("in between")


def test_a_bare_transformer_in_a_loop_of_ones_own():
    """Lumina2's pipeline guides by two calls that it does not name; its timestep rises."""
    name = "Lumina2Transformer2DModel"
    model = model_named(name)
    inputs = [inputs_of(name, IMAGES, time=time) for time in (900.0, 600.0, 300.0)]
    plan = Policy(DepthTable(((1, 4, 2), (4, 3, 0), (0, 1, 2))))
    with attach_exits(model, exits_for(model), plan, rows_per_sample=1, num_steps=3) as attachment:
        for _ in range(2):  # two runs
            for one in inputs:
                forward(model, one)
                forward(model, one | {"encoder_hidden_states": one["encoder_hidden_states"].flip(0)})
            trace = attachment.trace
            assert trace.depths.tolist() == [list(row) for row in plan.criterion.depths]
            assert trace.calls == (2, 2, 2)
            assert trace.ran.sum((1, 2)).tolist() == [14, 14, 6]
    with (
        attach_exits(model, exits_for(model), plan, rows_per_sample=1, num_steps=2),
        pytest.raises(ValueError, match="plan has 3"),
    ):
        forward(model, inputs[0])


@pytest.mark.parametrize("by", ["pipeline", "transformer"])
def test_the_transformer_inside_a_modular_pipeline(by: str):
    made, model = FluxCoreDenoiseStep().init_pipeline(), pipe("flux").transformer
    made.update_components(transformer=model, scheduler=pipe("flux").scheduler)
    made.set_progress_bar_config(disable=True)
    arguments = call_of(
        "flux", IMAGES, guided=False, height=64, width=64
    )  # it divides by a factor of 8, having no autoencoder
    arguments = {name: value for name, value in arguments.items() if name not in ("true_cfg_scale", "output_type")}
    plain = made(**arguments, output="latents")
    plan = Policy(DepthTable(((1, 6, 2), (4, 6, 0), (3, 6, 6))))
    target = {"pipeline": made, "transformer": model}[by]
    with pytest.raises(ValueError, match=r"bare FluxTransformer2DModel needs rows_per_sample="):
        attach_exits(target, exits_for(model), plan)
    with attach_exits(target, exits_for(model), plan, rows_per_sample=1, num_steps=STEPS) as attachment:
        assert hook_of(made) is attachment
        generators = [torch.Generator().manual_seed(image) for image in IMAGES]
        found = made(**arguments | {"generator": generators}, output="latents")
        assert attachment.trace.depths.tolist() == [list(row) for row in plan.criterion.depths]
        assert "3 samples x 3 steps" in exit_summary(made)
    assert "forward" not in model.__dict__
    with pytest.raises(ValueError, match="ModularPipeline has no transformer"):
        attach_exits(FluxCoreDenoiseStep().init_pipeline(), exits_for(model))
    torch.testing.assert_close(found[1], plain[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found[0], plain[0], rtol=1e-3, atol=1e-4)


def test_a_forward_that_fails_ends_its_run(monkeypatch):
    name = "Lumina2Transformer2DModel"
    model = model_named(name)
    first, second, third = (inputs_of(name, IMAGES, time=time) for time in (900.0, 600.0, 300.0))
    plan = Policy(DepthTable(((1, 4, 2), (4, 3, 0))))
    with attach_exits(model, exits_for(model), plan, rows_per_sample=1, num_steps=2) as attachment:
        forward(model, first)
        with monkeypatch.context() as patch:
            patch.setattr(inner_modules(model)[0], "forward", _broken)
            with pytest.raises(RuntimeError, match="in between"):
                forward(model, second)
        forward(model, second)  # not step 1 of the run that failed
        forward(model, third)
        assert attachment.trace.depths.tolist() == [[1, 4, 2], [4, 3, 0]]
        with pytest.raises(ValueError, match="forward 3 of a run of 2 steps"):
            forward(model, inputs_of(name, IMAGES, time=200.0))


# --- what does not fit


def test_misuse_is_refused_before_work():
    one, policy = pipe("dit"), Policy(Threshold(0.5))
    exits = exits_for(one.transformer)
    with pytest.raises(ValueError, match="no exits are attached"):
        exit_summary(one)
    with pytest.raises(ValueError, match=r"needs rows_per_sample= .* and num_steps="):
        attach_exits(one.transformer, exits, policy)
    with pytest.raises(ValueError, match=r"policy=0\.2, expected a Policy"):
        attach_exits(one, exits, 0.2)
    with pytest.raises(ValueError, match="rows_per_sample=0, num_steps=None, expected whole numbers, at least 1"):
        attach_exits(one, exits, policy, rows_per_sample=0)
    with pytest.raises(ValueError, match="without a policy"):
        attach_exits(one, exits, rows_per_sample=2)
    with pytest.raises(ValueError, match="has no transformer"):
        attach_exits("a pipeline", exits, policy)
    with attach_exits(one, exits, policy) as attachment:
        assert "no run yet" in exit_summary(one)
        with pytest.raises(ValueError, match="attached to this DiTTransformer2DModel already"):
            attach_exits(one, exits, policy)
        assert attachment.trace is None
    with pytest.raises(ValueError, match="no exits are attached"):
        detach_exits(one)
    with attach_exits(one, exits, policy, rows_per_sample=4), pytest.raises(ValueError, match="6 rows of 4 branches"):
        images_of(one, call_of("dit", IMAGES))
    with (
        attach_exits(one, exits, Policy(DepthTable(((1, 2, 0),)))),
        pytest.raises(ValueError, match="the plan has 1 steps"),
    ):
        images_of(one, call_of("dit", IMAGES))
    assert "progress_bar" not in one.__dict__


def test_a_pipeline_that_does_not_say_whether_it_guides(monkeypatch):
    one = pipe("pixart")
    with attach_exits(one, exits_for(one.transformer), Policy(Threshold(0.5))), monkeypatch.context() as patch:
        patch.setattr(one, "prepare_latents", functools.partial(type(one).prepare_latents, one))
        with pytest.raises(ValueError, match="does not say whether it guides: attach with rows_per_sample="):
            images_of(one, call_of("pixart", IMAGES))


# --- forwards without a model: which steps and branches they are taken for


class Solver:
    """What is read of a scheduler: its timesteps, and how many steps it took."""

    def __init__(self, times: list[float]):
        self.timesteps, self.taken = torch.tensor(times), None

    @property
    def step_index(self) -> int | None:
        return self.taken

    def step(self) -> None:
        self.taken = 1 + (self.taken or 0)


class Forwards:
    """Runs of a family whose guidance is a second call, under a solver with these timesteps, or in a loop of one's own (`solver=False`);
    forwards at times, of named branches, at a sample."""

    def __init__(self, times: list[float], dtype: torch.dtype = torch.float32, *, solver: bool = True, **policy):
        self.solver = Solver(times)
        pipeline = SimpleNamespace(
            scheduler=self.solver,
            progress_bar=lambda *args: None,
            maybe_free_model_hooks=lambda: None,
        )
        model, self.dtype = model_named("WanTransformer3DModel"), dtype

        def start(policy: Policy, *, rows: torch.Tensor, num_steps: int, device) -> Session:
            return begin(policy, 4, (1,), rows=rows, num_steps=num_steps)

        said = {"pipeline": pipeline, "rows_per_sample": None, "num_steps": None, "renew": lambda: None}
        if not solver:
            said |= {"pipeline": None, "rows_per_sample": 1, "num_steps": len(times)}
        self.runs = RunTracker(Policy(Threshold(0.5), **policy), start, model, model_spec_of(model), **said)

    def __call__(self, time: float, branch: str | None = None, sample: float = 0.0, rows: int = 1) -> None:
        seen = torch.tensor(time).to(self.dtype).expand(rows)
        arguments = {"timestep": seen, "hidden_states": torch.full((rows, 2), sample)}
        named = nullcontext() if branch is None else self.runs._cache_context(nullcontext, branch)
        with named:
            step = self.runs.step(arguments, seen.float(), shape=torch.Size((rows, 2)), device=torch.device("cpu"))
            step.close()

    @property
    def seen(self) -> tuple[list[float], list[int]]:
        """Times of the steps, forwards of each."""
        return self.runs.trace.times.tolist(), list(self.runs.trace.calls)


@pytest.mark.parametrize("named", [False, True])
def test_a_second_call_is_one_before_the_solver_moved_on(named: bool):
    """A solver of two stages asks twice at one time."""
    times = [900.0, 600.0, 600.0, 300.0]
    for calls in (["cond"], ["cond", "uncond"]):
        forwards = Forwards(times)
        for time in times:
            for name in calls:
                forwards(time, name if named else None)
            forwards.solver.step()
        assert forwards.seen == (times, [len(calls)] * 4)


@pytest.mark.parametrize("calls", [1, 2])
def test_neighbouring_times_that_half_precision_rounds_to_the_same(calls: int):
    times = [float(time) for time in range(1000, 900, -1)]
    forwards = Forwards(times, torch.bfloat16)
    for time in times:
        for _ in range(calls):
            forwards(time)
        forwards.solver.step()
    assert forwards.seen == (times, [calls] * 100)


def test_in_a_loop_of_ones_own_a_second_call_is_named_or_asks_about_the_same_sample():
    for names in ((None, None), ("cond", "uncond")):
        forwards = Forwards([0.0] * 4, torch.bfloat16, solver=False)
        for place, time in enumerate((999.0, 998.0, 997.0, 300.0)):
            for name in names:
                forwards(time, name, sample=float(place))
        assert forwards.seen[1] == [2, 2, 2, 2]
    forwards = Forwards([0.0] * 4, solver=False)
    for place, time in enumerate((900.0, 600.0, 600.0, 300.0)):
        forwards(time, sample=float(place))
    assert forwards.seen == ([900, 600, 600, 300], [1, 1, 1, 1])


def test_a_branch_has_its_name_only_as_long_as_the_pipeline_says():
    forwards = Forwards([900.0, 600.0])
    for time in (900.0, 600.0):
        forwards(time, "cond")
        forwards(time, "uncond")
    for time in (900.0, 900.0, 600.0, 600.0):
        forwards(time)
    assert forwards.seen == ([900, 600], [2, 2])


def test_a_time_that_the_model_sees_rounded_is_found_among_the_schedulers():
    forwards = Forwards([999.0, 501.0, 300.0], torch.bfloat16)
    forwards(502.0)  # 501 in bfloat16: image to image begins at the second
    forwards(300.0)
    assert forwards.seen == ([501, 300], [1, 1])
    with pytest.raises(ValueError, match="forward 3 of a run of 2 steps"):
        forwards(200.0)


def test_where_a_run_begins_among_times_that_are_rounded_to_the_same_the_scheduler_says():
    forwards = Forwards([999.0, 998.0, 997.0, 996.0], torch.bfloat16)
    forwards.solver.begin_index = 2
    forwards(997.0)
    forwards.solver.step()
    forwards(996.0)
    assert forwards.seen == ([997, 996], [1, 1])


# --- calls of guidance that are not made at every step, each with exits of its own


def test_a_branch_that_ends_begins_late_or_comes_again():
    """Guidance in an interval: at the other steps the second call's images have no part."""
    forwards, times = Forwards([900.0, 700.0, 500.0, 300.0], cfg_exit="separate"), [900, 700, 500, 300]
    for _ in range(2):
        for time, calls in zip(times, (1, 2, 1, 2), strict=True):
            for _ in range(calls):
                forwards(float(time), rows=2)
            forwards.solver.step()
        trace = forwards.runs.trace
        assert trace.times.tolist() == times
        assert trace.depths.tolist() == [[4, 4, -1, -1], [4, 4, 4, 4], [4, 4, -1, -1], [4, 4, 4, 4]]
        assert trace.rows.tolist() == [[1, 1, 1, 1]] * 4


def test_a_call_that_ends_between_two_calls_of_a_step_is_nobodys_business():
    forwards = Forwards([900.0, 600.0], cfg_exit="separate")
    for time in (900.0, 900.0, 600.0):
        forwards(time)
    assert forwards.runs.trace.depths.tolist() == [[4, 4], [4, -1]]
    for time in (900.0, 900.0, 600.0, 600.0):
        forwards(time)
    assert forwards.runs.trace.depths.tolist() == [[4, 4], [4, 4]]
