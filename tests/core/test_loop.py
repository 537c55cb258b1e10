"""The plain loop: schedules as truncated models, holes, nobody left, NaN, half precision, scores made of answers, misuse."""

from __future__ import annotations

import pytest
import torch
from factories import IMAGES, LAYOUTS, STEPS, PlainDriver, answer_at, images_of, run, truncated
from laws import counting
from torch import nn

from ee_diffusion.core.active_batch import run_blocks
from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import DepthPerStep, FixedDepth, FixedLayers, PiecewiseDepth
from ee_diffusion.core.session import begin

SINGLE = LAYOUTS["single"]
EVERYBODY = list(range(IMAGES))


@pytest.fixture(params=["output", "hidden"])
def driver(request) -> PlainDriver:
    return PlainDriver(request.param, depths=(0, 1, 2, 3, 4, 5))


@pytest.mark.parametrize("depth", range(7))
def test_a_fixed_depth_is_the_truncated_model(driver: PlainDriver, depth: int):
    outputs = run(driver, Policy(schedule=FixedDepth(depth)), SINGLE).outputs
    for index in range(STEPS):
        torch.testing.assert_close(outputs[index], answer_at(driver, depth, images_of(EVERYBODY, index, 1)))


@pytest.mark.parametrize("schedule", [DepthPerStep((4, 0)), PiecewiseDepth((600.0,), (0, 4))], ids=repr)
def test_depths_by_step_and_by_time(driver: PlainDriver, schedule):
    found = run(driver, Policy(schedule=schedule), SINGLE)
    assert found.trace.depths.unique(dim=1).tolist() == [[4], [0]]
    for index, depth in enumerate((4, 0)):
        torch.testing.assert_close(found.outputs[index], answer_at(driver, depth, images_of(EVERYBODY, index, 1)))


def test_a_hole_passes_its_input_on(driver: PlainDriver):
    found = run(driver, Policy(schedule=FixedLayers((0, 2, 5))), SINGLE)
    for index in range(STEPS):
        hidden = driver.hidden(images_of(EVERYBODY, index, 1))
        for layer in (0, 2, 5):
            hidden = driver.blocks[layer](hidden)
        torch.testing.assert_close(found.outputs[index], driver.tail(hidden))
    assert (found.trace.depths == 6).all()
    assert found.trace.ran.sum((0, 1)).tolist() == [14, 0, 14, 0, 0, 14]
    assert torch.equal(found.trace.needed, found.trace.ran > 0)


def test_a_criterion_stops_within_a_schedule(driver: PlainDriver):
    found = run(driver, Policy(DepthTable(((1, 6, 0, 3, 4, 5, 2),) * STEPS), FixedDepth(4)), SINGLE)
    assert found.trace.depths[0].tolist() == [1, 4, 0, 3, 4, 4, 2]
    inputs = images_of(EVERYBODY, 0, 1)
    for image, depth in enumerate([1, 4, 0, 3, 4, 4, 2]):
        torch.testing.assert_close(found.outputs[0][image], answer_at(driver, depth, inputs)[image])


def test_everybody_stopped_leaves_nothing_for_the_tail(driver: PlainDriver):
    seen = []
    hook = driver.tail.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    calls = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args: calls.append(len(args[0]))) for block in driver.blocks
    ]
    found = run(driver, Policy(DepthTable(((0, 1, 1, 2, 0, 2, 1),) * STEPS)), SINGLE)
    for one in (hook, *hooks):
        one.remove()
    assert calls == [5, 2] * STEPS, "no block is called for nobody"
    assert found.trace.answered.tolist() == [[2, 3, 2, 0, 0, 0]] * STEPS
    assert seen == [0 if driver.heads.space == "output" else IMAGES] * STEPS
    assert found.outputs.isfinite().all()
    assert found.trace.ran[:, :, 2:].sum() == 0
    for image, depth in enumerate((0, 1, 1, 2, 0, 2, 1)):
        expected = answer_at(driver, depth, images_of(EVERYBODY, 1, 1))[image]
        torch.testing.assert_close(found.outputs[1][image], expected)


def test_one_departure_leaves_the_others_their_own_answers(driver: PlainDriver):
    """Two images leave together, the rest run to the end."""
    depths = [2, 6, 6, 2, 6, 6, 6]
    found, inputs = run(driver, Policy(DepthTable((tuple(depths),) * STEPS)), SINGLE), images_of(EVERYBODY, 0, 1)
    assert len(found.outputs[0]) == IMAGES
    for image, depth in enumerate(depths):
        torch.testing.assert_close(found.outputs[0][image], answer_at(driver, depth, inputs)[image])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(driver: PlainDriver, dtype):
    for module in (driver.model, driver.heads, driver.tail):
        module.to(dtype)
    original = driver.hidden
    driver.hidden = lambda inputs: original(inputs).to(dtype)
    with torch.no_grad():
        found = run(driver, Policy(Threshold(0.3)), SINGLE)
    assert found.outputs.dtype == dtype
    assert found.trace.scores.dtype == torch.float32
    assert len(found.trace.depths.unique()) >= 2
    with truncated(driver, 0):
        assert driver.base(images_of(EVERYBODY, 0, 1)).dtype == dtype


def test_nan_in_the_hidden_states(driver: PlainDriver):
    images = images_of(EVERYBODY, 0, 1)
    images["pixels"][3] = torch.nan
    session = driver.start(Policy(Threshold(0.0)), rows=torch.arange(IMAGES), num_steps=1)
    step = session.step(0, 1.0)
    with pytest.raises(ValueError, match=r"NaN score at step 0 after depths \[0, 1, 2, 3, 4, 5\]"):
        driver.under(step, images)
    depths = session.trace().depths[0].tolist()
    assert depths == [0, 0, 0, 6, 0, 0, 0], "NaN stopped nothing, and nobody else was held back"


def test_scores_made_of_answers_evaluate_the_head_once():
    driver = PlainDriver("output", depths=(1, 3))
    with counting(driver) as work:
        found = run(driver, Policy(Threshold(0.6, score="max_probability")), SINGLE, each=lambda step: work.clear())
    depths = found.trace.depths[1]
    assert len(depths.unique()) >= 2
    reached = [int((depths >= depth).sum()) for depth in (1, 3)]
    assert work.current.heads == reached == found.trace.answered[1].tolist() == found.trace.measured[1].tolist()
    assert work.current.uncertainty == [0, 0]
    inputs = images_of(EVERYBODY, 1, 1)
    for image, depth in enumerate(depths.tolist()):
        torch.testing.assert_close(found.outputs[1][image], answer_at(driver, depth, inputs)[image])


def test_an_exit_that_is_not_measured_answers_for_itself():
    """The schedule ends at 3: nothing is measured there, and what exit 1 answered when it was measured is not taken."""
    driver = PlainDriver("output", depths=(1, 3))
    found = run(driver, Policy(Threshold(1.0, score="max_probability"), FixedDepth(3)), SINGLE)
    assert (found.trace.depths == 3).all()
    for index in range(STEPS):
        torch.testing.assert_close(found.outputs[index], answer_at(driver, 3, images_of(EVERYBODY, index, 1)))


def test_gradients_reach_the_blocks_that_ran(driver: PlainDriver):
    session = driver.start(Policy(DepthTable(((2, 2, 6, 6, 6, 6, 6),))), rows=torch.arange(IMAGES), num_steps=1)
    driver.under(session.step(0, 1.0), images_of(EVERYBODY, 0, 1))[:2].sum().backward()
    assert [block.inner.weight.grad is not None and bool(block.inner.weight.grad.any()) for block in driver.blocks] == [
        layer < 2 for layer in range(6)
    ]


@pytest.mark.parametrize("wrong", ["rows", "blocks"])
def test_another_batch_or_model_is_refused_before_work(driver: PlainDriver, wrong: str):
    session = driver.start(Policy(Threshold(0.5)), rows=torch.arange(IMAGES), num_steps=1)
    hidden = driver.hidden(images_of(EVERYBODY, 0, 1))
    blocks = driver.blocks[: 6 if wrong == "rows" else 5]
    with counting(driver) as work, pytest.raises(ValueError, match="the session was started for 7 rows and 6 blocks"):
        run_blocks(
            blocks, hidden[: IMAGES - (wrong == "rows")], session.step(0, 1.0), heads=driver.heads, tail=driver.tail
        )
    assert sum(work.current.blocks) == 0


def test_a_closed_step_is_refused(driver: PlainDriver):
    session = driver.start(Policy(), rows=torch.arange(IMAGES), num_steps=2)
    step = session.step(0, 1.0)
    driver.under(step, images_of(EVERYBODY, 0, 1))
    with counting(driver) as work, pytest.raises(ValueError, match="closed"):
        driver.under(step, images_of(EVERYBODY, 0, 1))
    assert sum(work.current.blocks) == 0


class Carrying(nn.Module):
    """Heads whose judge carries each row's own number on, and says whether it met it again at the next exit."""

    depths, space = (1, 2, 3), "output"

    def __init__(self):
        super().__init__()
        self.seen: list[list[float]] = []

    def answer(self, exit, hidden, context):
        return hidden[:, 0]

    def judge(self, inputs):
        own = inputs.hidden[:, 0, 0].round()  # (R,) the row's number, which the blocks keep
        before = inputs.context.get("own")
        assert (before is None) == (inputs.exit == 0)
        assert before is None or torch.equal(before, own), "somebody else's memory"
        inputs.carried["own"] = own
        self.seen.append(own.tolist())
        return (own == inputs.exit).float()


def test_what_is_carried_follows_the_rows_that_go_on():
    heads, hidden = Carrying(), torch.tensor([2.0, 0.0, 1.0, 5.0])[:, None, None].expand(4, 2, 3)
    policy = Policy(Threshold(0.5, score="learned_confidence"))
    step = begin(policy, 4, heads.depths, rows=torch.arange(4), num_steps=1).step(0, 0.0)
    run_blocks([lambda x: x] * 4, hidden, step, heads=heads, tail=lambda x: x[:, 0])
    assert heads.seen == [[2, 0, 1, 5], [2, 1, 5], [2, 5]]
    assert step.depths.tolist() == [3, 1, 2, 4]
