"""Fit exits to a frozen causal language model: adapters before its own LM head, and certainties.

accelerate launch -m train.train_lm_exits --model MODEL --chat --exit_depths 5 10 15 20 --text_files instruct.json e2e/devset.csv \\
    --prompt_templates '{instruction}\\n{input}' '{mr}' --answer_columns output ref --output_dir runs/heads

The model reads the texts once; what is needed of it (its states at the exits' depths and before the LM head, at the answers' tokens) lies
in states.safetensors, and a sample of the training is a token. `--teacher model`: the exits learn the model's own next-token distribution;
`labels`: the text's next token. `--sampled_tokens N` makes steps some ten times cheaper; a short last run over all tokens
(`--init_exits`) sets certainties right. `--dry-run` prints the resolved settings; `--resume_from_checkpoint latest` goes on after
a stop. Writes exits.safetensors (`LearnedExits.load(file).bind(model)`; an `Edge` takes it, too), log.jsonl, config.json, report.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedModel

from ee_diffusion.cli.errors import run_script
from ee_diffusion.decoding.exit_objective import TEACHERS, ExitObjective, TokenStates, collect_states, exit_table
from ee_diffusion.decoding.fingerprint import fingerprint_of
from ee_diffusion.decoding.heads import LearnedExits
from ee_diffusion.training.checkpointing import write_json
from ee_diffusion.training.config import PromptDataConfig, TrainConfig
from ee_diffusion.training.loop import Trainer
from ee_diffusion.training.prompts import PromptSource
from ee_diffusion.training.sources import TableSource
from train.language_model import ModelConfig, flag, machine

WINDOW = 16  # batches among which texts are sorted by length
DEFAULTS = {  # of the loop, where fitting small heads differs from training a model
    "learning_rate": 1e-3,
    "adam_weight_decay": 0.01,
    "lr_warmup_steps": 20,
    "max_train_steps": 1000,
    "ema_decay": 0.99,
    "checkpointing_steps": 200,
}


@dataclass(frozen=True)
class HeadsConfig(ModelConfig):
    """Which exits, and who teaches them.

    Raises:
        ValueError: an unknown teacher, a number below 1.
    """

    exit_depths: list[int] | None = flag("Executed layers at each exit, ascending, below the model's.")
    adapter_width: int | None = flag("Inner width of the adapters before the LM head; none: certainties alone.")
    teacher: str = flag("model: its own next-token distribution; labels: the text's next token.", "model")
    sampled_tokens: int | None = flag("Tokens drawn for each step's loss, beside the likely ones; none: all tokens.")
    init_exits: str | None = flag("exits.safetensors to go on from; none: fresh ones.")
    states: str | None = flag("Where the model's states lie; none: states.safetensors in output_dir.")
    collect_batch_size: int = flag("Texts per forward of the model.", 4)
    held_out: int = flag("States at the end that the exits are judged on and not fitted to.", 1024)

    def __post_init__(self):
        if self.teacher not in TEACHERS:
            raise ValueError(f"teacher={self.teacher!r}, expected one of {TEACHERS}")
        if min(self.collect_batch_size, self.held_out) < 1:
            raise ValueError(
                f"collect_batch_size={self.collect_batch_size}, held_out={self.held_out}, expected at least 1"
            )


def parse() -> tuple[HeadsConfig, PromptDataConfig, TrainConfig, bool]:
    """Flags over the defaults."""
    parser = HfArgumentParser((HeadsConfig, PromptDataConfig, TrainConfig), description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Print the resolved settings as JSON and exit."
    )
    parser.set_defaults(**DEFAULTS)
    *configs, rest = parser.parse_args_into_dataclasses()
    return *configs, rest.dry_run


def batches(source: PromptSource, size: int) -> Iterator[dict[str, Tensor]]:
    """All texts in a fixed order that mixes the files; texts of like length share a batch, and batches come in no order of length."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(source), generator=generator)
    lengths = torch.tensor([len(one) for one in source.tokens])
    for window in order.split(WINDOW * size):
        alike = window[lengths[window].argsort(stable=True)].split(size)
        for batch in torch.randperm(len(alike), generator=generator).tolist():
            yield source.batch(alike[batch], alike[batch])


def find_states(config: HeadsConfig, model: PreTrainedModel, source: PromptSource, file: Path) -> TokenStates:
    """The states on disk, or fresh ones that are put there."""
    depths = tuple(config.exit_depths)
    name = f"{fingerprint_of(model)} at {depths} on {source.fingerprint()}"
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    with state.main_process_first():
        if not file.is_file():
            texts = batches(source, config.collect_batch_size)
            texts = tqdm(texts, desc="texts", total=math.ceil(len(source) / config.collect_batch_size), miniters=1)
            found = collect_states(model, texts, depths, name=name)
            file.parent.mkdir(parents=True, exist_ok=True)
            found.save(file)
    return TokenStates.load(file, name=name)


def run(config: HeadsConfig, data: PromptDataConfig, train: TrainConfig) -> dict:
    """Fit, and say what the exits say before and after; empty on ranks other than the first."""
    if not train.output_dir:
        raise ValueError(f"output_dir={train.output_dir!r}, expected the folder to write to")
    if not config.exit_depths:
        raise ValueError(f"exit_depths={config.exit_depths}, expected at least one: each check may cost an LM head")
    model, tokenizer = config.load()
    set_seed(train.seed)
    width, made_for = model.config.get_text_config().hidden_size, fingerprint_of(model)
    shape = {"adapter_width": config.adapter_width, "made_for": made_for}
    exits = LearnedExits(tuple(config.exit_depths), width, **shape)
    if config.init_exits:
        came = LearnedExits.load(config.init_exits).at(tuple(config.exit_depths))
        if (came.width, came.adapter_width) != (width, config.adapter_width):
            raise ValueError(
                f"the exits in {config.init_exits} have width {came.width} and adapters of {came.adapter_width}, "
                f"expected {width} and adapter_width={config.adapter_width}"
            )
        exits = came
    exits.bind(model)
    file = Path(config.states or Path(train.output_dir) / "states.safetensors")
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    model.to(device)
    exits.to(device)
    objective = ExitObjective(model, exits, teacher=config.teacher, sampled_tokens=config.sampled_tokens)
    fitted, held = find_states(config, model, config.source(tokenizer, data), file).split(config.held_out)
    before = exit_table(objective, held, batch_size=train.train_batch_size)
    trainer = Trainer(
        objective,
        TableSource(fitted, fitted.name),
        train,
        save=lambda folder, trained: trained.exits.save(folder / "exits.safetensors"),
        identity={
            "teacher": config.teacher,
            "adapter_width": config.adapter_width,
            "sampled_tokens": config.sampled_tokens,
            "init_exits": config.init_exits,
            "backbone": made_for,
        },
    )
    report = trainer.fit()
    if not trainer.accelerator.is_main_process:
        return {}
    with trainer.learner.averaged() as trained:
        after = exit_table(trained, held, batch_size=train.train_batch_size)
    counts = {"states": len(fitted), "held_out": len(held)}
    return {"fit": asdict(report), "before": before, "after": after, **counts} | machine()


def main() -> None:
    config, data, train, dry_run = parse()
    resolved = asdict(config) | asdict(data) | asdict(train)
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return
    if report := run(config, data, train):
        write_json(Path(train.output_dir) / "config.json", resolved)
        write_json(Path(train.output_dir) / "report.json", report)
        for row in report["after"]:
            print(" ".join(f"{name} {value:.4g}" for name, value in row.items()))


if __name__ == "__main__":
    run_script(main)
