"""The whole journey of a stock `DiTPipeline`: load, attach, calibrate, generate beside the controls, save, reload in a new process.

python eval/journey.py --model runs/dit --exits runs/dit_fit/exits --fit_report runs/dit_fit/report.json --output_dir runs/journey

The exits come from train/fit_exits.py, which has seen no data. A threshold for `budget` is found by replay on calibration seeds; then the
policy, answers from memory and the controls of each (fewer steps at the same measured time, a static schedule with the same mean depth
per step, random exits with the per-step and with the overall histogram) draw the same test seeds. Candidates take turns batch by batch; a
time is the median over batches of (candidate / full model), the decoder included. Images are judged at `judged_size` pixels.
Writes pipeline/ (with the exits), policy.json, journey.json and journey.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from contenders import WARM_UP, load_memory
from contenders import controls as memory_controls
from diffusers import DiTPipeline
from options import flag, parse
from peers_dit import db_cache
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from tradeoff import Candidate, Draw, controls, in_turns, judge_of, row

from ee_diffusion.core.calibrate import value_for_budget
from ee_diffusion.core.criteria import Planned, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.adapters import AdapterExits
from ee_diffusion.diffusion.attach import attach
from ee_diffusion.diffusion.generation import Generated
from ee_diffusion.diffusion.heads import DenoisingExits
from ee_diffusion.diffusion.kinds import DenoiserHeads
from ee_diffusion.diffusion.methods import periodic_cache, remembered
from ee_diffusion.diffusion.pipelines import EarlyExitDiTPipeline
from ee_diffusion.diffusion.solver import step_sensitivity
from ee_diffusion.errors import run_script
from ee_diffusion.measure.quality import COLUMNS, flat
from ee_diffusion.measure.splits import balanced_labels, seeds
from ee_diffusion.measure.tables import environment, markdown_table, write_json, write_text

RELOADED = """
import sys, torch
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.pipelines import EarlyExitDiTPipeline
from safetensors.torch import save_file
folder, steps, guidance, labels, chosen = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5]
torch.set_num_threads(int(sys.argv[6]))
pipe = EarlyExitDiTPipeline.from_pretrained(folder + "/pipeline")
pipe.set_progress_bar_config(disable=True)
drawn = pipe(
    [int(label) for label in labels.split()],
    generator=[torch.Generator().manual_seed(int(seed)) for seed in chosen.split()],
    num_inference_steps=steps, guidance_scale=guidance, output_type="np", exit_policy=Policy.load(folder + "/policy.json"),
)
save_file({"images": torch.from_numpy(drawn.images).contiguous(), "depths": drawn.trace.depths}, folder + "/reloaded.safetensors")
"""


@dataclass(frozen=True)
class JourneyOptions:
    """Which model, which exits, how many images.

    Raises:
        ValueError: a folder that is not given, a number out of range.
    """

    model: str | None = flag("Folder of a stock DiTPipeline.")
    exits: str | None = flag("Folder of exits fitted to it.")
    fit_report: str | None = flag("report.json of that fit, to be quoted; none: left out.")
    output_dir: str | None = flag("Where results go.")
    num_classes: int = flag("Classes that are drawn, the first of the model's.", 10)
    num_inference_steps: int = flag("Denoising steps.", 50)
    guidance_scale: float = flag("Classifier-free guidance.", 3.0)
    batch_size: int = flag("Images per call.", 16)
    count: int = flag("Test images.", 64)
    calibration_count: int = flag("Calibration images.", 32)
    budget: float = flag("Fraction of the blocks to aim at.", 0.6)
    errors: list[float] = field(
        default_factory=lambda: [0.01], metadata={"help": "Answers from memory: errors allowed per step."}
    )
    period: int = flag("Answers from memory: period of the fixed cache.", 2)
    judged_size: int = flag("Pixels that images are reduced to before they are judged.", 32)
    data: str | None = flag("Data folder, for LPIPS, FD and accuracy; none: what EE_DIFFUSION_DATA names, or without.")
    reference_count: int = flag("Real images behind the FD.", 10_000)
    cache_dir: str = flag("Where reference statistics are kept.", "runs/references")
    db_cache: list[float] = field(
        default_factory=list, metadata={"help": "Thresholds of cache-dit's DBCache, with and without TaylorSeer."}
    )
    seed: int = flag("Seed of the random controls.", 0)

    def __post_init__(self):
        for name in ("model", "exits", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}, expected a folder")
        for name in ("num_classes", "num_inference_steps", "batch_size", "count", "calibration_count", "period"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget={self.budget}, expected a fraction of the blocks in (0, 1]")


def load_exits(folder: str) -> AdapterExits | DenoisingExits:
    """Exits of the class that their config names. Raises ValueError for another one."""
    kinds = {kind.__name__: kind for kind in (AdapterExits, DenoisingExits)}
    name = AdapterExits.load_config(folder)["_class_name"]
    if name not in kinds:
        raise ValueError(f"{folder} holds {name}, expected one of {sorted(kinds)}")
    return kinds[name].from_pretrained(folder).eval()


def drawer(pipe: DiTPipeline, options: JourneyOptions, heads: dict[str, DenoiserHeads]) -> Draw:
    """Draws batches with the stock pipeline, its call as ever; exits are attached around it. heads: by candidate's budget name."""

    def draw(candidate: Candidate, chosen: list[int], labels: list[int], first: int) -> Generated:
        call = {
            "class_labels": labels,
            "generator": [torch.Generator().manual_seed(seed) for seed in chosen],
            "num_inference_steps": candidate.steps,
            "guidance_scale": options.guidance_scale,
            "output_type": "np",
        }
        begun = time.perf_counter()
        if candidate.kind.startswith("db_cache"):
            with db_cache(pipe, candidate.budget, num_steps=candidate.steps, taylor=candidate.kind.endswith("taylor")):
                begun = time.perf_counter()
                images, trace = pipe(**call).images, None
        elif candidate.policy is None:
            images, trace = pipe(**call).images, None
        else:
            exits = heads["memory" if candidate.policy.exits == (0,) else "fitted"]
            with attach(pipe, exits, _slice(candidate.policy, first, len(chosen))) as attachment:
                images, trace = pipe(**call).images, attachment.trace
            ids = torch.arange(first, first + len(chosen))
            trace = replace(trace, elements=ids, policy=candidate.policy.to_dict())
        seconds = time.perf_counter() - begun
        small = interpolate(torch.from_numpy(images).permute(0, 3, 1, 2), size=(options.judged_size,) * 2, mode="area")
        return Generated(small.contiguous(), trace, (seconds,))

    return draw


def _slice(policy: Policy, first: int, count: int) -> Policy:
    """A plan for all images, cut to one batch of them."""
    if not isinstance(policy.criterion, Planned):
        return policy
    return replace(policy, criterion=Planned(tuple(line[first : first + count] for line in policy.criterion.depths)))


def calibrated(options: JourneyOptions, draw: Draw) -> tuple[Policy, dict]:
    """The threshold for the budget, by replay on calibration seeds, and what the live run then costs on them."""
    chosen = seeds("calibrate", options.calibration_count)
    labels, size = balanced_labels(len(chosen), options.num_classes), options.batch_size

    def traced(policy: Policy) -> Trace:
        candidate = Candidate("calibration", "calibration", None, policy, options.num_inference_steps)
        starts = range(0, len(chosen), size)
        return Trace.concatenate([draw(candidate, chosen[i : i + size], labels[i : i + size], i).trace for i in starts])

    recorded = traced(Policy(Threshold(1.0), record_all=True))
    choice = value_for_budget(recorded, lambda v: Policy(Threshold(v)), budget=options.budget, low=0.0, high=1.0)
    policy = Policy(Threshold(choice.value))
    live = traced(policy)
    layers = live.planned.shape[1]
    found = {"threshold": choice.value, "replayed": choice.fraction, "images": len(chosen)}
    return policy, found | {"live": live.report().mean_executed / layers}


def candidates_of(options: JourneyOptions, policy: Policy, sensitivity: tuple[float, ...]) -> list[Candidate]:
    """Whatever needs no trace: the full model, the fitted exits, answers from memory."""
    steps = options.num_inference_steps
    found = [Candidate("full", "full", None, None, steps)]
    found.append(Candidate(f"deediff {options.budget}", "deediff", options.budget, policy, steps))
    for error in options.errors:
        made = remembered(error, sensitivity=sensitivity)
        found.append(Candidate(f"remembered {error}", "remembered", error, made, steps))
    for threshold in options.db_cache:
        for kind in ("db_cache", "db_cache_taylor"):
            found.append(Candidate(f"{kind.replace('_', ' ')} {threshold}", kind, threshold, None, steps))
    cache = periodic_cache(options.period, warm_up=WARM_UP)
    return [*found, Candidate(f"periodic cache {options.period}", "periodic_cache", None, cache, steps)]


def second_round(first: list[Candidate], drawn: dict[str, Generated], rows: list[dict], seed: int) -> list[Candidate]:
    """The controls of every policy that decides by itself, made of its own trace and its measured time."""
    times, found = {row["name"]: row["time"] for row in rows}, []
    for candidate in first:
        if candidate.kind == "deediff":
            found += controls(candidate, drawn[candidate.name], times[candidate.name], seed=seed)
        elif candidate.kind == "remembered":
            steps = max(1, round(candidate.steps * times[candidate.name]))
            made = memory_controls(candidate, drawn[candidate.name].trace, seed=seed)
            found += [replace(one, policy=replace(one.policy, exits=(0,))) for one in made]
            found.append(Candidate(f"fewer steps {candidate.budget}", "fewer_steps", candidate.budget, None, steps))
    return found


def reloaded(pipe: DiTPipeline, exits: AdapterExits | DenoisingExits, policy: Policy, options: JourneyOptions) -> dict:
    """Save the pipeline with its exits, draw one batch in a new process, and compare it with this process's."""
    folder, chosen = Path(options.output_dir), seeds("test", min(options.batch_size, options.count))
    labels = balanced_labels(len(chosen), options.num_classes)
    with_exits = EarlyExitDiTPipeline.from_pipe(pipe, vae=pipe.vae, exits=exits)
    with_exits.set_progress_bar_config(disable=True)
    with_exits.save_pretrained(folder / "pipeline")
    policy.save(folder / "policy.json")
    call = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    drawn = with_exits(
        labels,
        generator=[torch.Generator().manual_seed(s) for s in chosen],
        output_type="np",
        exit_policy=policy,
        **call,
    )
    words = [folder, *call.values(), " ".join(map(str, labels)), " ".join(map(str, chosen)), torch.get_num_threads()]
    subprocess.run([sys.executable, "-c", RELOADED, *map(str, words)], check=True)
    there = load_file(folder / "reloaded.safetensors")
    (folder / "reloaded.safetensors").unlink()
    apart = (torch.from_numpy(drawn.images) - there["images"]).abs().max().item()
    same = torch.equal(drawn.trace.depths, there["depths"])
    return {"images": len(chosen), "largest_difference": apart, "same_depths": same}


def report_of_fit(path: str | None) -> dict:
    """The costs and the gain of the fit, without its folders."""
    if path is None:
        return {}
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    return {name: report[name] for name in ("states", "fit", "gain", "device", "threads", "torch") if name in report}


def lines_of(rows: list[dict]) -> str:
    columns = ["name", "steps", "time", "executed", *(name for name in COLUMNS if name in rows[0])]
    return markdown_table(
        [{**r, "executed": r.get("report", {}).get("mean_executed"), **flat(r)} for r in rows], columns
    )


def main() -> None:
    (options,) = parse(JourneyOptions, description=__doc__)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pipe = DiTPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    exits, memory = load_exits(options.exits), load_memory(pipe, None)
    draw = drawer(pipe, options, {"fitted": exits, "memory": memory})
    judge = judge_of(data=options.data, reference_count=options.reference_count, cache_dir=options.cache_dir)
    policy, calibration = calibrated(options, draw)
    print(json.dumps(calibration), flush=True)
    chosen, labels = seeds("test", options.count), balanced_labels(options.count, options.num_classes)

    sensitivity = step_sensitivity(memory, pipe.scheduler, options.num_inference_steps)
    first = candidates_of(options, policy, sensitivity)
    drawn = in_turns(first, draw, chosen, labels, batch=options.batch_size)
    rows = [row(c, drawn[c.name], drawn["full"], judge=judge, labels=labels) for c in first]
    second = second_round(first, drawn, rows, options.seed)
    drawn = in_turns([first[0], *second], draw, chosen, labels, batch=options.batch_size)
    rows += [row(c, drawn[c.name], drawn["full"], judge=judge, labels=labels) for c in second]

    again = reloaded(pipe, exits, policy, options)
    facts = {"settings": asdict(options), "environment": environment(), "fit": report_of_fit(options.fit_report)}
    facts["model"] = {
        "blocks": len(pipe.transformer.transformer_blocks),
        "parameters": pipe.transformer.num_parameters(),
    }
    write_json(folder / "journey.json", facts | {"calibration": calibration, "rows": rows, "reloaded": again})
    write_text(folder / "journey.md", lines_of(rows))
    print(lines_of(rows) + json.dumps(again))


if __name__ == "__main__":
    run_script(main)
