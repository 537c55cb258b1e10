"""Traces and reports: needed against ran, files that are whole or refused, joining runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from factories import IMAGES, LAYOUTS, driver_named, run
from safetensors.torch import save_file

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.replay import replay
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.core.trace import Trace

PLAN = Policy(DepthTable(((0, 1, 2, 4, 6, 6, 2) * 2, (6,) * 14)))


@pytest.fixture
def trace() -> Trace:
    return run(driver_named("plain-output"), PLAN, LAYOUTS["joint"]).trace


def test_needed_is_allowed_and_below_the_depth(trace: Trace):
    assert trace.needed.sum(2).tolist() == [[0, 1, 2, 4, 6, 6, 2], [6] * 7]
    assert torch.equal(trace.needed * 2, trace.ran.int())
    cut = run(driver_named("plain-output"), Policy(schedule=FixedDepth(2)), LAYOUTS["single"]).trace
    assert (cut.needed.sum(2) == 2).all()


def test_report(trace: Trace):
    report = trace.report()
    assert (report.num_steps, report.num_samples, report.num_layers) == (2, 7, 6)
    assert report.mean_executed == pytest.approx((21 + 42) / 14)
    assert report.mean_needed == pytest.approx((21 + 42) / 14)
    assert report.executed_per_step == pytest.approx((3.0, 6.0))
    assert report.spread_per_step == pytest.approx((((9 + 4 + 1 + 1 + 9 + 9 + 1) / 7) ** 0.5, 0.0))
    assert report.depth_histogram == {0: 1, 1: 1, 2: 2, 4: 1, 6: 9}
    assert (report.measured_rows, report.answered_rows) == (0, 10)
    assert report.fraction_executed == pytest.approx(4.5 / 6)
    text = report.summary()
    assert "4.50 of 6 (75.0 %)" in text
    assert "nothing was skipped" not in text
    assert "needed by the policy" not in text


def test_a_report_says_when_nothing_was_skipped_and_when_work_was_not_needed(trace: Trace):
    everything = run(driver_named("plain-output"), Policy(), LAYOUTS["single"]).trace.report()
    assert "nothing was skipped" in everything.summary()
    ran = torch.full_like(trace.ran, 2)
    more = dataclasses.replace(trace, ran=ran).report()
    assert "needed by the policy: 4.50" in more.summary()
    assert (more.mean_executed, more.mean_needed) == (6.0, 4.5)


def test_joining_batches_is_one_batch(trace: Trace):
    driver, layout = driver_named("plain-output"), LAYOUTS["joint"]
    parts = [run(driver, PLAN, layout, images).trace for images in ([0, 1, 2], [3], [4, 5, 6])]
    whole = Trace.concatenate(parts)
    for name in ("samples", "rows", "times", "exits", "planned", "depths", "ran", "measured", "answered"):
        assert torch.equal(getattr(whole, name), getattr(trace, name)), name
    assert whole.policy == trace.policy
    assert not whole.recorded_all


def test_runs_that_do_not_belong_together_are_not_joined(trace: Trace):
    with pytest.raises(ValueError, match="at least one"):
        Trace.concatenate([])
    other = run(driver_named("plain-output"), Policy(Threshold(0.5)), LAYOUTS["single"]).trace
    others = [
        other,
        dataclasses.replace(trace, times=trace.times + 1),
        dataclasses.replace(trace, exits=trace.exits + 1),
        dataclasses.replace(trace, planned=trace.planned[:, :5], ran=trace.ran[:, :, :5]),
    ]
    for one in others:
        with pytest.raises(ValueError, match="cannot be joined"):
            Trace.concatenate([trace, one])


def test_recorded_all_only_if_all_are(trace: Trace):
    full = dataclasses.replace(trace, recorded_all=True)
    assert Trace.concatenate([full, full]).recorded_all
    assert not Trace.concatenate([full, trace]).recorded_all


def test_truncated_and_foreign_files_are_refused(trace: Trace, tmp_path):
    path = tmp_path / "a.safetensors"
    trace.save(path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a readable trace"):
            Trace.load(path)
    path.write_bytes(b"\x89PNG" * 100)
    with pytest.raises(ValueError, match="not a readable trace"):
        Trace.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is no trace: format None"):
        Trace.load(path)
    save_file({"depths": torch.zeros(3)}, path, metadata={"format": "ee_diffusion.trace.1", "policy": "{}"})
    with pytest.raises(ValueError, match="not a readable trace"):
        Trace.load(path)
    tensors = {name: getattr(trace, name) for name in ("samples", "rows", "times", "exits", "planned", "depths")}
    tensors |= {name: getattr(trace, name) for name in ("scores", "ran", "measured", "answered")}
    for metadata in ({}, {"policy": "{"}, {"policy": "{}"}):
        save_file(tensors, path, metadata={"format": "ee_diffusion.trace.1"} | metadata)
        with pytest.raises(ValueError, match=r"trace|JSON|Expecting"):
            Trace.load(path)


def test_a_trace_knows_its_images(trace: Trace):
    assert trace.samples.tolist() == list(range(IMAGES))
    assert trace.rows.tolist() == [[2] * IMAGES] * 2


def test_calls_and_the_reason_for_carrying_rows_along_are_kept(trace: Trace, tmp_path):
    more = dataclasses.replace(trace, calls=(2, 1), keeps_exited_rows="a reason")
    more.save(tmp_path / "trace.safetensors")
    loaded = Trace.load(tmp_path / "trace.safetensors")
    assert (loaded.calls, loaded.keeps_exited_rows) == ((2, 1), "a reason")
    joined = Trace.concatenate([more, more])
    assert (joined.calls, joined.keeps_exited_rows) == ((2, 1), "a reason")
    assert joined.report().followed_calls == 1
    for other in (dataclasses.replace(more, calls=(1, 1)), dataclasses.replace(more, keeps_exited_rows="")):
        with pytest.raises(ValueError, match="cannot be joined"):
            Trace.concatenate([more, other])


def file_of_before(trace: Trace, path: Path, format: str, **metadata: str) -> Trace:
    """The trace as it was written when samples were called elements."""
    tensors = {name: getattr(trace, name) for name in ("rows", "times", "exits", "planned", "depths")}
    tensors |= {name: getattr(trace, name) for name in ("scores", "ran", "measured", "answered")}
    tensors |= {"elements": trace.samples} | ({"rows": trace.rows[0]} if format.endswith("1") else {})
    metadata |= {"format": format, "recorded_all": "false"}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    return Trace.load(path)


def test_a_file_from_before_calls_were_counted(trace: Trace, tmp_path: Path):
    loaded = file_of_before(trace, tmp_path / "old", "ee_diffusion.trace.1", policy="{}")
    assert (loaded.calls, loaded.keeps_exited_rows) == ((), "")
    assert torch.equal(loaded.rows, trace.rows)
    assert loaded.report().mean_executed == trace.report().mean_executed


def test_a_file_from_before_samples_and_criteria_were_renamed(trace: Trace, tmp_path: Path):
    policy = trace.policy | {"criterion": trace.policy["criterion"] | {"kind": "Planned"}, "guidance": "together"}
    del policy["cfg_exit"]
    loaded = file_of_before(
        trace, tmp_path / "old", "ee_diffusion.trace.2", policy=json.dumps(policy), frozen='"a reason"', calls="[1, 1]"
    )
    assert torch.equal(loaded.samples, trace.samples)
    assert (loaded.keeps_exited_rows, loaded.policy) == ("a reason", trace.policy)
    assert torch.equal(replay(loaded, Policy.from_dict(trace.policy)), trace.depths), "it is known as its own policy's"
