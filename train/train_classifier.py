"""Fine-tune a classifier of texts or images, alone or with exits: PALBERT, PonderNet, PABEE, DeeBERT, FastBERT, BERxiT, JEI-DNN...

accelerate launch --num_cpu_threads_per_process 2 -m train.train_classifier --method palbert --init_from MODEL --num_labels 2 \
    --text_files sst2/train_full.tsv --text_columns sentence --output_dir runs/palbert

`--init_from`: a classifier or encoder of transformers, or the `model` folder of an earlier run. deebert, fastbert and jei_dnn train exits
on a frozen one: fine-tune it first with `--method plain`; `--states FILE` runs that one over the data once and keeps what exits see. Magic
Pyramid is magic_soft, then magic_hard, then fastbert. Images come from `--train_data_files`, `--train_data_dir` or `--dataset_name`, and
`--random_weights true` begins with the configuration of init_from alone. `--dry-run` prints the resolved settings;
`--resume_from_checkpoint latest` goes on after a stop. Writes model/ (`EarlyExitClassifier.from_pretrained` and transformers' pipelines
take it, its tokeniser or image processor is in it), log.jsonl, config.json, report.json.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
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
from ee_diffusion.cli.errors import run_script
from ee_diffusion.core.devices import device_named
from ee_diffusion.training.checkpointing import write_json
from ee_diffusion.training.config import ImageDataConfig, TextDataConfig, TrainConfig
from ee_diffusion.training.datasets import Source
from ee_diffusion.training.loop import Trainer
from ee_diffusion.training.sources import TableSource, load_labelled_images
from ee_diffusion.training.text_datasets import load_text_source, once


def _flag(help: str, default=None):
    return field(default=default, metadata={"help": help})


def _methods_of(flag: str) -> tuple[str, ...]:
    """The methods that a flag says something to."""
    if flag in ("exit_depths", "pooling"):
        return tuple(name for name, method in METHODS.items() if method.trains != "model")
    if flag == "states":
        return tuple(name for name, method in METHODS.items() if method.trains == "exits")
    own = {name: {one.name for one in fields(method.settings)} for name, method in METHODS.items()}
    return tuple(name for name in own if flag in own[name]) or tuple(METHODS)


@dataclass(frozen=True)
class ClassifierConfig:
    """The model and the method.

    Raises:
        ValueError: an unknown method, fewer than one label, a flag that is not the method's.
    """

    method: str = _flag(
        "plain, magic_soft, magic_hard (no exits), palbert, pondernet, pabee, deebert, fastbert, berxit or jei_dnn.",
        "plain",
    )
    init_from: str | None = _flag("Folder or Hub name to start from.")
    num_labels: int | None = _flag("Classes; 1: regression; none: as many as init_from has.")
    exit_depths: list[int] | None = _flag("Executed layers at each exit; none: after every layer but the last.")
    pooling: str = _flag("What exits look at: first (the first token) or mean (of all tokens).", "first")
    prior_rate: float = _flag("lambda_p of the geometric prior (palbert, pondernet).", 0.1)
    divergence_weight: float = _flag("beta, the weight of the KL (palbert, pondernet).", 0.5)
    divergence_direction: str = _flag(
        "posterior_to_prior (the formula) or prior_to_posterior (the released code).", "posterior_to_prior"
    )
    trade_off: float | None = _flag("lambda of jei_dnn: what the whole model's cost is worth in nats.")
    warm_up: int = _flag("Batches of heads alone at the beginning (jei_dnn).", 0)
    phase: int = _flag("Batches of each phase (jei_dnn).", 200)
    released: bool = _flag("The released weighting that cancels (jei_dnn).", False)

    mask_weight: float | None = _flag("What a kept token costs (magic_soft).")
    temperature: float | None = _flag("T of the fading (magic_soft).")
    top_threshold: float | None = _flag("The last layer's saliency threshold to begin with (magic_soft).")
    bottom_threshold: float = _flag("The first layer's saliency threshold to begin with (magic_soft).", 0.0)

    num_layers: int | None = _flag("Keep only the first so many layers of init_from: the truncated control.")
    random_weights: bool = _flag("Take the configuration of init_from, not its weights.", False)
    length_parts: int = _flag("Parts of like length that a batch of texts runs in.", 1)
    states: str | None = _flag("File of stored states for exits on a frozen model; written where absent.")

    def __post_init__(self):
        method_named(self.method)
        if self.num_labels is not None and self.num_labels < 1:
            raise ValueError(f"num_labels={self.num_labels}, expected at least 1")
        for flag in fields(self):
            given, methods = getattr(self, flag.name), _methods_of(flag.name)
            if self.method not in methods and given != flag.default:
                raise ValueError(f"{flag.name}={given}: method {self.method} does not look at it, {methods} do")


Configs = tuple[ClassifierConfig, TextDataConfig, ImageDataConfig, TrainConfig, bool]


def parse() -> Configs:
    kinds = (ClassifierConfig, TextDataConfig, ImageDataConfig, TrainConfig)
    parser = HfArgumentParser(kinds, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Print the resolved settings as JSON and exit."
    )
    *configs, rest = parser.parse_args_into_dataclasses()
    return *configs, rest.dry_run


def settled(config: ClassifierConfig, train: TrainConfig) -> ClassifierConfig:
    """The settings with the number of labels in them.

    Raises:
        ValueError: no model or the folder of a run in its place, a run of jei_dnn that ends in its warm-up.
    """
    if not config.init_from:
        raise ValueError(f"init_from={config.init_from!r}, expected the folder or name of a model to start from")
    check_folder(config.init_from)
    if config.method == "jei_dnn" and train.max_train_steps <= config.warm_up:
        raise ValueError(
            f"max_train_steps={train.max_train_steps} with warm_up={config.warm_up}: the gates would not be trained"
        )
    if config.num_labels is not None:
        return config
    return replace(config, num_labels=AutoConfig.from_pretrained(config.init_from).num_labels)


def build_model(config: ClassifierConfig, *, images: bool) -> tuple[PreTrainedModel, tuple[float, ...] | None]:
    """The stock classifier to start from, and its pruning thresholds, if it has some."""
    described = AutoConfig.from_pretrained(config.init_from)
    if isinstance(described, EarlyExitConfig):
        begun = EarlyExitClassifier.from_pretrained(config.init_from)
        if config.num_labels not in (None, begun.config.num_labels):
            raise ValueError(f"{config.init_from} has {begun.config.num_labels} labels, num_labels={config.num_labels}")
        return begun.model, begun.pruning
    auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    if config.num_labels is not None:
        described.num_labels = config.num_labels
    if config.random_weights:
        return auto.from_config(described, dtype=torch.float32), None
    return auto.from_pretrained(config.init_from, config=described, dtype=torch.float32), None


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


def main() -> None:
    config, data, pictures, train, dry_run = parse()
    resolved = asdict(config) | asdict(data) | asdict(pictures) | asdict(train)
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return
    config = settled(config, train)
    resolved |= asdict(config)
    set_seed(train.seed)
    images = bool(pictures.sources())
    objective = build_objective(config, images=images, micro_steps=train.gradient_accumulation_steps)
    if images:
        processor = ViTImageProcessorPil(size={"height": pictures.resolution, "width": pictures.resolution})
        source = load_labelled_images(pictures, num_labels=config.num_labels)
    else:
        processor = AutoTokenizer.from_pretrained(config.init_from)
        source = text_source(objective, data, processor)
    if config.states:
        source = stored(objective, source, Path(config.states), train.train_batch_size)

    def save(folder: Path, trained: ClassifierObjective) -> None:
        trained.trained().save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")

    units = None if objective.token_gates is None else objective.units
    trainer = Trainer(objective, source, train, save=save, units=units, identity=asdict(config))
    report = asdict(trainer.fit())
    if trainer.accelerator.is_main_process:
        write_reports(Path(train.output_dir), resolved, report, trainer.accelerator.num_processes)


def write_reports(directory: Path, resolved: dict, report: dict, processes: int) -> None:
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = {"device": device, "processes": processes, "torch": torch.__version__}
    write_json(directory / "config.json", resolved)
    write_json(directory / "report.json", report | machine)
    print(json.dumps(report))


if __name__ == "__main__":
    run_script(main)
