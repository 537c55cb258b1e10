"""One Markdown page from reports of the scripts that do not yet write the common report: classifiers, decoding, edge and cloud, retrieval,
certificates, image quality, the demo.

python -m eval.write_results --reports runs/reports --output runs/reports.md

Not here: docs/results.md and the reports in results/, which are of the common format (eval/report.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.io import write_text
from eval.classifier_results import classifier_speed, classifiers, classify
from eval.cloud_results import cloud_clock, cloud_rows, cloud_tokens
from eval.decode_results import decode, exit_heads
from eval.diffusion_results import (
    demo,
    finalists,
    frontier,
    guarantee,
    journey,
    matching,
    metrics,
    speed,
    tradeoff,
    training,
    uncertainty,
)
from eval.report_facts import told

HEAD = """# Results

Written by `python -m eval.write_results`; each section names its script and settings.
Times are wall clock on the device named. PSNR, SSIM and LPIPS are to the full model's images at equal seeds.
FD is the Frechet distance on resnet20's 64 pooled features, FID the one on Inception features; both depend on the number of
samples, which stands beside them.
"""


SECTIONS = {
    "train-": ("Training", "accelerate launch -m train.train_uvit --preset NAME", training),
    "metrics": (
        "The full-depth generator",
        "python -m eval.metrics --images runs/samples/samples.safetensors --output_dir runs/metrics --metrics fd fid kid accuracy",
        metrics,
    ),
    "tradeoff": (
        "DeeDiff's trade-off beside its controls",
        "python -m eval.tradeoff --output_dir runs/tradeoff",
        tradeoff,
    ),
    "frontier": (
        "Answers from memory beside what is simpler",
        "python -m eval.frontier --output_dir runs/frontier",
        frontier,
    ),
    "finalists": ("FD of a frontier's finalists", "python -m eval.finalists ...", finalists),
    "ablation": ("What each part of answering from memory is worth", "python -m eval.ablation ...", frontier),
    "dit-journey": (
        "The journey of a stock DiT",
        "python -m eval.journey --model ... --exits ... --fit_report ... --output_dir ...",
        journey,
    ),
    "guarantee": (
        "Does a certified policy keep its promise",
        "python -m eval.guarantee --output_dir runs/guarantee",
        guarantee,
    ),
    "speed": ("The clock of one forward", "python -m eval.speed --output_dir runs/speed", speed),
    "training-step": ("What exits cost in training", "python -m eval.training_step ...", told(cloud_rows)),
    "hot-path": ("Where the time of a run goes", "python -m eval.hot_path ...", told(cloud_rows)),
    "uncertainty": (
        "What the uncertainty modules know",
        "python -m eval.uncertainty --output_dir runs/uncertainty",
        uncertainty,
    ),
    "exit-heads": ("Exits on a frozen language model", "accelerate launch -m train.train_lm_exits ...", exit_heads),
    "decode": ("Decoding", "python -m eval.decode ...", decode),
    "classifiers": (
        "Classifiers with exits beside constant depth and truncated models",
        "python -m eval.classifier_table --reference ... --truncated ... --names ... --folders ... --output_dir ...",
        told(classifiers),
    ),
    "classify-": (
        "One classifier with exits",
        "python -m eval.classify --model ... --text_files ... --output_dir ...",
        told(classify),
    ),
    "classifier-speed": (
        "Seconds of classifiers",
        "python -m eval.classifier_speed --names ... --models ... --policies ... --pruning ... --output_dir ...",
        told(classifier_speed),
    ),
    "tower-match": ("Do images from prompts show what the prompts say", "python -m eval.retrieval ...", told(matching)),
    "cloud-tokens": ("Edge and cloud: tokens, bytes and FLOPs", "python -m eval.cloud ...", told(cloud_tokens)),
    "cloud-clock": ("Edge and cloud: seconds", "python -m eval.cloud_clock ...", told(cloud_clock)),
    "cloud-load": ("A cloud under load", "python -m eval.cloud_load ...", told(cloud_rows)),
    "cloud-memory": ("Memory of an edge", "python -m eval.cloud_memory ...", told(cloud_rows)),
    "demo": ("The demo", "make demo", demo),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", required=True, help="Folder of reports.")
    parser.add_argument("--output", required=True, help="The file to write.")
    options = parser.parse_args()
    parts, contents = [], []
    for start, (title, command, section) in SECTIONS.items():
        for path in sorted(Path(options.reports).glob(f"{start}*.json")):
            report = json.loads(path.read_text(encoding="utf-8"))
            if "format" in report:
                raise ValueError(
                    f"{path} is of format {report['format']!r}, expected a script's own: eval.report reads it"
                )
            said = f"`{report['command']}`" if "command" in report else f"`{command}`, with the settings below"
            contents.append(f"- [{title}: {path.stem}](#{path.stem})")
            parts.append(f'<a id="{path.stem}"></a>\n## {title}: {path.stem}\n\n{said}\n\n{section(report)}')
    if not parts:
        raise ValueError(
            f"no reports in {options.reports}, expected some of {[f'{start}*.json' for start in SECTIONS]}"
        )
    write_text(options.output, "\n".join([HEAD, *contents, "", *parts]))


if __name__ == "__main__":
    run_script(main)
