"""Lossless decoding: the first layers draft some tokens, the others verify them at once from the drafts' own hidden states.

`model.generate(..., custom_generate=self_speculative_generate, exit_depth=10, draft_tokens=4)` says what greedy search says. Nothing is
computed
twice: a draft's keys, values and hidden state at the exit are what the verification goes on from (the self-speculation of LayerSkip,
arXiv 2404.16710, sec. 4.3). Sequences of a batch accept different numbers of drafts: the positions of rejected ones stay in the cache
as holes that the attention mask hides, positions are explicit, and holes that all sequences share at the end are cut off.

Here: the loop of drafts and verifications. Not here: exits without verification (generate.py).
R sequences, N positions in the cache, K drafted positions of a cycle, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from ee_diffusion.core.exits import ExitHeads
from ee_diffusion.core.patch import patched
from ee_diffusion.decoding.heads import SharedTail, check_heads
from ee_diffusion.decoding.kv_cache import check_asked_once, check_cache, pads_ended, with_cache
from ee_diffusion.decoding.model_specs import layers_of

_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


@dataclass
class SelfSpeculativeOutput(GenerateDecoderOnlyOutput):
    """Sequences, and for each of them how often it was verified, how many drafts it made and how many of those were right.

    verified, drafted, accepted: (R,) int64. A sequence of T tokens was verified at most T - 1 times (the first token is the prompt's).
    """

    verified: Tensor | None = None
    drafted: Tensor | None = None
    accepted: Tensor | None = None


class Sections:
    """A model whose forward runs its first `exit_depth` layers (`draft`) or the rest (`verify`). A context manager, as
    `DecodingHook`."""

    def __init__(self, model: PreTrainedModel, exit_depth: int, heads: ExitHeads):
        self.model, self.layers, self.exit_depth, self.heads = model, layers_of(model), exit_depth, heads
        self.states: list[Tensor] = []  # (R, 1, D) of each drafted position, at the exit
        self._part = "all"
        by_layer = [(module, functools.partial(self._layer, layer)) for layer, module in enumerate(self.layers)]
        self._patched = patched(by_layer)

    def __enter__(self) -> Sections:
        self._patched.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._patched.__exit__(*exception)

    def draft(self, tokens: Tensor, *, mask: Tensor, positions: Tensor, cache: DynamicCache) -> None:
        """tokens (R, 1) through the first layers; their states at the exit (R, 1, D) are kept, `said` makes tokens of the last one."""
        with self._running("draft"):
            self.model.base_model(
                tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )

    def said(self) -> Tensor:
        """(R, 1) what the exit says after the token that was drafted last."""
        return self.heads.answer(self.heads.depths.index(self.exit_depth), self.states[-1], {}).argmax(-1, keepdim=True)

    def verify(self, tokens: Tensor, *, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """The drafted positions (R, K) through the other layers, from the kept states -> logits (R, K, V)."""
        upper = DynamicCache()
        # the model reads the sequence length from layer 0: of the layers that run now
        upper.layers = [cache.layers[self.exit_depth]] * self.exit_depth + cache.layers[self.exit_depth :]
        with self._running("verify"):
            logits = self.model(
                tokens, attention_mask=mask, position_ids=positions, past_key_values=upper, use_cache=True
            ).logits
        self.states = []
        return logits

    @contextmanager
    def _running(self, part: str) -> Iterator[None]:
        """A part of the model, for one forward: whoever else calls it (a processor of the caller's) gets the whole."""
        self._part = part
        try:
            yield
        finally:
            self._part = "all"

    def _layer(self, layer: int, original, hidden: Tensor, *args, **kwargs):
        if self._part == "draft" and layer >= self.exit_depth:
            if layer == self.exit_depth:
                self.states.append(hidden)
            return hidden
        if self._part == "verify" and layer < self.exit_depth:
            return hidden
        if self._part == "verify" and layer == self.exit_depth:
            hidden = torch.cat(self.states, dim=1)  # (R, K, D)
        return original(hidden, *args, **kwargs)


class Sequences:
    """What each sequence has said, by the caller's processors and criteria, and which sequences are still going.

    Processors and criteria judge one sequence at a time: sequences have different lengths. One that has ended is padded if there is an end
    token; without one it goes on, as in transformers' loop, until each of the batch has ended.
    """

    def __init__(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        *,
        max_length: int,
    ):
        self.ids = list(input_ids)  # R tensors, each of its own length
        self.processors, self.criteria, self.streamer = processors, criteria, streamer
        self.going, self.max_length = list(range(len(input_ids))), max_length
        self.ended, self.pads = dict[int, int](), pads_ended(criteria)  # sequence -> its length when it ended
        self.counts = torch.zeros(3, len(input_ids), dtype=torch.int64)  # verified, drafted, accepted

    def say(self, logits: Tensor, drafted: Tensor) -> list[int]:
        """Take the full model's tokens for the going sequences as long as they are what was drafted: logits (r, K, V), drafted (r, K), its
        first column the token before. -> how many positions each of them keeps, 1..K. Sequences that end leave `going`."""
        best = logits.argmax(-1) if not self.processors else None  # (r, K)
        drafts, kept = drafted.tolist(), []
        for row, sequence in enumerate(self.going):
            chosen = None if best is None else best[row].tolist()
            count = self._accept(sequence, logits[row], drafts[row], chosen)
            kept.append(count)
            self.counts[:, sequence] += torch.tensor([1, len(drafts[row]) - 1, count - 1])
        wanted = self.max_length if len(self.ended) < len(self.ids) else self.length
        self.going = [
            sequence
            for sequence in self.going
            if sequence not in self.ended or (not self.pads and len(self.ids[sequence]) < wanted)
        ]
        return kept

    @property
    def length(self) -> int:
        """Of all sequences, once each has ended: that of the last one to end."""
        return max(self.ended.values())

    def _accept(self, sequence: int, logits: Tensor, drafts: list[int], chosen: list[int] | None) -> int:
        for place in range(len(drafts)):
            if place and int(self.ids[sequence][-1]) != drafts[place]:
                return place
            ids = self.ids[sequence]  # (n,)
            token = self._processed(sequence, logits[place]) if chosen is None else ids.new_tensor([chosen[place]])
            self.ids[sequence] = torch.cat([ids, token])
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            if sequence not in self.ended and bool(self.criteria(self.ids[sequence][None], None)[0]):
                self.ended[sequence] = len(self.ids[sequence])
                return place + 1
        return len(drafts)

    def _processed(self, sequence: int, logits: Tensor) -> Tensor:
        """The best token (1,) after the caller's processors, logits (V,). Some of these hold values for each sequence of the batch:
        they get as many, all like this one, and only its own place counts."""
        ids = self.ids[sequence].expand(len(self.ids), -1)  # (R, n)
        scores = self.processors(ids, logits.float().expand(len(self.ids), -1).clone())  # (R, V)
        return scores[sequence].argmax(-1, keepdim=True)

    def room(self) -> int:
        """The most tokens that a sequence may still say."""
        return self.max_length - min(len(self.ids[sequence]) for sequence in self.going)

    def ahead(self, count: int) -> Tensor:
        """(r, K) how far the drafted positions are from the next one: no further than what a sequence may still read, since the model may
        have no positions beyond (such drafts are never kept)."""
        room = torch.tensor([self.max_length - len(self.ids[sequence]) for sequence in self.going])  # (r,)
        return torch.arange(count).minimum(room[:, None] - 1)

    def padded(self, pad: int) -> Tensor:
        """(R, n) all sequences, padded on the right."""
        ids = [ids[: self.length] for ids in self.ids]
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)


def self_speculative_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    exit_depth: int,
    draft_tokens: int,
    exit_heads: ExitHeads | None = None,
    exit_streamer: BaseStreamer | None = None,
    **model_kwargs,
) -> SelfSpeculativeOutput | Tensor:
    """Greedy search in cycles: `draft_tokens` positions through the first `exit_depth` layers, then all of them through the rest at once.

    Each cycle adds 1 to `draft_tokens` tokens to every sequence, whatever its batch-mates do. To be handed to `model.generate` as
    `custom_generate`. Tokens are those of greedy search up to rounding: a position that is verified beside others may differ in the
    last bits, which shows where the two best tokens are that close. `exit_heads`: what drafts at `exit_depth`, None: the model's own tail.
    `exit_streamer`: for one sequence; gets prompt and tokens. One generation with exits at a time, as in `early_exit_generate`. A cache
    that was passed is of use afterwards for one sequence alone: those of a batch have holes.

    Raises:
        ValueError: sampling, beams, assistants or guidance; a model that trains with gradient checkpointing; exit_depth outside
            1..L-1, or without an exit among the heads; draft_tokens below 2; a cache that is not empty or not a DynamicCache; scores,
            logits, attentions or hidden states asked for; arguments of the model that are not known here.
    """
    model_kwargs = with_cache(model, model_kwargs)
    _check(model, generation_config, model_kwargs, exit_depth=exit_depth, draft_tokens=draft_tokens)
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids are empty, expected a prompt of tokens (inputs_embeds are not supported)")
    if exit_streamer is not None and len(input_ids) > 1:
        raise ValueError(f"exit_streamer with {len(input_ids)} sequences, expected one")
    length = generation_config.max_length
    sequences = Sequences(input_ids, logits_processor, stopping_criteria, exit_streamer, max_length=length)
    heads = SharedTail(model, (exit_depth,)) if exit_heads is None else exit_heads
    check_heads(model, heads)
    if exit_depth not in heads.depths:
        raise ValueError(f"exit_depth={exit_depth}, the exit heads are at depths {heads.depths}")
    if exit_streamer is not None:
        exit_streamer.put(input_ids.cpu())
    with Sections(model, exit_depth, heads) as sections:
        _decode(sections, sequences, input_ids, model_kwargs, draft_tokens)
    if exit_streamer is not None:
        exit_streamer.end()
    pad = generation_config._pad_token_tensor
    ids = sequences.padded(0 if pad is None else int(pad))
    if not generation_config.return_dict_in_generate:
        return ids
    verified, drafted, accepted = sequences.counts
    return SelfSpeculativeOutput(sequences=ids, verified=verified, drafted=drafted, accepted=accepted)


def _decode(
    sections: Sections,
    sequences: Sequences,
    input_ids: Tensor,
    model_kwargs: dict,
    draft_tokens: int,
) -> None:
    """The prompt at full depth, then cycles until every sequence has ended."""
    model, cache = sections.model, model_kwargs["past_key_values"]
    given = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if given is None else given.long()  # (R, N)
    positions = model_kwargs.get("position_ids")
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if positions is None else positions.expand(len(mask), -1)  # (R, N)
    logits = model(
        input_ids, attention_mask=given, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    before = list(sequences.going)
    sequences.say(logits, input_ids[:, -1:])
    sequences.counts.zero_()  # the prompt was not drafted
    mask, next_position = _only(before, sequences.going, cache, mask, positions[:, -1:] + 1)
    while sequences.going:
        before = list(sequences.going)
        tokens = torch.stack([sequences.ids[row][-1:] for row in before])  # (r, 1)
        count = min(draft_tokens, sequences.room())  # K: no sequence keeps more
        mask = torch.cat([mask, mask.new_ones(len(tokens), count)], dim=1)  # (r, N + K)
        places = next_position + sequences.ahead(count).to(mask.device)  # (r, K)
        for k in range(count):
            seen = mask[:, : mask.shape[1] - count + k + 1]
            sections.draft(tokens[:, -1:], mask=seen, positions=places[:, k : k + 1], cache=cache)
            if k + 1 < count:  # the last position is only verified
                tokens = torch.cat([tokens, sections.said()], dim=1)
        logits = sections.verify(tokens, mask=mask, positions=places, cache=cache)  # (r, K, V)
        kept = torch.tensor(sequences.say(logits, tokens), device=mask.device)[:, None]  # (r, 1)
        mask[:, -count:] = (torch.arange(count, device=mask.device) < kept).long()
        spare = count - int(kept.max())
        if spare:  # crop(0) empties the cache in older transformers
            cache.crop(-spare)
        mask = mask[:, : mask.shape[1] - spare]
        mask, next_position = _only(before, sequences.going, cache, mask, next_position + kept)


def _only(before: list[int], going: list[int], cache: DynamicCache, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The cache and tensors (r, ...) of the sequences that are still going."""
    if len(going) == len(before) or not going:
        return tensors
    rows = torch.tensor([before.index(sequence) for sequence in going], device=tensors[0].device)
    cache.batch_select_indices(rows)
    return tuple(tensor.index_select(0, rows) for tensor in tensors)


def _check(
    model: PreTrainedModel, config: GenerationConfig, model_kwargs: dict, *, exit_depth: int, draft_tokens: int
) -> None:
    """Raise ValueError for what lossless decoding cannot do, before any work."""
    num_layers, mode = len(layers_of(model)), config.get_generation_mode()
    if mode is not GenerationMode.GREEDY_SEARCH:
        raise ValueError(
            f"generation mode {mode.value!r}, expected greedy search (do_sample=False, num_beams=1, no assistant)"
        )
    check_asked_once(model, config)
    if isinstance(exit_depth, bool) or not isinstance(exit_depth, int) or not 1 <= exit_depth < num_layers:
        raise ValueError(
            f"exit_depth={exit_depth}, expected within 1..{num_layers - 1}: the model has {num_layers} layers"
        )
    if not isinstance(draft_tokens, int) or draft_tokens < 2:
        raise ValueError(
            f"draft_tokens={draft_tokens}, expected a whole number, at least 2: the last position of a cycle is only verified"
        )
    if config.output_scores or config.output_logits or config.output_attentions or config.output_hidden_states:
        raise ValueError(
            "output_scores, output_logits, output_attentions, output_hidden_states: expected none of them here"
        )
    check_cache(model_kwargs.get("past_key_values"))
    if model_kwargs["past_key_values"].get_seq_length():
        raise ValueError(
            f"a cache of {model_kwargs['past_key_values'].get_seq_length()} positions, expected an empty one"
        )
    unknown = sorted(name for name, value in model_kwargs.items() if name not in _KNOWN and value is not None)
    if unknown:
        raise ValueError(f"arguments {unknown} of the model, expected none but {sorted(_KNOWN)}")
