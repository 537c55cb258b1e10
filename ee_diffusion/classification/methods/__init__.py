"""Published methods for classifiers, one file each: policy, loss and kinds of exit. Add a paper with a file and a row of `METHODS`."""

from __future__ import annotations

from ee_diffusion.classification.method import POOLED, SHARED, Head, Judge, Method
from ee_diffusion.classification.methods.berxit import BERXIT, berxit
from ee_diffusion.classification.methods.confidence import PLAIN, confidence
from ee_diffusion.classification.methods.deebert import DEEBERT, deebert
from ee_diffusion.classification.methods.fastbert import FASTBERT, fastbert
from ee_diffusion.classification.methods.jei_dnn import JEI_DNN, jei_dnn
from ee_diffusion.classification.methods.magic_pyramid import HARD, SOFT
from ee_diffusion.classification.methods.pabee import PABEE, pabee, pabee_regression
from ee_diffusion.classification.methods.palbert import PALBERT, PONDERNET, palbert, pondernet
from ee_diffusion.core.registry import add_row

__all__ = [
    "METHODS",
    "berxit",
    "confidence",
    "deebert",
    "fastbert",
    "head_named",
    "jei_dnn",
    "judge_named",
    "method_named",
    "pabee",
    "pabee_regression",
    "palbert",
    "pondernet",
    "register_method",
]

METHODS: dict[str, Method] = {
    "plain": PLAIN,
    "magic_soft": SOFT,
    "magic_hard": HARD,
    "palbert": PALBERT,
    "pondernet": PONDERNET,
    "pabee": PABEE,
    "deebert": DEEBERT,
    "fastbert": FASTBERT,
    "berxit": BERXIT,
    "jei_dnn": JEI_DNN,
}


def register_method(name: str, method: Method) -> None:
    """Make a method known to `ClassifierExits` and `ClassifierObjective`.

    Raises:
        ValueError: the name is taken; a head or a judge that has the name of another one.
    """
    for kind, known in ((method.head, heads()), (method.judge, judges())):
        if kind is not None and known.get(kind.name, kind) != kind:
            raise ValueError(f"{kind.name!r} is the name of another {type(kind).__name__.lower()} already")
    add_row(METHODS, name, method, called="the table of methods")


def method_named(name: str) -> Method:
    """The method of that name. Raises ValueError if there is none."""
    if name not in METHODS:
        raise ValueError(f"method={name!r}, expected one of {sorted(METHODS)}")
    return METHODS[name]


def heads() -> dict[str, Head]:
    """The kinds of exit heads, by name."""
    return {head.name: head for head in (SHARED, POOLED, *(method.head for method in METHODS.values()))}


def judges() -> dict[str, Judge | None]:
    """The kinds of learned judges, by name; None is that of exits without one."""
    found = (method.judge for method in METHODS.values())
    return {"none": None} | {judge.name: judge for judge in found if judge is not None}


def head_named(name: str) -> Head:
    """The kind of exit heads of that name. Raises ValueError if there is none."""
    if name not in heads():
        raise ValueError(f"head={name!r}, expected one of {sorted(heads())}")
    return heads()[name]


def judge_named(name: str) -> Judge | None:
    """The kind of learned judge of that name; None for `none`. Raises ValueError if there is none."""
    if name not in judges():
        raise ValueError(f"judge={name!r}, expected one of {sorted(judges())}")
    return judges()[name]
