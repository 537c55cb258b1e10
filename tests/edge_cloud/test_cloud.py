"""Edge and cloud without a network: parts, encodings, the context manager, and tokens equal to the whole model's."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from language import model_named
from split_parts import EXITS, LIMITS, TOKENS, client, edge, manager, parts, prompt, whole

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.heads import LearnedExits, SharedTail
from ee_diffusion.decoding.hooks import running_modules
from ee_diffusion.decoding.methods import skipdecode
from ee_diffusion.edge_cloud import client as client_module
from ee_diffusion.edge_cloud.client import CloudLost, LocalTransport
from ee_diffusion.edge_cloud.codec import decode, encode, payload_bytes
from ee_diffusion.edge_cloud.edge import Edge
from ee_diffusion.edge_cloud.sessions import ContextManager, Limits, Refused
from ee_diffusion.edge_cloud.split import split_model


def unsure(threshold: float = 1.0) -> Policy:
    return Policy(Threshold(threshold, "max_probability"), exits=EXITS)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_always_asking_says_what_the_whole_model_says(name: str):
    for row in range(2 if name == "llama" else 1):
        with client(LocalTransport(manager(name))) as cloud:
            out = edge(name).generate(prompt(row), Policy(), cloud, max_new_tokens=TOKENS)
        assert tuple(out.sequences[0].tolist()) == whole(row, name)
        assert out.sources == ["cloud"] * TOKENS
        positions = prompt(row).shape[1] + TOKENS - 1
        assert out.payload == payload_bytes(positions, 32, kind="float32")  # each position once


def test_parts_hold_their_layers_alone(tmp_path):
    (below, part), (above, other) = parts("llama")
    assert (list(part.layers), list(other.layers)) == ([0, 1, 2, 3], [2, 3, 4, 5])
    assert part.fingerprint == other.fingerprint
    total = sum(value.numel() for value in model_named("llama").parameters())
    assert sum(value.numel() for value in below.parameters()) < total
    table = above.get_input_embeddings().weight
    assert above.get_output_embeddings().weight is table  # the head alone, no second table
    for exits in ((0, 2), (3, 3), (2, 6), (4, 2)):
        with pytest.raises(ValueError, match="two depths"):
            split_model(model_named("llama"), tmp_path, exits=exits)
    with pytest.raises(ValueError, match="cannot be split"):
        split_model(model_named("gpt2"), tmp_path, exits=EXITS)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 1.0])
def test_layers_above_the_exit_are_not_executed(threshold: float):
    rows: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args, layer=layer: rows.append(layer))
        for layer, module in enumerate(running_modules(parts("llama")[0][0]))
    ]
    out = edge().generate(prompt(0), unsure(threshold), max_new_tokens=TOKENS)
    for handle in handles:
        handle.remove()
    left = out.sources[1:].count("exit 0")  # the prompt, which gives the first token, is read by all layers
    assert rows.count(0) == rows.count(1) == TOKENS
    assert rows.count(2) == rows.count(3) == TOKENS - left
    assert int(out.trace.depths.eq(EXITS[0]).sum()) == out.sources.count("exit 0")
    assert left == TOKENS - 1 or threshold > 0


def test_keys_of_skipped_layers_come_from_the_state_at_the_exit():
    """Leaving at e1 and asking in turns: what the cloud says is the whole model's answer to those very tokens."""
    with client() as cloud:
        out = edge().generate(prompt(0), unsure(0.12), cloud, max_new_tokens=TOKENS)
    assert {"cloud"} < set(out.sources), out.sources
    said = out.sequences
    logits = model_named("llama")(said).logits[0]
    for token, source in enumerate(out.sources):
        at = said.shape[1] - TOKENS + token
        assert source != "cloud" or int(said[0, at]) == int(logits[at - 1].argmax())


@pytest.mark.parametrize("kind,size", [("float32", 128), ("float16", 64), ("bfloat16", 64), ("int8", 36)])
def test_encodings(kind: str, size: int):
    hidden = torch.randn(5, 32)
    payload = encode(hidden, kind=kind)
    assert len(payload) == payload_bytes(5, 32, kind=kind) == 5 * size
    error = (decode(payload, 5, 32, kind=kind) - hidden).abs().amax(-1) / hidden.abs().amax(-1)
    assert float(error.max()) <= {"float32": 0, "float16": 5e-4, "bfloat16": 4e-3, "int8": 0.51 / 127}[kind]
    for wrong in (payload[:-1], payload + b"x", b""):
        with pytest.raises(ValueError, match="bytes, expected"):
            decode(wrong, 5, 32, kind=kind)
    with pytest.raises(ValueError, match="NaN"):
        encode(hidden * torch.nan, kind=kind)
    with pytest.raises(ValueError, match="0 positions"):
        decode(b"", 0, 32, kind=kind)
    if kind in ("float16", "bfloat16"):
        broken = torch.full((2, 32), torch.nan, dtype=getattr(torch, kind)).view(torch.uint8).numpy().tobytes()
        with pytest.raises(ValueError, match="NaN or infinity"):
            decode(broken, 2, 32, kind=kind)
    assert not decode(encode(torch.zeros(2, 32), kind=kind), 2, 32, kind=kind).any()


def test_float16_overflow_offers_another_encoding():
    with pytest.raises(ValueError, match="use bfloat16"):
        encode(torch.full((1, 4), 1e5), kind="float16")
    assert torch.isfinite(decode(encode(torch.full((1, 4), 1e5), kind="int8"), 1, 4, kind="int8")).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_overflows_in_the_cloud_is_refused(dtype: torch.dtype):
    """Finite on the wire, but not in the cloud's precision, or not after its layers: no token is made up of that."""
    cloud = ContextManager(copy.deepcopy(parts("llama")[1][0]).to(dtype), parts("llama")[1][1], limits=LIMITS)
    session, large = cloud.open("a"), torch.full((1, 32), 1e38)
    if dtype is torch.float16:
        with pytest.raises(Refused, match=r"infinity in torch\.float16"):
            cloud.upload("a", session, 0, hidden=large)
        assert cloud.bytes == 0
        large = torch.full((1, 32), 6e4)
    cloud.upload("a", session, 0, hidden=large)
    with torch.no_grad():
        cloud.model.get_output_embeddings().weight[0, 0] = torch.nan
    (answer,) = cloud.answer([("a", session, 0)])
    assert isinstance(answer, Refused)
    assert "logits" in str(answer)


def states(row: int) -> torch.Tensor:
    """(N, D) the edge's states at the first exit for what the whole model said."""
    ids = torch.tensor([whole(row)])[:, :-1]
    return model_named("llama").model(ids, output_hidden_states=True).hidden_states[EXITS[0]][0].detach()


def test_ragged_batches_say_what_each_says_alone():
    cloud, rows = manager(), (0, 1, 3)
    sessions = [cloud.open("a") for _ in rows]
    begun = [prompt(row).shape[1] for row in rows]
    for session, row in zip(sessions, rows, strict=True):
        cloud.upload("a", session, 0, hidden=states(row))
    for token in range(TOKENS):
        there = [place for place in range(len(rows)) if token % (place + 1) == 0]  # some ask less often: they catch up
        said = cloud.answer([("a", sessions[place], begun[place] - 1 + token) for place in there])
        assert said == [whole(rows[place])[begun[place] + token] for place in there]


def test_order_and_repetition_do_not_matter_and_rollback_goes_back():
    cloud, hidden, begun = manager(), states(0), prompt(0).shape[1]
    session = cloud.open("a")
    for at in reversed(range(len(hidden))):
        assert not cloud.ready("a", session, len(hidden) - 1)
        assert cloud.upload("a", session, at, hidden=hidden[at : at + 1]) == 1
        assert cloud.upload("a", session, at, hidden=hidden[at : at + 1] + 1) == 0
    end = len(hidden) - 1
    assert cloud.answer([("a", session, end)]) * 2 == cloud.answer([("a", session, end)] * 2) == [whole(0)[-1]] * 2
    with pytest.raises(Refused, match="roll back"):
        cloud.ready("a", session, end - 2)
    cloud.rollback("a", session, begun)
    cloud.upload("a", session, begun, hidden=hidden[begun:])
    assert cloud.answer([("a", session, begun + 1)]) == [whole(0)[begun + 2]]


def test_the_cloud_refuses_and_lives_on():
    now = [0.0]
    cloud = manager(limits=Limits(3, 2, 20 * manager().bytes_per_position, 16, 10.0), clock=lambda: now[0])
    mine, hidden = cloud.open("a"), torch.zeros(1, 32)
    cloud.open("a")
    for wrong, reason in [
        (lambda: cloud.open("a"), "sessions are open"),
        (lambda: cloud.upload("b", mine, 0, hidden=hidden), "no such session"),
        (lambda: cloud.rollback("b", mine, 0), "no such session"),
        (lambda: cloud.close("b", mine), "no such session"),
        (lambda: cloud.upload("a", mine, 0, hidden=hidden * torch.nan), "NaN"),
        (lambda: cloud.upload("a", mine, 0, hidden=torch.zeros(1, 31)), "expected"),
        (lambda: cloud.upload("a", mine, 0, hidden=torch.zeros(1, 32, dtype=torch.int64)), "expected"),
        (lambda: cloud.upload("a", mine, 16, hidden=hidden), "at most 16"),
        (lambda: cloud.upload("a", mine, -1, hidden=hidden), "at most 16"),
        (lambda: cloud.rollback("a", mine, -1), "0 or more"),
    ]:
        with pytest.raises(Refused, match=reason):
            wrong()
    (answer,) = cloud.answer([("a", mine, 0)])
    assert isinstance(answer, Refused)
    assert answer.kind == "missing"
    other = cloud.open("b")
    cloud.upload("a", mine, 0, hidden=torch.zeros(16, 32))
    with pytest.raises(Refused, match="no room"):
        cloud.upload("b", other, 0, hidden=torch.zeros(5, 32))
    now[0] = 11.0
    with pytest.raises(Refused, match="expired"):
        cloud.upload("a", mine, 0, hidden=hidden)
    assert cloud.bytes == 0
    assert LIMITS.sessions == 80


def test_what_is_held_is_counted_to_the_last_session_position_and_second():
    now, one = [0.0], torch.zeros(1, 32)
    cloud = manager(limits=Limits(2, 2, 10**8, 10**6, 10.0), clock=lambda: now[0])
    assert cloud.positions_limit == 64  # the model has no more
    mine, other = cloud.open("a"), cloud.open("b")
    with pytest.raises(Refused, match="2 sessions are open, 0 of them"):
        cloud.open("c")
    for wrong in (-1, 64):
        with pytest.raises(Refused, match=r"expected within 0\.\.63"):
            cloud.ready("a", mine, wrong)
    assert cloud.upload("a", mine, 0, hidden=one.expand(3, -1)) == 3
    cloud.answer([("a", mine, 1)])
    assert cloud.upload("a", mine, 1, hidden=one.expand(3, -1)) == 1  # one was processed, one waits, one is new
    assert cloud.bytes == 4 * cloud.bytes_per_position
    now[0] = 10.0
    assert not cloud.ready("a", mine, 63)  # used now, the other one not since it was opened
    assert len(cloud.sessions) == 2
    now[0] = 10.1
    assert cloud.expire() == 1
    assert other not in cloud.sessions
    now[0] = 20.0
    assert cloud.expire() == 0


class Failing(LocalTransport):
    """Fails at chosen calls: (method, number of the call)."""

    def __init__(self, at: set[tuple[str, int]], *, token: int | None = None):
        super().__init__(manager())
        self.at, self.calls, self.wrong = at, {"open": 0, "upload": 0, "next": 0}, token

    def _may(self, name: str) -> None:
        self.calls[name] += 1
        if (name, self.calls[name]) in self.at:
            self.manager.sessions.clear()  # the server died and came back empty
            raise CloudLost(f"lost at {name} {self.calls[name]}")

    def open(self, *, timeout):
        self._may("open")
        return super().open(timeout=timeout)

    def upload(self, session, upload, *, timeout):
        self._may("upload")
        super().upload(session, upload, timeout=timeout)

    def next(self, session, position, *, sending, timeout):
        sending.result(timeout)
        self._may("next")
        token, seconds = super().next(session, position, sending=sending, timeout=timeout)
        return (token if self.wrong is None else self.wrong), seconds


@pytest.mark.parametrize("at", [("open", 1), ("upload", 1), ("upload", 4), ("next", 1), ("next", 5), ("next", TOKENS)])
def test_a_loss_costs_no_token_and_the_cloud_comes_back(at: tuple[str, int]):
    with client(Failing({at})) as cloud:
        out = edge().generate(prompt(0), Policy(), cloud, max_new_tokens=TOKENS)
    assert out.sequences.shape[1] == prompt(0).shape[1] + TOKENS
    assert out.sources.count("own") == len(out.losses) <= 1
    logits, begun = model_named("llama")(out.sequences).logits[0], prompt(0).shape[1]
    for token, source in enumerate(out.sources):
        right = int(logits[begun + token - 1].argmax()) == int(out.sequences[0, begun + token])
        assert right or source == "own"


def test_a_wrong_cloud_leaves_the_edge_to_itself():
    with client(Failing(set(), token=10**6)) as cloud:
        out = edge().generate(prompt(1), Policy(), cloud, max_new_tokens=TOKENS)
    own = edge().generate(prompt(1), Policy(), max_new_tokens=TOKENS)
    assert torch.equal(out.sequences, own.sequences)
    assert all("wrong" in reason for _, reason in out.losses)
    assert len(out.losses) == TOKENS


def test_the_edges_own_token_is_its_second_exits_whatever_the_policy_looks_at():
    both, first = (
        edge().generate(prompt(0), Policy(Threshold(1.0, "max_probability"), exits=exits), max_new_tokens=TOKENS)
        for exits in (EXITS, EXITS[:1])
    )
    assert first.sources == both.sources == ["own"] * TOKENS
    assert torch.equal(first.sequences, both.sequences)


def test_the_edge_ends_with_the_end_of_text():
    own = edge().generate(prompt(0), Policy(), max_new_tokens=TOKENS).sequences[0, prompt(0).shape[1] :].tolist()
    out = edge().generate(prompt(0), Policy(), max_new_tokens=TOKENS, eos_token_id=own[2])
    assert out.sequences[0, prompt(0).shape[1] :].tolist() == own[: own.index(own[2]) + 1]
    assert len(out.sources) == len(out.times) == own.index(own[2]) + 1 < TOKENS


def test_a_client_serves_one_generation():
    """Its states are sent again after a loss: those of another text among them would give its tokens."""
    with client() as cloud:
        edge().generate(prompt(0), Policy(), cloud, max_new_tokens=2)
        with pytest.raises(ValueError, match="one client for each generation"):
            edge().generate(prompt(1), Policy(), cloud, max_new_tokens=2)


def test_a_long_prompt_goes_in_several_messages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client_module, "LARGEST", 3 * 4 * 32 + 5)
    transport = Failing(set())
    with client(transport) as cloud:
        out = edge().generate(prompt(0), Policy(), cloud, max_new_tokens=TOKENS)
    assert tuple(out.sequences[0].tolist()) == whole(0)
    assert transport.calls["upload"] == 3 + TOKENS - 1  # seven positions, three at a time
    assert out.payload == payload_bytes(prompt(0).shape[1] + TOKENS - 1, 32, kind="float32")


def test_what_does_not_belong_to_the_edge_is_refused():
    (model, part), policy = parts("llama")[0], unsure(0.5)
    for heads in (SharedTail(model_named("llama"), EXITS), LearnedExits(EXITS, 32)):
        with pytest.raises(ValueError, match=r"another|bind"):
            Edge(model, part, heads=heads)
    other = dataclasses.replace(policy, made_for=(("model", "0" * 16),))
    own = dataclasses.replace(policy, made_for=(("model", part.fingerprint),))
    for wrong in (
        other,
        skipdecode(warm_up=1, least=2, most=5, horizon=5),
        None,
        dataclasses.replace(policy, delayed=True),
    ):
        with pytest.raises(ValueError, match=r"another model|leaves out layers|expected a Policy|a late policy"):
            edge().generate(prompt(0), wrong, max_new_tokens=2)
    fine = [edge().generate(prompt(0), one, max_new_tokens=2).sources for one in (own, policy)]
    assert fine[0] == fine[1]
