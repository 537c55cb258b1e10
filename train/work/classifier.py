"""Train a classifier and its exits: the model to start from, its data, the objective of the method, the folder that is written."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    ViTImageProcessorPil,
)

from ee_diffusion.classification.activations import StoredStates, fingerprint_of, stored_states
from ee_diffusion.classification.classifier import EarlyExitClassifier, EarlyExitConfig, check_folder
from ee_diffusion.classification.exits import ClassifierExits, ClassifierHeads
from ee_diffusion.classification.methods import METHODS, method_named
from ee_diffusion.classification.model_specs import model_spec_of
from ee_diffusion.classification.objective import ClassifierObjective
from ee_diffusion.classification.truncate import truncate
from ee_diffusion.core.devices import device_named
from ee_diffusion.training.config import ImageDataConfig, TextDataConfig, TrainConfig
from ee_diffusion.training.datasets import Source
from ee_diffusion.training.loop import Trainer
from ee_diffusion.training.sources import TableSource, load_labeled_images
from ee_diffusion.training.text_datasets import load_text_source, once
from train.train_classifier import ClassifierConfig
from train.work.report import write_reports


def check_flags(config: ClassifierConfig) -> None:
    """Raises ValueError for an unknown method, or a flag that the method does not use."""
    method_named(config.method)
    for flag in fields(config):
        value, methods = getattr(config, flag.name), methods_of(flag.name)
        if config.method not in methods and value != flag.default:
            raise ValueError(f"{flag.name}={value}: method {config.method} does not use it, {methods} do")


def methods_of(flag: str) -> tuple[str, ...]:
    """The methods that use a flag."""
    if flag in ("exit_depths", "pooling"):
        return tuple(name for name, method in METHODS.items() if method.trains != "model")
    if flag == "states":
        return tuple(name for name, method in METHODS.items() if method.trains == "exits")
    own = {name: {one.name for one in fields(method.settings)} for name, method in METHODS.items()}
    return tuple(name for name in own if flag in own[name]) or tuple(METHODS)


def build_model(config: ClassifierConfig, *, images: bool) -> tuple[PreTrainedModel, tuple[float, ...] | None]:
    """The stock classifier to start from, and its pruning thresholds, if it has some."""
    model_config = AutoConfig.from_pretrained(config.init_from)
    if isinstance(model_config, EarlyExitConfig):
        started = EarlyExitClassifier.from_pretrained(config.init_from)
        if config.num_labels not in (None, started.config.num_labels):
            raise ValueError(
                f"{config.init_from} has {started.config.num_labels} labels, num_labels={config.num_labels}"
            )
        return started.model, started.pruning
    auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    if config.num_labels is not None:
        model_config.num_labels = config.num_labels
    if config.random_weights:
        return auto.from_config(model_config, dtype=torch.float32), None
    return auto.from_pretrained(config.init_from, config=model_config, dtype=torch.float32), None


def build_objective(config: ClassifierConfig, *, images: bool = False, micro_steps: int = 1) -> ClassifierObjective:
    model, pruning = build_model(config, images=images)
    if config.num_layers is not None:
        if pruning is not None:
            raise ValueError(
                "num_layers of a classifier with pruning thresholds for all its layers, expected one without"
            )
        model = truncate(model, config.num_layers)
    method = method_named(config.method)
    settings = method.settings_from(vars(config), name=config.method)
    depths = None if config.exit_depths is None else tuple(config.exit_depths)
    exits = ClassifierExits.for_model(model, depths, **method.exits, pooling=config.pooling)
    classifier = EarlyExitClassifier.from_classifier(model, exits)
    classifier.pruning = pruning
    counts = {"parts": config.length_parts, "micro_steps": micro_steps}
    return ClassifierObjective(classifier, method=config.method, settings=settings, **counts)


def text_source(objective: ClassifierObjective, data: TextDataConfig, tokenizer) -> Source:
    model = objective.classifier.model
    longest = model_spec_of(model).positions(model)
    if longest is not None and data.max_length > longest:
        raise ValueError(f"max_length={data.max_length}, expected at most the model's {longest} positions")
    return load_text_source(
        data,
        lambda texts: tokenizer(texts, truncation=True, max_length=data.max_length)["input_ids"],
        num_labels=objective.classifier.config.num_labels,
        pad=tokenizer.pad_token_id,
    )


def stored(objective: ClassifierObjective, source: Source, path: Path, size: int) -> Source:
    """What the exits of a frozen model see of a source, computed once."""
    classifier = objective.classifier
    heads, pruning = ClassifierHeads(classifier.model, classifier.exits), classifier.pruning
    if path.exists():
        states = StoredStates.load(path, origin=fingerprint_of(heads, pruning, source.fingerprint()))
    else:
        device = device_named(None)
        classifier.to(device)
        states = stored_states(heads, once(source, size, device), pruning=pruning, data=source.fingerprint())
        states.save(path)
    return TableSource(states, states.origin)


def run(config: ClassifierConfig, texts: TextDataConfig, images: ImageDataConfig, train: TrainConfig) -> None:
    """Raises ValueError for flags that contradict the method, the folder of a run in the place of a model, and as what it calls does."""
    check_flags(config)
    check_folder(config.init_from)
    if config.num_labels is None:
        config = replace(config, num_labels=AutoConfig.from_pretrained(config.init_from).num_labels)
    set_seed(train.seed)
    on_images = bool(images.sources())
    objective = build_objective(config, images=on_images, micro_steps=train.gradient_accumulation_steps)
    if on_images:
        processor = ViTImageProcessorPil(size={"height": images.resolution, "width": images.resolution})
        source = load_labeled_images(images, num_labels=config.num_labels)
    else:
        processor = AutoTokenizer.from_pretrained(config.init_from)
        source = text_source(objective, texts, processor)
    if config.states:
        source = stored(objective, source, Path(config.states), train.train_batch_size)

    def save(folder: Path, trained: ClassifierObjective) -> None:
        trained.trained().save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")

    units = None if objective.token_gates is None else objective.units
    trainer = Trainer(objective, source, train, save=save, units=units, identity=asdict(config))
    report = asdict(trainer.fit())
    write_reports(report, config, texts, images, train)
    if trainer.accelerator.is_main_process:
        print(json.dumps(report))
