"""Latency at the shape of DiT-XL/2 with random weights: time does not depend on them. Flags: eval/latency.py."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ee_diffusion.core.devices import device_named
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.hooks.attach import attach_exits, detach_exits
from ee_diffusion.diffusion.hooks.truncate import truncate
from ee_diffusion.metrics.tables import write_report
from ee_diffusion.metrics.timing import interleaved
from eval.harness.options import command, merged, results_folder
from eval.latency import SyntheticOptions

TIME, CLASSES = 500, 1000


def run(options: SyntheticOptions) -> None:
    folder, built, lines, text = results_folder(options.output_dir), build(options), [], ""
    facts = {"title": "Latency at the shape of DiT-XL/2", "command": command(), "settings": merged(options)}
    note = f"{built[0].num_parameters()} parameters. `off`: exits attached and none taken, over plain; `realised`: ideal over measured."
    for mode in options.modes:
        for rows in options.batch_sizes:
            torch._dynamo.reset()
            lines.append(line(built, options, rows=rows, mode=mode))
            tables, device = (
                {"forward": lines},
                built[0].device,
            )  # written line by line: a run cut short leaves what it had
            text = write_report(folder / "report.json", **facts, tables=tables, note=note, device=device)
    print(text)


def build(options: SyntheticOptions) -> tuple[DiTTransformer2DModel, AdapterExits, dict[float, int]]:
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
    built: tuple[DiTTransformer2DModel, AdapterExits, dict[float, int]],
    options: SyntheticOptions,
    *,
    rows: int,
    mode: str,
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
