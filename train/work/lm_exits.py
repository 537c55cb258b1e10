"""Fit exits to a frozen language model: its states at the exits' depths, the exits before and after the fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ee_diffusion.decoding.exit_objective import ExitObjective, TokenStates, collect_states, exit_table
from ee_diffusion.decoding.fingerprint import fingerprint_of
from ee_diffusion.decoding.heads import LearnedExits
from ee_diffusion.training.config import LanguageModelConfig, PromptDataConfig, TrainConfig
from ee_diffusion.training.loop import Trainer
from ee_diffusion.training.prompts import PromptSource
from ee_diffusion.training.sources import TableSource
from train.train_lm_exits import HeadsConfig
from train.work.language_model import load_model, load_prompts
from train.work.report import process_state, write_reports

WINDOW = 16  # batches among which texts are sorted by length


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
    """The states on disk, or fresh ones that are then stored there."""
    depths = tuple(config.exit_depths)
    name = f"{fingerprint_of(model)} at {depths} on {source.fingerprint()}"
    with process_state().main_process_first():
        if not file.is_file():
            texts = batches(source, config.collect_batch_size)
            texts = tqdm(texts, desc="texts", total=math.ceil(len(source) / config.collect_batch_size), miniters=1)
            found = collect_states(model, texts, depths, name=name)
            file.parent.mkdir(parents=True, exist_ok=True)
            found.save(file)
    return TokenStates.load(file, name=name)


def build_exits(config: HeadsConfig, model: PreTrainedModel) -> LearnedExits:
    """Fresh exits, or those of `init_exits`. Raises ValueError where the latter have other widths."""
    depths, width = tuple(config.exit_depths), model.config.get_text_config().hidden_size
    sizes = {"adapter_width": config.adapter_width, "made_for": fingerprint_of(model)}
    exits = LearnedExits(depths, width, **sizes)
    if config.init_exits:
        exits = LearnedExits.load(config.init_exits).at(depths)
    if (exits.width, exits.adapter_width) != (width, config.adapter_width):
        raise ValueError(
            f"the exits in {config.init_exits} have width {exits.width} and adapters of {exits.adapter_width}, "
            f"expected {width} and adapter_width={config.adapter_width}"
        )
    exits.bind(model)
    return exits


def run(language: LanguageModelConfig, config: HeadsConfig, data: PromptDataConfig, train: TrainConfig) -> None:
    """Fit, and report what the exits predict before and after."""
    model, tokenizer = load_model(language)
    set_seed(train.seed)
    exits = build_exits(config, model)
    device = process_state().device
    model.to(device)
    exits.to(device)
    objective = ExitObjective(model, exits, teacher=config.teacher, sampled_tokens=config.sampled_tokens)
    file = Path(config.states or Path(train.output_dir) / "states.safetensors")
    prompts = load_prompts(language, tokenizer, data)
    fitted, held = find_states(config, model, prompts, file).split(config.held_out)
    before = exit_table(objective, held, batch_size=train.train_batch_size)
    names = ("teacher", "adapter_width", "sampled_tokens", "init_exits")
    trainer = Trainer(
        objective,
        TableSource(fitted, fitted.name),
        train,
        save=lambda folder, trained: trained.exits.save(folder / "exits.safetensors"),
        identity={name: getattr(config, name) for name in names} | {"backbone": fingerprint_of(model)},
    )
    report = {"fit": asdict(trainer.fit()), "before": before}
    if not trainer.accelerator.is_main_process:
        return
    with trainer.learner.averaged() as trained:
        report["after"] = exit_table(trained, held, batch_size=train.train_batch_size)
    report |= {"states": len(fitted), "held_out": len(held)}
    write_reports(report, language, config, data, train)
    for row in report["after"]:
        print(" ".join(f"{name} {value:.4g}" for name, value in row.items()))
