"""The family table as the tests saw it: one line a class, one column a check. Printed at the end of every run that tries the families.

Here: from pytest's reports to a table. Not here: the checks (diffusion/test_families.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

FILE = "tests/diffusion/test_families.py"
CHECKS = {
    "test_off_is_the_plain_model_and_detaching_restores_it": ("off is the plain model", "detached as before"),
    "test_an_exit_is_the_truncated_model": ("an exit is the truncated model",),
    "test_an_image_in_a_batch_is_the_image_alone": ("in a batch as alone",),
    "test_each_row_is_its_own_truncated_model_and_nothing_else_is_executed": ("work counted inside",),
}
COLUMNS = [column for columns in CHECKS.values() for column in columns]


def family_report(reports: Iterable[pytest.TestReport]) -> list[str]:
    """Lines of a table of the families that were tried; none if none was."""
    found: dict[str, dict[str, str]] = {}
    for report in reports:
        path, _, rest = report.nodeid.partition("::")
        test, _, name = rest.removesuffix("]").partition("[")
        if path == FILE and test in CHECKS and (report.when == "call" or report.failed):
            found.setdefault(name, {}).update(dict.fromkeys(CHECKS[test], "ok" if report.passed else "FAILED"))
    if not found:
        return []
    wide = max(map(len, found))
    lines = [f"{'class':{wide}}  {'  '.join(COLUMNS)}"]
    for name in sorted(found):
        cells = (f"{found[name].get(column, '-'):{len(column)}}" for column in COLUMNS)
        lines.append(f"{name:{wide}}  {'  '.join(cells)}".rstrip())
    green = sum(all(found[name].get(column) == "ok" for column in COLUMNS) for name in found)
    return [*lines, f"{green} of {len(found)} families hold in all {len(COLUMNS)} checks"]
