"""The cloud's context manager: what each client session has uploaded, what was made of it, and the tokens that are asked for.

Here: stores, limits, catch-up, batches; no network (server.py), no threads: the caller locks, except around `compute`. CE-CoLLM (arXiv
2411.02829, sec. IV-C).
B sessions of a batch, N positions, D width, H key-value heads, d width of a head, V vocabulary.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ee_diffusion.decoding.model_specs import model_spec_of
from ee_diffusion.edge_cloud.split import Part

NO_TOKEN = -1
SPARED = 5.0  # seconds: who was heard of since then does not give way to others


class Refused(ValueError):
    """The cloud will not do that. `kind`: "unknown" (session), "limit", "invalid", "missing" (states that were not uploaded yet)
    or "unavailable" (who held the session)."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Limits:
    """What the cloud takes on before the idlest sessions give way, and without idle ones it refuses: sessions in all and per owner, bytes
    in all and per owner (None: all of them), positions of a session, idle seconds until a session is forgotten."""

    sessions: int
    owner_sessions: int
    total_bytes: int
    positions: int
    idle_seconds: float
    owner_bytes: int | None = None


@dataclass
class Context:
    """One client session. `pending`: position -> state (D,) not yet processed; keys and values per layer (1, H, N, d) of those that are."""

    owner: str
    seen: float
    pending: dict[int, Tensor] = field(default_factory=dict)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    processed: int = 0
    answer: int | None = None  # the token after position processed - 1
    epoch: int = 0  # counts the rollbacks: what a pass made of an earlier epoch is dropped

    @property
    def positions(self) -> int:
        return self.processed + len(self.pending)


@dataclass(frozen=True)
class Row:
    """One session's part in a pass: the states (n, D) of positions past..past + n - 1, and the keys and values that were there when the
    pass began, so that nothing which happens to the session meanwhile disturbs it. `last`: the pass reaches what was asked for."""

    context: Context
    epoch: int
    past: int
    states: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    last: bool


@dataclass(frozen=True)
class Made:
    """What a pass made of a Row: keys and values per layer (1, H, n, d) of its positions, and the token after the last of them (NO_TOKEN:
    its logits are not finite)."""

    keys: list[Tensor]
    values: list[Tensor]
    token: int


class ContextManager:
    """Sessions of one cloud part. Every method takes the owner that authenticated: a session of another owner is as unknown as none."""

    def __init__(
        self,
        model: PreTrainedModel,
        part: Part,
        *,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ):
        if part.side != "cloud":
            raise ValueError(f"the {part.side} part, expected the cloud's")
        model_spec_of(model)  # refuses a model that reads a session in slices, or beside a longer one, as another text
        self.model, self.part, self.limits, self.clock = model, part, limits, clock
        config = model.config
        self.width, self.vocabulary = config.hidden_size, config.vocab_size
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        numbers = self.width + 2 * len(part.layers) * config.num_key_value_heads * head_dim
        self.bytes_per_position = numbers * model.dtype.itemsize  # its state, and its keys and values at every layer
        self.positions_limit = min(limits.positions, config.max_position_embeddings)
        self.sessions: dict[str, Context] = {}

    @property
    def bytes(self) -> int:
        """Bytes that all sessions take or will take once their positions are processed."""
        return self.bytes_per_position * sum(context.positions for context in self.sessions.values())

    def open(self, owner: str, *, session: str | None = None) -> str:
        """Begin a session -> its id, which nobody can guess (`session`: one that the caller drew). At the limits the idlest session makes
        room, at the client's own one of its own. Raises Refused where none is idle."""
        self.expire()
        while len(mine := self._of(owner)) >= self.limits.owner_sessions or len(self.sessions) >= self.limits.sessions:
            if not self._evict(mine if len(mine) >= self.limits.owner_sessions else self.sessions):
                raise Refused("limit", f"{len(self.sessions)} sessions are open, {len(mine)} of them by this client")
        session = secrets.token_hex(16) if session is None else session
        self.sessions[session] = Context(owner, self.clock())
        return session

    def upload(self, owner: str, session: str, first: int, *, hidden: Tensor) -> int:
        """Store the states (N, D) of positions first.. in any order -> how many were new; those that are there already stay.

        Raises:
            Refused: an unknown session; states of another width or type or not finite; positions or bytes beyond the limits, and no idle
                session that makes room.
        """
        context = self._context(owner, session)
        if hidden.ndim != 2 or hidden.shape[1] != self.width or not hidden.is_floating_point():
            raise Refused("invalid", f"states {tuple(hidden.shape)} {hidden.dtype}, expected (N, {self.width}) floats")
        hidden = hidden.to(self.model.device, self.model.dtype)
        if not bool(hidden.isfinite().all()):
            raise Refused("invalid", f"states hold NaN or infinity in {hidden.dtype}, expected finite numbers")
        if first < 0 or first + len(hidden) > self.positions_limit:
            raise Refused("limit", f"positions {first}..{first + len(hidden) - 1}, at most {self.positions_limit} fit")
        new = {first + place: state for place, state in enumerate(hidden)}
        new = {at: state for at, state in new.items() if at >= context.processed and at not in context.pending}
        self._make_room(owner, len(new))
        context.pending |= {at: state.clone() for at, state in new.items()}
        return len(new)

    def _make_room(self, owner: str, count: int) -> None:
        """Room for so many positions more, of idle sessions where there is none. Raises Refused."""
        limits = self.limits
        for whose, most in ((owner, limits.owner_bytes), (None, limits.total_bytes)):
            while most is not None:
                there = self._of(whose)
                held = self.bytes_per_position * sum(context.positions for context in there.values())
                if held + count * self.bytes_per_position <= most:
                    break
                if not self._evict(there):
                    raise Refused("limit", f"{held} bytes are held of {most}: no room for {count} more positions")

    def _of(self, owner: str | None) -> dict[str, Context]:
        """The sessions of an owner; None: all."""
        return {name: context for name, context in self.sessions.items() if owner in (None, context.owner)}

    def _evict(self, among: dict[str, Context]) -> bool:
        """Forget the idlest of some sessions, unless it was heard of a moment ago -> whether it was."""
        idlest = min(among, key=lambda session: among[session].seen, default=None)
        if idlest is None or among[idlest].seen > self.clock() - SPARED:
            return False
        del self.sessions[idlest]
        return True

    def ready(self, owner: str, session: str, position: int) -> bool:
        """Whether everything up to `position` has been uploaded. Raises Refused: an unknown session, a position that was passed."""
        context = self._context(owner, session)
        if not 0 <= position < self.positions_limit:
            raise Refused("limit", f"position {position}, expected within 0..{self.positions_limit - 1}")
        if position < context.processed - 1:
            raise Refused(
                "invalid", f"position {position} was passed, {context.processed} are processed: roll back first"
            )
        return all(at in context.pending for at in range(context.processed, position + 1))

    def remaining(self, owner: str, session: str, position: int) -> int:
        """Positions that a pass must process before the token after `position` is known. Raises Refused as `ready` does."""
        context = self._context(owner, session)
        return max(0, position + 1 - context.processed)

    def answer(self, requests: Sequence[tuple[str, str, int]]) -> list[int | Refused]:
        """The tokens after (owner, session, position) of several clients in one pass; each catches up on all it has pending up to there.

        A request that is asked again gets the same token. What is refused is refused alone. For one thread: take, compute, finish.
        """
        answers: list[int | Refused] = [Refused("invalid", "the session is in this batch already")] * len(requests)
        rows: dict[int, Row] = {}
        taken: set[str] = set()
        for place, (owner, session, position) in enumerate(requests):
            try:
                found = self.take(owner, session, position)
            except Refused as refused:
                answers[place] = refused
                continue
            if isinstance(found, int):
                answers[place] = found
            elif session not in taken:
                taken.add(session)
                rows[place] = found
        if rows:
            made = self.compute(list(rows.values()))
            for (place, row), part in zip(rows.items(), made, strict=True):
                answers[place] = self.finish(row, part)
        return answers

    def take(self, owner: str, session: str, position: int, *, most: int | None = None) -> Row | int:
        """What a pass needs to answer (at most `most` positions of it; None: all), or the token where it is known already.

        Raises:
            Refused: an unknown session, a position that was passed, states that are not all there.
        """
        if not self.ready(owner, session, position):
            raise Refused("missing", f"states up to position {position} are not all there")
        context = self.sessions[session]
        if position == context.processed - 1:
            if context.answer is None:
                raise Refused("invalid", f"position {position} was processed before a rollback: roll back further")
            return context.answer
        begun, end = context.processed, position + 1
        end = end if most is None else min(end, begun + most)
        states = torch.stack([context.pending[at] for at in range(begun, end)])  # (n, D)
        keys, values = list(context.keys), list(context.values)
        return Row(context, context.epoch, begun, states, keys, values, end == position + 1)

    def finish(self, row: Row, made: Made) -> int | Refused:
        """Put what a pass made into the session's store -> the token after its last position."""
        context = row.context
        if context.epoch != row.epoch or context.processed != row.past:
            return Refused("invalid", "the session was rolled back while it was asked")
        if made.token == NO_TOKEN:
            return Refused("invalid", "the logits hold NaN or infinity: the states are too large")
        end = row.past + len(row.states)
        context.keys = (
            [torch.cat(pair, dim=2) for pair in zip(row.keys, made.keys, strict=True)] if row.past else made.keys
        )
        context.values = (
            [torch.cat(pair, dim=2) for pair in zip(row.values, made.values, strict=True)] if row.past else made.values
        )
        context.pending = {at: state for at, state in context.pending.items() if at >= end}
        context.processed, context.answer = end, made.token
        return made.token

    def rollback(self, owner: str, session: str, length: int) -> None:
        """Forget positions from `length` on. Raises Refused: an unknown session, a negative length."""
        context = self._context(owner, session)
        if length < 0:
            raise Refused("invalid", f"length {length}, expected 0 or more")
        context.epoch += 1
        context.pending = {at: state for at, state in context.pending.items() if at < length}
        if length < context.processed:
            context.keys = [keys[:, :, :length].clone() for keys in context.keys]
            context.values = [values[:, :, :length].clone() for values in context.values]
            context.processed, context.answer = length, None

    def close(self, owner: str, session: str) -> None:
        """End a session and free what it held. Raises Refused: an unknown session."""
        self._context(owner, session)
        del self.sessions[session]

    def expire(self) -> int:
        """Forget sessions nobody has used for `idle_seconds` -> how many."""
        limit = self.clock() - self.limits.idle_seconds
        old = [session for session, context in self.sessions.items() if context.seen < limit]
        for session in old:
            del self.sessions[session]
        return len(old)

    def _context(self, owner: str, session: str) -> Context:
        self.expire()
        context = self.sessions.get(session)
        if context is None or context.owner != owner:
            raise Refused("unknown", "no such session of this client: it was never opened, was closed or has expired")
        context.seen = self.clock()
        return context

    @torch.no_grad()
    def compute(self, rows: Sequence[Row]) -> list[Made]:
        """One pass of several sessions, of different lengths, through the cloud's layers; needs no lock, changes no session."""
        past, counts = [row.past for row in rows], [len(row.states) for row in rows]
        longest, most = max(past), max(counts)
        device, dtype = self.model.device, self.model.dtype
        hidden = torch.zeros(len(rows), most, self.width, dtype=dtype, device=device)  # (B, N, D)
        seen = torch.zeros(len(rows), 1, most, longest + most, dtype=torch.bool, device=device)
        causal = torch.ones(most, most, dtype=torch.bool, device=device).tril()
        for place, row in enumerate(rows):
            hidden[place, : counts[place]] = row.states
            seen[place, :, :, : past[place]] = True
            seen[place, :, :, longest:] = causal  # what pads the end is seen by nobody before it
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
        cache = self._padded(rows, longest)
        states = self.model.base_model(
            inputs_embeds=hidden,
            attention_mask=mask,
            position_ids=torch.tensor(past, device=device)[:, None] + torch.arange(most, device=device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # (B, N, D)
        last = states[torch.arange(len(rows), device=device), torch.tensor(counts, device=device) - 1]  # (B, D)
        logits = self.model.get_output_embeddings()(last)  # (B, V)
        tokens = logits.argmax(-1).where(logits.isfinite().all(-1), NO_TOKEN).tolist()
        return [
            _made(cache, place, slice(longest, longest + counts[place]), token) for place, token in enumerate(tokens)
        ]

    def _padded(self, rows: Sequence[Row], longest: int) -> DynamicCache:
        """The sessions' keys and values in one cache (B, H, N, d), padded at the end."""
        cache = DynamicCache()
        if len(rows) == 1 and longest:  # nothing to pad, nothing to copy
            for layer, pair in enumerate(zip(rows[0].keys, rows[0].values, strict=True)):
                cache.update(*pair, layer)
            return cache
        for layer in range(len(self.part.layers) if longest else 0):
            one = next(row for row in rows if row.past).keys[layer]
            keys, values = (one.new_zeros(len(rows), one.shape[1], longest, one.shape[3]) for _ in range(2))
            for place, row in enumerate(rows):
                if row.past:
                    keys[place, :, : row.past] = row.keys[layer][0]
                    values[place, :, : row.past] = row.values[layer][0]
            cache.update(keys, values, layer)
        return cache


def _made(cache: DynamicCache, place: int, span: slice, token: int) -> Made:
    keys = [layer.keys[place : place + 1, :, span].clone() for layer in cache.layers]
    values = [layer.values[place : place + 1, :, span].clone() for layer in cache.layers]
    return Made(keys, values, token)
