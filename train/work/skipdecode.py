"""Fine-tune a language model under the layers that it will run: its schedule, its controls, the folder that is written."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.fingerprint import fingerprint_of
from ee_diffusion.decoding.methods import skipdecode
from ee_diffusion.decoding.model_specs import layers_of, model_spec_of
from ee_diffusion.decoding.skip_objective import SkipObjective
from ee_diffusion.decoding.truncate import truncate
from ee_diffusion.training.config import LanguageModelConfig, PromptDataConfig, TrainConfig
from ee_diffusion.training.loop import Trainer
from ee_diffusion.training.lora import add_lora, merged
from train.train_skipdecode import SkipConfig
from train.work.language_model import load_model, load_prompts
from train.work.report import process_state, write_reports

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
A causal language model that was fine-tuned under a schedule of its layers, `{schedule}`.
It was made to run under that schedule: generate with the policy beside the weights.

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


def policy_of(config: SkipConfig) -> Policy:
    """What runs. Raises ValueError as the method does."""
    if config.policy is not None:
        return Policy.load(config.policy)
    if config.warm_up is None:
        return Policy()
    return skipdecode(warm_up=config.warm_up, least=config.least, most=config.most, horizon=config.horizon)


def save(folder: Path, model: PreTrainedModel, policy: Policy) -> None:
    """The model and the policy that belongs to it."""
    model.save_pretrained(folder / "model")
    if not policy.is_off:
        policy = replace(policy, made_for=(("model", fingerprint_of(model)),))
        for place in (folder, folder / "model"):  # the second travels with the weights
            policy.save(place / "policy.json")
        (folder / "model" / "README.md").write_text(CARD.format(schedule=policy.schedule), encoding="utf-8")


def run(language: LanguageModelConfig, config: SkipConfig, data: PromptDataConfig, train: TrainConfig) -> None:
    """Fine-tune, and report what was done.

    Raises:
        ImportError: LoRA without peft. ValueError: as what it calls does.
    """
    policy, state = policy_of(config), process_state()
    model, tokenizer = load_model(language)
    model = model if config.keep is None else truncate(model, config.keep)
    identity = {"policy": policy.to_dict(), "keep": config.keep, "lora_rank": config.lora_rank}
    identity["backbone"] = fingerprint_of(model)
    set_seed(train.seed)
    if config.lora_rank is not None:
        add_lora(model, [model_spec_of(model).layers], rank=config.lora_rank)
    model.to(state.device)
    taught = {}
    if config.teacher is not None:
        taught["teacher"] = load_model(replace(language, model=config.teacher, gguf_file=None))[0].to(state.device)
        taught |= {} if config.teacher_weight is None else {"teacher_weight": config.teacher_weight}
    objective = SkipObjective(model, policy, num_steps=data.max_length, **taught)
    if taught:
        identity |= {"teacher": fingerprint_of(taught["teacher"]), "teacher_weight": objective.teacher_weight}

    def export(folder: Path, trained: SkipObjective) -> None:
        save(folder, merged(trained.model), policy)
        tokenizer.save_pretrained(folder / "model")

    if policy.is_off and state.is_main_process:
        print("no schedule was given: plain fine-tuning, every layer runs")
    source = load_prompts(language, tokenizer, data)
    trainer = Trainer(objective, source, train, save=export, units=objective.units, identity=identity)
    fit = asdict(trainer.fit())
    if not state.is_main_process:
        return
    if policy.is_off:
        (Path(train.output_dir) / "policy.json").unlink(missing_ok=True)  # of an earlier training into this folder
    depth = objective.table.sum(1, dtype=torch.float32)  # (S,)
    counts = {"layers": len(layers_of(model)), "layers_by_step": depth[:64].tolist()}
    write_reports({"fit": fit} | counts, language, config, data, train)
    print(json.dumps(fit))
