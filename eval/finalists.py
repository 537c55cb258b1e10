"""FD of a frontier's finalists on many images: how much worse than the full model, with an interval, in disjoint blocks of seeds.

python -m eval.finalists --report runs/frontier/candidates.json --names "searched joint 12 computed" "20 steps" --output_dir runs/finalists

The full model and the candidates that --names names draw the same test seeds, none of which the frontier used, with its settings. FD is on
resnet20's features against CIFAR-10's training images, or those that --reference_dir, --reference_files or --reference_statistics names.
`difference` is FD minus the full model's, its interval from resamples of the pairs; `block_*` the same on each of --blocks disjoint parts
of the seeds. Features are kept in features/: a run that was stopped goes on when started again. Writes report.json and report.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from ee_diffusion.cli.errors import run_script
from eval.harness.options import DTYPES, ReferenceOptions, flag, launch, numbers


@dataclass(frozen=True)
class FinalistOptions:
    """Which candidates of which frontier, and how many images.

    Raises:
        ValueError: numbers out of range.
    """

    report: str | None = flag("candidates.json of eval.frontier; its folder holds what was fitted.")
    names: list[str] = numbers("Names of candidates, beside the full model.")
    output_dir: str | None = flag("Folder for the results.")
    count: int = flag("Test images, after those of the frontier.", 10_000)
    blocks: int = flag("Disjoint parts of the seeds that are looked at alone.", 3)
    resamples: int = flag("Resamples of the pairs for an interval.", 400)
    batch_size: int | None = flag("Images per forward; none: as in the frontier.")
    dtype: str | None = flag("float32, bfloat16 or float16; none: as in the frontier.")
    device: str | None = flag("cpu, cuda, ...; none: cuda if there is one.")
    seed: int = flag("Seed of the resamples.", 0)

    def __post_init__(self):
        for name in ("report", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is missing")
        if not self.names or self.blocks < 1 or self.resamples < 2 or self.count < 2 * self.blocks:
            raise ValueError(
                f"names={self.names}, count={self.count}, blocks={self.blocks}, resamples={self.resamples}, expected a name, at least two "
                "images a block and two resamples"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}, expected one of {DTYPES}")


def main() -> None:
    launch(__doc__, "eval.work.finalists:run", FinalistOptions, ReferenceOptions)


if __name__ == "__main__":
    run_script(main)
