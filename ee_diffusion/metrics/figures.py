"""Pictures: a run's decisions (steps x images, colour = blocks before the answer), and grids of images."""

from __future__ import annotations

import os

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ee_diffusion.core.io import write_whole
from ee_diffusion.core.trace import Trace

DPI = 110


def exit_map(trace: Trace, *, title: str = "") -> Figure:
    """Draw where every image stopped at every step: x = step, y = image, colour = depth at which its answer was taken (0..L).

    Raises:
        ValueError: no trace (the call ran without an exit policy).
    """
    if not isinstance(trace, Trace):
        raise ValueError(f"got {type(trace).__name__}, expected a Trace: a call without an exit policy has none")
    steps, images = trace.depths.shape
    num_layers = trace.planned.shape[1]
    size = (max(5.0, 0.13 * steps), max(2.5, min(8.0, 0.16 * images + 1.2)))
    figure = Figure(figsize=size, layout="constrained")  # without pyplot: no backend of the user's is touched
    axes = figure.subplots()
    shown = axes.imshow(
        trace.depths.T.numpy(), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=num_layers
    )
    axes.set_xlabel("denoising step (noise to data)")
    axes.set_ylabel("image")
    axes.set_title(title or f"mean depth {trace.depths.float().mean():.2f} of {num_layers} blocks")
    figure.colorbar(shown, label="blocks before the answer")
    return figure


def image_grid(images: Tensor, *, columns: int = 8, scale: int = 2) -> Figure:
    """Images (n, C, H, W) in [0, 1] side by side, `columns` a row, `scale` screen pixels a pixel."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    cells = torch.ones(rows * columns, channels, height + 2, width + 2)
    cells[:n, :, 1:-1, 1:-1] = images.float().cpu()
    grid = cells.reshape(rows, columns, channels, height + 2, width + 2)
    grid = grid.permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, C)
    grid = grid.reshape(rows * (height + 2), columns * (width + 2), channels)
    # pixels / DPI * DPI may fall just below the pixels, and matplotlib 3.9 cuts off the fraction: one pixel less
    figure = Figure(figsize=tuple((side * scale + 1e-3) / DPI for side in (grid.shape[1], grid.shape[0])))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(grid.squeeze(-1).numpy(), interpolation="nearest", cmap="gray")
    axes.set_axis_off()
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a PNG, whole or not at all."""
    write_whole(path, lambda beside: figure.savefig(beside, format="png", dpi=DPI))
