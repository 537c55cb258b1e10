"""What a training run is told, with the flag names of diffusers' examples. Frozen dataclasses, checked when they are made.

Here: the loop's and the image data's settings. Not here: those of a model or a method (train/), command lines (train/).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

PRECISIONS = ("no", "fp16", "bf16")
TRACKERS = ("none", "tensorboard", "wandb")
OPTIMIZERS = ("adamw", "muon")
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup")

# A run resumed under another value of one of these would not be the run that was begun.
MATHS = (
    "seed",
    "optimizer",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "use_ema",
    "ema_decay",
    "mixed_precision",
)


def _flag(help: str, default=None):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop. Batch sizes count samples; learning rates count per optimiser step.

    Raises:
        ValueError: for a value out of range (said which, and what was expected).
    """

    output_dir: str | None = _flag("Where weights, checkpoints, logs, config.json and report.json go.")
    seed: int = _flag("Seed of initial weights, data order and every draw.", 0)
    train_batch_size: int = _flag("Samples per process and micro-step.", 128)
    gradient_accumulation_steps: int = _flag("Micro-steps per optimiser step.", 1)
    max_train_steps: int = _flag("Optimiser steps in all.", 10_000)
    max_train_minutes: float | None = _flag("Stop after so many minutes, with a checkpoint, to be resumed.")
    optimizer: str = _flag(
        "adamw, or muon: torch's Muon for the matrices within repeated blocks (steps scaled to AdamW's size), AdamW for the rest.",
        "adamw",
    )
    learning_rate: float = _flag("Peak learning rate.", 2e-4)
    lr_scheduler: str = _flag(
        "A name diffusers' get_scheduler knows: constant_with_warmup, cosine, ...", "constant_with_warmup"
    )
    lr_warmup_steps: int = _flag("Optimiser steps of linear warm-up.", 500)
    adam_beta1: float = _flag("AdamW beta1.", 0.9)
    adam_beta2: float = _flag("AdamW beta2.", 0.99)
    adam_weight_decay: float = _flag("AdamW weight decay.", 0.03)
    adam_epsilon: float = _flag("AdamW epsilon.", 1e-8)
    max_grad_norm: float = _flag("Clip the gradient to this norm; 0: do not clip.", 1.0)
    use_ema: bool = _flag(
        "Keep an exponential moving average of the weights; it is what is validated and exported.", True
    )
    ema_decay: float = _flag("Decay of the average.", 0.9999)
    mixed_precision: str = _flag("no, fp16 or bf16.", "no")
    compile: bool = _flag("torch.compile the objective.", False)
    report_to: str = _flag("none, tensorboard or wandb.", "none")
    logging_dir: str = _flag("Tracker files, below output_dir.", "logs")
    logging_steps: int = _flag("Write losses every so many steps.", 50)
    checkpointing_steps: int = _flag("Write a checkpoint every so many steps.", 1000)
    checkpoints_total_limit: int | None = _flag("Keep only the newest so many checkpoints; none: all.")
    resume_from_checkpoint: str | None = _flag("latest, or the path of a checkpoint folder.")
    validation_steps: int | None = _flag("Validate every so many steps; none: never.")

    def __post_init__(self):
        counts = (
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "logging_steps",
            "checkpointing_steps",
        )
        for name in (*counts, "checkpoints_total_limit", "validation_steps"):
            self._expect(name, "an integer of at least 1", lambda v: v >= 1, optional=name not in counts)
        self._expect("seed", "0 <= seed < 2^63", lambda v: 0 <= v < 2**63)
        self._expect("lr_warmup_steps", "at least 0", lambda v: v >= 0)
        for name in ("learning_rate", "adam_epsilon"):
            self._expect(name, "a finite number above 0", lambda v: 0 < v < math.inf)
        self._expect("max_train_minutes", "a number above 0", lambda v: v > 0, optional=True)
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._expect(name, "a number in [0, 1)", lambda v: 0 <= v < 1)
        for name in ("adam_weight_decay", "max_grad_norm"):
            self._expect(name, "a finite number of at least 0", lambda v: 0 <= v < math.inf)
        self._expect("optimizer", f"one of {OPTIMIZERS}", lambda v: v in OPTIMIZERS)
        if self.optimizer == "muon" and self.mixed_precision == "fp16":
            raise ValueError(
                "mixed_precision='fp16' with optimizer='muon', expected 'bf16' or 'no': one loss scale serves one optimizer"
            )
        self._expect("mixed_precision", f"one of {PRECISIONS}", lambda v: v in PRECISIONS)
        self._expect("report_to", f"one of {TRACKERS}", lambda v: v in TRACKERS)

    def _expect(self, name: str, expected: str, holds, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if not (optional if value is None else holds(value)):
            raise ValueError(f"{name}={value!r}, expected {expected}{' or none' if optional else ''}")

    def maths(self) -> dict[str, object]:
        """The settings that a resumed run must share; the number of steps only where the learning rate depends on it."""
        values = asdict(self)
        names = MATHS if self.lr_scheduler in ENDLESS_SCHEDULES else (*MATHS, "max_train_steps")
        return {name: values[name] for name in names}


@dataclass(frozen=True)
class ImageDataConfig:
    """Where images come from: exactly one of a Hub name, a local folder of images, and parquet files.

    Relative `train_data_files` that match nothing are looked up below the folder named by EE_DIFFUSION_DATA.
    """

    dataset_name: str | None = _flag("A data set by its Hub name.")
    train_data_dir: str | None = _flag("A local folder of images (one sub-folder per class, or metadata files).")
    train_data_files: list[str] | None = _flag("Parquet files or glob patterns.")
    dataset_split: str = _flag("Which split of it.", "train")
    image_column: str = _flag("Column of the images.", "image")
    label_column: str | None = _flag("Column of integer class labels; none: unconditional.", "label")
    resolution: int = _flag("Height and width in pixels; other sizes are resized and centre-cropped.", 32)
    random_flip: bool = _flag("Mirror half of the images.", True)
    max_train_samples: int | None = _flag("Use only the first so many images.")

    def sources(self) -> list[str]:
        """The names of the origins that were given."""
        return [name for name in ("dataset_name", "train_data_dir", "train_data_files") if getattr(self, name)]


@dataclass(frozen=True)
class TextDataConfig:
    """Where labelled texts come from: tsv, csv or parquet files. Relative ones are also looked up below EE_DIFFUSION_DATA.

    With `folds` the rows are shuffled, always alike, and dealt out; `fold` is held out, and `held_out` says which side is meant.

    Raises:
        ValueError: files of several kinds or of none of the three, names for columns that have theirs, no text column, a length or number
            below 1, a fold that there is not.
    """

    text_files: list[str] | None = _flag("Files or glob patterns, all .tsv, all .csv or all .parquet.")
    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Columns of the text; several are joined by a space."}
    )
    text_label_column: str = _flag("Column of the labels.", "label")
    first_label: int = _flag("The smallest label in the files; labels count from 0 in here.", 0)
    max_length: int = _flag("Longest text in tokens; longer ones are cut.", 128)
    max_texts: int | None = _flag("Use only the first so many texts.")
    column_names: list[str] | None = _flag("Names of all columns, for .tsv and .csv files without a header.")
    folds: int | None = _flag("Deal the rows out into so many parts; none: all rows in their order.")
    fold: int = _flag("Which of them is held out.", 0)
    held_out: bool = _flag("Take the part held out, not the rest.", False)

    def __post_init__(self):
        kinds = {name.rsplit(".", 1)[-1] for name in self.text_files or ()}
        if self.text_files and (len(kinds) > 1 or not kinds <= {"tsv", "csv", "parquet"}):
            raise ValueError(f"text_files={self.text_files}, expected files of one kind: .tsv, .csv or .parquet")
        if not self.text_columns:
            raise ValueError("text_columns is empty, expected at least one column")
        if self.column_names and "parquet" in kinds:
            raise ValueError(f"column_names={self.column_names} for parquet files, which name their columns themselves")
        for name, least in (("max_length", 1), ("max_texts", 1), ("folds", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}, expected at least {least}")
        if not 0 <= self.fold < (self.folds or 1) or (self.held_out and self.folds is None):
            raise ValueError(
                f"fold={self.fold}, held_out={self.held_out} of folds={self.folds}, expected one of the folds, counted from 0"
            )


@dataclass(frozen=True)
class PromptDataConfig:
    """Where prompts with answers come from: csv, json or jsonl files. Relative ones are also looked up below EE_DIFFUSION_DATA.

    Raises:
        ValueError: lists of different lengths, a length or number below 1.
    """

    text_files: list[str] | None = _flag("Files: .csv, .json (a list of objects) or .jsonl, of one kind or several.")
    prompt_templates: list[str] | None = _flag("For each file its prompt: {column} is replaced, \\n is a line break.")
    answer_columns: list[str] | None = _flag("For each file the column of the answer.")
    max_texts: list[int] | None = _flag("For each file, use only so many rows, evenly spaced; none: all.")
    max_length: int = _flag(
        "Longest prompt with answer in tokens; longer answers are cut, longer prompts left out.", 256
    )

    def __post_init__(self):
        files = len(self.text_files or ())
        for name in ("prompt_templates", "answer_columns", "max_texts"):
            value = getattr(self, name)
            if (value is not None or name != "max_texts") and len(value or ()) != files:
                raise ValueError(f"{name} has {len(value or ())} entries, expected one for each of {files} text_files")
        if self.max_length < 2 or min(self.max_texts or [1]) < 1:
            raise ValueError(
                f"max_length={self.max_length}, max_texts={self.max_texts}, expected at least 2 tokens and 1 row"
            )
