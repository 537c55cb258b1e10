"""One step of each masked loss, in float64, on texts of unequal length; as one of two processes: token_run.py FOLDER

Here: the runs of tests/training/test_token_means.py; 4 texts a step. Writes the gradient that the optimizer is
given, and the scalars.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from classification.tiny_classifiers import exits_for
from classification.tiny_classifiers import model_named as classifier_named
from language import VOCABULARY, model_named
from safetensors.torch import save_file
from torch import Tensor, nn

from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.methods.magic_pyramid import SoftPruningSettings
from ee_diffusion.classification.objective import ClassifierObjective
from ee_diffusion.decoding.exit_objective import ExitObjective, collect_states
from ee_diffusion.decoding.heads import LearnedExits
from ee_diffusion.decoding.methods import skipdecode
from ee_diffusion.decoding.skip_objective import SkipObjective
from ee_diffusion.training.config import TrainConfig
from ee_diffusion.training.datasets import Source
from ee_diffusion.training.loop import Trainer
from ee_diffusion.training.prompts import PromptSource
from ee_diffusion.training.sources import TableSource
from ee_diffusion.training.text_datasets import TextSource

TEXTS = 4
LENGTHS = (1, 9, 3, 6)  # of the answers


def texts() -> tuple[list[list[int]], list[int]]:
    """Token ids of prompts with answers, and the prompts' lengths."""
    generator = torch.Generator().manual_seed(3)
    prompts = [2, 4, 3, 5]
    sizes = [prompt + answer for prompt, answer in zip(prompts, LENGTHS, strict=True)]
    return [torch.randint(2, VOCABULARY, (size,), generator=generator).tolist() for size in sizes], prompts


def skip(taught: bool) -> tuple[nn.Module, Source]:
    model = copy.deepcopy(model_named("llama"))
    teacher = copy.deepcopy(model_named("llama")) if taught else None
    policy = skipdecode(warm_up=1, least=2, most=5, horizon=5)
    ids, prompts = texts()
    first = torch.tensor([ids[0][: prompts[0]]])
    ids[0][-1] = int(model(first).logits[0, -1].argmax())  # right, and a text of one token: no mean of means
    return SkipObjective(model, policy, num_steps=max(LENGTHS), teacher=teacher), PromptSource(ids, prompts, pad=0)


def exits() -> tuple[nn.Module, Source]:
    model = copy.deepcopy(model_named("llama"))
    torch.manual_seed(0)
    heads = LearnedExits((2, 4), 32, adapter_width=4).double().bind(model)
    source = PromptSource(*texts(), pad=0)
    states = collect_states(model, [source.batch(torch.arange(TEXTS), torch.arange(TEXTS))], (2, 4), name="states")
    return ExitObjective(model, heads, teacher="model"), TableSource(states, "states")


def soft() -> tuple[nn.Module, Source]:
    """Magic Pyramid's soft stage: answers are a mean over texts, kept tokens over tokens."""
    model = classifier_named("Bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    classifier = EarlyExitClassifier.from_classifier(model, exits_for(model, head="shared", judge="none"))
    settings = SoftPruningSettings(mask_weight=1.0, temperature=0.01, top_threshold=0.1)
    tokens = [[token % model.config.vocab_size for token in ids[:9]] for ids in texts()[0]]
    objective = ClassifierObjective(classifier, method="magic_soft", settings=settings)
    return objective, TextSource(tokens, torch.tensor([0, 1, 2, 1]), pad=0)


def turns(micro_steps: int) -> tuple[nn.Module, Source]:
    """BERxiT: the first step trains the model's own answer alone, in all its parts, the next one all answers."""
    model = classifier_named("Bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    classifier = EarlyExitClassifier.from_classifier(model, exits_for(model, head="pooled", judge="correctness"))
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    objective = ClassifierObjective(classifier, method="berxit", micro_steps=micro_steps)
    return objective, soft()[1]


RUNS: dict[str, Callable[[int], tuple[nn.Module, Source]]] = {
    "skip": lambda _: skip(False),
    "taught": lambda _: skip(True),
    "exits": lambda _: exits(),
    "soft": lambda _: soft(),
    "turns": turns,
}
MASKED = ("skip", "taught", "soft")  # the others' means are over samples (of "exits": a sample is a token)


def run(name: str, folder: Path, *, micro_steps: int = 1, ranks: int = 1, units: bool = True) -> dict[str, Tensor]:
    """The gradient of the step, by parameter, and the log's scalars; written to step.safetensors, too."""
    objective, source = RUNS[name](micro_steps)
    config = TrainConfig(
        output_dir=str(folder),
        train_batch_size=TEXTS // micro_steps // ranks,
        gradient_accumulation_steps=micro_steps,
        max_train_steps=1,
        logging_steps=1,
        use_ema=False,
    )
    asked = objective.units if units and name in MASKED else None
    trainer = Trainer(objective, source, config, save=lambda to, trained: None, units=asked)
    update, found, journal = trainer.learner.update, {}, trainer.journal.add

    def add(terms: dict[str, Tensor]) -> None:
        journal(terms)
        for term, value in terms.items():
            found[f"mean {term}"] = found.get(f"mean {term}", 0.0) + value.detach().double() / micro_steps

    def updating() -> None:
        found.update({key: trainer.accelerator.reduce(one, "mean") for key, one in found.items()})
        found.update({key: one.grad.clone() for key, one in objective.named_parameters() if one.grad is not None})
        update()

    trainer.learner.update, trainer.journal.add = updating, add
    trainer.accelerator.end_training = lambda: None  # which ends the processes' group: other runs follow
    trainer.fit()
    if trainer.accelerator.is_main_process:
        save_file({key: one.contiguous() for key, one in found.items()}, folder / "step.safetensors")
    return found


if __name__ == "__main__":
    for one in RUNS:
        run(one, Path(sys.argv[1]) / one, ranks=2)
