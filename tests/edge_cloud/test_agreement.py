"""What an edge and its cloud must agree in, what a pair of parts is on the disk, and what a fingerprint reads of a model."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from language import model_named
from split_parts import EXITS, LIMITS, TOKENS, client, prompt, whole
from transformers import PreTrainedModel

grpc = pytest.importorskip("grpc", reason="needs the extra cloud")

from cloud_servers import serving  # noqa: E402

from ee_diffusion.core.policy import Policy  # noqa: E402
from ee_diffusion.decoding.fingerprint import digest_of, fingerprint_of  # noqa: E402
from ee_diffusion.edge_cloud import split as split_module  # noqa: E402
from ee_diffusion.edge_cloud.client import CloudLost  # noqa: E402
from ee_diffusion.edge_cloud.edge import Edge  # noqa: E402
from ee_diffusion.edge_cloud.grpc_transport import RemoteTransport  # noqa: E402
from ee_diffusion.edge_cloud.sessions import ContextManager  # noqa: E402
from ee_diffusion.edge_cloud.split import load_part, split_model  # noqa: E402


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory):
    """A server of the cloud's part in float64."""
    folder = tmp_path_factory.mktemp("cloud")
    split_model(model_named("llama"), folder, exits=EXITS)
    with serving(ContextManager(*load_part(folder, "cloud", dtype=torch.float64), limits=LIMITS)) as there:
        yield there


def changed(change: Callable[[PreTrainedModel], object]) -> PreTrainedModel:
    model = copy.deepcopy(model_named("llama"))
    change(model)
    return model


def last_number(model: PreTrainedModel) -> None:
    """One bit of one weight, far behind the first eight."""
    weight = model.model.layers[5].mlp.down_proj.weight.data
    weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0, dtype=weight.dtype))


def last_sign(model: PreTrainedModel) -> None:
    """The very last bit."""
    model.model.layers[5].mlp.down_proj.weight.data[-1, -1] *= -1


def without_last_layer(model: PreTrainedModel) -> None:
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:-1], 5


OTHERS: dict[str, tuple[dict, Callable[[PreTrainedModel], object], str]] = {
    "lower exits": ({"exits": (1, 3)}, lambda model: None, "exits"),
    "another first exit": ({"exits": (1, 4)}, lambda model: None, "exits"),
    "another second exit": ({"exits": (2, 5)}, lambda model: None, "exits"),
    "one bit of a weight": ({}, last_number, "weights and configuration"),
    "RoPE": ({}, lambda model: model.config.rope_parameters.update(rope_theta=5e5), "weights and configuration"),
    "eps": ({}, lambda model: setattr(model.config, "rms_norm_eps", 1e-5), "weights and configuration"),
    "activation": ({}, lambda model: setattr(model.config, "hidden_act", "gelu"), "weights and configuration"),
    "depth": ({}, without_last_layer, "layers of the model"),
    "dtype": ({"dtype": torch.float32}, lambda model: None, "dtype of the states"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_cloud_serves_its_own_edge_alone(cloud, tmp_path: Path, name: str):
    """Same class and width throughout: without the handshake each of them would be served, with wrong tokens."""
    how, change, told = OTHERS[name]
    split_model(changed(change), tmp_path, exits=how.get("exits", EXITS))
    model, part = load_part(tmp_path, "edge", dtype=how.get("dtype", torch.float64))
    with RemoteTransport(f"127.0.0.1:{cloud.port}", part, width=32) as line:
        with pytest.raises(CloudLost, match=rf"differs from the cloud's in {told} \(came"):
            line.open(timeout=5)
        with client(line, retry_after=60.0) as asked:
            out = Edge(model, part).generate(prompt(0), Policy(), asked, max_new_tokens=TOKENS)
    assert out.sources == ["own"] * TOKENS


def test_parts_split_elsewhere_from_the_same_model_agree(cloud, tmp_path: Path):
    model_named("llama").save_pretrained(tmp_path / "model")
    again = type(model_named("llama")).from_pretrained(tmp_path / "model", dtype=torch.float64)
    split_model(again, tmp_path, exits=EXITS)
    model, part = load_part(tmp_path, "edge", dtype=torch.float64)
    with RemoteTransport(f"127.0.0.1:{cloud.port}", part, width=32) as line, client(line) as asked:
        out = Edge(model, part).generate(prompt(0), Policy(), asked, max_new_tokens=TOKENS)
    assert tuple(out.sequences[0].tolist()) == whole(0)


@pytest.mark.parametrize("change", [last_sign, *(one[1] for one in OTHERS.values() if one[2].startswith("weights"))])
def test_a_digest_reads_everything(change: Callable[[PreTrainedModel], object]):
    assert digest_of(changed(change)) != digest_of(model_named("llama"))


def test_a_fingerprint_reads_every_weight_and_the_configuration():
    model = copy.deepcopy(model_named("llama"))
    names = [fingerprint_of(model)]
    weight = model.model.layers[5].mlp.down_proj.weight
    with torch.no_grad():
        weight[-1, -1] += 1.0  # far behind the first numbers of the tensor
    names.append(fingerprint_of(model))
    model.config.rms_norm_eps = 1e-5
    names.append(fingerprint_of(model))
    assert len(set(names)) == 3
    model.config.use_cache, model.config.pad_token_id, model.config._name_or_path = False, 3, "elsewhere"
    assert fingerprint_of(model) == names[-1], "no answer depends on these"
    assert fingerprint_of(model.bfloat16()) == names[-1]


def test_weights_are_read_once(monkeypatch: pytest.MonkeyPatch):
    model, read = copy.deepcopy(model_named("llama")), []
    first = fingerprint_of(model)
    monkeypatch.setattr("ee_diffusion.decoding.fingerprint.hashlib.sha256", lambda *_: read.append(1))
    assert fingerprint_of(model) == first
    assert not read


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_split_that_fails_leaves_the_pair_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    split_model(model_named("llama"), tmp_path, exits=EXITS)
    before, save, saved = files_of(tmp_path), split_module.save_file, []

    def failing(weights, path, **more):
        saved.append(path)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        save(weights, path, **more)

    monkeypatch.setattr(split_module, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        split_model(model_named("llama"), tmp_path, exits=(1, 3))
    assert files_of(tmp_path) == before


def test_a_split_that_is_stopped_never_leaves_parts_of_two_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped before each step that changes the folder: what can be loaded then is of one split, and another split mends it."""

    class Stopped(BaseException):
        pass

    old, new = tmp_path / "old", tmp_path / "new"
    split_model(model_named("llama"), old, exits=EXITS)
    split_model(model_named("llama"), new, exits=(1, 3))
    (old / "edge" / "exits.safetensors").write_bytes(b"the user's own")
    for stop in range(8):
        folder, left = tmp_path / str(stop), [stop]
        shutil.copytree(old, folder)

        def stopping(call: Callable, left=left):
            def changing(*args, **more):
                if not left[0]:
                    raise Stopped
                left[0] -= 1
                return call(*args, **more)

            return changing

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping(os.replace))
            patch.setattr(Path, "unlink", stopping(Path.unlink))
            with pytest.raises(Stopped):
                split_model(model_named("llama"), folder, exits=(1, 3))
        exits = set()
        for side in ("edge", "cloud"):
            try:
                exits.add(load_part(folder, side, dtype=torch.float64)[1].exits)
            except ValueError as error:
                assert "holds no part" in str(error)  # noqa: PT017
        assert len(exits) <= 1, exits
        split_model(model_named("llama"), folder, exits=(1, 3))
        found = files_of(folder)
        assert found.pop("edge/exits.safetensors") == b"the user's own"
        assert found == files_of(new)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path):
    split_model(model_named("llama"), tmp_path / "a", exits=EXITS)
    split_model(changed(last_number), tmp_path / "b", exits=EXITS)
    weights = tmp_path / "a" / "cloud" / "model.safetensors"
    whole_file = weights.read_bytes()
    for content in (
        (tmp_path / "b" / "cloud" / "model.safetensors").read_bytes(),
        whole_file[:-1],
        whole_file[:-1] + b"!",
    ):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is not the file"):
            load_part(tmp_path / "a", "cloud", dtype=torch.float64)
    about = tmp_path / "b" / "cloud" / "part.json"
    for change, told in (
        ({"exits": [1, 4]}, "holds 4 layers, expected"),
        ({"exits": 4}, "no description of a part"),
        ({"more": 1}, "no description of a part"),
        ({"files": {}}, "no description of a part"),
        ({"files": 3}, "no description of a part"),
        ({"format": "ee_diffusion.cloud.part.1"}, "split the model again"),
    ):
        values = json.loads((tmp_path / "b" / "cloud" / "part.json").read_text())
        about.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=told):
            load_part(tmp_path / "b", "cloud", dtype=torch.float64)
        about.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"device='cuda:99' cannot be used here|device='nowhere'"):
        load_part(tmp_path / "b", "cloud", dtype=torch.float64, device="cuda:99")
    (about.parent / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file"):
        load_part(tmp_path / "b", "cloud", dtype=torch.float64)


def test_a_loaded_part_says_its_dtype_and_ends(tmp_path: Path):
    model = changed(lambda model: setattr(model.generation_config, "eos_token_id", [5, 1]))
    parts = split_model(model, tmp_path, exits=EXITS)
    for side in ("edge", "cloud"):
        _, part = load_part(tmp_path, side, dtype=torch.bfloat16)
        assert part.end_tokens == (5, 1)
        assert part == dataclasses.replace(parts[side], dtype="bfloat16")
