"""The edge: the lower layers with two exits, alone or with a cloud for the tokens it is not sure of (CE-CoLLM, arXiv 2411.02829).

Here: the token loop and the layers that are left out. Not here: sending (client.py), decisions (core).
N positions, D width, V vocabulary, T generated tokens, e1 and e2 the exits' depths.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ee_diffusion.core.active_batch import ActiveBatch
from ee_diffusion.core.exits import ExitHeads
from ee_diffusion.core.patch import patched
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import depth_of
from ee_diffusion.core.session import Session, StepSession, begin
from ee_diffusion.core.trace import Trace
from ee_diffusion.decoding.generate import check_made_for
from ee_diffusion.decoding.heads import SharedTail
from ee_diffusion.decoding.kv_cache import write_position
from ee_diffusion.decoding.model_specs import layers_of, model_spec_of
from ee_diffusion.edge_cloud.client import CloudLost, Helper
from ee_diffusion.edge_cloud.split import Part


@dataclass
class EdgeOutput:
    """sequences (1, N + T); trace: step t chose token t, depth L: neither exit was sure; sources: who said each token ("exit 0", "exit 1",
    "cloud" or "own": the edge's second exit because there was no cloud or it failed); losses: (token, reason) of every failure.

    Seconds: waited for the cloud, of these computed by the cloud, in all, and `times` of each token; payload: bytes of states that were
    sent.
    """

    sequences: Tensor
    trace: Trace
    sources: list[str] = field(default_factory=list)
    losses: list[tuple[int, str]] = field(default_factory=list)
    waited: float = 0.0
    cloud: float = 0.0
    total: float = 0.0
    times: list[float] = field(default_factory=list)
    payload: int = 0


class Edge:
    """An edge part that generates. `heads`: exits at depths e1 and e2; None: the part's own norm and LM head.

    Threads may share one, or several of one model: their generations take turns, plain calls of the model are what they were.
    """

    def __init__(self, model: PreTrainedModel, part: Part, *, heads: ExitHeads | None = None):
        if part.side != "edge" or len(layers_of(model)) != part.exits[1]:
            raise ValueError(
                f"the {part.side} part with {len(layers_of(model))} layers, expected the edge's {part.exits[1]}"
            )
        self.model, self.part, self.family = model, part, model_spec_of(model)
        self.heads = SharedTail(model, part.exits) if heads is None else heads
        if tuple(self.heads.depths) != tuple(part.exits):
            raise ValueError(f"heads at depths {self.heads.depths}, expected the part's exits {part.exits}")
        self.heads.check_fits(model)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        policy: Policy,
        cloud: Helper | None = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> EdgeOutput:
        """Greedy search for one sequence (1, N), N >= 1. `cloud=None`: standalone. `Policy()`: no exit is ever sure. `eos_token_id`: a
        token that ends the answer, or several (those of the model: `part.end_tokens`).

        The prompt is read by all of the edge's layers. A token that leaves at e1 does not run layers e1..e2-1: their keys and values come
        from the state it left with, as in `early_exit_generate`. The cloud gets the state at e1 of every position.

        Raises:
            ValueError: not one sequence of one or more tokens; a policy that does not fit the exits, that was made for another model, that
                is late or whose schedule leaves out layers below others; an end that is no token; a cloud that is not at the first
                position; NaN scores; a generation from within another one of the same thread.
        """
        if input_ids.ndim != 2 or len(input_ids) != 1 or input_ids.shape[1] == 0 or max_new_tokens < 1:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)}, max_new_tokens={max_new_tokens}, expected (1, N >= 1) and at least 1"
            )
        ends = _ends(eos_token_id)
        check_made_for(self.model, policy, part_of=self.part.fingerprint)
        if policy.delayed:
            raise ValueError(
                "a late policy, expected one that decides where it measures: the cloud is asked in between"
            )
        plans = policy.schedule.plans(num_steps=max_new_tokens, num_layers=self.part.num_layers)
        if any(depth_of(plan) is None for plan in plans):
            raise ValueError(f"the schedule {policy.schedule} leaves out layers below others, expected one that stops")
        session = begin(
            policy,
            self.part.num_layers,
            self.part.exits,
            rows=torch.zeros(1, dtype=torch.int64),
            num_steps=max_new_tokens,
            samples=policy.ids_of(input_ids),
        )
        ids = input_ids.to(self.model.device)
        output = EdgeOutput(ids, None)  # type: ignore[arg-type]  # the trace comes at the end
        with _BlockRunner(self, session, cloud) as passage:
            begun, new = time.monotonic(), ids
            for token in range(max_new_tokens):
                started = time.monotonic()
                answer = passage.step(new)
                new = torch.tensor([[self._token(passage, answer, output, token)]], device=ids.device)
                ids = torch.cat([ids, new], dim=1)
                output.times.append(time.monotonic() - started)
                if int(new) in ends:
                    break
        output.sequences, output.trace, output.total = ids, session.trace(), time.monotonic() - begun
        output.payload = 0 if cloud is None else cloud.payload
        return output

    def _token(self, passage: _BlockRunner, answer: tuple[int, Tensor] | None, output: EdgeOutput, token: int) -> int:
        """The token of the exit that was sure, else the cloud's, else the second exit's."""
        if answer is not None:
            output.sources.append(f"exit {answer[0]}")
            return int(answer[1].argmax(-1))
        if passage.cloud is not None:
            asked = time.monotonic()
            try:
                said, seconds = passage.cloud.ask(passage.length - 1, vocabulary=self.model.config.vocab_size)
                output.sources.append("cloud")
                output.cloud += seconds
                return said
            except CloudLost as lost:
                output.losses.append((token, str(lost)))
            finally:
                output.waited += time.monotonic() - asked
        output.sources.append("own")
        return int(passage.own().argmax(-1))


def _ends(eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """The tokens that end an answer."""
    ends = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
    if isinstance(ends, str) or not isinstance(ends, Iterable) or not all(isinstance(token, int) for token in ends):
        raise ValueError(f"eos_token_id={eos_token_id!r}, expected a token's id, several of them, or None")
    return frozenset(ends)


class _BlockRunner:
    """One generation's way through the edge's layers, when it has its turn: a context manager that leaves the model as it was."""

    def __init__(self, edge: Edge, session: Session, cloud: Helper | None):
        self.edge, self.session, self.cloud = edge, session, cloud
        self.cache, self.length = DynamicCache(), 0
        self.layers = layers_of(edge.model)
        self.first, self.second = edge.part.exits
        self.top: Tensor  # (1, n, D) what the last layer said
        self._row = torch.zeros(1, dtype=torch.int64, device=edge.model.device)  # the only one there is
        self._names = list(inspect.signature(type(self.layers[0]).forward).parameters)[1:]
        by_layer = [(module, functools.partial(self._layer, layer)) for layer, module in enumerate(self.layers)]
        self._patched = patched(by_layer)
        self._step: StepSession
        self._lane: ActiveBatch
        self._whole = True

    def __enter__(self) -> _BlockRunner:
        self._patched.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._patched.__exit__(*exception)

    def step(self, tokens: Tensor) -> tuple[int, Tensor] | None:
        """Read tokens (1, n) -> the exit that was sure and its logits (1, V), or None."""
        index = len(self.session.finished)
        self._step = self.session.step(index, float(index))
        self._lane, self._whole = ActiveBatch(self._step, self.edge.heads, {}), index == 0
        positions = torch.arange(self.length, self.length + tokens.shape[1], device=tokens.device)[None]
        self.edge.model.base_model(tokens, position_ids=positions, past_key_values=self.cache, use_cache=True)
        if self._whole:
            self._lane.offer(self.first, self._at_first[:, -1:])
        if not self._step.finished:
            self._lane.offer(self.second, self.top[:, -1:])
        self.length += tokens.shape[1]
        self._step.close()
        if not self._lane.answers:
            return None
        return self.edge.part.exits.index(int(self._step.depths[0])), self._lane.answers[0][1]

    def own(self) -> Tensor:
        """What the second exit says of the last token (1, V), sure or not; not evaluated again where its score was made of it."""
        seen = self._lane.observed
        if seen is not None and seen.exit == 1 and seen.answered:
            return seen.answer
        return self.edge.heads.answer(1, self.top[:, -1:], {})

    def _layer(self, layer: int, original, *args, **kwargs):
        named = dict(zip(self._names, args, strict=False)) | kwargs
        hidden = named.pop(self._names[0])
        if layer == self.first:
            self._at_first = hidden  # (1, n, D)
            if self.cloud is not None:
                self.cloud.upload(self.length, hidden[0])
            if not self._whole:
                self._lane.offer(self.first, hidden)
        if self._step.finished:
            keys, values = self.edge.family.keys_values(self.layers[layer], hidden, named["position_embeddings"])
            write_position(self.cache, layer, [(self._row, keys, values)], num_rows=1)
            return hidden
        hidden = original(hidden, **named)
        self._step.executed(layer)
        if layer == self.second - 1:
            self.top = hidden
        return hidden
