"""Tokens that leave early wait; the first that does not takes them all through the upper layers: no key or value is guessed.

Here: the driver of step sessions with one exit and recomputation (the synchronised parallel decoding of FREE, arXiv 2310.05424), the
alternative to keys and values from the state a token left with (hooks.py). Not here: the token loop (generate.py).
R rows (sequences), K waiting positions with the present one, N positions, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ee_diffusion.core.active_batch import ActiveBatch
from ee_diffusion.core.exits import ExitHeads
from ee_diffusion.core.patch import patched
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FullDepth
from ee_diffusion.core.session import Session
from ee_diffusion.decoding.hooks import certain
from ee_diffusion.decoding.model_specs import layers_of

_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds"}
CARRIES_EXITED_ROWS = "waiting positions go through the upper layers together, for all sequences"


class ParallelRecomputeHook:
    """Drives a session through the decode forwards of a model with one exit. A context manager, as `DecodingHook`.

    A step runs the layers below the exit on every sequence. Where all sequences leave, the upper layers do not run and their caches stay
    behind. Where one goes on, the upper layers read every waiting position and the present one in one call: a sequence that left keeps its
    exit's answer, and its keys and values are those of the full model. What a sequence is given does not depend on when that happens, so
    batch-mates do not matter. `recomputed` (S,): rows x earlier positions that a step took through the upper layers.
    """

    def __init__(self, model: PreTrainedModel, heads: ExitHeads, session: Session, *, padding: int = 0):
        self.model, self.heads, self.session, self.layers = model, heads, session, layers_of(model)
        self.padding = padding
        (self.depth,) = session.exits
        self.recomputed: list[int] = []
        self._names = list(inspect.signature(type(self.layers[0]).forward).parameters)[1:]
        self._waiting: list[Tensor] = []  # K states (R, 1, D) at the exit
        self._places: list[Tensor] = []  # their positions (R, 1)
        self._cache: DynamicCache | None = None
        self._states: dict[str, Tensor] = {}  # of the present position, before and after the last layer below the exit
        self._absent: Tensor
        self._armed, self._part = False, "all"
        by_layer = [(module, functools.partial(self._layer, layer)) for layer, module in enumerate(self.layers)]
        self._patched = patched([*by_layer, (model, self._forward)])

    def __enter__(self) -> ParallelRecomputeHook:
        self._patched.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._patched.__exit__(*exception)
        if (
            self._cache is not None
        ):  # positions that still wait are in the lower layers alone: whoever goes on reads them again
            known = self._cache.get_seq_length(self.depth)
            for layer in self._cache.layers[: self.depth]:
                if layer.get_seq_length() > known:
                    layer.crop(known - layer.get_seq_length())

    def begin(self, absent: Tensor) -> None:
        """The next forward is a step of the session; `absent` (R,) bool: sequences that have ended."""
        self._armed, self._absent = True, absent

    def _forward(self, original, *args, **kwargs):
        """The model's forward: the lower layers, the exit, and the upper layers where a sequence goes on."""
        if not self._armed:
            return original(*args, **kwargs)
        self._armed, index = False, len(self.session.finished)
        step = self.session.step(index, float(index), absent=self._absent)
        lane = ActiveBatch(step, self.heads, {})
        ids, mask, cache = kwargs["input_ids"], kwargs.get("attention_mask"), kwargs["past_key_values"]
        self._cache, place = cache, self._place(kwargs.get("position_ids"), mask, cache, ids)  # (R, 1)
        given = {"attention_mask": mask, "use_cache": True}
        self._part = "lower"
        self.model.base_model(ids, position_ids=place, past_key_values=cache, **given)
        self._waiting.append(self._states["now"])
        self._places.append(place)
        for layer in range(self.depth):
            step.executed(layer)
        lane.context["previous"] = lane.running(self._states["before"])
        staying = lane.offer(self.depth, lane.running(self._states["now"]))  # (r, 1, D)
        if len(staying):
            count = len(self._waiting)
            dummies = ids[:, -1:].expand(-1, count)  # (R, K); their states are known
            self._part = "upper"
            positions = {"position_ids": torch.cat(self._places, dim=1), "past_key_values": self._upper(cache)}
            logits = original(dummies, logits_to_keep=1, **positions, **given).logits[:, -1]  # (R, V)
            logits = lane.put_back(lane.running(logits))
            for layer in range(self.depth, len(self.layers)):
                step.executed(layer)
        elif lane.answers:
            logits = lane.put_back(lane.answers[0][1][:0])  # (R, V)
        else:  # every sequence has ended
            logits = self._states["now"].new_zeros(len(ids), self.model.get_output_embeddings().weight.shape[0])
        self.recomputed.append((len(self._waiting) - 1) * len(ids) if len(staying) else 0)
        if len(staying):
            self._waiting, self._places = [], []
        self._part = "all"
        step.close()
        logits = certain(logits, self.padding, self._absent)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)

    def _layer(self, layer: int, original, *args, **kwargs):
        named = dict(zip(self._names, args, strict=False)) | kwargs
        hidden = named.pop(self._names[0])
        if self._part == "lower":
            if layer >= self.depth:
                self._states["now"] = hidden  # the same at every layer from the exit on
                return hidden
            self._states["before"] = hidden
        if self._part == "upper":
            if layer < self.depth:
                return hidden
            if layer == self.depth:
                hidden = torch.cat(self._waiting, dim=1)  # (R, K, D)
        return original(hidden, **named)

    def _upper(self, cache: DynamicCache) -> DynamicCache:
        """The cache as the upper layers see it: the model reads the sequence length from layer 0, which must be theirs."""
        upper = DynamicCache()
        upper.layers = [cache.layers[self.depth]] * self.depth + cache.layers[self.depth :]
        return upper

    @staticmethod
    def _place(given: Tensor | None, mask: Tensor | None, cache: DynamicCache, ids: Tensor) -> Tensor:
        """(R, 1) position of the token that is read."""
        if given is not None:
            return given[:, -1:].expand(len(ids), -1)
        if mask is not None:
            return (mask.long().sum(-1, keepdim=True) - 1).clamp(min=0)
        return torch.full_like(ids[:, -1:], cache.get_seq_length())


def check_deferrable(policy: Policy, depths: tuple[int, ...], model_kwargs: Mapping[str, object]) -> None:
    """Raise ValueError unless a policy has a criterion, every layer in its schedule, and one exit above depth 0, and the model gets
    nothing but what is handed on to both halves."""
    unknown = sorted(name for name, value in model_kwargs.items() if name not in _KNOWN and value is not None)
    if unknown:
        raise ValueError(
            f"exit_missing='recompute' with arguments {unknown} of the model, expected none but {sorted(_KNOWN)}"
        )
    exits = depths if policy.exits is None else policy.exits
    if policy.criterion is None or not isinstance(policy.schedule, FullDepth) or len(exits) != 1 or exits[0] < 1:
        raise ValueError(
            f"exit_missing='recompute' with exits {exits}, schedule {policy.schedule} and criterion {policy.criterion}, "
            "expected one exit above depth 0, every layer, and a criterion"
        )
