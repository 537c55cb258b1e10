"""Every head and judge in bfloat16 and float16, exits in the model's precision or in float32: near to what float32 says."""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import LAYERS, NAMES, ROWS, batch_for, exits_for, model_named

from ee_diffusion.classification.attach import attach
from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.evaluation import record_exits
from ee_diffusion.classification.exits import POOLINGS, ClassifierExits
from ee_diffusion.classification.methods import berxit, confidence, heads, jei_dnn, judges, pabee, palbert, pondernet
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth

RULES = {
    "none": (confidence(0.6), pabee(1)),
    "halting": (palbert(0.5), pondernet(0)),
    "linear_halting": (palbert(0.5), pondernet(0)),
    "correctness": (berxit(0.5),),
    "statistics": (jei_dnn(0.5),),
}
HALF = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 0.15, torch.float16: 0.02}  # of logits of about 1, after four layers


def inputs(name: str, dtype: torch.dtype) -> dict:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch_for(name).items()}


@torch.no_grad()
def run(dtype: torch.dtype, exits: ClassifierExits, policy: Policy):
    """The trace and the logits (R, C) of a tiny BERT."""
    model = model_named("Bert").to(dtype)
    with attach(model, exits, policy) as traces:
        logits = model(**inputs("Bert", dtype)).logits
    assert logits.dtype == dtype
    return traces[0], logits.float()


@functools.cache
def in_float32(head: str, judge: str, pooling: str):
    """The scores (K, R) of the judge's first rule, and the answers (A, R, C) at all depths."""
    exits = exits_for(model_named("Bert"), head=head, judge=judge, pooling=pooling)
    depths = [Policy(schedule=FixedDepth(depth)) for depth in (*exits.depths, LAYERS)]
    everything = Policy(RULES[judge][0].criterion, record_all=True)
    scores = run(torch.float32, exits, everything)[0].scores[0]
    return scores, torch.stack([run(torch.float32, exits, depth)[1] for depth in depths])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("own", ["the model's", "float32"])
@pytest.mark.parametrize("judge", judges())
def test_every_head_and_judge(judge: str, own: str, dtype: torch.dtype):
    for head, pooling in itertools.product(heads(), POOLINGS):
        scores, answers = in_float32(head, judge, pooling)
        exits = exits_for(model_named("Bert"), head=head, judge=judge, pooling=pooling)
        exits = exits.to(torch.float32 if own == "float32" else dtype)
        found = run(dtype, exits, Policy(RULES[judge][0].criterion, record_all=True))[0].scores[0]
        torch.testing.assert_close(found, scores, atol=TOLERANCE[dtype], rtol=0)
        for rule in RULES[judge]:
            trace, logits = run(dtype, exits, rule)
            places = torch.bucketize(trace.depths[0].long(), torch.tensor([*exits.depths, LAYERS]))
            expected = answers[places, torch.arange(ROWS)]
            torch.testing.assert_close(logits, expected, atol=2 * TOLERANCE[dtype], rtol=0.1)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_class(name: str, dtype: torch.dtype, tmp_path: Path):
    model = model_named(name).to(dtype)
    exits = ClassifierExits.for_model(model, head="linear", judge="statistics").eval()
    assert {value.dtype for value in exits.state_dict().values()} == {dtype}
    classifier = EarlyExitClassifier.from_classifier(model, exits)
    classifier.policy, batch = jei_dnn(0.4), inputs(name, dtype)
    with torch.no_grad(), classifier.recording() as traces:
        logits = classifier(**batch).logits
        classifier.save_pretrained(tmp_path)
        loaded = EarlyExitClassifier.from_pretrained(tmp_path)
        assert loaded.dtype == dtype
        with loaded.recording() as again:
            torch.testing.assert_close(loaded(**batch).logits, logits)
    assert torch.equal(again[0].depths, traces[0].depths)
    seen = record_exits(
        classifier, [batch | {"labels": torch.arange(ROWS) % 3}], scores=["learned_confidence", "max_probability"]
    )
    assert bool(seen.logits.isfinite().all())


def test_exits_of_another_precision_are_not_saved_as_one_model():
    """A folder has one precision: loaded again, exits in float32 would be rounded and decide otherwise."""
    model = model_named("Bert").bfloat16()
    exits = exits_for(model_named("Bert"), head="linear", judge="statistics")
    with pytest.raises(
        ValueError, match=r"exits in torch.float32 on a model in torch.bfloat16, expected one precision"
    ):
        EarlyExitClassifier.from_classifier(model, exits)
    assert EarlyExitClassifier.from_classifier(model, exits.bfloat16()).dtype == torch.bfloat16
