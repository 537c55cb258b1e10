"""A causal language model in two parts that overlap: the edge's layers with both exits, the cloud's from the first exit on (CE-CoLLM).

Here: writing the parts and loading one of them. Not here: what runs on them (edge.py, sessions.py). L layers, D width, V vocabulary.
Each part is a checkpoint of its own that transformers reads: the same class with fewer layers, final norm and LM head.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ee_diffusion.decoding.fingerprint import digest_of, fingerprint_of
from ee_diffusion.decoding.model_specs import layers_of, model_spec_of

_FORMAT = "ee_diffusion.cloud.part.2"
_WEIGHTS, _CONFIG, _ABOUT = "model.safetensors", "config.json", "part.json"
# Classes whose layers take the token embedding as it is: hidden states can enter above as `inputs_embeds`.
SPLITTABLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Part:
    """What a part is: `side` edge or cloud; `exits` (e1, e2), depths; `num_layers` L of the whole model; its `fingerprint`, which exits and
    policies made for it bear; its `digest`, of its configuration and all bytes of its weights; its `end_tokens`; `dtype` that the part
    was loaded in, empty: not loaded.
    """

    side: str
    exits: tuple[int, int]
    num_layers: int
    fingerprint: str
    digest: str
    end_tokens: tuple[int, ...] = ()
    dtype: str = ""

    @property
    def terms(self) -> dict[str, str]:
        """What an edge and its cloud must agree in, by name."""
        return {
            "exits": " ".join(map(str, self.exits)),
            "layers of the model": str(self.num_layers),
            "weights and configuration": self.digest,
            "dtype of the states": self.dtype,
        }

    @property
    def layers(self) -> range:
        """The layers of the whole model that this part holds."""
        first, second = self.exits
        return range(second) if self.side == "edge" else range(first, self.num_layers)


def split_model(model: PreTrainedModel, folder: str | os.PathLike, *, exits: tuple[int, int]) -> dict[str, Part]:
    """Write `folder/edge` (layers 0..e2-1) and `folder/cloud` (layers e1..L-1), each with final norm and LM head.

    exits: depths (executed layers) of the two exits, 1 <= e1 < e2 < L. CE-CoLLM (arXiv 2411.02829, sec. IV). The overlap e1..e2-1 lets the
    cloud start from what is uploaded at the first exit while the edge goes on to its second.

    Raises:
        ValueError: an unknown class, or one that adds something to inputs_embeds; exits out of order or range.
    """
    family, num_layers = model_spec_of(model), len(layers_of(model))
    if type(model).__name__ not in SPLITTABLE:
        raise ValueError(f"{type(model).__name__} cannot be split, expected one of {SPLITTABLE}")
    if len(exits) != 2 or not 1 <= exits[0] < exits[1] < num_layers:
        raise ValueError(f"exits={exits}, expected two depths with 1 <= e1 < e2 < {num_layers} (layers of the model)")
    weights, ends = model.state_dict(), model.generation_config.eos_token_id
    ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    about = (tuple(exits), num_layers, fingerprint_of(model), digest_of(model), ends)
    parts = {side: Part(side, *about) for side in ("edge", "cloud")}
    with _Pair(Path(folder)) as pair:
        for part in parts.values():
            chosen = _chosen(weights, part, prefix=f"{family.layers}.")
            pair.write(part, _config(model.config, part), chosen)
    return parts


def load_part(
    folder: str | os.PathLike, side: str, *, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, Part]:
    """Load one part, and nothing of the other, from what `split_model` wrote.

    Raises:
        ValueError: no such part, or another format; files that are not those that were written; a device that is not there.
    """
    path = Path(folder) / side
    if side not in ("edge", "cloud") or not (path / _ABOUT).is_file():
        raise ValueError(
            f"{path} holds no part, expected the folder with edge/ and cloud/ that `edge split` wrote: {folder}"
        )
    place = checked_device(device)
    part = _described(path, str(dtype).removeprefix("torch."))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False).to(place)
    if part.side != side or len(layers_of(model)) != len(part.layers):
        raise ValueError(
            f"{path} holds {len(layers_of(model))} layers, expected the {side}'s of exits {part.exits} of {part.num_layers} layers"
        )
    return model, part


def checked_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises ValueError where there is none."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def disagreement(came: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """In what the terms of an edge differ from those expected, in words; empty: in nothing."""
    names = [name for name in sorted({*came, *expected}) if came.get(name) != expected.get(name)]
    return ", ".join(
        f"{name[:40]} (came {str(came.get(name))[:80]}, expected {expected.get(name)})" for name in names[:8]
    )


def _chosen(weights: dict[str, Tensor], part: Part, *, prefix: str) -> dict[str, Tensor]:
    """The part's weights under the names they have in a model of its layers alone."""
    chosen = {}
    for name, value in weights.items():
        if name.startswith(prefix):
            layer, rest = name[len(prefix) :].split(".", 1)
            if int(layer) in part.layers:
                chosen[f"{prefix}{int(layer) - part.layers.start}.{rest}"] = value
        else:
            chosen[name] = value
    if part.side == "cloud":  # it embeds nothing: its head stands in the place of the table that it is tied to
        chosen["model.embed_tokens.weight"] = chosen.pop("lm_head.weight")
    elif torch.equal(chosen["lm_head.weight"], chosen["model.embed_tokens.weight"]):
        del chosen["lm_head.weight"]
    return {name: value.detach().cpu().clone().contiguous() for name, value in chosen.items()}


def _config(config: PreTrainedConfig, part: Part) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(part.layers)
    if kinds is not None:
        config.layer_types = [kinds[layer] for layer in part.layers]
    config.tie_word_embeddings = config.tie_word_embeddings or part.side == "cloud"
    return config


def _described(path: Path, dtype: str) -> Part:
    """What the description says, once the files are those that it was written for."""
    values = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
        raise ValueError(f"{path / _ABOUT} is of another format, expected {_FORMAT!r}: split the model again")
    try:
        files = values.pop("files")
        for name in (_CONFIG, _WEIGHTS):
            if not (path / name).is_file() or _file_digest(path / name) != files[name]:
                raise ValueError(f"{path / name} is not the file that {_ABOUT} was written for: split the model again")
        tuples = {name: tuple(values.pop(name)) for name in ("exits", "end_tokens")}
        return Part(**values, **tuples, dtype=dtype)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / _ABOUT} is no description of a part: {error!r}") from error


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Pair:
    """Writes both parts aside, and puts them in place together at the end: a stop leaves the pair that was there, or the new one, or a
    folder with a part missing; never parts of two pairs, never half a file. A context manager."""

    def __init__(self, folder: Path):
        self.folder, self._sides = folder, list[str]()

    def __enter__(self) -> _Pair:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._aside = Path(mkdtemp(prefix=".split.", dir=self.folder))
        return self

    def write(self, part: Part, config: PreTrainedConfig, weights: dict[str, Tensor]) -> None:
        """One part, aside, with digests of its files."""
        aside = self._aside / part.side
        aside.mkdir()
        config.save_pretrained(aside)
        save_file(weights, aside / _WEIGHTS, metadata={"format": "pt"})
        about = {name: value for name, value in asdict(part).items() if name != "dtype"}
        files = {name: _file_digest(aside / name) for name in (_CONFIG, _WEIGHTS)}
        text = json.dumps({"format": _FORMAT, **about, "files": files}, indent=1) + "\n"
        (aside / _ABOUT).write_text(text, encoding="utf-8")
        self._sides.append(part.side)

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        try:
            if error is None:
                self._put_in_place()
        finally:
            shutil.rmtree(self._aside)

    def _put_in_place(self) -> None:
        for side in self._sides:  # a part without its description is no part
            (self.folder / side).mkdir(exist_ok=True)
            (self.folder / side / _ABOUT).unlink(missing_ok=True)
        for name in (_CONFIG, _WEIGHTS, _ABOUT):
            for side in self._sides:
                os.replace(self._aside / side / name, self.folder / side / name)
