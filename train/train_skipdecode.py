"""Fine-tune a causal language model under the layers that it will run: SkipDecode, or any schedule; plain and truncated as controls.

accelerate launch -m train.train_skipdecode --model MODEL --warm_up 4 --least 10 --most 20 --horizon 28 --lora_rank 16 \\
    --text_files e2e/devset.csv --prompt_templates '{mr}\\n' --answer_columns ref --output_dir runs/skip15

`--policy FILE` (of Policy.save) in the place of the four numbers: early termination, D3, uniform skipping. Neither: plain fine-tuning,
with `--keep N` of the first N layers alone. Without `--lora_rank` every weight trains. `--teacher MODEL`: learn from a
fine-tuned model at full depth, too (`--model MODEL` beside it starts from its weights). `--dry-run` prints the resolved settings;
`--resume_from_checkpoint latest` continues after a stop. Writes model/ (transformers loads it with its tokenizer), policy.json (made
for that model; in model/ too), log.jsonl, config.json, report.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ee_diffusion.cli.errors import run_script
from ee_diffusion.training.config import LanguageModelConfig, PromptDataConfig, TrainConfig
from train.launch import launch

# Of the loop, where fine-tuning a language model differs from training a diffusion model
DEFAULTS = {"train_batch_size": 8, "learning_rate": 5e-4, "adam_weight_decay": 0.0, "lr_warmup_steps": 20}
DEFAULTS |= {"max_train_steps": 500, "ema_decay": 0.95, "checkpointing_steps": 100}


@dataclass(frozen=True)
class SkipConfig:
    """The layers that run, and what trains.

    Raises:
        ValueError: some of SkipDecode's numbers without the others, or beside a policy; truncation beside either; a teacher's part
            outside (0, 1] or without one.
    """

    warm_up: int | None = HfArg(default=None, help="SkipDecode: layers at the bottom that always run.")
    least: int | None = HfArg(default=None, help="SkipDecode: layers from token `horizon` on.")
    most: int | None = HfArg(default=None, help="SkipDecode: layers at the first token.")
    horizon: int | None = HfArg(default=None, help="SkipDecode: tokens from most to least layers.")
    policy: str | None = HfArg(default=None, help="A file that Policy.save wrote, in their place.")
    keep: int | None = HfArg(default=None, help="Fine-tune so many first layers alone: the truncated control.")
    lora_rank: int | None = HfArg(default=None, help="Train LoRA of this rank, merged at the end; none: all weights.")
    teacher: str | None = HfArg(default=None, help="A model to learn from at full depth, by folder or name.")
    teacher_weight: float | None = HfArg(default=None, help="The teacher's share of the loss; none: 0.5.")

    def __post_init__(self):
        given = [name for name in ("warm_up", "least", "most", "horizon") if getattr(self, name) is not None]
        if len(given) not in (0, 4):
            raise ValueError(f"SkipDecode's {given} alone, expected all of warm_up, least, most, horizon, or none")
        ways = [bool(given), self.policy is not None, self.keep is not None]
        if sum(ways) > 1:
            raise ValueError("two of SkipDecode's numbers, policy and keep were given, expected at most one")
        if self.teacher_weight is not None and (self.teacher is None or not 0 < self.teacher_weight <= 1):
            raise ValueError(
                f"teacher_weight={self.teacher_weight}, teacher={self.teacher!r}, expected within (0, 1], and a teacher"
            )


def check(_language: LanguageModelConfig, _skip: SkipConfig, _data: PromptDataConfig, train: TrainConfig) -> None:
    if train.compile:
        raise ValueError("compile=True: layers that differ by position cannot be compiled")


def main() -> None:
    configs = (LanguageModelConfig, SkipConfig, PromptDataConfig, TrainConfig)
    needs = {"required": ("output_dir", "model"), "defaults": DEFAULTS, "check": check}
    launch("train.work.skipdecode:run", __doc__, *configs, **needs)


if __name__ == "__main__":
    run_script(main)
