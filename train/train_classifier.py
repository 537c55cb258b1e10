"""Fine-tune a classifier of texts or images, alone or with exits: PALBERT, PonderNet, PABEE, DeeBERT, FastBERT, BERxiT, JEI-DNN...

accelerate launch --num_cpu_threads_per_process 2 -m train.train_classifier --method palbert --init_from MODEL --num_labels 2 \
    --text_files sst2/train_full.tsv --text_columns sentence --output_dir runs/palbert

`--init_from`: a classifier or encoder of transformers, or the `model` folder of an earlier run. deebert, fastbert and jei_dnn train exits
on a frozen model: fine-tune it first with `--method plain`; `--states FILE` runs it over the data once and stores what the exits read.
Magic Pyramid is magic_soft, then magic_hard, then fastbert. Images come from `--train_data_files`, `--train_data_dir` or
`--dataset_name`; `--random_weights true` takes the configuration of init_from alone. `--dry-run` prints the resolved settings;
`--resume_from_checkpoint latest` continues after a stop. Writes model/ (for `EarlyExitClassifier.from_pretrained` and transformers'
pipelines, with its tokenizer or image processor), log.jsonl, config.json, report.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ee_diffusion.cli.errors import run_script
from ee_diffusion.training.config import ImageDataConfig, TextDataConfig, TrainConfig
from train.launch import launch


@dataclass(frozen=True)
class ClassifierConfig:
    """The model and the method.

    Raises:
        ValueError: fewer than one label.
    """

    method: str = HfArg(
        default="plain", help="plain, magic_soft, magic_hard (no exits), palbert, pondernet, pabee, deebert, ..."
    )
    init_from: str | None = HfArg(default=None, help="Folder or Hub name to start from.")
    num_labels: int | None = HfArg(default=None, help="Classes; 1: regression; none: as many as init_from has.")
    exit_depths: list[int] | None = HfArg(default=None, help="Executed layers at each exit; none: all but the last.")
    pooling: str = HfArg(default="first", help="Input of exits: first (the first token) or mean (of all tokens).")
    prior_rate: float = HfArg(default=0.1, help="lambda_p of the geometric prior (palbert, pondernet).")
    divergence_weight: float = HfArg(default=0.5, help="beta, the weight of the KL (palbert, pondernet).")
    divergence_direction: str = HfArg(default="posterior_to_prior", help="or prior_to_posterior, as the released code.")
    trade_off: float | None = HfArg(default=None, help="jei_dnn's lambda: nats for the whole model's cost.")
    warm_up: int = HfArg(default=0, help="Batches of heads alone at the beginning (jei_dnn).")
    phase: int = HfArg(default=200, help="Batches of each phase (jei_dnn).")
    released: bool = HfArg(default=False, help="The released weighting that cancels (jei_dnn).")

    mask_weight: float | None = HfArg(default=None, help="What a kept token costs (magic_soft).")
    temperature: float | None = HfArg(default=None, help="T of the fading (magic_soft).")
    top_threshold: float | None = HfArg(default=None, help="The last layer's first threshold (magic_soft).")
    bottom_threshold: float = HfArg(default=0.0, help="The first layer's first threshold (magic_soft).")

    num_layers: int | None = HfArg(default=None, help="Keep so many first layers: the truncated control.")
    random_weights: bool = HfArg(default=False, help="Take the configuration of init_from, not its weights.")
    length_parts: int = HfArg(default=1, help="Parts of like length that a batch of texts runs in.")
    states: str | None = HfArg(default=None, help="File of states of a frozen model; written if absent.")

    def __post_init__(self):
        if self.num_labels is not None and self.num_labels < 1:
            raise ValueError(f"num_labels={self.num_labels}, expected at least 1")


def check(config: ClassifierConfig, _texts: TextDataConfig, _images: ImageDataConfig, train: TrainConfig) -> None:
    if config.method == "jei_dnn" and train.max_train_steps <= config.warm_up:
        raise ValueError(
            f"max_train_steps={train.max_train_steps} with warm_up={config.warm_up}: the gates would not be trained"
        )


def main() -> None:
    configs = (ClassifierConfig, TextDataConfig, ImageDataConfig, TrainConfig)
    launch("train.work.classifier:run", __doc__, *configs, required=("output_dir", "init_from"), check=check)


if __name__ == "__main__":
    run_script(main)
