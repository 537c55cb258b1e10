"""The exits of one run, laid out for the clock: the same uncertainty as deediff.py, in half as many operations.

Here: certainty without gradients in float32. Not here: parameters and answers, which stay those of the exits that were packed.
R rows, X prefix tokens, P patches, N = X + P, D width, V = p*p*C values of a patch, K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ee_diffusion.core.exits import Space
from ee_diffusion.diffusion.models.uvit import embedding_frequencies, timestep_embedding

Answer = Callable[[int, Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class PackedExits:
    """Uncertainty modules `u = sigmoid(W_h h + W_t e + b)` (DeeDiff eq. 4), cut in two once for a run.

    A small model on a CPU waits for the number of operations, not for their size, and most for an operation of a kind that has not
    run for a while: what can be done for all exits at once, or once for a run, is not done at each exit, and the mean is a product, too.
    """

    depths: tuple[int, ...]
    space: Space
    answer: Answer
    check_fits: Callable[[nn.Module], None]
    frequencies: Tensor  # (D // 2,) of the embedding e, without the zero that an odd D ends in
    for_hidden: tuple[Tensor, ...]  # for each exit (V, D)
    for_time: Tensor  # (K V, D), D even
    bias: Tensor  # (K V,)
    minus_mean: Tensor  # (N V,): -1 / (P V) for every value of a patch, 0 for those of prefix tokens
    one: Tensor  # (1,)

    @classmethod
    def of(
        cls,
        exits,
        modules: Sequence[nn.Linear],
        *,
        num_prefix_tokens: int,
        num_patches: int,
    ) -> PackedExits:
        """W_h as views of the modules' weights (V, 2D), W_t of all modules as one copy."""
        width, values, one = modules[0].in_features // 2, modules[0].out_features, modules[0].weight
        minus_mean = one.new_full((num_prefix_tokens + num_patches, values), -1 / (num_patches * values))
        minus_mean[:num_prefix_tokens] = 0
        return cls(
            exits.depths,
            exits.space,
            exits.answer,
            exits.check_fits,
            embedding_frequencies(width, device=one.device),
            tuple(linear.weight.detach()[:, :width] for linear in modules),
            torch.cat([linear.weight.detach()[:, width:][:, : width // 2 * 2] for linear in modules]),
            torch.cat([linear.bias.detach() for linear in modules]),
            minus_mean.view(-1),
            one.new_ones(1),
        )

    def context(self, timestep: Tensor) -> dict[str, Any]:
        """timestep (R,) -> `timestep`, and the time's part of every uncertainty module, `time_part` (R, K, V).

        Where all rows are at one time (`expand`), its part is made once, as K tensors (V,): the biases of the products to come.
        """
        if timestep.stride(0) != 0 and len(timestep) > 1:
            part = nn.functional.linear(timestep_embedding(timestep, self.frequencies), self.for_time, self.bias)
            return {"timestep": timestep, "time_part": part.view(len(part), len(self.depths), -1)}
        angles = self.frequencies * timestep[0]  # (D / 2,), in float32 whatever the type of the one time is
        said = torch.addmv(self.bias, self.for_time, torch.cat([angles.cos(), angles.sin()]))  # (K V,)
        return {"timestep": timestep, "time_part": said.split(len(said) // len(self.depths))}

    def confidence(self, exit: int, hidden: Tensor, context: Mapping[str, Any]) -> Tensor:
        """hidden (R, N, D) -> `1 - mean u` (R,), the mean over patches alone."""
        time, weight = context["time_part"], self.for_hidden[exit]
        if isinstance(time, tuple):
            logits = nn.functional.linear(hidden, weight, time[exit])  # (R, N, V)
        else:
            logits = nn.functional.linear(hidden, weight).add_(time[:, exit, None])
        return torch.addmv(self.one, logits.sigmoid_().view(len(hidden), -1), self.minus_mean)  # (R,)
