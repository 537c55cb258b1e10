"""CLIP score (torchmetrics) of what a text-to-image pipeline draws for a file of prompts.

python -m eval.clip_score --model runs/text_exits --text_encoder sentence-transformers/all-MiniLM-L6-v2 --prompts PartiPrompts.tsv --clip openai/clip-vit-base-patch32 --output_dir runs/clip

`--model`: any pipeline folder of diffusers that takes `prompt`, or one of this package; `--prompts`: a .tsv or .csv with a header
(`--prompt_column`), or a .txt with a prompt a line. `--clip`: a path or Hub name of any CLIPModel with its processor: the score depends on
which, so it is written beside it, and prompts longer than its text model reads are cut (`prompts_cut`). `--shuffled` scores the same images against prompts of other images: what blind drawing gets.
Writes images.safetensors, config.json and report.json.
"""  # noqa: E501  (a command is one line)

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPProcessor

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.devices import device_named
from ee_diffusion.core.io import write_tensors
from ee_diffusion.core.policy import Policy
from ee_diffusion.metrics.clip_score import clip_scores, cut_prompts, read_prompts
from ee_diffusion.metrics.image import summary
from ee_diffusion.metrics.splits import seeds
from ee_diffusion.metrics.tables import environment, write_json
from eval.harness.options import flag, parse
from eval.harness.prompting import draw, load_text_pipeline


@dataclass(frozen=True)
class ClipOptions:
    """What draws, what is drawn, what judges."""

    model: str | None = flag("Folder of a text-to-image pipeline.")
    text_encoder: str | None = flag("Path or Hub name of its text encoder, if the folder has none.")
    prompts: str | None = flag("File of prompts: .tsv, .csv or .txt.")
    prompt_column: str = flag("Column of the prompts in a .tsv or .csv.", "Prompt")
    count: int | None = flag("Use only the first so many prompts; none: all.")
    clip: str | None = flag("Path or Hub name of a CLIPModel with its processor.")
    output_dir: str | None = flag("Where results go.")
    num_inference_steps: int = flag("Denoising steps.", 50)
    guidance_scale: float = flag("Classifier-free guidance.", 3.0)
    exit_policy: str | None = flag("File of an exit policy (pipelines with exits); none: the plain model.")
    shuffled: bool = flag("Also score each image against the prompt of another.", True)
    batch_size: int = flag("Images per call.", 16)
    device: str | None = flag("cpu, cuda, ...; none: cuda if there is one.")


def check(options: ClipOptions) -> None:
    missing = [name for name in ("model", "prompts", "clip", "output_dir") if getattr(options, name) is None]
    if missing:
        raise ValueError(f"--{missing[0]} is missing, expected --model, --prompts, --clip and --output_dir")
    if options.count is not None and options.count < 2:
        raise ValueError(f"count={options.count}, expected at least 2 (or none)")


def main() -> None:
    (options,) = parse(ClipOptions, description=__doc__)
    check(options)
    prompts = read_prompts(options.prompts, column=options.prompt_column)[: options.count]
    device = device_named(options.device)
    folder = Path(options.output_dir)
    write_json(folder / "config.json", asdict(options))
    judge = {
        "model": CLIPModel.from_pretrained(options.clip, dtype=torch.float32).to(device),
        "processor": CLIPProcessor.from_pretrained(options.clip),
    }
    cut = cut_prompts(prompts, **judge)
    if cut:
        print(
            f"{cut} of {len(prompts)} prompts are longer than the text model of {options.clip} reads and are cut",
            flush=True,
        )
    policy = {} if options.exit_policy is None else {"exit_policy": Policy.load(options.exit_policy)}
    pipeline = load_text_pipeline(options.model, text_encoder=options.text_encoder, device=device)
    call = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    chosen = seeds("test", len(prompts))
    images, trace = draw(pipeline, prompts, chosen, batch_size=options.batch_size, **call, **policy)
    write_tensors(folder / "images.safetensors", {"images": images})
    report = {"clip": options.clip, "prompts_cut": cut, "clip_score": summary(clip_scores(images, prompts, **judge))}
    if options.shuffled:
        turned = [*prompts[1:], prompts[0]]
        report["clip_score_shuffled"] = summary(clip_scores(images, turned, **judge))
    if trace is not None:
        report["share_of_blocks"] = trace.report().fraction_executed
    settings = call | {"prompts": Path(options.prompts).name, "count": len(prompts)}
    write_json(folder / "report.json", {"settings": settings} | report | {"environment": environment(device)})
    for name in ("clip_score", "clip_score_shuffled"):
        if name in report:
            print(
                f"{name}: {report[name].mean:.3f} [{report[name].low:.3f}, {report[name].high:.3f}], {len(prompts)} images"
            )


if __name__ == "__main__":
    run_script(main)
