"""A causal language model in two parts that overlap: the edge's layers with both exits, the cloud's from the first exit on (CE-CoLLM).

Here: writing the parts and loading one of them. Not here: what runs on them (edge.py, context.py). L layers, D width, V vocabulary.
Each part is a checkpoint of its own that transformers reads: the same class with fewer layers, final norm and LM head.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ee_diffusion.decoding.families import family_of, layers_of
from ee_diffusion.decoding.fingerprint import fingerprint_of

_FORMAT = "ee_diffusion.cloud.part.1"
# Classes whose layers take the token embedding as it is: hidden states can enter above as `inputs_embeds`.
SPLITTABLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Part:
    """What a part is: `side` edge or cloud; `exits` (e1, e2), depths; `num_layers` L of the whole model; `fingerprint` the same for the
    two parts of one model."""

    side: str
    exits: tuple[int, int]
    num_layers: int
    fingerprint: str

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
    family, num_layers = family_of(model), len(layers_of(model))
    if type(model).__name__ not in SPLITTABLE:
        raise ValueError(f"{type(model).__name__} cannot be split, expected one of {SPLITTABLE}")
    if len(exits) != 2 or not 1 <= exits[0] < exits[1] < num_layers:
        raise ValueError(f"exits={exits}, expected two depths with 1 <= e1 < e2 < {num_layers} (layers of the model)")
    weights = model.state_dict()
    fingerprint = fingerprint_of(model)
    parts = {side: Part(side, tuple(exits), num_layers, fingerprint) for side in ("edge", "cloud")}
    for side, part in parts.items():
        chosen = _chosen(weights, part, prefix=f"{family.layers}.")
        _write(Path(folder) / side, part, _config(model.config, part), chosen)
    return parts


def load_part(folder: str | os.PathLike, side: str, *, dtype: torch.dtype) -> tuple[PreTrainedModel, Part]:
    """Load one part, and nothing of the other, from what `split_model` wrote.

    Raises:
        ValueError: no such part, or another format.
    """
    path = Path(folder) / side
    if side not in ("edge", "cloud") or not (path / "part.json").is_file():
        raise ValueError(
            f"{path} holds no part, expected the folder with edge/ and cloud/ that `edge split` wrote: {folder}"
        )
    values = json.loads((path / "part.json").read_text(encoding="utf-8"))
    if values.pop("format", None) != _FORMAT:
        raise ValueError(f"{path}/part.json is of another format, expected {_FORMAT!r}")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)
    return model, Part(**values | {"exits": tuple(values["exits"])})


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


def _write(folder: Path, part: Part, config: PreTrainedConfig, weights: dict[str, Tensor]) -> None:
    """Files beside first, then renamed; the description last, so that a part without one is no part."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    beside = folder / f"model.{os.getpid()}.tmp"
    save_file(weights, beside, metadata={"format": "pt"})
    os.replace(beside, folder / "model.safetensors")
    beside.write_text(json.dumps({"format": _FORMAT, **asdict(part)}, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, folder / "part.json")
