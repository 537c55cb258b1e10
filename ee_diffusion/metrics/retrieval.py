"""Does an image show what its caption says? A small image tower beside a frozen text encoder: "tower match", a figure of its own, not CLIP.

Here: the tower, its loss, retrieval with intervals. Not here: text encoders (the caller brings embeddings), drawing images.
B images, Q captions, V width of the text encoder, C, H, W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from ee_diffusion.core.io import write_tensors

SIZE = 32  # pixels that the tower looks at: what a coarse autoencoder spoils, it does not see
_FORMAT = "ee_diffusion.tower.1"


class ImageTower(nn.Module):
    """A small residual network from an image to a text encoder's space: (B, 3, H, W) float in [0, 1] -> (B, V) of length 1.

    Args:
        text_dim: V. widths: channels of the stages, each half the size of the one before.
        centre: (V,) what is subtracted from every text embedding before it is compared (the mean over training captions).

    Raises:
        ValueError: no widths, a centre of another shape.
    """

    def __init__(self, text_dim: int, widths: tuple[int, ...], centre: Tensor):
        super().__init__()
        if not widths or centre.shape != (text_dim,):
            raise ValueError(f"widths={widths}, centre {tuple(centre.shape)}, expected at least one and ({text_dim},)")
        self.text_dim, self.widths = text_dim, tuple(widths)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(
            _Stage(before, after) for before, after in zip((widths[0], *widths), widths, strict=False)
        )
        self.out = nn.Linear(widths[-1], text_dim)
        self.register_buffer("centre", centre.float())

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected float (B, 3, H, W) in [0, 1]")
        hidden = functional.interpolate(images, size=(SIZE, SIZE), mode="area")
        hidden = self.stem(hidden * 2 - 1)  # (B, c, 32, 32)
        for stage in self.stages:
            hidden = stage(hidden)
        return functional.normalize(self.out(hidden.mean(dim=(2, 3))), dim=1)  # (B, V)

    def texts(self, embeddings: Tensor) -> Tensor:
        """Sentence embeddings (Q, V) -> what images are compared with (Q, V): centred, of length 1."""
        return functional.normalize(embeddings.float() - self.centre, dim=1)


class _Stage(nn.Module):
    """`x + conv(relu(norm(conv(relu(norm(x))))))` after halving the size and widening by a 1x1 convolution."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.widen = nn.Conv2d(before, after, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.conv1, self.conv2 = (nn.Conv2d(after, after, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.widen(functional.avg_pool2d(hidden, 2))
        inner = self.conv1(functional.relu(self.norm1(hidden)))
        return hidden + self.conv2(functional.relu(self.norm2(inner)))


def contrastive_loss(images: Tensor, texts: Tensor, captions: Tensor, *, scale: Tensor | float) -> Tensor:
    """`mean_i -log softmax_j(scale <x_i, t_j>)_i`, once over texts and once over images, averaged (CLIP, arXiv 2103.00020, fig. 3).

    Pairs of one caption beside the sample's own are left out of the sums: they are no negatives. images, texts (B, V) of length 1,
    captions (B,) integers; a scalar.
    """
    logits = scale * images @ texts.T  # (B, B)
    same = (captions[:, None] == captions[None, :]) & ~torch.eye(len(captions), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(captions), device=logits.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


class MatchingObjective(nn.Module):
    """`contrastive_loss` of a tower on jittered images, with a learned scale. batch: `images` (B, 3, H, W) uint8, `texts` (B, V)
    sentence embeddings, `captions` (B,)."""

    def __init__(self, tower: ImageTower):
        super().__init__()
        self.tower = tower
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = jittered(batch["images"].float() / 255) if self.training else batch["images"].float() / 255
        scale = self.log_scale.exp().clamp(max=100)
        loss = contrastive_loss(self.tower(images), self.tower.texts(batch["texts"]), batch["captions"], scale=scale)
        return {"loss": loss, "scale": scale.detach()}


def jittered(images: Tensor) -> Tensor:
    """Turned by up to 10 degrees, scaled by up to 15 %, shifted by up to 8 % and with a little noise, drawn from torch's generator."""
    count = len(images)
    draws = torch.rand(4, count, device=images.device) * 2 - 1  # (4, B) in [-1, 1)
    angle, zoom = draws[0] * torch.pi / 18, 1 + 0.15 * draws[1]
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    shift = 0.16 * draws[2:]  # of coordinates in [-1, 1]
    rows = torch.stack([torch.stack([cosine, -sine, shift[0]], 1), torch.stack([sine, cosine, shift[1]], 1)], dim=1)
    grid = functional.affine_grid(rows, list(images.shape), align_corners=False)  # (B, H, W, 2)
    moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    strength = 0.08 * torch.rand(count, 1, 1, 1, device=images.device)
    return (moved + strength * torch.randn_like(moved)).clamp(0, 1)


def save_tower(path: str | Path, tower: ImageTower, facts: Mapping[str, object]) -> None:
    """One safetensors file with the tower's sizes and `facts` (JSON values: how it was trained) in its metadata."""
    about = {"text_dim": tower.text_dim, "widths": list(tower.widths), "facts": dict(facts)}
    write_tensors(path, tower.state_dict(), metadata={_FORMAT: json.dumps(about, sort_keys=True)})


def load_tower(path: str | Path) -> tuple[ImageTower, dict]:
    """The tower in evaluation mode, and the facts it was saved with.

    Raises:
        ValueError: no such file, or one of something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"no tower at {path}; train one by train/train_retrieval_tower.py")
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(_FORMAT)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error
    if about is None:
        raise ValueError(f"{path} holds no image tower (its metadata lacks {_FORMAT!r})")
    known = json.loads(about)
    tower = ImageTower(known["text_dim"], tuple(known["widths"]), torch.zeros(known["text_dim"]))
    tower.load_state_dict(state)
    return tower.eval().requires_grad_(False), known["facts"]


@dataclass(frozen=True)
class Retrieval:
    """How often an image finds its own caption among `captions` captions, at rank 1 and within the first 10.

    `low`, `high`: 95 % percentile interval over captions drawn with replacement (images of one caption stay together). `chance`: what
    blind guessing gives.
    """

    at_1: float
    at_1_low: float
    at_1_high: float
    at_10: float
    at_10_low: float
    at_10_high: float
    median_rank: float
    images: int
    captions: int
    chance_at_1: float
    chance_at_10: float


def ranks(images: Tensor, own: Tensor, texts: Tensor) -> Tensor:
    """Rank of each image's own caption among all: 1 + the number of other captions at least as similar (so ties count against it).

    images (B, V), own (B,) positions in texts, texts (Q, V) -> (B,) int64.

    Raises:
        ValueError: shapes that do not fit, positions out of range, values that are not finite.
    """
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or own.shape != images.shape[:1]:
        raise ValueError(
            f"images {tuple(images.shape)}, own {tuple(own.shape)}, texts {tuple(texts.shape)}, expected (B, V), (B,), (Q, V)"
        )
    if not len(images) or int(own.min()) < 0 or int(own.max()) >= len(texts):
        raise ValueError(
            f"{len(images)} images with captions {own.tolist()[:3]}..., expected some in 0..{len(texts) - 1}"
        )
    similar = images.double() @ texts.double().T  # (B, Q)
    if not similar.isfinite().all():
        raise ValueError("a similarity is NaN or infinite")
    return (similar >= similar.gather(1, own[:, None])).sum(dim=1)


def retrieval(images: Tensor, own: Tensor, texts: Tensor, *, draws: int = 2000) -> Retrieval:
    """images (B, V), own (B,) positions of their captions in texts (Q, V). `draws`: resamples of the interval.

    Raises:
        ValueError: as `ranks`.
    """
    found, captions = ranks(images, own, texts), len(texts)
    facts: dict[str, float] = {}
    for first in (1, 10):
        hits = (found <= first).double()  # (B,)
        low, high = _interval(hits, own, draws)
        facts |= {f"at_{first}": hits.mean().item(), f"at_{first}_low": low, f"at_{first}_high": high}
    chances = {"chance_at_1": 1 / captions, "chance_at_10": min(10, captions) / captions}
    return Retrieval(
        **facts, median_rank=found.double().median().item(), images=len(images), captions=captions, **chances
    )


def shown(row: Mapping[str, object]) -> dict[str, object]:
    """A row of a table: what stands beside a `Retrieval`'s fields, then shares with their intervals and chance, medians and counts."""
    names = Retrieval.__dataclass_fields__
    cells = {name: value for name, value in row.items() if name not in names}
    for first in (1, 10):
        value, low, high, chance = (
            row[name] for name in (f"at_{first}", f"at_{first}_low", f"at_{first}_high", f"chance_at_{first}")
        )
        cells[f"@{first} (chance {chance:.3f})"] = f"{value:.3f} [{low:.3f}, {high:.3f}]"
    return cells | {"median rank": row["median_rank"], "images": row["images"], "captions": row["captions"]}


def _interval(hits: Tensor, own: Tensor, draws: int) -> tuple[float, float]:
    groups, place = own.unique(return_inverse=True)
    sums = torch.zeros(len(groups), dtype=torch.float64).index_add(0, place, hits)
    sizes = torch.zeros(len(groups), dtype=torch.float64).index_add(0, place, torch.ones_like(hits))
    picked = torch.randint(len(groups), (draws, len(groups)), generator=torch.Generator().manual_seed(0))
    shares = sums[picked].sum(dim=1) / sizes[picked].sum(dim=1)  # (draws,)
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
