"""An edge alone: threads that share it, tokens that end an answer, states that an encoding cannot hold, long answers, devices."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path

import pytest
import torch
from language import VOCABULARY, model_named
from split_parts import EXITS, LIMITS, TOKENS, client, edge, parts, prompt, whole
from tiny_language import text_folder

pytest.importorskip("grpc", reason="needs the extra cloud")

from ee_diffusion.cli.main import main
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.core.session import begin
from ee_diffusion.decoding.methods import early_termination
from ee_diffusion.decoding.model_specs import layers_of
from ee_diffusion.edge_cloud import edge as edge_module
from ee_diffusion.edge_cloud.client import LocalTransport
from ee_diffusion.edge_cloud.codec import payload_bytes
from ee_diffusion.edge_cloud.edge import Edge
from ee_diffusion.edge_cloud.sessions import ContextManager

MIXED = Policy(Threshold(0.12, "max_probability"), exits=EXITS)


def new(out, row: int) -> list[int]:
    return out.sequences[0, prompt(row).shape[1] :].tolist()


def test_threads_share_an_edge():
    """Generations take turns, plain calls of the model in between are what they were, and the model is restored."""
    shared, other = edge(), edge()
    assert other.model is shared.model
    wanted = [new(edge().generate(prompt(row), MIXED, max_new_tokens=TOKENS), row) for row in range(4)]
    plain = shared.model(prompt(0)).logits
    found: dict[tuple[int, int], object] = {}

    def work(row: int) -> None:
        for turn in range(6):
            try:
                which = (shared, other)[turn % 2]
                found[row, turn] = new(which.generate(prompt(row), MIXED, max_new_tokens=TOKENS), row) == wanted[row]
                found[row, -turn - 1] = torch.equal(shared.model(prompt(0)).logits, plain)
            except Exception as error:
                found[row, turn] = error

    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 48
    assert all(value is True for value in found.values()), found
    assert not any("forward" in module.__dict__ for module in layers_of(shared.model))


def test_a_generation_within_a_generation_is_refused_and_both_are_whole():
    shared, errors = edge(), []

    class Nosy:
        payload = 0

        def upload(self, first: int, hidden: torch.Tensor) -> None:
            with pytest.raises(ValueError, match="already") as error:
                shared.generate(prompt(1), MIXED, max_new_tokens=1)
            errors.append(error)

        def ask(self, position: int, *, vocabulary: int) -> tuple[int, float]:
            return 5, 0.0

    out = shared.generate(prompt(0), MIXED, Nosy(), max_new_tokens=TOKENS)
    assert len(errors) == len(out.sources) == TOKENS
    assert not any("forward" in module.__dict__ for module in layers_of(shared.model))


def test_any_of_several_tokens_ends_an_answer():
    own = new(edge().generate(prompt(0), Policy(), max_new_tokens=TOKENS), 0)
    second, third = (token for token in dict.fromkeys(own[1:]) if token != own[0] and token != own[-1])
    first_end = min(own.index(second), own.index(third))
    for ends, last in (
        ([second, third], first_end),
        ((third, second), first_end),
        ({third}, own.index(third)),
        (second, own.index(second)),
    ):
        assert 0 < last < TOKENS - 1
        assert new(edge().generate(prompt(0), Policy(), max_new_tokens=TOKENS, eos_token_id=ends), 0) == own[: last + 1]
    for ends in ([], None, [VOCABULARY + 9]):
        assert new(edge().generate(prompt(0), Policy(), max_new_tokens=TOKENS, eos_token_id=ends), 0) == own
    for ends in ("2", ["2"], 2.0, [None]):
        with pytest.raises(ValueError, match="expected a token's id"):
            edge().generate(prompt(0), Policy(), max_new_tokens=TOKENS, eos_token_id=ends)


def test_the_command_ends_with_the_ends_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The tokenizer knows one end, token 1; the model's generation config names another."""
    folder = str(text_folder(tmp_path) / "model")
    generate = [
        "edge",
        "generate",
        "--model",
        str(tmp_path),
        "--tokenizer",
        folder,
        "--prompt",
        "w3 w4",
        "--threshold",
        "1",
    ]

    def said() -> list[str]:
        assert main(["edge", "split", "--model", folder, "--exits", *map(str, EXITS), "--output", str(tmp_path)]) == 0
        capsys.readouterr()
        assert main([*generate, "--max_new_tokens", "6"]) == 0
        return capsys.readouterr().out.splitlines()[0].split()

    words = said()
    assert len(words) == 6
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [1, int(words[2][1:])]}))
    assert said() == words[: words.index(words[2]) + 1]


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_states_that_the_encoding_cannot_hold_go_as_float32(kind: str):
    """States of 1e5 and more, as some models have them: the answer is whole, the cloud's, and the whole model's."""
    large = copy.deepcopy(model_named("llama"))
    size = {"float16": 1e5, "bfloat16": 3.4e38}[kind]
    with torch.no_grad():
        large.model.embed_tokens.weight[:, 0] = size
    below, above = copy.deepcopy(parts("llama")[0][0]), copy.deepcopy(parts("llama")[1][0])
    below.model.embed_tokens.weight.data[:, 0] = size
    ids = prompt(0)
    for _ in range(TOKENS):
        ids = torch.cat([ids, large(ids).logits[:, -1:].argmax(-1)], dim=1)
    with client(LocalTransport(ContextManager(above, parts("llama")[1][1], limits=LIMITS)), kind=kind) as cloud:
        out = Edge(below, parts("llama")[0][1]).generate(prompt(0), Policy(), cloud, max_new_tokens=TOKENS)
    assert out.sources == ["cloud"] * TOKENS
    assert torch.equal(out.sequences, ids)
    assert out.payload == payload_bytes(ids.shape[1] - 1, 32, kind="float32")
    with client(kind=kind) as cloud:
        ordinary = edge().generate(prompt(0), Policy(), cloud, max_new_tokens=TOKENS)
    assert ordinary.payload == payload_bytes(len(whole(0)) - 1, 32, kind=kind), "no others do"


def test_a_long_answer_begins_at_once(monkeypatch: pytest.MonkeyPatch):
    """Not counted in seconds: nothing is asked of the schedule for each of a million tokens before the first."""
    asked, layers = [], type(early_termination(least=4, most=6, horizon=5).schedule).layers
    monkeypatch.setattr(
        "ee_diffusion.core.schedules.LinearDecay.layers",
        lambda *args, **more: asked.append(args) or layers(*args, **more),
    )
    policy = early_termination(least=5, most=6, horizon=5)
    with pytest.raises(ValueError, match="the schedule stops at depth 5"):
        edge().generate(prompt(0), policy, max_new_tokens=10**6)
    assert len(asked) < 200


def test_nothing_that_a_skipped_layer_is_given_stays_on_the_host(monkeypatch: pytest.MonkeyPatch):
    """On another device (torch's pretended one, whose tensors hold no numbers), leaving at the first exit by a schedule."""
    model, part = copy.deepcopy(parts("llama")[0][0]).to("meta"), parts("llama")[0][1]
    seen, write = [], edge_module.write_position

    def looking(cache, layer, rows_of, **more):
        seen.extend(one.device.type for one in rows_of[0])
        return write(cache, layer, rows_of, **more)

    monkeypatch.setattr(edge_module, "write_position", looking)
    policy = Policy(schedule=FixedDepth(EXITS[0]), exits=EXITS)
    session = begin(policy, part.num_layers, part.exits, rows=torch.zeros(1, dtype=torch.int64), num_steps=2)
    with torch.no_grad(), edge_module._BlockRunner(Edge(model, part), session, None) as passage:
        for count in (3, 1):
            exit, logits = passage.step(torch.zeros(1, count, dtype=torch.int64, device="meta"))
            assert (exit, logits.device.type) == (0, "meta")
    assert seen == ["meta"] * 3 * (EXITS[1] - EXITS[0])
