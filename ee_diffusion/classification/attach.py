"""Attach exits to a stock classifier of transformers: its layers run on the rows that are still going, no forward is copied.

Here: the driver of sessions for classifiers; one forward is one run of one step. Not here: facts about classes (model_specs.py), decisions
(core). R rows of the batch, r running rows, N tokens, D width, C classes, L layers.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ee_diffusion.classification.exits import ClassifierExits, ClassifierHeads
from ee_diffusion.classification.model_specs import model_spec_of
from ee_diffusion.classification.token_pruning import ActiveTokens, TokenTrace, check_pruning
from ee_diffusion.core.active_batch import ActiveBatch
from ee_diffusion.core.criteria import DepthTable
from ee_diffusion.core.patch import patched
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.rows import require_rows
from ee_diffusion.core.session import begin
from ee_diffusion.core.trace import Trace

INPUTS = ("input_ids", "inputs_embeds", "pixel_values")
EXTRAS = ("output_hidden_states", "output_attentions")
LEARNED = ("learned_confidence", "confidence")  # scores of a learned judge
OF_CLASSES = ("margin", "negative_entropy", "max_probability", "agreement")  # scores of one softmax
OF_DECODING = ("saturation", "pruned_probability")
IGNORED = -100  # the label of rows that a loss leaves out, in torch and transformers


@contextmanager
def attach(
    model: nn.Module,
    exits: ClassifierExits,
    policy: Policy,
    *,
    sample_ids: Tensor | None = None,
    pruning: tuple[float, ...] | None = None,
    token_traces: list[TokenTrace] | None = None,
) -> Iterator[list[Trace]]:
    """Within, every forward of `model` in this thread runs under `policy`; yields a list to which each forward appends its trace.

    Outside, and in other threads, the model computes exactly what it did before; another thread that attaches exits to it waits.
    `sample_ids` (R,): ids of the rows (for depth tables and drawn exits); None: 0..R-1, for drawn exits `Policy.ids_of` the inputs.
    The loss of a forward with labels is over all rows, early or not. `pruning`: saliency below which a token is removed,
    one threshold per layer (token_pruning.py); what was removed is appended to `token_traces`.

    Raises:
        ValueError: an unknown class; exits of another model, or attached by this thread already; a score that these exits cannot give;
            thresholds of the wrong number or range, or a class whose tokens cannot be removed; in a forward: an input longer than the
            model, hidden states or attentions wanted while rows may leave, attention masks that cannot be cut by rows, labels that
            are no class.
    """
    exits.check_fits(model)
    check_policy(policy, exits, problem_of(model, None))
    if pruning is not None:
        check_pruning(model, pruning)
    run = _ClassifierHook(model, exits, policy, sample_ids, pruning=pruning)
    run.token_traces = token_traces
    blocks = run.spec.blocks(model)
    by_block = [(block, functools.partial(run.block, block)) for block in blocks]
    with patched([*by_block, (model, run.forward)]):
        yield run.traces


def check_policy(policy: Policy, exits: ClassifierExits, problem: str | None) -> None:
    """Raise ValueError if the policy uses a score that these exits cannot give; `problem`: the config's problem_type."""
    criterion = policy.criterion
    if isinstance(criterion, DepthTable | None):
        return
    score = criterion.score
    if score in LEARNED and exits.judge_kind is None:
        raise ValueError(f"the policy uses the score {score!r}, these exits have no learned judge")
    if score in OF_DECODING:
        raise ValueError(f"score {score!r} is about decoding, expected another for a classifier")
    if score in OF_CLASSES and exits.num_labels < 2:
        raise ValueError(f"score {score!r} is about classes, this model has {exits.num_labels} output")
    if score == "closeness" and exits.num_labels != 1:
        raise ValueError(f"score 'closeness' is about one value, this model has {exits.num_labels} outputs")
    of_classes = score in OF_CLASSES or (score in LEARNED and exits.judge_kind.looks_at == "logits")
    if of_classes and problem not in (None, "single_label_classification"):
        raise ValueError(
            f"score {score!r} takes one class of several to be right, this model's problem_type is {problem!r}; expected a score of a "
            "learned judge that does not look at classes"
        )
    criterion.validate(1, len(exits.depths if policy.exits is None else policy.exits))


def problem_of(model: nn.Module, labels: Tensor | None) -> str | None:
    """The problem_type of a model's config; where it names none, what transformers takes floating labels (R, C) for."""
    several = labels is not None and labels.is_floating_point() and model.config.num_labels > 1
    return model.config.problem_type or ("multi_label_classification" if several else None)


@contextmanager
def recorded_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within, a forward of `model` appends the hidden states that enter each layer, so that entry d is what an exit at depth d sees."""
    states: list[Tensor] = []

    def append(block, args, kwargs) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    blocks = model_spec_of(model).blocks(model)
    handles = [block.register_forward_pre_hook(append, with_kwargs=True) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


class _ClassifierHook:
    """The patched forwards of one `attach`."""

    def __init__(
        self,
        model: nn.Module,
        exits: ClassifierExits,
        policy: Policy,
        sample_ids: Tensor | None,
        *,
        pruning: tuple[float, ...] | None,
    ):
        self.model, self.policy, self.sample_ids = model, policy, sample_ids
        self.heads, self.spec = ClassifierHeads(model, exits), model_spec_of(model)
        self.num_layers = self.spec.num_layers(model)
        self.traces: list[Trace] = []
        self.active: ActiveBatch | None = None
        self.pruning, self.tokens = pruning, None
        self.token_traces: list[TokenTrace] | None = None
        self.calls = 0  # of blocks in this forward: the next one's layer
        self.names = _names(self.spec.blocks(model)[0])

    def forward(self, original, *args, **kwargs):
        """The model's forward: start an active batch, let the model run, put the logits of the rows that left back."""
        arguments = dict(zip(_names(self.model), args, strict=False)) | kwargs
        labels, as_dict = arguments.pop("labels", None), arguments.pop("return_dict", None)
        self._check(arguments)
        if labels is not None:
            labels = labels_for_loss(self.model, labels)
            check_policy(self.policy, self.heads.exits, problem_of(self.model, labels))
        given = next(arguments[name] for name in INPUTS if arguments.get(name) is not None)
        mask = arguments.get("attention_mask")
        session = begin(
            self.policy,
            self.num_layers,
            self.heads.depths,
            rows=torch.arange(len(given)),
            num_steps=1,
            samples=self.policy.ids_of(given, mask) if self.sample_ids is None else self.sample_ids,
            device=given.device,
        )
        step = session.step(0, 0.0)
        self.active, self.calls = ActiveBatch(step, self.heads, {} if mask is None else {"attention_mask": mask}), 0
        if self.pruning is not None:
            self.tokens = ActiveTokens(self.pruning, mask, rows=len(given))
        try:
            output = original(**arguments, return_dict=True)
            output.logits = self._own_logits(output.logits)
        finally:
            self.active, tokens, self.tokens = None, self.tokens, None
        step.close()
        if tokens is not None and self.token_traces is not None:  # only where wanted: a trace holds device memory
            self.token_traces.append(tokens.trace())
        self.traces.append(session.trace())
        if labels is not None:
            config = copy.copy(
                self.model.config
            )  # the loss writes the kind of problem that it takes labels for into it
            loss = self.model.loss_function(labels, output.logits, config)
            output = type(output)(**dict(output) | {"loss": loss})
        return output.to_tuple() if as_dict is False else output

    def _check(self, arguments: dict) -> None:
        wanted = [name for name in EXTRAS if arguments.get(name, getattr(self.model.config, name))]
        if wanted:
            raise ValueError(f"{wanted[0]}: rows that leave have none of the later layers; run the model without exits")
        if not any(arguments.get(name) is not None for name in INPUTS):
            raise ValueError(f"a forward without inputs, expected one of {INPUTS}")
        check_length(self.model, arguments)

    def _own_logits(self, logits: Tensor) -> Tensor:
        """logits (r or R, C) of the tail -> (R, C) with the logits of the rows that left."""
        return self.active.put_back(self.active.running(logits) if self.spec.tail_takes_all else logits)

    def block(self, block: nn.Module, original, *args, **kwargs):
        """One layer: let rows leave, then run on the rest."""
        active, layer = self.active, self.calls
        if active is None:
            return original(*args, **kwargs)
        self.calls += 1
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        hidden = active.offer(layer, arguments.pop(self.names[0]))  # (r, N, D)
        if active.step.runs(layer):
            arguments = {name: self._rows_of(name, value) for name, value in arguments.items()}
            if self.tokens is None:
                given, hidden = len(hidden), original(hidden, **arguments)
                hidden = hidden[0] if self.spec.returns_tuple else hidden
                names = {"class_name": self.spec.class_name, "row_arguments": self.spec.row_arguments}
                require_rows((hidden,), given, **names)
            else:
                hidden = self.tokens.layer(
                    layer, block, hidden, mask=arguments.get("attention_mask"), rows=active.step.rows.tolist()
                )
                active.context["attention_mask"] = self.tokens.keys  # (r, M), of what is left
            active.step.executed(layer)
        if layer == self.num_layers - 1 and self.spec.tail_takes_all:
            hidden = active.spread(hidden)  # (R, N, D)
        return (hidden, None) if self.spec.returns_tuple else hidden

    def _rows_of(self, name: str, value):
        """The running rows of one argument, as the model spec says; anything else is passed on as it is."""
        if value is None or name not in self.spec.row_arguments:
            return value
        if isinstance(value, tuple):
            return tuple(self._rows_of(name, one) for one in value)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} is a {type(value).__name__}, which cannot be cut by rows; use attn_implementation='sdpa' or 'eager'"
            )
        return self.active.running(value) if len(value) == self.active.num_rows else value  # one for all rows


def check_length(model: nn.Module, arguments: dict) -> None:
    """Raise ValueError if texts have no tokens, or more than the model has positions."""
    tokens = next((arguments[name] for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None), None)
    if tokens is None:
        return
    if not tokens.shape[1]:
        raise ValueError(f"texts of no tokens: input_ids are {tuple(tokens.shape)}, expected at least one token each")
    most = model_spec_of(model).positions(model)
    if most is not None and tokens.shape[1] > most:
        raise ValueError(
            f"texts of {tokens.shape[1]} tokens, the model takes at most {most}: truncate them (truncation=True)"
        )


def labels_for_loss(model: nn.Module, labels: Tensor) -> Tensor:
    """Labels (R,) as transformers' loss takes them: -100 where the class's own loss leaves a row out; floating labels (values, several
    classes at once) as they are. Raises ValueError if a class is none of the model's."""
    classes = model.config.num_labels
    if labels.is_floating_point() or classes == 1:
        return labels
    if model_spec_of(model).ignored_labels == "negative" and model.config.problem_type is None:
        labels = labels.masked_fill(labels < 0, IGNORED)
    known = labels[labels != IGNORED]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < classes:
        raise ValueError(
            f"labels span {int(known.min())}..{int(known.max())}, this model has the classes 0..{classes - 1} ({IGNORED}: not counted)"
        )
    return labels


def _names(module: nn.Module) -> list[str]:
    """Names of the parameters of a module's own forward."""
    return _parameters(type(module))


@functools.cache
def _parameters(kind: type) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]
