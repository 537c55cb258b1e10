"""Exit heads of causal language models: the model's own tail at every exit, alone or with learned adapters and certainty.

R rows, N tokens, D width, V vocabulary, K exits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ee_diffusion.core.exits import ExitHeads, Space
from ee_diffusion.core.io import read_tensors, write_tensors
from ee_diffusion.decoding.fingerprint import fingerprint_of
from ee_diffusion.decoding.model_specs import layers_of, model_spec_of

_FORMAT = "ee_diffusion.exits.lm.2"


class SharedTail:
    """Every exit answers through the model's own final norm and LM head; nothing is learned. An exit head as the core wants it.

    `depths`: executed layers at each exit, ascending.

    Raises:
        ValueError: a model of no known family, depths that are not ascending or beyond the model.
    """

    space: Space = "output"

    def __init__(self, model: PreTrainedModel, depths: tuple[int, ...]):
        self.model, self.family, self.depths = model, model_spec_of(model), tuple(depths)
        most = len(layers_of(model))  # the last layer of a part of a model may have an exit behind it
        if list(depths) != sorted(set(depths)) or any(not 0 <= depth <= most for depth in depths):
            raise ValueError(f"depths={depths}, expected ascending distinct depths within 0..{most}")

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """Logits of the last token: hidden (R, N, D) -> (R, V)."""
        return self.model.get_output_embeddings()(self.family.norm(self.model, hidden[:, -1:]))[:, -1]

    def answer_among(self, exit: int, hidden: Tensor, classes: Tensor) -> Tensor:
        """Logits of some tokens alone: hidden (R, N, D), classes (R, k), or (k,) the same for all rows -> (R, k).

        Raises:
            ValueError: an LM head whose rows cannot be taken one by one.
        """
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ValueError(f"the LM head is a {type(head).__name__}, expected nn.Linear: its rows are needed")
        normed = self.family.norm(self.model, hidden[:, -1:])[:, -1]  # (R, D)
        if classes.ndim == 1:
            return nn.functional.linear(normed, head.weight[classes], None if head.bias is None else head.bias[classes])
        logits = torch.einsum("rd,rkd->rk", normed, head.weight[classes])
        return logits if head.bias is None else logits + head.bias[classes]

    def confidence(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """Raises ValueError: nothing is learned here."""
        raise ValueError("score 'confidence' needs learned exits (LearnedExits), these are the model's own tail")

    def check_fits(self, model: nn.Module) -> None:
        """Raise ValueError if these are exits of another model."""
        if model is not self.model:
            raise ValueError(f"exits made for another {type(self.model).__name__} object than the one that generates")


def check_heads(model: nn.Module, heads: ExitHeads) -> None:
    """Raise ValueError for what is no exits, or exits of another model."""
    if isinstance(heads, type) or not hasattr(heads, "check_fits"):
        raise ValueError(f"exit_heads={heads!r}, expected exits, as LearnedExits.load(path).bind(model)")
    heads.check_fits(model)


class Adapter(nn.Module):
    """`h + up(silu(down(rms_norm(h))))`: brings a hidden state to where the model's tail can read it; fresh ones change nothing.

    Of the kind of a tuned lens (Belrose et al., arXiv 2303.08112, eq. 7), with one hidden layer in the place of its affine map.
    """

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return hidden + self.up(nn.functional.silu(self.down(self.norm(hidden))))


class LearnedExits(nn.Module):
    """Exits that are learned on a frozen model: an adapter before the model's own tail, and a certainty.

    The answer is the model's final norm and LM head on the adapted state; `adapter_width`: its inner width, None: no adapters, the
    model's own tail. The certainty is `sigmoid(w_k . rms(h) + b_k)`, whether the exit's token is the full model's (CALM, arXiv
    2207.07061, sec. 3.5, the early-exit classifier; deviation: of the state at unit root mean square).

    `depths`: executed layers at each exit, ascending; `width`: D; `made_for`: the fingerprint of the model they are for, empty: any.

    Raises:
        ValueError: depths not ascending, an inner width below 1.
    """

    space: Space = "output"

    def __init__(self, depths: tuple[int, ...], width: int, *, adapter_width: int | None = None, made_for: str = ""):
        super().__init__()
        whole = isinstance(depths, tuple | list) and all(isinstance(depth, int) for depth in depths)
        if not whole or not depths or list(depths) != sorted(set(depths)) or depths[0] < 0:
            raise ValueError(f"depths={depths!r}, expected ascending distinct depths, whole numbers, at least one")
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width={width!r}, expected the model's hidden size")
        if adapter_width is not None and (not isinstance(adapter_width, int) or adapter_width < 1):
            raise ValueError(f"adapter_width={adapter_width!r}, expected at least 1, or None: no adapters")
        self.depths, self.width = tuple(depths), width
        self.adapter_width, self.made_for = adapter_width, made_for
        self.classifiers = nn.ModuleList(nn.Linear(width, 1) for _ in depths)
        self.adapters = nn.ModuleList(Adapter(width, adapter_width) for _ in depths if adapter_width is not None)
        self._tail: list[SharedTail] = []  # in a list: the model is no submodule of its exits

    def bind(self, model: PreTrainedModel, *, part_of: str | None = None) -> LearnedExits:
        """Answer through this model's tail from now on, in its dtype and on its device. `part_of`: the whole model's fingerprint, where
        `model` is a part of it.

        Raises:
            ValueError: a model of another width or depth, or another model than they were made for.
        """
        width, num_layers = model.config.get_text_config().hidden_size, len(layers_of(model))
        most = num_layers - 1 if part_of is None else num_layers
        if width != self.width or self.depths[-1] > most:
            raise ValueError(
                f"exits of width {self.width} up to depth {self.depths[-1]}, the model has width {width} and {num_layers} layers; "
                f"expected that width and depths up to {most} (`at(depths)` takes some of the exits; `part_of` says that a model is a part)"
            )
        if self.made_for and self.made_for != (came := part_of or fingerprint_of(model)):
            raise ValueError(f"exits made for model {self.made_for}, this one is {came} (fingerprints of the weights)")
        self._tail = [SharedTail(model, self.depths)]
        self.to(model.dtype)
        return self if model.device.type == "meta" else self.to(model.device)

    def at(self, depths: tuple[int, ...]) -> LearnedExits:
        """The exits at some of the depths alone, with weights of their own, bound to nothing yet.

        Raises:
            ValueError: depths that there are no exits at.
        """
        if missing := sorted(set(depths) - set(self.depths)):
            raise ValueError(f"no exits at depths {missing}, these are at {self.depths}")
        chosen = LearnedExits(tuple(depths), self.width, adapter_width=self.adapter_width, made_for=self.made_for).to(
            self.classifiers[0].weight
        )
        for exit, depth in enumerate(depths):
            own = self.depths.index(depth)
            for mine, theirs in zip(self._parts(own), chosen._parts(exit), strict=True):
                theirs.load_state_dict(mine.state_dict())
        return chosen

    def answer(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """Logits of the last token: hidden (R, N, D) -> (R, V)."""
        return self._tail[0].answer(exit, self._adapted(exit, hidden[:, -1:]), context)

    def answer_among(self, exit: int, hidden: Tensor, classes: Tensor) -> Tensor:
        """As `SharedTail.answer_among`."""
        return self._tail[0].answer_among(exit, self._adapted(exit, hidden[:, -1:]), classes)

    def certainty_logits(self, exit: int, hidden: Tensor) -> Tensor:
        """Certainty before its sigmoid, of the last token: hidden (R, N, D) -> (R,)."""
        state = nn.functional.rms_norm(hidden[:, -1], (self.width,), eps=1e-6)
        return self.classifiers[exit](state)[:, 0]

    def confidence(self, exit: int, hidden: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        """hidden (R, N, D) -> (R,) in [0, 1], of the last token."""
        return torch.sigmoid(self.certainty_logits(exit, hidden))

    def check_fits(self, model: nn.Module) -> None:
        """Raise ValueError if these exits are not bound to this model."""
        if not self._tail:
            raise ValueError("these exits answer through no model yet: exits.bind(model) first")
        self._tail[0].check_fits(model)

    def save(self, path: str | os.PathLike) -> None:
        """Write to one safetensors file, whole or not at all."""
        said = {"depths": self.depths, "width": self.width, "adapter_width": self.adapter_width}
        metadata = {
            "format": _FORMAT,
            "made_for": self.made_for,
            **{name: json.dumps(one) for name, one in said.items()},
        }
        write_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> LearnedExits:
        """Read what `save` wrote; bind it to a model before use.

        Raises:
            ValueError: a folder, or a file that holds something else.
        """
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder, expected the file of the exits (exits.safetensors)")
        tensors, metadata = read_tensors(path, "file of exits", format=_FORMAT)
        try:
            depths, width, inner = (json.loads(metadata[name]) for name in ("depths", "width", "adapter_width"))
            exits = cls(tuple(depths), width, adapter_width=inner, made_for=metadata["made_for"])
            exits.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} holds no exits: {error}") from error
        return exits

    def _adapted(self, exit: int, hidden: Tensor) -> Tensor:
        return hidden if self.adapter_width is None else self.adapters[exit](hidden)

    def _parts(self, exit: int) -> list[nn.Module]:
        return [self.classifiers[exit], *(self.adapters[exit : exit + 1])]
