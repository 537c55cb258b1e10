"""`model.generate(..., custom_generate=early_exit_generate, exit_policy=policy)`: transformers' own token loop with exits in the model.

Here: the entry point, what it refuses, what it returns. Not here: how layers are left out (hooks.py), drafts that are verified
(self_speculative.py).
R sequences, S decode steps, L layers, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from ee_diffusion.core.exits import ExitHeads
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import depth_of
from ee_diffusion.core.session import begin
from ee_diffusion.core.trace import Report, Trace
from ee_diffusion.decoding.fingerprint import fingerprint_of
from ee_diffusion.decoding.heads import SharedTail, check_heads
from ee_diffusion.decoding.hooks import DecodingHook
from ee_diffusion.decoding.kv_cache import check_asked_once, check_cache, pads_ended, with_cache
from ee_diffusion.decoding.model_specs import layers_of, model_spec_of
from ee_diffusion.decoding.parallel_recompute import CARRIES_EXITED_ROWS, ParallelRecomputeHook, check_deferrable

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


@dataclass
class EarlyExitDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`: transformers' fields, and what the decode steps did.

    trace: step t is the forward that reads generated token t, a sample is a sequence; the prompt's forward, always at full depth, is not
    in it. None if the policy is off or nothing but the prompt was read. propagated (S, L): rows whose keys and values were computed for
    a layer that did not run; recomputed (S,): with `exit_missing="recompute"`, rows x earlier positions that took the upper layers then
    (not in the trace, which holds a step's own position). These two are attributes alone, no items: they have no entry per sequence, as
    pipelines expect of items.
    """

    trace: Trace | None = None
    propagated = recomputed = None  # no annotation: no fields, so no items

    @property
    def report(self) -> Report | None:
        """The trace condensed; None where there is no trace."""
        return None if self.trace is None else self.trace.report()


class Progress(StoppingCriteriaList):
    """The caller's stopping criteria. They are asked once a token, after it has been chosen: what follows is a decode step, and the
    attachment is told so, and which sequences are padded from now on: those that have ended, if there is an end token. Without one
    transformers goes on with all of a batch until each has ended."""

    def __init__(self, criteria: StoppingCriteriaList, attachment: DecodingHook | ParallelRecomputeHook):
        super().__init__(criteria)
        self.attachment, self.pads = attachment, pads_ended(criteria)
        self.padded: Tensor | None = None  # (R,) bool

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs) -> Tensor:
        ended = super().__call__(input_ids, scores, **kwargs)  # (R,)
        before = torch.zeros_like(ended) if self.padded is None else self.padded
        self.padded = before | ended if self.pads else before
        self.attachment.begin(self.padded.cpu())
        return ended


class HeldEnd(BaseStreamer):
    """Hands tokens to the caller's streamer, and not the end: who hears that may send the next request, to a restored model."""

    def __init__(self, streamer: BaseStreamer):
        self.streamer = streamer

    def put(self, value: Tensor) -> None:
        self.streamer.put(value)

    def end(self) -> None:
        pass


def early_exit_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    exit_policy: Policy,
    exit_heads: ExitHeads | None = None,
    exit_missing: Literal["propagate", "recompute"] = "propagate",
    exit_streamer: BaseStreamer | None = None,
    **model_kwargs,
) -> EarlyExitDecoderOnlyOutput | GenerateDecoderOnlyOutput | Tensor:
    """Generate with exits. To be handed to `model.generate` as `custom_generate`; greedy search and sampling.

    Args:
        exit_policy: what may run and when to stop. Off (`Policy()`): transformers' own loop, bit for bit.
        exit_heads: exits; None: the model's own tail at the policy's depths.
        exit_missing: keys and values of layers that a token did not run. "propagate": from the state it left with; "recompute": exact,
            tokens that left wait until one goes on and take the upper layers with it (parallel_recompute.py; one exit). The cache holds
            what all layers have read: without the tokens that wait at the end.
        exit_streamer: gets prompt and tokens; in the place of `streamer`, which `generate` does not hand to a custom function.
        The rest is prepared by `generate`.

    One generation with exits at a time: another thread's waits; plain calls of other threads are what they were. `exit_streamer` hears the
    end when the model is restored.

    The prompt is read at full depth. A run has `max_new_tokens - 1` steps (that many depths in a plan). A sequence that has ended takes
    no part in later steps where transformers pads it, that is if there is an end token: its logits are sure of the padding token.

    Raises:
        ValueError: beams or assistants, an unknown model, a cache that cannot be used, a policy that does not fit, outputs that
            rows which left do not have (attentions, hidden states); under a policy that is on also guidance, a model that trains with
            gradient checkpointing, and a generation from within another one with exits (a processor's, say).
    """
    if exit_missing not in ("propagate", "recompute"):
        raise ValueError(f"exit_missing={exit_missing!r}, expected 'propagate' or 'recompute'")
    _check(model, generation_config, with_cache(model, model_kwargs))
    check_made_for(model, exit_policy)
    arguments = {"logits_processor": logits_processor, "generation_config": generation_config}
    if exit_policy.is_off:
        _stream_prompt(exit_streamer, input_ids)
        arguments |= {"streamer": exit_streamer, "stopping_criteria": stopping_criteria}
        result = model._sample(input_ids, **arguments, **model_kwargs)
        return EarlyExitDecoderOnlyOutput(**result) if generation_config.return_dict_in_generate else result
    check_asked_once(model, generation_config)
    arguments |= with_cache(model, model_kwargs)
    num_steps = max(1, generation_config.max_length - input_ids.shape[1] - 1)
    heads = default_heads(model, exit_policy, num_steps=num_steps) if exit_heads is None else exit_heads
    check_heads(model, heads)
    _check_score(exit_policy, heads)
    attach, keeps_exited_rows = DecodingHook, ""
    if exit_missing == "recompute":
        check_deferrable(exit_policy, heads.depths, model_kwargs)
        attach, keeps_exited_rows = ParallelRecomputeHook, CARRIES_EXITED_ROWS
    embeds = model_kwargs.get("inputs_embeds")
    session = begin(
        exit_policy,
        len(layers_of(model)),
        heads.depths,
        rows=torch.arange(len(input_ids)),
        num_steps=num_steps,
        samples=exit_policy.ids_of(input_ids if embeds is None else embeds, model_kwargs.get("attention_mask")),
        device=model.device,
        keeps_exited_rows=keeps_exited_rows,
    )
    padding = generation_config._pad_token_tensor  # transformers refuses an end token without one
    with attach(model, heads, session, padding=0 if padding is None else int(padding)) as attachment:
        _stream_prompt(exit_streamer, input_ids)
        arguments["streamer"] = None if exit_streamer is None else HeldEnd(exit_streamer)
        result = model._sample(input_ids, stopping_criteria=Progress(stopping_criteria, attachment), **arguments)
    if exit_streamer is not None:
        exit_streamer.end()
    if not generation_config.return_dict_in_generate:
        return result
    found = EarlyExitDecoderOnlyOutput(**result, trace=session.trace() if session.finished else None)
    if isinstance(attachment, ParallelRecomputeHook):
        found.recomputed = torch.tensor(attachment.recomputed, dtype=torch.int64)  # (S,)
    else:
        found.propagated = torch.tensor(attachment.propagated, dtype=torch.int64).reshape(-1, session.num_layers)
    return found


def _stream_prompt(streamer: BaseStreamer | None, input_ids: Tensor) -> None:
    if streamer is not None:
        streamer.put(input_ids.cpu())


def _check_score(policy: Policy, heads: ExitHeads) -> None:
    """Raise ValueError for a score that these exits cannot give."""
    score = getattr(policy.criterion, "score", None)
    exits = heads.depths if policy.exits is None else policy.exits
    if score == "saturation" and 0 in exits:
        raise ValueError("score 'saturation' at an exit at depth 0, expected exits behind a layer: states are compared")
    if score == "confidence" and isinstance(heads, SharedTail):
        raise ValueError("score 'confidence' needs learned exits (LearnedExits), these are the model's own tail")
    if score == "learned_confidence" and not hasattr(heads, "judge"):
        raise ValueError(f"score 'learned_confidence' needs exits that judge, these are {type(heads).__name__}")


def default_heads(model: PreTrainedModel, policy: Policy, *, num_steps: int) -> SharedTail:
    """The model's own tail, at the policy's exits or at the depths its schedule stops at.

    Raises:
        ValueError: a criterion, but no exits: a check at every layer costs more than it saves, so the caller says where.
    """
    if policy.exits is not None:
        return SharedTail(model, policy.exits)
    if policy.criterion is not None:
        raise ValueError("the policy has a criterion but no exits: say at which depths, each check may cost an LM head")
    num_layers = len(layers_of(model))
    plans = policy.schedule.plans(num_steps=num_steps, num_layers=num_layers)
    depths = {depth for depth in map(depth_of, plans) if depth is not None} - {num_layers}
    return SharedTail(model, tuple(sorted(depths)))


def check_made_for(model: PreTrainedModel, policy: Policy, *, part_of: str | None = None) -> None:
    """Raise ValueError for what is no policy, or one that was made for another model or for something that is no language model.
    `part_of`: the whole model's fingerprint, where `model` is a part of it."""
    if not isinstance(policy, Policy):
        raise ValueError(f"exit_policy={policy!r}, expected a Policy")
    for name, value in policy.made_for:
        if name != "model":
            raise ValueError(f"the policy was made for {name}={value!r}, expected a policy for a causal language model")
        if value != (came := part_of or fingerprint_of(model)):
            raise ValueError(
                f"the policy was made for another model, {value}; this one is {came} (fingerprints of the weights)"
            )


def _check(model: PreTrainedModel, config: GenerationConfig, model_kwargs: dict) -> None:
    """Raise ValueError for what exits cannot do, before any work."""
    model_spec_of(model)
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"generation mode {mode.value!r}, expected greedy search or sampling: set num_beams=1 and no assistant"
        )
    if config.output_attentions or config.output_hidden_states:
        raise ValueError(
            "output_attentions and output_hidden_states: sequences that left early have none; expected neither"
        )
    attention = model.config._attn_implementation
    if attention not in ATTENTION:
        raise ValueError(f"attention implementation {attention!r}, expected one of {ATTENTION}")
    check_cache(model_kwargs.get("past_key_values"))
