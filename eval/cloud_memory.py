"""Peak memory of an edge that loads its part alone, beside the whole model: each in a fresh process that answers one prompt.

python -m eval.cloud_memory --model MODEL --parts parts --output_dir runs/cloud-memory

`weights_mb`: of the tensors; `imported_mb`: resident memory once everything is imported; `peak_mb`: the most it ever was (ru_maxrss),
`over_imports_mb`: the difference. Float32, one thread. Writes cloud-memory.json.
"""

from __future__ import annotations

import multiprocessing
import resource
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.policy import Policy
from ee_diffusion.edge_cloud.baselines import whole_answer
from ee_diffusion.edge_cloud.edge import Edge
from ee_diffusion.edge_cloud.split import load_part
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from eval.harness.options import flag, parse


@dataclass(frozen=True)
class MemoryOptions:
    """What is loaded, and what for."""

    model: str = flag("Folder of the whole causal language model.")
    parts: str = flag("Folder that `ee-diffusion edge split` wrote.")
    prompt_tokens: int = flag("Positions of the prompt.", 128)
    new_tokens: int = flag("Tokens of the answer.", 8)
    output_dir: str = flag("Where cloud-memory.json goes.")


def peak() -> float:
    """The most resident memory of this process so far, in megabytes (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(name: str, options: MemoryOptions, results) -> None:
    """In a fresh process: load, answer, tell."""
    torch.set_num_threads(1)
    before, ids = peak(), torch.arange(2, options.prompt_tokens + 2)[None]
    if name == "whole":
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        whole_answer(model, ids, max_new_tokens=options.new_tokens)
    else:
        model, part = load_part(options.parts, "edge", dtype=torch.float32)
        Edge(model, part).generate(ids, Policy(), max_new_tokens=options.new_tokens)
    weights = sum(value.numel() * value.element_size() for value in model.parameters()) / 1e6
    results.put(
        {
            "name": name,
            "weights_mb": weights,
            "imported_mb": before,
            "peak_mb": peak(),
            "over_imports_mb": peak() - before,
        }
    )


def main() -> None:
    (options,) = parse(MemoryOptions, description=__doc__)
    for name in ("model", "parts", "output_dir"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing")
    fresh, rows = multiprocessing.get_context("spawn"), []
    for name in ("whole", "edge"):
        results = fresh.Queue()
        process = fresh.Process(target=measure, args=(name, options, results))
        process.start()
        rows.append(results.get(timeout=600))
        process.join()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "cloud-memory.json", {"settings": asdict(options), "rows": rows, "environment": environment("cpu")}
    )
    print(markdown_table(rows))


if __name__ == "__main__":
    run_script(main)
