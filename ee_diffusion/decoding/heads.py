"""Exit heads of causal language models: the model's own tail at every exit, with or without a learned certainty.

R rows, N tokens, D width, V vocabulary, K exits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ee_diffusion.core.heads import Space
from ee_diffusion.decoding.families import family_of, layers_of

_FORMAT = "ee_diffusion.exits.lm.1"


class SharedTail:
    """Every exit answers through the model's own final norm and LM head; nothing is learned. An exit head as the core wants it.

    `depths`: executed layers at each exit, ascending.

    Raises:
        ValueError: a model of no known family.
    """

    space: Space = "output"

    def __init__(self, model: PreTrainedModel, depths: tuple[int, ...]):
        self.model, self.family, self.depths = model, family_of(model), tuple(depths)

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """Logits of the last token: hidden (R, N, D) -> (R, V)."""
        return self.model.get_output_embeddings()(self.family.norm(self.model, hidden[:, -1:]))[:, -1]

    def answer_among(self, exit: int, hidden: Tensor, classes: Tensor) -> Tensor:
        """Logits of some tokens alone: hidden (R, N, D), classes (R, k) -> (R, k).

        Raises:
            ValueError: an LM head whose rows cannot be taken one by one.
        """
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ValueError(f"the LM head is a {type(head).__name__}, expected nn.Linear: its rows are needed")
        normed = self.family.norm(self.model, hidden[:, -1:])[:, -1]  # (R, D)
        logits = torch.einsum("rd,rkd->rk", normed, head.weight[classes])
        return logits if head.bias is None else logits + head.bias[classes]

    def certainty(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """Raises ValueError: nothing is learned here."""
        raise ValueError("score 'certainty' needs learned exits (LearnedExits), these are the model's own tail")

    def check_fits(self, model: nn.Module) -> None:
        """Raise ValueError if these are exits of another model."""
        if model is not self.model:
            raise ValueError(f"exits made for another {type(self.model).__name__} object than the one that generates")


class LearnedExits(nn.Module):
    """Exits whose certainty is learned: `sigmoid(w_k . h + b_k)`, whether the exit's token is the full model's (CALM, arXiv 2207.07061,
    sec. 3.5, the early-exit classifier). The answer is the model's own tail.

    `depths`: executed layers at each exit, ascending; `width`: D.
    """

    space: Space = "output"

    def __init__(self, depths: tuple[int, ...], width: int):
        super().__init__()
        if not depths or list(depths) != sorted(set(depths)) or depths[0] < 0:
            raise ValueError(f"depths={depths}, expected ascending distinct depths")
        self.depths, self.width = tuple(depths), width
        self.classifiers = nn.ModuleList(nn.Linear(width, 1) for _ in depths)
        self._tail: list[SharedTail] = []  # in a list: the model is no submodule of its exits

    def bind(self, model: PreTrainedModel) -> LearnedExits:
        """Answer through this model's tail from now on. Raises ValueError if it is of another width or depth."""
        width, num_layers = model.config.get_text_config().hidden_size, len(layers_of(model))
        if width != self.width or self.depths[-1] >= num_layers:
            raise ValueError(
                f"exits of width {self.width} up to depth {self.depths[-1]}, the model has width {width} and {num_layers} layers"
            )
        self._tail = [SharedTail(model, self.depths)]
        return self

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """Logits of the last token: hidden (R, N, D) -> (R, V)."""
        return self._tail[0].answer(exit, hidden, context)

    def answer_among(self, exit: int, hidden: Tensor, classes: Tensor) -> Tensor:
        """As `SharedTail.answer_among`."""
        return self._tail[0].answer_among(exit, hidden, classes)

    def certainty(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """hidden (R, N, D) -> (R,) in [0, 1], of the last token."""
        return torch.sigmoid(self.classifiers[exit](hidden[:, -1])[:, 0])

    def check_fits(self, model: nn.Module) -> None:
        """Raise ValueError if these exits are not bound to this model."""
        if not self._tail:
            raise ValueError("these exits answer through no model yet: exits.bind(model) first")
        self._tail[0].check_fits(model)

    def save(self, path: str | os.PathLike) -> None:
        """Write to one safetensors file, beside first, then renamed."""
        metadata = {"format": _FORMAT, "depths": json.dumps(self.depths), "width": str(self.width)}
        beside = Path(f"{path}.{os.getpid()}.tmp")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, beside, metadata=metadata)
        os.replace(beside, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> LearnedExits:
        """Read what `save` wrote; bind it to a model before use.

        Raises:
            ValueError: a file that holds something else.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} holds no exits: format {metadata.get('format')!r}, expected {_FORMAT!r}")
            exits = cls(tuple(json.loads(metadata["depths"])), int(metadata["width"]))
            exits.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a mapping)
        return exits
