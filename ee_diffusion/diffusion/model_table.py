"""The family table as Markdown, for docs/attach.md: `python -m ee_diffusion.diffusion.model_table`.

Here: words for the facts of model_specs.py. Not here: the facts.
"""

from __future__ import annotations

from ee_diffusion.diffusion.model_specs import MODEL_SPECS, ModelSpec

HEADER = ("class", "blocks", "a block returns", "row arguments", "added between blocks", "guidance", "rows that stop")


def family_table() -> str:
    """One line a class, in the order of the table."""
    lines = [HEADER, tuple("---" for _ in HEADER), *(_row(family) for family in MODEL_SPECS.values())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(family: ModelSpec) -> tuple[str, ...]:
    lists = " then ".join(f"`{name}`" for name in family.lists)
    joined = [f"`{name}`: one sequence, text first" for name in family.concatenated]
    between = [f"`{name}` (ControlNet)" for name in family.residuals]
    between += [f"`{name}` (long skips)" for name in family.earlier]
    guidance = "one batch" if family.guidance == "batch" else "two calls, the second follows the first"
    return (
        f"`{family.class_name}`",
        lists,
        "; ".join([family.returns, *joined]),
        ", ".join(f"`{name}`" for name in family.row_arguments) or "none",
        ", ".join(between) or "nothing",
        guidance,
        f"carried along: {family.keeps_exited_rows}" if family.keeps_exited_rows else "dropped",
    )


if __name__ == "__main__":
    print(family_table())
