"""Tower match: does a text-to-image model draw what held-out captions say? A small image tower must find the caption of an image again.

python -m eval.retrieval --model runs/text_exits --text_encoder sentence-transformers/all-MiniLM-L6-v2 --tower runs/tower/tower.safetensors --output_dir runs/retrieval

This is not CLIP: the tower (train/train_retrieval_tower.py) saw the training captions of one small data set alone, and is good for comparing models
on it. Rows: real images of the captions (upper control), the same through the autoencoder, the model at full depth, its images against
captions dealt out anew (lower control), fewer steps (`--fewer_steps`), and each policy beside a static schedule of its own depths and
random exits. Captions and split must be those of the training. Writes retrieval.md, samples.safetensors, config.json and report.json.
"""  # noqa: E501  (a command is one line)

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.devices import device_named
from ee_diffusion.core.io import write_tensors, write_text
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.latents import decode, encode
from ee_diffusion.diffusion.pipelines.prompts import encode_many
from ee_diffusion.diffusion.pipelines.sampling import controls_of
from ee_diffusion.metrics.files import to_bytes
from ee_diffusion.metrics.reference_models import in_batches
from ee_diffusion.metrics.retrieval import ImageTower, load_tower, retrieval, shown
from ee_diffusion.metrics.splits import seeds
from ee_diffusion.metrics.tables import environment, markdown_table, write_json
from ee_diffusion.training.captions import Captioned, load_captioned, subject
from ee_diffusion.training.config import CaptionConfig, ImageDataConfig
from eval.harness.options import flag, parse
from eval.harness.prompting import draw, load_text_pipeline

CONTROLS = ("static", "random_per_step")


@dataclass(frozen=True)
class RetrievalOptions:
    """What draws, what judges, how much."""

    model: str | None = flag("Folder of a text-to-image pipeline.")
    text_encoder: str | None = flag("Path or Hub name of the text encoder of the model and of the tower.")
    tower: str | None = flag("File of the tower.")
    output_dir: str | None = flag("Where results go.")
    data_files: str = flag("Parquet files of images with captions.", "emoji64/*.parquet")
    split: str = flag("validation or test.", "test")
    count: int | None = flag("Use only the first so many captions; none: all.")
    images_per_caption: int = flag("Images drawn for each caption, a seed each.", 2)
    num_inference_steps: int = flag("Denoising steps.", 25)
    fewer_steps: int | None = flag("Also the plain model with so many steps; none: not.")
    guidance_scale: float = flag("Classifier-free guidance.", 3.0)
    policies: str | None = flag(
        "Folder of policy files (*.json), each measured beside its controls; none: full depth alone."
    )
    batch_size: int = flag("Images per call.", 32)
    device: str | None = flag("cpu, cuda, ...; none: cuda if there is one.")


def check(options: RetrievalOptions) -> None:
    missing = [name for name in ("model", "text_encoder", "tower", "output_dir") if getattr(options, name) is None]
    if missing:
        raise ValueError(f"--{missing[0]} is missing, expected --model, --text_encoder, --tower and --output_dir")
    if options.split not in ("validation", "test") or options.images_per_caption < 1:
        raise ValueError(
            f"split={options.split!r}, images_per_caption={options.images_per_caption}, expected validation or test, at least 1"
        )


def gallery(part: Captioned, count: int | None) -> tuple[list[str], Tensor, Tensor]:
    """One caption for each subject (the first of the alphabet), real images of these subjects, and the subject of each image."""
    captions: dict[str, str] = {}
    for caption in sorted(set(part.captions)):
        captions.setdefault(subject(caption), caption)
    chosen = dict(sorted(captions.items())[:count])
    places = {name: place for place, name in enumerate(chosen)}
    kept = [index for index, caption in enumerate(part.captions) if subject(caption) in places]
    own = torch.tensor([places[subject(part.captions[index])] for index in kept])
    return list(chosen.values()), part.images[kept], own


def through_vae(pipeline: DiffusionPipeline, images: Tensor, batch_size: int) -> Tensor:
    """(n, 3, H, W) uint8 -> the same, encoded and decoded."""
    chunks = [chunk.to(pipeline.vae.device).float() / 127.5 - 1 for chunk in images.split(batch_size)]
    back = [decode(pipeline.vae, encode(pipeline.vae, chunk)).cpu() for chunk in chunks]
    return to_bytes(torch.cat(back) / 2 + 0.5)


def drawn(pipeline: DiffusionPipeline, options: RetrievalOptions, captions: list[str]) -> dict[str, tuple]:
    """Name of a row -> images (n, 3, H, W) uint8, share of the blocks, steps."""
    prompts = [caption for caption in captions for _ in range(options.images_per_caption)]
    chosen, steps = seeds("test" if options.split == "test" else "calibrate", len(prompts)), options.num_inference_steps
    call = {"guidance_scale": options.guidance_scale, "batch_size": options.batch_size}

    def made(number: int, policy: Policy | None = None):
        images, trace = draw(pipeline, prompts, chosen, num_inference_steps=number, exit_policy=policy, **call)
        print(
            f"{number} steps, {'full depth' if trace is None else trace.report().summary().splitlines()[0]}", flush=True
        )
        return images, trace

    found = {"full depth": (made(steps)[0], 1.0, steps)}
    if options.fewer_steps is not None:
        found[f"{options.fewer_steps} steps"] = (made(options.fewer_steps)[0], 1.0, options.fewer_steps)
    files = [] if options.policies is None else sorted(Path(options.policies).glob("*.json"))
    for file in files:
        images, trace = made(steps, Policy.load(file))
        found[file.stem] = (images, trace.report().fraction_executed, steps)
        controls = controls_of(trace, seed=0)
        for name in CONTROLS:
            images, played = made(steps, controls[name])
            found[f"{file.stem}, {name.replace('_', ' ')}"] = (images, played.report().fraction_executed, steps)
    return found


def row(
    name: str, images: Tensor, own: Tensor, texts: Tensor, *, tower: ImageTower, blocks: float | None, steps: int | None
) -> dict:
    result = retrieval(in_batches(tower, images, batch_size=64), own, texts)
    return {"images of": name, "steps": steps, "share of blocks": blocks} | asdict(result)


def main() -> None:
    (options,) = parse(RetrievalOptions, description=__doc__)
    check(options)
    device = device_named(options.device)
    folder = Path(options.output_dir)
    write_json(folder / "config.json", asdict(options))
    tower, facts = load_tower(options.tower)
    split = CaptionConfig(**{name: facts[name] for name in CaptionConfig.__dataclass_fields__})
    data = ImageDataConfig(train_data_files=[options.data_files], label_column=None, resolution=64, random_flip=False)
    captions, real, of_real = gallery(load_captioned(data, split).part(options.split), options.count)
    pipeline = load_text_pipeline(options.model, text_encoder=options.text_encoder, device=device)
    texts = encode_many(pipeline.tokenizer, pipeline.text_encoder, captions, num_tokens=1, batch_size=64)[:, 0]
    texts, own = tower.texts(texts), torch.arange(len(captions)).repeat_interleave(options.images_per_caption)
    judge = {"tower": tower.to(device)}
    rows = [row("real images", real, of_real, texts, blocks=None, steps=None, **judge)]
    back = through_vae(pipeline, real, options.batch_size)
    rows.append(row("real images through the autoencoder", back, of_real, texts, blocks=None, steps=None, **judge))
    sets = drawn(pipeline, options, captions)
    for name, (images, blocks, steps) in sets.items():
        rows.append(row(name, images, own, texts, blocks=blocks, steps=steps, **judge))
    turned = (own + len(captions) // 2) % len(captions)  # every image against the caption of another
    images, _, steps = sets["full depth"]
    rows.append(row("full depth, prompts dealt out anew", images, turned, texts, blocks=1.0, steps=steps, **judge))
    write_tensors(folder / "samples.safetensors", {name: images for name, (images, _, _) in sets.items()})
    places = {"model": options.model, "tower": options.tower, "policies": options.policies}
    settings = asdict(options) | {name: path and Path(path).name for name, path in places.items()}
    settings |= {"text_encoder": facts["text_encoder"], "output_dir": None}
    write_json(
        folder / "report.json", {"settings": settings, "tower": facts, "rows": rows, "environment": environment(device)}
    )
    write_text(folder / "retrieval.md", markdown_table([shown(one) for one in rows]))
    print((folder / "retrieval.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
