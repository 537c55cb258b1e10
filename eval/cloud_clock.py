"""Seconds of edge and cloud over shaped links: the whole model at the cloud, the naive split, and CE-CoLLM, taking turns on every prompt.

python -m eval.cloud_clock --model MODEL --parts parts --text_folder text --count 4 --exits exits.safetensors --max_minutes 3.5 \\
    --candidates whole naive always-float16 sure-0.8 sure-0.9 alone --output_dir runs/cloud-clock

The cloud's server, the whole model's server, the links and the edge are processes of this one machine, one thread each: servers on the
last core, edge and links on the first (on two cores each side has one; with one core they share it, and the report says so). A link is a
proxy with half a round trip of delay and a rate each way. Every candidate makes the same number of tokens (no end of text), greedy,
float32. total = edge + waiting; waiting = the cloud's seconds + communication (waits for states on their way included). Rows are kept in
rows.jsonl; a stopped run goes on; --max_minutes ends a run in time. Writes cloud-clock.json; `rougeL` and `same` (answers) are to the whole
model's. FLOPs, encodings, references: eval/cloud.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median, quantiles

import torch
from transformers import AutoTokenizer

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.policy import Policy
from ee_diffusion.edge_cloud.baselines import NaiveSplit, ask_whole
from ee_diffusion.edge_cloud.client import CloudClient
from ee_diffusion.edge_cloud.grpc_transport import RemoteTransport
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from ee_diffusion.metrics.text import text_scores
from eval.answers import chat, choose
from eval.cloud import add_row, candidate, load_edge, read_rows, said_of
from eval.harness.options import flag, parse
from eval.prompt_sets import Prompt

DEADLINE = 60.0  # seconds: nothing is to be lost here


@dataclass(frozen=True)
class ClockOptions:
    """What is timed, over which links."""

    model: str = flag("Folder of the whole causal language model, with its tokenizer.")
    parts: str = flag("Folder that `ee-diffusion edge split` wrote.")
    exits: str | None = flag("exits.safetensors of train/train_lm_exits.py; none: the model's own tail, untrained.")
    score: str = flag("Score of the thresholds: max_probability, certainty, margin, ...", "max_probability")
    text_folder: str = flag("Folder of the text sets.")
    sets: list[str] = field(default_factory=lambda: ["alpaca", "dialogsum", "truthfulqa"], metadata={"help": "Sets."})
    split: str = flag("train or test.", "test")
    count: int = flag("Prompts of each set.", 4)
    max_prompt_tokens: int = flag("Longer prompts are left out.", 256)
    max_new_tokens: int = flag("Tokens of every answer.", 32)
    candidates: list[str] = field(default_factory=list, metadata={"help": "whole, naive, always-KIND, sure-T, alone."})
    round_trips: list[float] = field(
        default_factory=lambda: [0.0025, 0.05], metadata={"help": "Of the links, seconds."}
    )
    rate: float = flag("Bits per second of every link, each way.", 20e6)
    max_minutes: float | None = flag("Begin nothing new after so long; none: no bound.")
    output_dir: str = flag("Where rows.jsonl and cloud-clock.json go.")


def cores() -> tuple[int, int]:
    """The core of the edge and that of the cloud; the same one where there is but one."""
    here = sorted(os.sched_getaffinity(0))
    return here[0], here[-1]


def started(stack: ExitStack, words: list[str], *, core: int) -> tuple[int, int]:
    """Start a process of this package on one core and one thread -> the port it listens on, and its id."""
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    said = []
    for line in iter(process.stdout.readline, ""):
        said.append(line)
        if line.startswith('{"listening"'):
            threading.Thread(
                target=process.stdout.read, daemon=True
            ).start()  # so that what it says further never stops it
            return json.loads(line)["listening"], process.pid
    raise RuntimeError(f"{words} ended: {''.join(said[-5:])}")


def servers(stack: ExitStack, options: ClockOptions) -> dict[tuple[str, float], str]:
    """Everything that listens -> the address of (whole or parts, round trip)."""
    edge, cloud = cores()
    serve = ["-m", "ee_diffusion.cli.main", "cloud", "serve", "--model", options.parts, "--port", "0"]
    targets = {
        "parts": started(stack, [*serve, "--quiet"], core=cloud)[0],
        "whole": started(stack, ["-m", "ee_diffusion.edge_cloud.baselines", options.model], core=cloud)[0],
    }
    found = {}
    for name, target in targets.items():
        for round_trip in options.round_trips:
            shape = ["--target", str(target), "--round_trip", str(round_trip), "--rate", str(options.rate)]
            port, _ = started(stack, ["-m", "ee_diffusion.metrics.links", *shape], core=edge)
            found[name, round_trip] = f"127.0.0.1:{port}"
    return found


class Clock:
    """The edge, and one timed answer of a candidate over a link."""

    def __init__(self, options: ClockOptions, addresses: dict[tuple[str, float], str]):
        self.options, self.addresses = options, addresses
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.edge = load_edge(options)
        self.width, self.end = self.edge.model.config.hidden_size, self.tokenizer.eos_token_id

    def row(self, prompt: Prompt, name: str, round_trip: float) -> dict:
        """Seconds, bytes and tokens of one answer."""
        words = chat(self.tokenizer, prompt.text)
        ids = self.tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"]
        row = {"prompt": prompt.name, "candidate": name, "round_trip": round_trip, "prompt_tokens": ids.shape[1]}
        return row | (self._whole(ids, round_trip) if name == "whole" else self._edge(ids, name, round_trip))

    def _whole(self, ids: torch.Tensor, round_trip: float) -> dict:
        tokens = self.options.max_new_tokens
        told = ask_whole(self.addresses["whole", round_trip], ids, max_new_tokens=tokens, timeout=DEADLINE)
        seconds = {"total": told.total, "cloud": told.cloud, "edge": 0.0}
        return seconds | {"asked": tokens, "tokens": told.tokens, "text": self._text(told.tokens), "payload": 0}

    def _text(self, tokens: list[int]) -> str:
        """What was said before the end of text, where there was one."""
        end = tokens.index(self.end) if self.end in tokens else len(tokens)
        return self.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()

    def _edge(self, ids: torch.Tensor, name: str, round_trip: float) -> dict:
        naive = name == "naive"
        policy, kind = (Policy(), None) if naive else candidate(name, self.options.score, self.edge.part.exits)
        with ExitStack() as stack:
            cloud = None
            if naive or kind is not None:
                address = self.addresses["parts", round_trip]
                line = stack.enter_context(RemoteTransport(address, self.edge.part, width=self.width))
                line.close(line.open(timeout=DEADLINE), timeout=DEADLINE)  # connected before the clock starts
                client = (
                    NaiveSplit(line, deadline=DEADLINE)
                    if naive
                    else CloudClient(line, kind=kind, deadline=DEADLINE, retry_after=0.0)
                )
                cloud = stack.enter_context(client)
            out = self.edge.generate(ids, policy, cloud, max_new_tokens=self.options.max_new_tokens)
        if out.losses:
            raise RuntimeError(f"the cloud was lost: {out.losses[0]}")
        seconds = {"total": out.total, "cloud": out.cloud, "edge": out.total - out.waited}
        tokens = out.sequences[0, ids.shape[1] :].tolist()
        counts = {"asked": out.sources.count("cloud"), "tokens": tokens, "payload": out.payload}
        return seconds | counts | {"text": self._text(tokens)}


def summarise(rows: list[dict]) -> list[dict]:
    """Medians over prompts for each set, link and candidate, and ratios to the whole model's at the same prompts."""
    whole = {(row["prompt"], row["round_trip"]): row for row in rows if row["candidate"] == "whole"}
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if (row["prompt"], row["round_trip"]) in whole:
            key = (row["prompt"].split("/")[0], row["round_trip"], row["candidate"])
            groups.setdefault(key, []).append(row)
    return [_summary(key, chosen, whole) for key, chosen in sorted(groups.items())]


def _summary(key: tuple, rows: list[dict], whole: dict) -> dict:
    pairs = [(row, whole[row["prompt"], row["round_trip"]]) for row in rows]
    return {
        **dict(zip(("set", "round_trip", "candidate"), key, strict=True)),
        "prompts": len(rows),
        "total": median(row["total"] for row in rows),
        "cloud": median(row["cloud"] for row in rows),
        "edge": median(row["edge"] for row in rows),
        "communication": median(row["total"] - row["edge"] - row["cloud"] for row in rows),
        "kilobytes": fmean(row["payload"] for row in rows) / 1000,
        "asked": sum(row["asked"] for row in rows) / sum(len(row["tokens"]) for row in rows),
        "total_ratio": median(row["total"] / one["total"] for row, one in pairs),
        "rougeL": text_scores(
            [row["text"] for row, _ in pairs], [[one["text"]] for _, one in pairs], resamples=1, seed=0
        )["rougeL"],
        "same": sum(row["tokens"] == one["tokens"] for row, one in pairs),
        "cloud_saved": 1 - sum(row["cloud"] for row, _ in pairs) / sum(one["cloud"] for _, one in pairs),
    }


def break_even(rows: list[dict], *, resamples: int, seed: int) -> list[dict]:
    """For each set and link: the share of asked tokens at which CE-CoLLM takes as long as the whole model at the cloud.

    A line through (share, total over the whole model's total at the same prompt) of all candidates from the edge alone (share 0) to
    asking for all; where it crosses 1, with a bootstrap interval over prompts. Above 1 it is never slower, below 0 always.
    """
    whole = {(row["prompt"], row["round_trip"]): row["total"] for row in rows if row["candidate"] == "whole"}
    groups: dict[tuple, dict[str, list[tuple[float, float]]]] = {}  # (set, link) -> prompt -> points
    for row in rows:
        key = (row["prompt"], row["round_trip"])
        if row["candidate"] not in ("whole", "naive") and key in whole:
            of_prompts = groups.setdefault((row["prompt"].split("/")[0], row["round_trip"]), {})
            point = (row["asked"] / len(row["tokens"]), row["total"] / whole[key])
            of_prompts.setdefault(row["prompt"], []).append(point)
    found = []
    for (name, round_trip), of_prompts in sorted(groups.items()):
        prompts = [torch.tensor(points, dtype=torch.float64) for points in of_prompts.values()]  # (r, 2) each
        if len(prompts) < 2 or float(torch.cat(prompts)[:, 0].std()) == 0:
            continue
        drawn = torch.randint(len(prompts), (resamples, len(prompts)), generator=torch.Generator().manual_seed(seed))
        crossings = sorted(_crossing(torch.cat([prompts[place] for place in places])) for places in drawn.tolist())
        cuts = quantiles(crossings, n=40)
        row = {"set": name, "round_trip": round_trip, "prompts": len(prompts), "share": _crossing(torch.cat(prompts))}
        found.append(row | {"low": cuts[0], "high": cuts[-1]})
    return found


def _crossing(points: torch.Tensor) -> float:
    share, ratio = points[:, 0], points[:, 1]
    spread = share - share.mean()
    slope = float((spread * (ratio - ratio.mean())).sum() / (spread**2).sum().clamp(min=1e-12))
    return float(share.mean()) + (1 - float(ratio.mean())) / (slope if slope else 1e-12)


def measure(options: ClockOptions, path: Path) -> None:
    """Add the rows that are not there yet, candidates taking turns on every prompt and link."""
    begun, done = time.monotonic(), {(r["prompt"], r["candidate"], r["round_trip"]) for r in read_rows(path)}
    with ExitStack() as stack:
        clock = Clock(options, servers(stack, options))
        os.sched_setaffinity(0, {cores()[0]})
        torch.set_num_threads(1)
        warm = Prompt("warm", "Name a colour.", "")
        for turn, prompt in enumerate([warm, *choose(clock.tokenizer, options)]):
            shift = turn % len(options.candidates)
            for round_trip in options.round_trips if turn else options.round_trips[:1]:
                for name in options.candidates[shift:] + options.candidates[:shift]:
                    if (prompt.name, name, round_trip) in done:
                        continue
                    if options.max_minutes is not None and time.monotonic() - begun > 60 * options.max_minutes:
                        return
                    row = clock.row(prompt, name, round_trip)
                    if turn:  # the first prompt warms everything up
                        add_row(path, row)
                        print(*(row[key] for key in ("prompt", "candidate", "round_trip", "total")), flush=True)


def main() -> None:
    (options,) = parse(ClockOptions, description=__doc__)
    for name in ("model", "parts", "text_folder", "output_dir"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    measure(options, folder / "rows.jsonl")
    rows = read_rows(folder / "rows.jsonl")
    table, even = summarise(rows), break_even(rows, resamples=1000, seed=0)
    settings = {name: value for name, value in asdict(options).items() if name != "text_folder"}
    report = {"settings": settings, "rows": table, "break_even": even, "environment": environment("cpu")}
    write_json(folder / "cloud-clock.json", report | {"cores": len(set(cores())), "exits": said_of(options.exits)})
    print(markdown_table(table) if table else "nothing measured yet")


if __name__ == "__main__":
    run_script(main)
