"""The table of families says FAILED where a check failed, and counts as green only what held in all of them."""

from __future__ import annotations

import inspect

import pytest
from diffusion import test_families
from family_report import CHECKS, FILE, family_report


def report(test: str, name: str, outcome: str = "passed", when: str = "call") -> pytest.TestReport:
    return pytest.TestReport(f"{FILE}::{test}[{name}]", (FILE, 1, test), {}, outcome, None, when)


def test_it_is_green_only_where_everything_held():
    tests = list(CHECKS)
    reports = [report(test, "Good") for test in tests] + [report(tests[0], "Half")]
    reports += [report(test, "Bad", "failed" if test == tests[1] else "passed") for test in tests]
    reports += [report(test, "Setup", "passed") for test in tests[1:]] + [report(tests[0], "Setup", "failed", "setup")]
    reports += [report("test_something_else", "Else"), report(tests[0], "Good", "passed", "setup")]
    lines = family_report(reports)
    assert [line.split()[0] for line in lines] == ["class", "Bad", "Good", "Half", "Setup", "1"]
    assert lines[1].count("FAILED") == 1
    assert lines[2].split()[1:] == ["ok"] * 5
    assert lines[3].split()[1:] == ["ok", "ok", "-", "-", "-"]
    assert lines[4].count("FAILED") == 2
    assert lines[5] == "1 of 4 families hold in all 5 checks"
    assert family_report([]) == []


def test_every_check_is_a_test_of_every_family():
    for test in CHECKS:
        marks = inspect.getattr_static(test_families, test).pytestmark
        assert any(mark.args[1] is test_families.TINY for mark in marks)
