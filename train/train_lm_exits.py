"""Fit exits to a frozen causal language model: adapters before its own LM head, and confidences.

accelerate launch -m train.train_lm_exits --model MODEL --chat --exit_depths 5 10 15 20 --text_files instruct.json e2e/devset.csv \\
    --prompt_templates '{instruction}\\n{input}' '{mr}' --answer_columns output ref --output_dir runs/heads

The model reads the texts once; its states at the exits' depths and before the LM head, at the answers' tokens, are stored in
states.safetensors, and a sample of the training is a token. `--teacher model`: the exits learn the model's own next-token distribution;
`labels`: the text's next token. `--sampled_tokens N` makes steps some ten times cheaper; a short last run over all tokens
(`--init_exits`) corrects the confidences. `--dry-run` prints the resolved settings; `--resume_from_checkpoint latest` continues after
a stop. Writes exits.safetensors (`LearnedExits.load(file).bind(model)`; an `Edge` takes it, too), log.jsonl, config.json, report.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ee_diffusion.cli.errors import run_script
from ee_diffusion.training.config import LanguageModelConfig, PromptDataConfig, TrainConfig
from train.launch import launch

TEACHERS = ("model", "labels")
# Of the loop, where fitting small heads differs from training a model
DEFAULTS = {"learning_rate": 1e-3, "adam_weight_decay": 0.01, "lr_warmup_steps": 20, "max_train_steps": 1000}
DEFAULTS |= {"ema_decay": 0.99, "checkpointing_steps": 200}


@dataclass(frozen=True)
class HeadsConfig:
    """Which exits, and who teaches them.

    Raises:
        ValueError: an unknown teacher, a number below 1.
    """

    exit_depths: list[int] | None = HfArg(default=None, help="Executed layers at each exit, ascending.")
    adapter_width: int | None = HfArg(default=None, help="Width inside adapters; none: confidences alone.")
    teacher: str = HfArg(default="model", help="model: its own next-token distribution; labels: the text's next token.")
    sampled_tokens: int | None = HfArg(default=None, help="Tokens in a step's loss, beside likely ones; none: all.")
    init_exits: str | None = HfArg(default=None, help="exits.safetensors to start from; none: fresh ones.")
    states: str | None = HfArg(default=None, help="Where states are stored; none: in output_dir.")
    collect_batch_size: int = HfArg(default=4, help="Texts per forward of the model.")
    held_out: int = HfArg(default=1024, help="States at the end that the exits are evaluated on, not fitted to.")

    def __post_init__(self):
        if self.teacher not in TEACHERS:
            raise ValueError(f"teacher={self.teacher!r}, expected one of {TEACHERS}")
        if min(self.collect_batch_size, self.held_out) < 1:
            raise ValueError(
                f"collect_batch_size={self.collect_batch_size}, held_out={self.held_out}, expected at least 1"
            )


def main() -> None:
    configs = (LanguageModelConfig, HeadsConfig, PromptDataConfig, TrainConfig)
    required = ("output_dir", "model", "exit_depths")
    launch("train.work.lm_exits:run", __doc__, *configs, required=required, defaults=DEFAULTS)


if __name__ == "__main__":
    run_script(main)
