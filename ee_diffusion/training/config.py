"""Settings of a training run and of its data, with the flag names of diffusers' examples. Frozen dataclasses, checked when they are made.

Not here: settings of a model or a method, command lines (train/). Nothing here loads torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from transformers.hf_argparser import HfArg

PRECISIONS = ("no", "fp16", "bf16")
TRACKERS = ("none", "tensorboard", "wandb")
OPTIMIZERS = ("adamw", "muon")
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup")

# A run resumed under another value of one of these would be another run.
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


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop. Batch sizes count samples; learning rates count per optimizer step.

    Raises:
        ValueError: a value out of range.
    """

    output_dir: str | None = HfArg(default=None, help="Folder for weights, checkpoints, logs and reports.")
    seed: int = HfArg(default=0, help="Seed of initial weights, data order and every draw.")
    train_batch_size: int = HfArg(default=128, help="Samples per process and micro-step.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Micro-steps per optimizer step.")
    max_train_steps: int = HfArg(default=10_000, help="Optimizer steps in all.")
    max_train_minutes: float | None = HfArg(default=None, help="Stop after so many minutes, with a checkpoint.")
    optimizer: str = HfArg(default="adamw", help="adamw, or muon: Muon for matrices in blocks, AdamW for the rest.")
    learning_rate: float = HfArg(default=2e-4, help="Peak learning rate.")
    lr_scheduler: str = HfArg(default="constant_with_warmup", help="A name of diffusers' get_scheduler.")
    lr_warmup_steps: int = HfArg(default=500, help="Optimizer steps of linear warm-up.")
    adam_beta1: float = HfArg(default=0.9, help="AdamW beta1.")
    adam_beta2: float = HfArg(default=0.99, help="AdamW beta2.")
    adam_weight_decay: float = HfArg(default=0.03, help="AdamW weight decay.")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW epsilon.")
    max_grad_norm: float = HfArg(default=1.0, help="Clip the gradient to this norm; 0: do not clip.")
    use_ema: bool = HfArg(default=True, help="Validate and export an exponential moving average of the weights.")
    ema_decay: float = HfArg(default=0.9999, help="Decay of the average.")
    mixed_precision: str = HfArg(default="no", help="no, fp16 or bf16.")
    compile: bool = HfArg(default=False, help="torch.compile the objective.")
    report_to: str = HfArg(default="none", help="none, tensorboard or wandb.")
    logging_dir: str = HfArg(default="logs", help="Tracker files, below output_dir.")
    logging_steps: int = HfArg(default=50, help="Write losses every so many steps.")
    checkpointing_steps: int = HfArg(default=1000, help="Write a checkpoint every so many steps.")
    checkpoints_total_limit: int | None = HfArg(default=None, help="Keep so many newest checkpoints; none: all.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="latest, or the path of a checkpoint folder.")
    validation_steps: int | None = HfArg(default=None, help="Validate every so many steps; none: never.")

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

    dataset_name: str | None = HfArg(default=None, help="A data set by its Hub name.")
    train_data_dir: str | None = HfArg(default=None, help="A folder of images, one sub-folder per class.")
    train_data_files: list[str] | None = HfArg(default=None, help="Parquet files or glob patterns.")
    dataset_split: str = HfArg(default="train", help="Which split of it.")
    image_column: str = HfArg(default="image", help="Column of the images.")
    label_column: str | None = HfArg(default="label", help="Column of integer class labels; none: unconditional.")
    resolution: int = HfArg(default=32, help="Height and width in pixels; others are resized and center-cropped.")
    random_flip: bool = HfArg(default=True, help="Mirror half of the images.")
    max_train_samples: int | None = HfArg(default=None, help="Use only the first so many images.")

    def sources(self) -> list[str]:
        """The names of the origins that were given."""
        return [name for name in ("dataset_name", "train_data_dir", "train_data_files") if getattr(self, name)]


@dataclass(frozen=True)
class CaptionConfig:
    """Captions of images and their split. The shares are of subjects."""

    caption_column: str = HfArg(default="text", help="Column of the captions.")
    skin_tones: bool = HfArg(default=False, help="Also use captions that name a skin tone.")
    validation_share: float = HfArg(default=0.05, help="Share of subjects kept for choosing thresholds.")
    test_share: float = HfArg(default=0.1, help="Share of subjects kept for the final figures.")
    split_seed: int = HfArg(default=0, help="Seed of the split.")


@dataclass(frozen=True)
class LatentConfig:
    """How images become latents: enlarged, encoded once by the tiny autoencoder, stored in files.

    Raises:
        ValueError: a number below 1.
    """

    vae: str | None = HfArg(default=None, help="Folder of TAESD; also looked up below $EE_DIFFUSION_DATA.")
    latents_dir: str | None = HfArg(default=None, help="Where latents are stored; none: latents/ in output_dir.")
    image_size: int = HfArg(default=128, help="Pixels that images are enlarged to before they are encoded.")
    part_size: int = HfArg(default=2048, help="Images per file of latents.")
    encode_batch_size: int = HfArg(default=32, help="Images per forward of the autoencoder.")

    def __post_init__(self):
        for name in ("image_size", "part_size", "encode_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class LanguageModelConfig:
    """The causal language model and the form of its prompts."""

    model: str | None = HfArg(default=None, help="Folder or name of a causal language model.")
    gguf_file: str | None = HfArg(default=None, help="A GGUF file in that folder to load from.")
    attn_implementation: str | None = HfArg(default=None, help="sdpa, eager, ...; none: transformers' choice.")
    chat: bool = HfArg(default=False, help="Prompt through the tokenizer's chat template; else prompts as they are.")


@dataclass(frozen=True)
class TextDataConfig:
    """Where labeled texts come from: tsv, csv or parquet files. Relative ones are also looked up below EE_DIFFUSION_DATA.

    With `folds` the rows are shuffled, always in one order, and dealt out; `fold` is held out, and `held_out` selects it, not the rest.

    Raises:
        ValueError: files of several kinds or of none of the three, names for columns that have theirs, no text column, a length or number
            below 1, a fold that there is not.
    """

    text_files: list[str] | None = HfArg(default=None, help="Files or patterns of one kind: .tsv, .csv, .parquet.")
    text_columns: list[str] = HfArg(default_factory=lambda: ["text"], help="Columns of the text, joined by a space.")
    text_label_column: str = HfArg(default="label", help="Column of the labels.")
    first_label: int = HfArg(default=0, help="The smallest label in the files; labels count from 0 in here.")
    max_length: int = HfArg(default=128, help="Longest text in tokens; longer ones are cut.")
    max_texts: int | None = HfArg(default=None, help="Use only the first so many texts.")
    column_names: list[str] | None = HfArg(default=None, help="Names of the columns of files without a header.")
    folds: int | None = HfArg(default=None, help="Deal the rows out into so many parts; none: all rows in their order.")
    fold: int = HfArg(default=0, help="Which of them is held out.")
    held_out: bool = HfArg(default=False, help="Take the part held out, not the rest.")

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

    text_files: list[str] | None = HfArg(default=None, help="Files: .csv, .json (a list of objects) or .jsonl.")
    prompt_templates: list[str] | None = HfArg(default=None, help="For each file its prompt with {column}, \\n.")
    answer_columns: list[str] | None = HfArg(default=None, help="For each file the column of the answer.")
    max_texts: list[int] | None = HfArg(default=None, help="For each file, so many rows, evenly spaced.")
    max_length: int = HfArg(default=256, help="Longest prompt with answer in tokens; longer answers are cut.")

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
