"""Fine-tune a causal language model under the layers that it will run: SkipDecode, or any schedule; plain and truncated as controls.

accelerate launch -m train.train_skipdecode --model MODEL --warm_up 4 --least 10 --most 20 --horizon 28 --lora_rank 16 \\
    --text_files e2e/devset.csv --prompt_templates '{mr}\\n' --answer_columns ref --output_dir runs/skip15

`--policy FILE` (of Policy.save) in the place of the four numbers: early termination, D3, uniform skipping. Neither: plain fine-tuning,
with `--keep N` of the first N layers alone. Without `--lora_rank` every weight trains. `--teacher MODEL`: learn from a
fine-tuned model at full depth, too (`--model MODEL` beside it starts from its weights). `--dry-run` prints the resolved settings;
`--resume_from_checkpoint latest` goes on after a stop. Writes model/ (transformers loads it; its tokenizer is in it), policy.json (made for
that model; in model/ too), log.jsonl, config.json, report.json.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_peft_available

from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.fingerprint import fingerprint_of
from ee_diffusion.decoding.methods import skipdecode
from ee_diffusion.decoding.model_specs import layers_of, model_spec_of
from ee_diffusion.decoding.skip_objective import SkipObjective
from ee_diffusion.training.checkpointing import write_json
from ee_diffusion.training.config import PromptDataConfig, TrainConfig
from ee_diffusion.training.loop import Trainer
from train.language_model import ModelConfig, flag, machine

if is_peft_available():
    from ee_diffusion.decoding.lora import add_lora, merged

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
A causal language model that was fine-tuned under a schedule of its layers, `{schedule}`.
It was made to run under that schedule: generate with the policy that lies beside the weights.

```python
from ee_diffusion import Policy, early_exit_generate
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("...", return_tensors="pt")
policy = Policy.load(f"{{folder}}/policy.json")
model.generate(**inputs, custom_generate=early_exit_generate, exit_policy=policy, max_new_tokens=40)
```
"""
DEFAULTS = {  # of the loop, where fine-tuning a language model differs from training a diffusion model
    "train_batch_size": 8,
    "learning_rate": 5e-4,
    "adam_weight_decay": 0.0,
    "lr_warmup_steps": 20,
    "max_train_steps": 500,
    "ema_decay": 0.95,
    "checkpointing_steps": 100,
}


@dataclass(frozen=True)
class SkipConfig(ModelConfig):
    """The layers that run, and what trains.

    Raises:
        ValueError: some of SkipDecode's numbers without the others, or beside a policy; truncation beside either; a teacher's part
            outside (0, 1] or without one.
    """

    warm_up: int | None = flag("SkipDecode: layers at the bottom that always run.")
    least: int | None = flag("SkipDecode: layers from token `horizon` on.")
    most: int | None = flag("SkipDecode: layers at the first token.")
    horizon: int | None = flag("SkipDecode: tokens from the most layers to the least; the task's median length.")
    policy: str | None = flag("A file that Policy.save wrote, in their place.")
    keep: int | None = flag("Plain fine-tuning of the first so many layers alone (a truncated model, as control).")
    lora_rank: int | None = flag("Train adapters of this rank, merged when saved; none: every weight.")
    teacher: str | None = flag("Folder or name of a model to learn from at full depth; none: the answers alone.")
    teacher_weight: float | None = flag("The teacher's part of the loss, above 0 to 1; none: 0.5 where there is one.")

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

    def rule(self) -> Policy:
        """What runs. Raises ValueError as the method does."""
        if self.policy is not None:
            return Policy.load(self.policy)
        if self.warm_up is None:
            return Policy()
        return skipdecode(warm_up=self.warm_up, least=self.least, most=self.most, horizon=self.horizon)

    def load_teacher(self) -> PreTrainedModel | None:
        """The model to learn from, if there is one."""
        return self.teacher and dataclasses.replace(self, model=self.teacher, gguf_file=None).load()[0]


def parse() -> tuple[SkipConfig, PromptDataConfig, TrainConfig, bool]:
    """Flags over the defaults."""
    parser = HfArgumentParser((SkipConfig, PromptDataConfig, TrainConfig), description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Print the resolved settings as JSON and exit."
    )
    parser.set_defaults(**DEFAULTS)
    *configs, rest = parser.parse_args_into_dataclasses()
    return *configs, rest.dry_run


def truncated(model: PreTrainedModel, keep: int) -> PreTrainedModel:
    """The model with its first layers alone. Raises ValueError for a number that it has not."""
    layers = len(layers_of(model))
    if not 1 <= keep < layers:
        raise ValueError(f"keep={keep}, expected within 1..{layers - 1}: the model has {layers} layers")
    if "num_hidden_layers" not in model.config.to_dict():
        raise ValueError(f"{type(model).__name__} says its number of layers by another name than num_hidden_layers")
    model.set_submodule(model_spec_of(model).layers, model.get_submodule(model_spec_of(model).layers)[:keep])
    model.config.num_hidden_layers = keep
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:keep]
    return model


def save(
    folder: Path, objective: SkipObjective, *, tokenizer: PreTrainedTokenizerBase, policy: Policy, adapted: bool
) -> None:
    """The model, its tokenizer, and the policy that belongs to it."""
    model = merged(objective.model) if adapted else objective.model
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if not policy.is_off:
        policy = dataclasses.replace(policy, made_for=(("model", fingerprint_of(model)),))
        for place in (folder, folder / "model"):  # the second travels with the weights
            policy.save(place / "policy.json")
        (folder / "model" / "README.md").write_text(CARD.format(schedule=policy.schedule), encoding="utf-8")


def run(config: SkipConfig, data: PromptDataConfig, train: TrainConfig) -> dict:
    """Fine-tune, and say what was done; empty on ranks other than the first."""
    if not train.output_dir:
        raise ValueError(f"output_dir={train.output_dir!r}, expected the folder to write to")
    if train.compile:
        raise ValueError("compile=True: layers that differ by position cannot be compiled")
    if config.lora_rank is not None and not is_peft_available():
        raise ImportError("LoRA needs peft, which is not installed: pip install 'ee-diffusion[lora]'")
    policy = config.rule()
    model, tokenizer = config.load()
    model = model if config.keep is None else truncated(model, config.keep)
    backbone = fingerprint_of(model)
    set_seed(train.seed)
    if config.lora_rank is not None:
        add_lora(model, rank=config.lora_rank)
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    model.to(device)
    teacher = config.load_teacher()
    teacher = None if teacher is None else teacher.to(device)
    weight = {} if config.teacher_weight is None else {"teacher_weight": config.teacher_weight}
    objective = SkipObjective(model, policy, num_steps=data.max_length, teacher=teacher, **weight)
    adapted = config.lora_rank is not None
    identity = {"policy": policy.to_dict(), "keep": config.keep, "lora_rank": config.lora_rank, "backbone": backbone}
    if teacher is not None:
        identity |= {"teacher": fingerprint_of(teacher), "teacher_weight": objective.teacher_weight}

    def export(folder: Path, trained: SkipObjective) -> None:
        save(folder, trained, tokenizer=tokenizer, policy=policy, adapted=adapted)

    if policy.is_off and PartialState().is_main_process:
        print("no schedule was given: plain fine-tuning, every layer runs")
    source = config.source(tokenizer, data)
    trainer = Trainer(objective, source, train, save=export, units=objective.units, identity=identity)
    report = trainer.fit()
    if not trainer.accelerator.is_main_process:
        return {}
    if policy.is_off:
        (Path(train.output_dir) / "policy.json").unlink(missing_ok=True)  # of an earlier training into this folder
    depth = objective.table.sum(1, dtype=torch.float32)  # (S,)
    return {"fit": asdict(report), "layers": len(layers_of(model)), "layers_by_step": depth[:64].tolist()} | machine()


def main() -> None:
    config, data, train, dry_run = parse()
    resolved = asdict(config) | asdict(data) | asdict(train)
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return
    if report := run(config, data, train):
        write_json(Path(train.output_dir) / "config.json", resolved)
        write_json(Path(train.output_dir) / "report.json", report)
        print(json.dumps(report["fit"]))


if __name__ == "__main__":
    run_script(main)
