"""The whole journey of a stock `DiTPipeline`: load, attach, calibrate, generate beside the controls, save, reload in a new process.

python -m eval.journey --model runs/dit --exits runs/dit_fit/exits --fit_report runs/dit_fit/report.json --output_dir runs/journey

The exits come from train/fit_exits.py, which has seen no data. A threshold for `budget` is found by replay on calibration seeds; then the
policy, answers from memory and the controls of each (fewer steps at the same measured time, a static schedule with the same mean depth
per step, random exits with the per-step and with the overall histogram) draw the same test seeds. With --shares memory is fitted to
the pipeline's own call, too (`fit_schedules`), and runs at searched steps; --fewer draws the curve of fewer steps, --db_cache cache-dit's.
Candidates take turns batch by batch; a time is the median over batches of (candidate / full model), the decoder included. Images are
judged at `judged_size` pixels.
Writes pipeline/ (with the exits), policy.json, journey.json and journey.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.io import write_text
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import value_for_budget
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.methods import per_step_error_threshold, periodic_cache
from ee_diffusion.diffusion.pipelines.sampling import Generated
from ee_diffusion.diffusion.pipelines.stock import EarlyExitDiTPipeline
from ee_diffusion.diffusion.step_cache.solver import local_error_gain
from ee_diffusion.metrics.quality import COLUMNS, flat
from ee_diffusion.metrics.splits import balanced_labels, seeds
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from eval.harness.candidates import WARM_UP, load_memory
from eval.harness.candidates import controls as memory_controls
from eval.harness.options import command, parse
from eval.harness.real_images import ReferenceOptions, judge_of
from eval.journey_draw import JourneyOptions, drawer, each_by_itself, fitted_memory, load_exits
from eval.tradeoff import Candidate, Draw, controls, in_turns, row

RELOADED = """
import sys, torch
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.pipelines.stock import EarlyExitDiTPipeline
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


def candidates_of(
    options: JourneyOptions, policy: Policy, sensitivity: tuple[float, ...], schedules: dict[int, Policy]
) -> list[Candidate]:
    """Whatever needs no trace: the full model, the fitted exits, answers from memory, peers. schedules: by number of full steps."""
    steps = options.num_inference_steps
    found = [Candidate("full", "full", None, None, steps)]
    found.append(Candidate(f"deediff {options.budget}", "deediff", options.budget, policy, steps))
    for error in options.errors:
        made = per_step_error_threshold(error, local_gains=sensitivity)
        found.append(Candidate(f"remembered {error}", "remembered", error, made, steps))
    for threshold in options.db_cache:
        for kind in ("db_cache", "db_cache_taylor"):
            found.append(Candidate(f"{kind.replace('_', ' ')} {threshold}", kind, threshold, None, steps))
    found += [Candidate(f"{fewer} steps", "fewer_steps", None, None, fewer) for fewer in options.fewer]
    cache = periodic_cache(options.period, warmup_steps=WARM_UP)
    found.append(Candidate(f"periodic cache {options.period}", "periodic_cache", None, cache, steps))
    if not options.shares:
        return found
    wanted = {min(schedules, key=lambda full: (abs(full - steps * (1 - share)), -full)) for share in options.shares}
    for name in ("together", "fitted"):
        found.append(Candidate(f"periodic {name} {options.period}", f"periodic {name}", None, cache, steps))
        for full in sorted(wanted, reverse=True):
            found.append(Candidate(f"searched {name} {full} full", f"searched {name}", full, schedules[full], steps))
    return found


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
    options, reference = parse(JourneyOptions, ReferenceOptions, description=__doc__)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pipe = DiTPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    names = sorted(pipe.labels, key=pipe.labels.get)[: options.num_classes]  # where the pipeline says them
    size = (options.judged_size,) * 2
    judge = judge_of(reference, size=size, num_classes=options.num_classes, class_names=names)
    exits, memory = load_exits(options.exits), load_memory(pipe, None)
    fitted, schedules = fitted_memory(pipe, options) if options.shares else (None, {})
    heads = {"fit_exits": exits, "memory": memory, "together": fitted, "fitted": fitted and each_by_itself(fitted)}
    draw = drawer(pipe, options, heads)
    policy, calibration = calibrated(options, draw)
    print(json.dumps(calibration), flush=True)
    again = reloaded(pipe, exits, policy, options)
    print(json.dumps(again), flush=True)
    chosen, labels = seeds("test", options.count), balanced_labels(options.count, options.num_classes)

    sensitivity = local_error_gain(memory, pipe.scheduler, options.num_inference_steps)
    first = candidates_of(options, policy, sensitivity, schedules)
    drawn = in_turns(first, draw, chosen, labels, batch=options.batch_size)
    rows = [row(c, drawn[c.name], drawn["full"], judge=judge, labels=labels) for c in first]
    second = second_round(first, drawn, rows, options.seed)
    drawn = in_turns([first[0], *second], draw, chosen, labels, batch=options.batch_size)
    rows += [row(c, drawn[c.name], drawn["full"], judge=judge, labels=labels) for c in second]

    facts = {"command": command(), "settings": asdict(options) | asdict(reference), "environment": environment()}
    facts["figures"] = judge.note()
    facts["fit"] = report_of_fit(options.fit_report)
    facts["model"] = {
        "blocks": len(pipe.transformer.transformer_blocks),
        "parameters": pipe.transformer.num_parameters(),
    }
    write_json(folder / "journey.json", facts | {"calibration": calibration, "rows": rows, "reloaded": again})
    write_text(folder / "journey.md", lines_of(rows) + f"\n{judge.note()}\n")
    print((folder / "journey.md").read_text())


if __name__ == "__main__":
    run_script(main)
