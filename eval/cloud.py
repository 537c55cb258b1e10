"""Edge and cloud against the whole model: tokens, text scores, bytes, FLOPs; every prompt under every candidate, in one process.

python -m eval.cloud --model MODEL --parts parts --text_folder text --count 20 --max_new_tokens 32 --exits exits.safetensors \\
    --candidates always-float32 always-float16 always-int8 sure-0.8 sure-0.9 alone --output_dir runs/cloud

Parts: what `ee-diffusion edge split` wrote. Candidates: `always-KIND` asks for every token and sends states as KIND; `sure-T` keeps what an
exit's score is above T for; `alone` asks nobody (every token is the first sure exit's, or the second's). Compared with the whole model's
greedy answer (`full`): ROUGE-L, equal tokens, first differences with the gap of the two best logits there. FLOPs are counted as they run.
Rows are kept in rows.jsonl; a stopped run goes on. Writes cloud.json. Seconds: eval/cloud_clock.py.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.heads import LearnedExits
from ee_diffusion.edge_cloud.baselines import whole_answer
from ee_diffusion.edge_cloud.client import CloudClient, LocalTransport
from ee_diffusion.edge_cloud.edge import Edge, EdgeOutput
from ee_diffusion.edge_cloud.sessions import ContextManager, Limits
from ee_diffusion.edge_cloud.split import Part, load_part
from ee_diffusion.metrics.flops import counting_flops
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from ee_diffusion.metrics.text import text_scores
from eval.answers import chat, choose
from eval.harness.options import command, flag, parse
from eval.prompt_sets import Prompt

LIMITS = Limits(sessions=8, owner_sessions=8, total_bytes=10**9, positions=2048, idle_seconds=600.0)


@dataclass(frozen=True)
class CloudOptions:
    """What is asked, of whom, and how."""

    model: str = flag("Folder of the whole causal language model, with its tokenizer.")
    parts: str = flag("Folder that `ee-diffusion edge split` wrote.")
    exits: str | None = flag("exits.safetensors of train/train_lm_exits.py; none: the model's own tail, untrained.")
    score: str = flag("Score of the thresholds: max_probability, certainty, margin, ...", "max_probability")
    text_folder: str = flag("Folder of the text sets.")
    sets: list[str] = field(default_factory=lambda: ["alpaca", "dialogsum", "truthfulqa"], metadata={"help": "Sets."})
    split: str = flag("train or test.", "test")
    count: int = flag("Prompts of each set.", 20)
    max_prompt_tokens: int = flag("Longer prompts are left out.", 256)
    max_new_tokens: int = flag("Tokens of an answer.", 32)
    candidates: list[str] = field(default_factory=list, metadata={"help": "always-KIND, sure-T, alone."})
    flops_count: int | None = flag("Count FLOPs, which is slow, on so many prompts of each set; none: on all.")
    seed: int = flag("Seed of the bootstrap.", 0)
    output_dir: str = flag("Where rows.jsonl and cloud.json go.")


def load_edge(options) -> Edge:
    """The edge's part with its exits."""
    model, part = load_part(options.parts, "edge", dtype=torch.float32)
    if options.exits is None:
        return Edge(model, part)
    return Edge(model, part, heads=bound(LearnedExits.load(options.exits), model, part))


def said_of(exits: str | None) -> str:
    """In a word, what answers at the exits."""
    return "the model's own tail, untrained" if exits is None else "adapters before the model's own tail, trained"


def bound(exits: LearnedExits, model: PreTrainedModel, part: Part) -> LearnedExits:
    """The exits at the part's depths, answering through the part's tail."""
    return exits.at(part.exits).bind(model, part_of=part.fingerprint).eval().requires_grad_(False)


def candidate(name: str, score: str, exits: tuple[int, ...]) -> tuple[Policy, str | None]:
    """Policy and encoding of a candidate (None: nobody is asked). Raises ValueError for another name."""
    kind, _, value = name.partition("-")
    if kind == "always" and value:
        return Policy(), value
    if kind in ("sure", "alone") and (value or kind == "alone"):
        return Policy(Threshold(float(value or 1.0), score), exits=exits), ("float16" if kind == "sure" else None)
    raise ValueError(f"candidate {name!r}, expected always-KIND, sure-T, alone or alone-T")


class Counted:
    """A cloud in this process whose FLOPs are counted apart, while `counts`."""

    def __init__(self, manager: ContextManager):
        self.manager, self.compute, self.flops, self.counts = manager, manager.compute, 0, True
        manager.compute = self._compute  # type: ignore[method-assign]

    def _compute(self, rows):
        if not self.counts:
            return self.compute(rows)
        with counting_flops() as counter:
            made = self.compute(rows)
        self.flops += counter.get_total_flops()
        return made


class RunTracker:
    """The models, loaded once, and what each candidate makes of a prompt."""

    def __init__(self, options: CloudOptions):
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.whole = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        self.edge = load_edge(options)
        cloud, part = load_part(options.parts, "cloud", dtype=torch.float32)
        self.cloud = Counted(ContextManager(cloud, part, limits=LIMITS))
        self.limits = {"max_new_tokens": options.max_new_tokens, "eos_token_id": self.tokenizer.eos_token_id}

    def row(self, prompt: Prompt, name: str, *, flops: bool) -> dict:
        """What a candidate says to a prompt, and what it took; FLOPs are None if they are not counted."""
        words = chat(self.tokenizer, prompt.text)
        ids = self.tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"]
        row = {"prompt": prompt.name, "candidate": name, "prompt_tokens": ids.shape[1]}
        row |= self._counted(ids, name) if flops else self._said(ids, name) | {"edge_flops": None, "cloud_flops": None}
        text = self.tokenizer.decode(row["tokens"], skip_special_tokens=True).strip()
        return row | {"text": text, "reference": prompt.reference}

    def _counted(self, ids: torch.Tensor, name: str) -> dict:
        before = self.cloud.flops
        with counting_flops() as counter:
            said = self._said(ids, name)
        cloud = counter.get_total_flops() if name == "full" else self.cloud.flops - before
        return said | {"edge_flops": counter.get_total_flops() - cloud, "cloud_flops": cloud}

    def _said(self, ids: torch.Tensor, name: str) -> dict:
        return self._full(ids) if name == "full" else self._candidate(ids, name)

    def _full(self, ids: torch.Tensor) -> dict:
        tokens, gaps = whole_answer(self.whole, ids, **self.limits)
        return {"tokens": tokens, "gaps": gaps}

    def _candidate(self, ids: torch.Tensor, name: str) -> dict:
        policy, kind = candidate(name, self.options.score, self.edge.part.exits)
        if kind is None:
            return _facts(self.edge.generate(ids, policy, **self.limits), ids)
        transport = LocalTransport(self.cloud.manager)
        with CloudClient(transport, kind=kind, deadline=600.0, retry_after=0.0) as client:
            return _facts(self.edge.generate(ids, policy, client, **self.limits), ids)


def _facts(out: EdgeOutput, ids: torch.Tensor) -> dict:
    if out.losses:
        raise RuntimeError(f"the cloud was lost in its own process: {out.losses[0]}")
    sources = {source: out.sources.count(source) for source in sorted(set(out.sources))}
    return {"tokens": out.sequences[0, ids.shape[1] :].tolist(), "sources": sources, "payload": out.payload}


def first_of_each(prompts: list[Prompt], count: int | None) -> set[str]:
    """Names of the first `count` prompts of each set; None: of all."""
    sets: dict[str, list[str]] = {}
    for one in prompts:
        sets.setdefault(one.name.split("/")[0], []).append(one.name)
    return {name for names in sets.values() for name in names[:count]}


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of JSON lines; a line that a stop cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def add_row(path: Path, row: dict) -> None:
    """Append a row at once, in the place of a line that a stop cut short."""
    if path.is_file() and not (text := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def first_difference(tokens: list[int], full: list[int], gaps: list[float]) -> tuple[int, float] | None:
    """Where an answer first differs from the whole model's, and how near its two best logits were there; None: nowhere."""
    for place, (mine, theirs) in enumerate(zip(tokens, full, strict=False)):
        if mine != theirs:
            return place, gaps[place]
    return None


def summarise(rows: list[dict], *, seed: int) -> list[dict]:
    """One row for each set and candidate."""
    full = {row["prompt"]: row for row in rows if row["candidate"] == "full"}
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["prompt"] in full:
            groups.setdefault((row["prompt"].split("/")[0], row["candidate"]), []).append(row)
    return [
        _summary(*key, chosen, [full[row["prompt"]] for row in chosen], seed) for key, chosen in sorted(groups.items())
    ]


def _summary(name: str, candidate_name: str, rows: list[dict], full: list[dict], seed: int) -> dict:
    texts, wanted = [row["text"] for row in rows], [[one["text"]] for one in full]
    differing = [
        where
        for row, one in zip(rows, full, strict=True)
        if (where := first_difference(row["tokens"], one["tokens"], one["gaps"])) is not None
    ]
    close = text_scores(texts, wanted, resamples=1000, seed=seed)
    given = [[row["reference"]] for row in rows]
    tokens = sum(len(row["tokens"]) for row in rows)
    asked = sum(row.get("sources", {}).get("cloud", 0) for row in rows)
    counted = [
        (row, one) for row, one in zip(rows, full, strict=True) if None not in (row["cloud_flops"], one["cloud_flops"])
    ]
    cloud_full = sum(one["cloud_flops"] for _, one in counted)
    flops = {
        kind: sum(row[kind] for row, _ in counted) / cloud_full if counted else None
        for kind in ("cloud_flops", "edge_flops")
    }
    return {
        "set": name,
        "candidate": candidate_name,
        "prompts": len(rows),
        "tokens": tokens,
        "asked": asked / tokens,
        "rougeL_full": close["rougeL"],
        "rougeL_full_low": close["rougeL_low"],
        "rougeL_full_high": close["rougeL_high"],
        "rougeL_reference": text_scores(texts, given, resamples=1, seed=seed)["rougeL"],
        "differing": len(differing),
        "differing_far": sum(gap >= 1e-4 for _, gap in differing),
        "gap": median(gap for _, gap in differing) if differing else None,
        "payload": fmean(row.get("payload", 0) for row in rows),
        **flops,
        "flops_prompts": len(counted),
    }


def main() -> None:
    (options,) = parse(CloudOptions, description=__doc__)
    for name in ("model", "parts", "text_folder", "output_dir"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    runs, path = RunTracker(options), folder / "rows.jsonl"
    chosen = choose(runs.tokenizer, options)
    counted = first_of_each(chosen, options.flops_count)
    keys = [(one, name) for one in chosen for name in ("full", *options.candidates)]
    done = {(row["prompt"], row["candidate"]) for row in read_rows(path)}
    for prompt, name in keys:
        if (prompt.name, name) not in done:
            runs.cloud.counts = prompt.name in counted
            add_row(path, runs.row(prompt, name, flops=runs.cloud.counts))
            print(prompt.name, name, flush=True)
    rows = summarise(read_rows(path), seed=options.seed)
    settings = {name: value for name, value in asdict(options).items() if name != "text_folder"}
    facts = {"command": command(), "settings": settings, "exits": said_of(options.exits)}
    report = facts | {"rows": rows, "environment": environment("cpu")}
    write_json(folder / "cloud.json", report)
    print(markdown_table(rows))


if __name__ == "__main__":
    run_script(main)
