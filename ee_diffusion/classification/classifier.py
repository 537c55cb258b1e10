"""EarlyExitClassifier: a stock classifier with exits and a policy, in one folder, at home in transformers' Auto classes and pipelines.

Here: the wrapper. Not here: how rows leave (attach.py), which policies there are (methods.py), training (objective.py).
R rows, N tokens, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from ee_diffusion.classification.attach import attach, check_length, check_policy, labels_for_loss
from ee_diffusion.classification.exits import ClassifierExits
from ee_diffusion.classification.model_specs import MODEL_SPECS, model_spec_of
from ee_diffusion.classification.token_pruning import check_pruning
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Trace

TASK = ("id2label", "label2id", "problem_type")  # what pipelines read off a classifier's config


class EarlyExitConfig(PreTrainedConfig):
    """base: the stock classifier's config as a dictionary, its class among `architectures`; exits: `ClassifierExits.settings()`;
    policy: `Policy.to_dict()`; pruning: thresholds of saliency, one per layer, or None."""

    model_type = "early_exit_classifier"

    def __init__(
        self,
        base: dict | None = None,
        exits: dict | None = None,
        policy: dict | None = None,
        pruning: list[float] | None = None,
        **kwargs,
    ):
        self.base, self.exits, self.pruning = base, exits, pruning
        self.policy = Policy().to_dict() if policy is None else policy
        super().__init__(**kwargs)


class EarlyExitClassifier(PreTrainedModel):
    """A classifier whose samples exit early where its policy lets them.

        classifier = EarlyExitClassifier.from_pretrained("runs/palbert")
        classifier.policy = palbert(q=0.5)
        classify = pipeline("text-classification", model=classifier, tokenizer=tokenizer)

    With the policy off (`Policy()`) it computes exactly what the stock classifier does.

    Raises:
        ValueError: a config without a base or exits, a base of an unknown class, exits of another model, a policy that cannot run.
    """

    config_class = EarlyExitConfig
    base_model_prefix = "early_exit"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: EarlyExitConfig):
        super().__init__(config)
        if not config.base or not config.exits:
            raise ValueError("a config without base and exits; build one with EarlyExitClassifier.from_classifier")
        self.model = _stock(config.base, config._attn_implementation)
        self.exits = ClassifierExits(**config.exits)
        self.exits.check_fits(self.model)
        check_policy(self.policy, self.exits, config.problem_type)
        self.main_input_name = self.model.main_input_name
        self._traces: list[Trace] | None = None
        self.post_init()

    @classmethod
    def from_classifier(cls, model: PreTrainedModel, exits: ClassifierExits) -> EarlyExitClassifier:
        """A stock classifier and exits that fit it, as one model; both are taken over, not copied. The policy is off.

        Raises:
            ValueError: an unknown class, exits of another model or in another precision.
        """
        model_spec_of(model)
        exits.check_fits(model)
        kinds = {value.dtype for value in exits.parameters()}
        if kinds - {model.dtype}:
            kind = ", ".join(sorted(map(str, kinds)))
            raise ValueError(
                f"exits in {kind} on a model in {model.dtype}, expected one precision: exits.to(model.dtype)"
            )
        base = model.config.to_dict() | {"architectures": [type(model).__name__]}
        task = {name: getattr(model.config, name) for name in TASK}
        base.pop("_name_or_path", None)
        config = EarlyExitConfig(base=base, exits=exits.settings(), **task)
        with torch.device("meta"):  # the two modules are replaced at once
            classifier = cls(config)
        classifier.model, classifier.exits = model, exits
        return classifier.train(model.training)

    @property
    def policy(self) -> Policy:
        """When to exit; saved with the model. Setting one that does not fit these exits is a ValueError."""
        return Policy.from_dict(self.config.policy)

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy={policy!r}, expected a Policy; Policy() is off")
        check_policy(policy, self.exits, self.config.problem_type or self.model.config.problem_type)
        self.config.policy = policy.to_dict()

    @property
    def pruning(self) -> tuple[float, ...] | None:
        """Saliency below which a token is removed, one threshold per layer (Magic Pyramid; token_pruning.py); None: all stay. Saved too."""
        return None if self.config.pruning is None else tuple(self.config.pruning)

    @pruning.setter
    def pruning(self, thresholds: tuple[float, ...] | None) -> None:
        if isinstance(thresholds, int | float):
            raise TypeError(f"pruning={thresholds}, expected a tuple with one threshold for each layer, or None")
        if thresholds is not None:
            check_pruning(self.model, thresholds)
        self.config.pruning = None if thresholds is None else list(thresholds)

    @contextmanager
    def recording(self) -> Iterator[list[Trace]]:
        """Within, every forward appends its trace to the list that this yields (nothing while the policy is off)."""
        self._traces, before = [], self._traces
        try:
            yield self._traces
        finally:
            self._traces = before

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        sample_ids: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """As the stock classifier's; logits (R, C) are those of each row's exit. `sample_ids` (R,): as of `attach`."""
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            "labels": labels,
        }
        arguments = {name: value for name, value in named.items() if value is not None} | kwargs
        check_length(self.model, arguments)
        if labels is not None:
            labels_for_loss(self.model, labels)
        if self.policy.is_off and self.pruning is None:
            return self.model(**arguments)
        with attach(self.model, self.exits, self.policy, sample_ids=sample_ids, pruning=self.pruning) as traces:
            output = self.model(**arguments)
        if self._traces is not None:
            self._traces.extend(traces)
        return output

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights that a checkpoint lacks are not invented: loading refuses (see `from_pretrained`)."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers' `from_pretrained`, but a checkpoint with missing, foreign or misshapen weights, or a policy that cannot run, is
        a ValueError."""
        check_folder(pretrained_model_name_or_path)
        wants_facts = kwargs.pop("output_loading_info", False)
        try:
            model, facts = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except ValueError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {error}") from error
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        wrong = {kind: sorted(map(str, facts[kind]))[:3] for kind in kinds if facts[kind]}
        if wrong:
            raise ValueError(f"{pretrained_model_name_or_path} is no checkpoint of an {cls.__name__}: {wrong}")
        return (model, facts) if wants_facts else model


def check_folder(name: str | os.PathLike) -> None:
    """Raise ValueError for the folder of a training run in the place of the model in it."""
    weights = (*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin"))
    if Path(name, "model", "config.json").is_file() and not weights:
        raise ValueError(f"{name} holds no model itself, expected {Path(name, 'model')}")


def _stock(base: dict, attention: str | None) -> PreTrainedModel:
    """The stock classifier that a dictionary describes, untrained."""
    names = base.get("architectures") or [None]
    if names[0] not in MODEL_SPECS:
        raise ValueError(f"base is a {names[0]}, expected one of {sorted(MODEL_SPECS)}")
    config = AutoConfig.for_model(**base)
    kind = getattr(transformers, names[0])
    if (
        attention == "sdpa" and not kind._supports_sdpa
    ):  # what the wrapper chose of itself: leave the choice to the class
        attention = None
    return kind._from_config(config, attn_implementation=attention)


AutoConfig.register(EarlyExitConfig.model_type, EarlyExitConfig)
AutoModelForSequenceClassification.register(EarlyExitConfig, EarlyExitClassifier)
AutoModelForImageClassification.register(EarlyExitConfig, EarlyExitClassifier)
