"""What exits must know of each classifier class of transformers: one row a class, never guessed from a shape.

Here: facts. Not here: what is done with them (attach.py, token_pruning.py). R rows, N tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ee_diffusion.core.registry import add_row, family_row

Mask = Tensor | None


def _table_length(model: nn.Module) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)


@dataclass(frozen=True)
class ModelSpec:
    """One classifier class.

    block: class name of its blocks; in order of use, and one block may be used many times (ALBERT): a layer is a call.
    pool: (model, hidden (R, N, D), mask (R, N) or None) -> (R, D), what the model's classifier looks at, the final norm included.
    classify: (model, pooled (R, D)) -> (R, C).
    row_arguments: names of the block's arguments with one entry per row of the batch; a tuple of tensors counts as its tensors.
    returns_tuple: the block returns (hidden states, something).
    tail_takes_all: the model's tail combines the hidden states with something of the whole batch (an attention mask).
    first_exit: the smallest depth at which rows may leave.
    inner: the module inside a block that sees the hidden states first; work is counted there.
    repeats: name of the config's number of blocks in what it counts as one hidden layer; None: one.
    positions: (model) -> the longest text that it takes, in tokens; None: any, since its positions are relative (or those of images).
    ignored_labels: labels that its loss leaves out: -100 alone, as everywhere, or `negative`: every label below 0, unless
        the config names a problem_type.
    """

    class_name: str
    block: str
    pool: Callable[[nn.Module, Tensor, Mask], Tensor]
    classify: Callable[[nn.Module, Tensor], Tensor]
    row_arguments: tuple[str, ...] = ("attention_mask", "position_ids")
    returns_tuple: bool = False
    tail_takes_all: bool = False
    first_exit: int = 0
    inner: str = "attention"
    repeats: str | None = None
    positions: Callable[[nn.Module], int | None] = _table_length
    ignored_labels: Literal["-100", "negative"] = "-100"

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The block modules, each once."""
        return [module for module in model.modules() if type(module).__name__ == self.block]

    def num_layers(self, model: nn.Module) -> int:
        """L: calls of blocks in one forward."""
        repeats = 1 if self.repeats is None else getattr(model.config, self.repeats)
        return model.config.num_hidden_layers * repeats


def _dropped_classifier(model: nn.Module, pooled: Tensor) -> Tensor:
    return model.classifier(model.dropout(pooled))


def _roberta_pool(model: nn.Module, hidden: Tensor, mask: Mask) -> Tensor:
    head = model.classifier
    return head.dense(head.dropout(hidden[:, 0])).tanh()


def _modernbert_pool(model: nn.Module, hidden: Tensor, mask: Mask) -> Tensor:
    hidden = model.model.final_norm(hidden)
    if model.config.classifier_pooling == "cls":
        return model.head(hidden[:, 0])
    if mask is None:
        return model.head(hidden.mean(1))
    weights = mask[:, :, None].to(hidden.dtype)  # (R, N, 1)
    return model.head((hidden * weights).sum(1) / weights.sum(1))


MODEL_SPECS: dict[str, ModelSpec] = {
    spec.class_name: spec
    for spec in (
        ModelSpec(
            "BertForSequenceClassification",
            "BertLayer",
            pool=lambda model, hidden, mask: model.bert.pooler(hidden),
            classify=_dropped_classifier,
        ),
        ModelSpec(
            "RobertaForSequenceClassification",
            "RobertaLayer",
            pool=_roberta_pool,
            classify=lambda model, pooled: model.classifier.out_proj(model.classifier.dropout(pooled)),
            positions=lambda model: model.config.max_position_embeddings - model.config.pad_token_id - 1,
        ),
        ModelSpec(
            "AlbertForSequenceClassification",
            "AlbertLayer",
            pool=lambda model, hidden, mask: model.albert.pooler_activation(model.albert.pooler(hidden[:, 0])),
            classify=_dropped_classifier,
            repeats="inner_group_num",
        ),
        ModelSpec(
            "DistilBertForSequenceClassification",
            "TransformerBlock",
            pool=lambda model, hidden, mask: model.pre_classifier(hidden[:, 0]).relu(),
            classify=_dropped_classifier,
        ),
        ModelSpec(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Layer",
            pool=lambda model, hidden, mask: model.pooler(hidden),
            classify=_dropped_classifier,
            row_arguments=("attention_mask",),
            returns_tuple=True,
            positions=lambda model: _table_length(model) if model.config.position_biased_input else None,
            ignored_labels="negative",
            first_exit=1,  # a convolution behind the first block combines its input and output
        ),
        ModelSpec(
            "ModernBertForSequenceClassification",
            "ModernBertEncoderLayer",
            pool=_modernbert_pool,
            classify=lambda model, pooled: model.classifier(model.drop(pooled)),
            row_arguments=("attention_mask", "position_embeddings", "position_ids"),
            tail_takes_all=True,
            positions=lambda model: None,  # rotary
            inner="attn",
        ),
        ModelSpec(
            "ViTForImageClassification",
            "ViTLayer",
            pool=lambda model, hidden, mask: model.vit.layernorm(hidden)[:, 0],
            classify=lambda model, pooled: model.classifier(pooled),
            positions=lambda model: None,
        ),
    )
}


# The classes that the package's own tests compare with transformers, without those that users register.
TESTED = frozenset(MODEL_SPECS)


def register_model(spec: ModelSpec) -> None:
    """Make a classifier class known. The row is not checked here: check it on a classifier of that class with
    `model_check.check_model`, since broadcasting may hide a forgotten row argument.

    Raises:
        ValueError: the class is known already, or anything but a ModelSpec of this module (denoisers have their own).
    """
    if not isinstance(spec, ModelSpec):
        raise ValueError(f"{spec!r}, expected {__name__}.ModelSpec(...)")
    add_row(MODEL_SPECS, spec.class_name, spec, called="the table of classifiers")


def model_spec_of(model: nn.Module) -> ModelSpec:
    """The table's row for a classifier.

    Raises:
        ValueError: its class is unknown; where it wraps a known one, the message names it.
    """
    kinds = [type(one).__name__ for one in (model, getattr(model, "model", None))]
    if kinds[0] not in MODEL_SPECS and kinds[1] in MODEL_SPECS:
        raise ValueError(f"no model spec for {kinds[0]}, but for the {kinds[1]} in it: take its .model")
    return family_row(MODEL_SPECS, model, module=__name__)
