"""Sections of a page for the reports of edge and cloud. Used by write_results.py."""

from __future__ import annotations

from ee_diffusion.metrics.tables import markdown_table

_TOKENS = [
    "set",
    "candidate",
    "prompts",
    "tokens",
    "asked",
    "rougeL_full",
    "rougeL_reference",
    "differing",
    "differing_far",
    "gap",
]


def cloud_tokens(report: dict) -> str:
    note = (
        "`differing`: answers that differ from the whole model's; `differing_far`: where its two best logits were 1e-4 apart or more\n"
        "there, `gap`: median of that distance. `payload`: bytes of an answer. FLOPs, counted on `flops_prompts` of each set, in parts\n"
        "of the whole model's.\n"
    )
    table = markdown_table(report["rows"], [*_TOKENS, "payload", "cloud_flops", "edge_flops", "flops_prompts"])
    return "\n".join([table, note, f"Exits: {report['exits']}.\n"])


def cloud_clock(report: dict) -> str:
    note = (
        f"Edge, links and cloud are processes of one machine on {report['cores']} cores, one thread each. Seconds: medians over prompts;\n"
        "`total_ratio`: median ratio to `whole` at the same prompt and link; `cloud_saved`: of the sums; `rougeL`, `same` (answers): to\n"
        "`whole`.\n"
    )
    even = markdown_table(report["break_even"]) if report["break_even"] else "Too few answers for a break-even share.\n"
    said = "Share of asked tokens at which the total equals the whole model's, with a 95 % bootstrap interval over prompts:\n"
    return "\n".join([markdown_table(report["rows"]), note, said, even, f"Exits: {report['exits']}.\n"])


def cloud_rows(report: dict) -> str:
    return markdown_table(report["rows"])
