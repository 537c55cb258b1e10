"""One interleaved clock: candidates take turns batch by batch, so that drift of the machine is shared.

Here: turns and times. Not here: which candidates there are (candidates.py), images on disk (result_cache.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

from tqdm.auto import tqdm

from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.pipelines.sampling import Generated, joined
from ee_diffusion.metrics.splits import balanced_labels, seeds


@dataclass(frozen=True)
class Candidate:
    """One way to draw the images: a policy at a number of steps. value: its point of the kind's curve. exits: the name of those it draws
    with (harness/step_caches.py); None: not needed."""

    name: str
    kind: str
    value: float | None
    policy: Policy | None
    steps: int
    exits: str | None = None

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self) | {"policy": self.policy and self.policy.to_dict()}

    @classmethod
    def from_dict(cls, known: dict) -> Candidate:
        """Back from JSON."""
        return cls(**known | {"policy": known["policy"] and Policy.from_dict(known["policy"])})


Labels = list[int] | None  # None: of an unconditional model
Draw = Callable[[Candidate, list[int], Labels, int], Generated]


def by_batch(
    candidates: list[Candidate], draw: Draw, chosen: list[int], labels: Labels, *, batch: int
) -> dict[str, Generated]:
    """Name -> what it draws: all candidates over all seeds, batch by batch, each time beginning with the next one.

    Raises:
        ValueError: a name that two candidates have.
    """
    twice = [name for name, count in Counter(one.name for one in candidates).items() if count > 1]
    if twice:
        raise ValueError(f"several candidates are called {twice}, expected a name for each")
    parts: dict[str, list[Generated]] = {candidate.name: [] for candidate in candidates}
    with tqdm(total=len(candidates) * -(-len(chosen) // batch), desc="batches", mininterval=10) as progress:
        for turn, start in enumerate(range(0, len(chosen), batch)):
            shift = turn % len(candidates)
            for candidate in candidates[shift:] + candidates[:shift]:
                part = draw(candidate, chosen[start : start + batch], labels and labels[start : start + batch], start)
                parts[candidate.name].append(part)
                progress.update()
    return {name: joined(several) for name, several in parts.items()}


def in_turns(
    candidates: list[Candidate], draw: Draw, chosen: list[int], labels: Labels, *, batch: int
) -> dict[str, Generated]:
    """`by_batch` with times that count: every candidate first draws the first batch once, which is discarded."""
    for candidate in candidates:
        draw(candidate, chosen[:batch], labels and labels[:batch], 0)
    return by_batch(candidates, draw, chosen, labels, batch=batch)


def measured(drawn: Generated, full: Generated) -> dict[str, float]:
    """`time`: the median over batches of (candidate / full model); `seconds` of all its batches. Both drew in the same turns."""
    ratios = [own / whole for own, whole in zip(drawn.seconds, full.seconds, strict=True)]
    return {"time": median(ratios), "seconds": sum(drawn.seconds)}


def clocked(
    candidates: list[Candidate], draw: Draw, *, images: int, batch: int, num_classes: int | None
) -> dict[str, dict[str, float]]:
    """Name -> what `measured` says of it on the first test images. `draw` must draw anew; "full" is among the candidates."""
    drawn = in_turns(candidates, draw, seeds("test", images), balanced_labels(images, num_classes), batch=batch)
    return {name: measured(one, drawn["full"]) for name, one in drawn.items()}


def clock_images_of(asked: int | None, *, count: int, batch: int) -> int:
    """How many of `count` test images the clock looks at: whole batches, two if there are as many and nothing else is asked for.

    Raises:
        ValueError: a number of images that is not made of whole batches, or is none or more than there are.
    """
    size = min(batch, count)
    if size < 1:
        raise ValueError(f"{count} images in batches of {batch}, expected at least 1 of both")
    images = size * min(2, count // size) if asked is None else asked
    if not 1 <= images <= count or images % size:
        raise ValueError(f"{images} images for the clock of {count}, expected whole batches of {size}")
    return images
