"""The ideal time of a decode: the parts of the plain model timed in place, summed over what a candidate executed.

A part is timed where it runs, within generations of the plain model on as many rows: alone in a loop its weights would stay in the
processor's caches, which they do not when all layers take turns. Fixed: everything in a step that is neither a layer nor the LM head, with
the token loop. An exit that looks at logits costs the LM head's time at its rows; what else a score costs is left out, so `realised` is
rather too low than too high. R rows, S steps, L layers.
"""

from __future__ import annotations

import time
from collections import Counter
from statistics import median

import torch
from torch import Tensor

from ee_diffusion.core.patch import ForwardPatch
from ee_diffusion.core.trace import Trace
from ee_diffusion.decoding.model_specs import layers_of
from ee_diffusion.metrics.timing import executed_counts, ideal_seconds, realised
from eval.decoder import Decoder

Part = tuple[str, int]


class Stopwatch:
    """Seconds of every call of some modules, in the order of the calls. A context manager."""

    def __init__(self, modules: dict[str, torch.nn.Module], *, cuda: bool):
        self.modules, self.cuda = modules, cuda
        self.seconds: dict[str, list[float]] = {name: [] for name in modules}
        self._interceptions: list[ForwardPatch] = []

    def __enter__(self) -> Stopwatch:
        for name, module in self.modules.items():
            self._interceptions.append(ForwardPatch(module, self._timing(self.seconds[name])))
        return self

    def __exit__(self, *exception) -> None:
        while self._interceptions:
            self._interceptions.pop().restore()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _timing(self, seconds: list[float]):
        def call(original, *args, **kwargs):
            begun = self.now()
            out = original(*args, **kwargs)
            seconds.append(self.now() - begun)
            return out

        return call


class PartTimes:
    """The table of parts for one batch of prompts; what a number of rows takes is measured when first asked for."""

    def __init__(self, decoder: Decoder, inputs: dict[str, Tensor]):
        self.decoder, self.inputs = decoder, inputs
        self.steps = decoder.options.max_new_tokens - 1
        self.table: dict[Part, float] = {}
        self.fixed: dict[int, float] = {}

    def of(self, name: str, seconds: float) -> dict[str, float | None]:
        """Of a candidate that took `seconds` after the prompt: looks at logits per token and their share of its time, realised over ideal.
        None where nothing says what ran (drafts and verifications)."""
        rows = len(self.inputs["input_ids"])
        if name in ("lossless", "assistant"):
            return {"checks": None, "check_share": None, "realised": None}
        executed, looks = self._executed(name)
        for count in sorted({count for _, count in executed} | {rows}):
            self._measure(count)
        share = sum(times * self.table["tail", count] for count, times in looks.items()) / seconds
        ideal = ideal_seconds(executed, self.table, self.fixed[rows] * self.steps)
        looked = sum(count * times for count, times in looks.items()) / (rows * self.steps)
        return {"checks": looked, "check_share": share, "realised": realised(ideal, seconds)}

    def _executed(self, name: str) -> tuple[Counter[Part], Counter[int]]:
        """(part, rows) -> how often it ran, and of these the looks at logits by exits: rows -> how often."""
        rows = len(self.inputs["input_ids"])
        if name == "full":
            parts = [*(f"block {layer}" for layer in range(self.decoder.num_layers)), "tail"]
            return Counter({(part, rows): self.steps for part in parts}), Counter()
        trace: Trace = self.decoder.generate(name, self.inputs, eos_token_id=None).trace
        executed, looks = Counter(), Counter()
        for (part, count), times in executed_counts(trace).items():
            if part.startswith("block"):
                executed[part, count] += times
            elif part.startswith("head"):
                executed["tail", count] += times
                looks[count] += times
        for whole in (trace.depths == self.decoder.num_layers).sum(1).tolist():
            if whole:
                executed["tail", whole] += 1
        return executed, looks

    def _measure(self, rows: int) -> None:
        if ("tail", rows) in self.table:
            return
        decoder = self.decoder
        inputs = {name: value[:rows] for name, value in self.inputs.items()}
        modules = {f"block {layer}": module for layer, module in enumerate(layers_of(decoder.model))}
        modules |= {"tail": decoder.model.get_output_embeddings()}
        whole, parts = [], {name: [] for name in modules}
        for _ in range(1 + decoder.options.repeats):
            with Stopwatch(modules, cuda=torch.device(decoder.device).type == "cuda") as watch:
                begun = watch.now()
                decoder.generate("full", inputs, eos_token_id=None, max_new_tokens=1)
                prompt = watch.now()
                decoder.generate("full", inputs, eos_token_id=None)
                whole.append((watch.now() - prompt - (prompt - begun)) / self.steps)
            for name in modules:
                parts[name].append(median(watch.seconds[name][2:]))  # the first two calls are the prompt's
        # the first run warms up
        self.table |= {(name, rows): median(seconds[1:]) for name, seconds in parts.items()}
        self.fixed[rows] = max(0.0, median(whole[1:]) - sum(self.table[name, rows] for name in modules))
