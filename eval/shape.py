"""What exits cost and save at the shape of DiT-XL/2: 28 blocks of width 1152, 256 tokens, random weights (time does not depend on them).

python -m eval.shape --output_dir runs/shape

For every batch size, eager and compiled: the plain forward; with exits attached and none taken, over plain (`off`); and with all rows
leaving at a part of the depth, its time over plain, and ideal over measured time. Ideal is a stock model of just so many blocks
(`truncate`), compiled or not as the rest: whoever skips blocks cannot be faster. Candidates take turns.
Writes shape.json and shape.md after every line, so that a run cut short leaves what it had.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.devices import device_named
from ee_diffusion.core.io import write_text
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.hooks.attach import attach_exits, detach_exits
from ee_diffusion.diffusion.hooks.truncate import truncate
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from ee_diffusion.metrics.timing import interleaved
from eval.harness.options import DTYPES, flag, parse

TIME, CLASSES = 500, 1000


@dataclass(frozen=True)
class ShapeOptions:
    """The shape, and how long to look.

    Raises:
        ValueError: no folder, an unknown dtype, a number out of range.
    """

    output_dir: str | None = flag("Where results go.")
    num_layers: int = flag("Blocks.", 28)
    num_attention_heads: int = flag("Attention heads.", 16)
    attention_head_dim: int = flag("Width of a head.", 72)
    sample_size: int = flag("Latent pixels per side; patches are 2x2.", 32)
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Rows per forward."})
    fractions: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75], metadata={"help": "Parts of the depth."})
    modes: list[str] = field(default_factory=lambda: ["eager", "compiled"], metadata={"help": "eager, compiled."})
    compile_backend: str = flag("Backend of torch.compile.", "inductor")
    repeats: int = flag("Counted runs of each candidate.", 15)
    dtype: str = flag("float32, bfloat16 or float16.", "bfloat16")
    device: str | None = flag("cpu, cuda, ...; none: cuda if there is one.")
    seed: int = flag("Seed of the weights and inputs.", 0)

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError(f"output_dir={self.output_dir!r}, expected a folder")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}, expected one of {DTYPES}")
        if unknown := set(self.modes) - {"eager", "compiled"}:
            raise ValueError(f"modes {sorted(unknown)}, expected eager, compiled")
        if (
            not all(0 < part < 1 for part in self.fractions)
            or min((self.repeats, self.num_layers, *self.batch_sizes)) < 1
        ):
            raise ValueError(
                f"fractions={self.fractions}, repeats={self.repeats}, num_layers={self.num_layers}, batch_sizes={self.batch_sizes}: "
                "expected parts of the depth between 0 and 1, and numbers of at least 1"
            )


def build(options: ShapeOptions) -> tuple[DiTTransformer2DModel, AdapterExits, dict[float, int]]:
    """A DiT of random weights, exits through its own tail, and the depth of every part."""
    torch.manual_seed(options.seed)
    place = device_named(options.device)
    transformer = DiTTransformer2DModel(
        num_attention_heads=options.num_attention_heads,
        attention_head_dim=options.attention_head_dim,
        num_layers=options.num_layers,
        sample_size=options.sample_size,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    ).to(place, getattr(torch, options.dtype))
    depths = {part: min(max(1, round(part * options.num_layers)), options.num_layers - 1) for part in options.fractions}
    exits = AdapterExits.for_transformer(transformer, tuple(sorted(set(depths.values()))), rank=0)
    return transformer.eval(), exits.to(place, getattr(torch, options.dtype)).eval(), depths


def inputs_of(transformer: DiTTransformer2DModel, rows: int) -> dict[str, Tensor]:
    size, place = transformer.config.sample_size, transformer.device
    return {
        "hidden_states": torch.randn(rows, 4, size, size).to(place, transformer.dtype),
        "timestep": torch.full((rows,), TIME, device=place),
        "class_labels": torch.arange(rows, device=place) % CLASSES,
    }


def plain(model: nn.Module, inputs: dict[str, Tensor], options: dict | None) -> Callable[[], object]:
    """A forward of a model without exits, compiled where there are options."""
    forward = model if options is None else torch.compile(model, dynamic=False, **options)

    def run() -> None:
        with torch.no_grad():
            forward(**inputs)

    return run


def exited(
    model: nn.Module, exits: AdapterExits, inputs: dict[str, Tensor], *, depth: int, options: dict | None
) -> Callable[[], object]:
    """A forward whose rows all leave at a depth (that of the model: none leaves). Exits stay attached; the last one's are taken off."""
    policy, rows = Policy(schedule=FixedDepth(depth)), torch.arange(len(inputs["timestep"]))
    attachment = attach_exits(model, exits, compile_options=options)

    def run() -> None:
        session = attachment.start(policy, rows=rows, num_steps=1)
        with torch.no_grad(), attachment.use(session.step(0, TIME)):
            model(**inputs)

    return run


def line(
    built: tuple[DiTTransformer2DModel, AdapterExits, dict[float, int]], options: ShapeOptions, *, rows: int, mode: str
) -> dict:
    """All figures of one batch size, eager or compiled. One model is plain and one has exits, for both take turns."""
    transformer, exits, depths = built
    compiled = None if mode == "eager" else {"backend": options.compile_backend}
    facts = {
        "repeats": options.repeats,
        "warmup": 3,
        "device": transformer.device,
        "dtype": options.dtype,
        "batch": rows,
    }
    inputs, attached = inputs_of(transformer, rows), copy.deepcopy(transformer)
    candidates = {"plain": plain(transformer, inputs, compiled)}
    candidates["off"] = exited(attached, exits, inputs, depth=options.num_layers, options=compiled)
    timings = interleaved(candidates, **facts)
    detach_exits(attached)
    found = {"mode": mode, "batch": rows, "plain_ms": 1e3 * timings["plain"].median}
    found["off"] = timings["off"].ratio(timings["plain"])
    for part, depth in depths.items():
        ours = exited(attached, exits, inputs, depth=depth, options=compiled)
        shallow = plain(truncate(transformer, depth), inputs, compiled)
        timings = interleaved({"plain": candidates["plain"], "exited": ours, "ideal": shallow}, **facts)
        detach_exits(attached)
        found[f"time at {part}"] = timings["exited"].ratio(timings["plain"])
        found[f"realised at {part}"] = timings["ideal"].ratio(timings["exited"])
    return found


def main() -> None:
    (options,) = parse(ShapeOptions, description=__doc__)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    built, lines = build(options), []
    facts = {"settings": asdict(options), "parameters": built[0].num_parameters()}
    for mode in options.modes:
        for rows in options.batch_sizes:
            torch._dynamo.reset()
            lines.append(line(built, options, rows=rows, mode=mode))
            write_json(folder / "shape.json", facts | {"environment": environment(built[0].device), "rows": lines})
            write_text(folder / "shape.md", markdown_table(lines))
    print((folder / "shape.md").read_text())


if __name__ == "__main__":
    run_script(main)
