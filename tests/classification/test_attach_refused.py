"""What attaching exits refuses, in words and before work is done."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import batch_for, exits_for, model_named

from ee_diffusion.classification import methods
from ee_diffusion.classification.attach import attach
from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.exits import ClassifierExits
from ee_diffusion.classification.model_specs import ModelSpec, model_spec_of, register_model
from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy

OF_OTHERS = ("closeness", "saturation", "pruned_probability")  # scores of other outputs than class probabilities
PLAN = Policy(DepthTable(((1, 2),)))
TEXTS = batch_for("Bert")


class TestRefused:
    """Bad input ends in words, before work is done."""

    @pytest.fixture
    def model(self) -> nn.Module:
        return model_named("Bert")

    @pytest.fixture
    def exits(self, model) -> ClassifierExits:
        return exits_for(model, head="pooled", judge="none")

    def test_unknown_class(self):
        with pytest.raises(ValueError, match="no family for Linear"):
            model_spec_of(nn.Linear(1, 1))

    def test_known_class_registered_again(self):
        with pytest.raises(ValueError, match="already"):
            register_model(ModelSpec("BertForSequenceClassification", "", None, None))

    @pytest.mark.parametrize("changes", [{"hidden_size": 24}, {"num_labels": 2}, {"num_hidden_layers": 2}])
    def test_exits_of_another_model(self, exits, changes):
        with (
            pytest.raises(ValueError, match=r"another model|exits at depths"),
            attach(model_named("Bert", **changes), exits, Policy()),
        ):
            pass

    @pytest.mark.parametrize("depth", [4, 5])
    def test_an_exit_where_the_model_ends(self, model, depth):
        with pytest.raises(ValueError, match=r"takes 0\.\.3"):
            exits_for(model, (1, depth), head="pooled", judge="none")

    def test_rows_may_not_leave_before_debertas_convolution(self):
        with pytest.raises(ValueError, match=r"takes 1\.\.3"):
            exits_for(model_named("DebertaV2"), (0, 1), head="pooled", judge="none")

    @pytest.mark.parametrize(
        "policy, words",
        [
            (methods.palbert(0.5), "no learned judge"),
            (Policy(Threshold((0.5, 0.5), score="margin")), "2 thresholds, expected one for each of 3"),
            *((Policy(Threshold(0.5, score=score)), f"score '{score}' is about") for score in OF_OTHERS),
        ],
    )
    def test_policies_that_do_not_fit(self, model, exits, policy, words):
        with pytest.raises(ValueError, match=words), attach(model, exits, policy):
            pass

    def test_entropy_of_a_regression(self):
        model = model_named("Bert", num_labels=1)
        exits = exits_for(model, head="pooled", judge="none")
        with pytest.raises(ValueError, match="about classes"), attach(model, exits, methods.fastbert(0.5)):
            pass

    @pytest.mark.parametrize(
        "arguments, policy, pruning, words",
        [
            ({"input_ids": torch.ones(1, 17).long()}, Policy(), None, "17 tokens, the model takes at most 16"),
            ({"input_ids": torch.ones(2, 0).long()}, Policy(), None, "no tokens"),
            ({"input_ids": torch.ones(2, 0).long()}, Policy(), (0.1,) * 4, "no tokens"),
            (TEXTS | {"output_hidden_states": True}, Policy(), None, "output_hidden_states"),
            ({"attention_mask": torch.ones(1, 2)}, Policy(), None, "without inputs"),
            ({"input_ids": torch.ones(0, 2).long()}, Policy(), None, "the batch is empty"),
            (TEXTS, PLAN, None, "need columns in a plan"),
        ],
    )
    def test_a_forward(self, model, exits, arguments, policy, pruning, words):
        with attach(model, exits, policy, pruning=pruning), pytest.raises(ValueError, match=words):
            model(**arguments)

    def test_positions_of_roberta(self):
        model = model_named("Roberta")
        assert model_spec_of(model).positions(model) == 17

    def test_what_is_no_policy_and_no_thresholds(self, model, exits):
        classifier = EarlyExitClassifier.from_classifier(model, exits)
        with pytest.raises(TypeError, match=r"policy=0.5, expected a Policy"):
            classifier.policy = 0.5
        with pytest.raises(TypeError, match=r"pruning=0.01, expected a tuple"):
            classifier.pruning = 0.01

    def test_exits_for_a_classifier_that_has_some(self, model, exits):
        classifier = EarlyExitClassifier.from_classifier(model, exits)
        with pytest.raises(
            ValueError,
            match=r"no model spec for EarlyExitClassifier, but for the BertForSequenceClassification in it: take its \.model",
        ):
            ClassifierExits.for_model(classifier, head="pooled", judge="none")

    @pytest.mark.parametrize(
        "judge, policy",
        [
            ("none", methods.confidence(0.5)),
            ("none", methods.pabee(1)),
            ("none", methods.fastbert(0.5)),
            ("none", Policy(Threshold(0.5, score="margin"))),
            ("statistics", methods.jei_dnn(0.5)),
        ],
    )
    def test_one_softmax_of_several_classes_at_once(self, judge: str, policy: Policy):
        words = r"takes one class of several to be right.*'multi_label_classification'"
        model = model_named("Bert", problem_type="multi_label_classification")
        exits = exits_for(model, head="pooled", judge=judge)
        classifier = EarlyExitClassifier.from_classifier(model, exits)
        with pytest.raises(ValueError, match=words):
            classifier.policy = policy
        with pytest.raises(ValueError, match=words), attach(model, exits, policy):
            pass
        unnamed, labels = model_named("Bert"), torch.ones(2, 3)
        with attach(unnamed, exits, policy), pytest.raises(ValueError, match=words):
            unnamed(**batch_for("Bert", [0, 1]), labels=labels)

    def test_a_judge_may_speak_for_several_classes_at_once(self):
        model = model_named("Bert", problem_type="multi_label_classification")
        exits, labels = (
            exits_for(model, head="shared", judge="halting"),
            torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
        )
        with attach(model, exits, methods.palbert(0.5)):
            found = model(**batch_for("Bert", [0, 1]), labels=labels)
        torch.testing.assert_close(found.loss, nn.functional.binary_cross_entropy_with_logits(found.logits, labels))

    def test_exits_attached_twice(self, model, exits):
        with attach(model, exits, Policy()):
            with pytest.raises(ValueError, match="attached"), attach(model, exits, Policy()):
                pass
            model(**batch_for("Bert"))
        with attach(model, exits, Policy()):
            pass

    @pytest.mark.parametrize(
        "labels, words", [([0, 3], r"0\.\.3, this model has the classes 0\.\.2"), ([-1, -100], r"-1\.\.-1, this model")]
    )
    def test_labels_that_are_no_class(self, model, exits, labels, words):
        batch = batch_for("Bert", [0, 1]) | {"labels": torch.tensor(labels)}
        with attach(model, exits, Policy()), pytest.raises(ValueError, match=words):
            model(**batch)
        classifier = EarlyExitClassifier.from_classifier(model, exits)
        for policy in (Policy(), methods.confidence(0.5)):
            classifier.policy = policy
            with pytest.raises(ValueError, match=words):
                classifier(**batch)

    def test_values_to_regress_on_are_any_number(self):
        model = model_named("Bert", num_labels=1)
        with attach(model, exits_for(model, head="pooled", judge="none"), Policy()):
            found = model(**batch_for("Bert", [0, 1]), labels=torch.tensor([7.0, -3.0]))
        assert bool(found.loss > 0)

    def test_an_error_inside_leaves_the_model_as_it_was(self, model, exits):
        before = model(**batch_for("Bert")).logits
        with pytest.raises(ValueError, match="columns"), attach(model, exits, PLAN):
            model(**TEXTS)
        assert torch.equal(model(**batch_for("Bert")).logits, before)

    @pytest.mark.parametrize(
        "settings, words",
        [
            ({"depths": ()}, "at least one"),
            ({"depths": (2, 1)}, "ascending"),
            ({"depths": (-1, 1)}, "ascending"),
            ({"head": "big"}, "head='big'"),
            ({"judge": "jury"}, "judge='jury'"),
            ({"pooling": "last"}, "pooling='last'"),
            ({"judge": "statistics", "num_labels": 1}, "class probabilities"),
        ],
    )
    def test_exits_that_cannot_be(self, settings, words):
        values = {"depths": (1,), "hidden_size": 4, "num_labels": 2, "head": "linear", "judge": "none"} | settings
        with pytest.raises(ValueError, match=words):
            ClassifierExits(**values)

    def test_methods_out_of_range(self):
        for call in (
            lambda: methods.palbert(1.5),
            lambda: methods.pabee(0),
            lambda: methods.deebert(1.0, num_labels=2),
            lambda: methods.deebert(0.1, num_labels=1),
            lambda: methods.fastbert(-0.1),
            lambda: methods.pabee_regression(1, tolerance=0.0),
        ):
            with pytest.raises(ValueError, match=r"expected|outside"):
                call()
