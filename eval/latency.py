"""The clock: what exits cost and save, in four commands. Each writes report.json and report.md.

python -m eval.latency forward --output_dir runs/latency
python -m eval.latency synthetic --output_dir runs/latency-synthetic
python -m eval.latency training --output_dir runs/latency-training
python -m eval.latency profile --batch_size 1 --num_inference_steps 20 --output_dir runs/profile

forward: the plain model, exits attached but off, and on with a threshold that no score passes (every uncertainty module and every sync
runs), at once and delayed, take turns; ratios of pairwise medians. Then rows of one batch leave at different exits, by their own scores,
at thresholds set on these very rows for the mean depth asked for. Ideal = fixed part (embedding, tail) + every executed block's own median
time at its number of rows + uncertainty modules and heads at theirs, each timed where it runs, in turns with the runs (`ideal_ms`), and
alone in a loop, where its weights never leave the caches (`alone_ms`), which no model does. Starting a run, deciding, syncs and dropping
rows are in the measured time only. Last the whole call of the pipeline for one image under guidance. Inputs are noise: time does not
depend on content. On Linux, MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 before the command keep freed memory in
the process: without them some forwards, of any candidate, pay for thousands of new pages.
synthetic: the shape of DiT-XL/2 with random weights, eager and compiled: exits off, and all rows leaving at a part of the depth; ideal is
a stock model of just so many blocks (`truncate`).
training: a step (AdamW) with all exits and the joint loss over one of the same backbone without exits.
profile: where the time of one image goes, by cProfile. The profiler makes Python calls dearer than they are: shares of the package's own
code are upper bounds. `largest`: its function with the most time of its own, blocks of the model aside.
"""

from __future__ import annotations

from dataclasses import dataclass

from ee_diffusion.cli.errors import run_script
from eval.harness.options import COUNT, DTYPES, SHARE, SamplingOptions, check_numbers, flag, launch_one_of, numbers


@dataclass(frozen=True)
class ForwardOptions:
    """How long to look."""

    batch_sizes: list[int] = numbers("Rows per forward.", 1, 8, 64)
    mean_depths: list[float] = numbers("Fractions of the blocks.", 0.75, 0.4)
    repeats: int = flag("Counted runs of each candidate.", 9)
    steps: int = flag("Forwards of a run, under one session: what a generation does once is shared among them.", 10)


@dataclass(frozen=True)
class SyntheticOptions:
    """The shape, and how long to look.

    Raises:
        ValueError: no folder, an unknown dtype, a number out of range.
    """

    output_dir: str | None = flag("Folder for the results.")
    num_layers: int = flag("Blocks.", 28)
    num_attention_heads: int = flag("Attention heads.", 16)
    attention_head_dim: int = flag("Width of a head.", 72)
    sample_size: int = flag("Latent pixels per side; patches are 2x2.", 32)
    batch_sizes: list[int] = numbers("Rows per forward.", 1, 8, 32)
    fractions: list[float] = numbers("Parts of the depth.", 0.25, 0.5, 0.75)
    modes: list[str] = numbers("eager, compiled.", "eager", "compiled")
    compile_backend: str = flag("Backend of torch.compile.", "inductor")
    repeats: int = flag("Counted runs of each candidate.", 15)
    dtype: str = flag("float32, bfloat16 or float16.", "bfloat16")
    device: str | None = flag("cpu, cuda, ...; none: cuda if there is one.")
    seed: int = flag("Seed of the weights and inputs.", 0)

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError(f"output_dir={self.output_dir!r}, expected a folder")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}, expected one of {DTYPES}")
        if unknown := set(self.modes) - {"eager", "compiled"}:
            raise ValueError(f"modes {sorted(unknown)}, expected eager, compiled")
        check_numbers(self, SHARE, "fractions")
        check_numbers(self, COUNT, "repeats", "num_layers", "batch_sizes")


@dataclass(frozen=True)
class TrainingOptions:
    """What a step is.

    Raises:
        ValueError: another precision.
    """

    train_batch_size: int = flag("Samples of a step.", 64)
    mixed_precision: str = flag("bf16 (autocast) or no.", "no")
    repeats: int = flag("Counted steps of each.", 9)

    def __post_init__(self):
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r}, expected 'no' or 'bf16'")


@dataclass(frozen=True)
class ProfileOptions:
    """Which exits are taken."""

    thresholds: list[float] = numbers("DeeDiff's, on u.", 0.0, 0.2)


def main() -> None:
    launch_one_of(
        __doc__,
        forward=("eval.work.latency:run", (SamplingOptions, ForwardOptions), {}),
        synthetic=("eval.work.synthetic_latency:run", (SyntheticOptions,), {}),
        training=("eval.work.latency:run_training", (SamplingOptions, TrainingOptions), {}),
        profile=("eval.work.profile:run", (SamplingOptions, ProfileOptions), {}),
    )


if __name__ == "__main__":
    run_script(main)
