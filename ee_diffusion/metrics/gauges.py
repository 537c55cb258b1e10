"""What an uncertainty is worth: its size against the true error, and whether it ranks. Not here: who predicts it.

n = moments at which a prediction of the error was compared with the error.
"""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

_LEAST = 3  # moments that a rank correlation needs: of two it is 1 or -1 by chance


def gauge_figures(said: Tensor, error: Tensor, *, groups: Tensor) -> dict[str, float | int | None]:
    """said, error (n,) positive, groups (n,) -> `factor`: median of max(u / e, e / u); `bias`: median of u / e; `rank`: rank correlation
    (Spearman) of u with e within a group, mean over groups of three or more (a constant has 0), None without one; `moments`: n.

    Raises:
        ValueError: nothing to compare, or other shapes.
    """
    if not len(said) or said.shape != error.shape or said.shape != groups.shape:
        shapes = [tuple(tensor.shape) for tensor in (said, error, groups)]
        raise ValueError(f"said, error and groups are {shapes}, expected three of one length, 1 or more")
    ratio = (said / error.clamp(min=1e-6)).log()
    places = [groups == group for group in groups.unique() if int((groups == group).sum()) >= _LEAST]
    ranks = [spearman_corrcoef(said[here].float(), error[here].float()).item() for here in places]
    return {
        "factor": ratio.abs().median().exp().item(),
        "bias": ratio.median().exp().item(),
        "rank": sum(ranks) / len(ranks) if ranks else None,
        "moments": len(error),
    }
