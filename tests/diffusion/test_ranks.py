"""Exits on two ranks (gloo, two processes): one model with its tokens or weights on both, where they decide together; and images dealt
out to both, where each decides for its own and the traces are gathered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusion.ranks_run import MODEL_SPECS, RANKS, WEIGHTS
from tree import ROOT

from ee_diffusion.core.distributed import JointDecision, gather_traces
from ee_diffusion.diffusion.hooks.parallel import vote_of

if not dist.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)
TOGETHER = [*MODEL_SPECS, *(["weights"] if WEIGHTS else [])]


def ranks(scenario: str, folder: Path, *, seconds: int) -> tuple[list[Any], list[str]]:
    """What each rank found (None: it died), and what it said."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "diffusion")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests" / "diffusion" / "ranks_run.py")
    started = [
        subprocess.Popen(
            [sys.executable, script, scenario, str(folder), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=seconds)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    files = [folder / f"{scenario}-{rank}.pt" for rank in range(RANKS)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files], said


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    results, said = ranks("good", tmp_path_factory.mktemp("ranks"), seconds=500)
    for result, words in zip(results, said, strict=True):
        assert isinstance(result, dict), result or words[-3000:]
    return results


@pytest.mark.parametrize("name", TOGETHER)
def test_off_and_by_a_plan_the_shared_model_is_the_model_of_one_process(name: str, found):
    for one in (rank[name] for rank in found):
        torch.testing.assert_close(one["off"]["output"], one["plain"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one["planned"]["output"], one["alone"]["output"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODEL_SPECS)
def test_alone_the_ranks_would_stop_elsewhere(name: str, found):
    """The control: each sees other tokens."""
    one = found[0][name]
    stops = (one["everyone"] > one["policy"].criterion.threshold).float()  # (ranks, K, E)
    first = torch.where(stops.any(1), stops.argmax(1), stops.shape[1])
    assert (first[0] != first[1]).any()


@pytest.mark.parametrize("name", TOGETHER)
def test_voted_they_stop_together_where_the_least_safe_does(name: str, found):
    one, other = (rank[name] for rank in found)
    assert torch.equal(one["voted"]["depths"], other["voted"]["depths"])
    assert torch.equal(one["voted"]["ran"], other["voted"]["ran"])
    torch.testing.assert_close(one["voted"]["scores"], other["voted"]["scores"], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(one["voted"]["output"], other["voted"]["output"])
    assert torch.equal(one["voted"]["output"], one["planned"]["output"])
    least, threshold = one["everyone"].amin(0), one["policy"].criterion.threshold  # (K, E)
    depths = [
        next((depth for depth, score in enumerate(column, start=1) if score > threshold), len(column) + 1)
        for column in least.T.tolist()
    ]
    assert one["voted"]["depths"].tolist() == [depths]
    torch.testing.assert_close(one["voted"]["scores"][0, 0], least[0], rtol=0, atol=1e-6)
    assert len(set(depths)) >= 2


def test_a_stock_pipeline_whose_transformer_is_on_two_ranks(found):
    one, other = (rank["pipeline"] for rank in found)
    assert len(one["depths"].unique()) >= 2
    assert all(torch.equal(one[name], other[name]) for name in ("output", "depths", "ran"))


@pytest.mark.slow
def test_the_control_without_a_vote_ends_badly(tmp_path: Path):
    """One rank leaves out a collective in which the other waits: that dies of it, at once or by its time limit; no rank gets its images."""
    results, said = ranks("alone", tmp_path, seconds=120)
    assert not any(isinstance(result, dict) for result in results), "both came through: they did not disagree"
    told = " ".join([*said, *(result for result in results if isinstance(result, str))])
    assert any(word in told for word in ("mismatch", "imed out", "Connection")), told[-3000:]


def test_images_dealt_out_to_ranks(found):
    one, other = (rank["beside"] for rank in found)
    single = one["single"]
    for rank in (one, other):
        assert rank["gathered"]["samples"].tolist() == [0, 1, 2, 3, 4]
        for name in ("rows", "depths", "ran"):
            assert torch.equal(rank["gathered"][name], single[name])
        torch.testing.assert_close(rank["gathered"]["scores"], single["scores"], rtol=1e-4, atol=1e-5, equal_nan=True)
        assert rank["summary"] == rank["single summary"]
    assert one["mine"]["depths"].shape[1] == 3, "each rank reports its own"
    assert other["mine"]["depths"].shape[1] == 2
    torch.testing.assert_close(
        torch.cat([one["mine"]["output"], other["mine"]["output"]]), single["output"], rtol=1e-3, atol=1e-4
    )
    assert len(single["depths"].unique()) >= 3


REFUSED = {
    "depth 0": "use exits from depth 1 on",
    "compiled": "attach without compiling",
    "after the tail": "use AdapterExits",
    "another policy": "the ranks that decide together begin different runs",
    "another batch": "the ranks that decide together begin different runs",
    "other ids": "the ranks that decide together begin different runs",
    "ids twice": "say renumber=True if each rank counts from 0",
}


def test_what_cannot_go_on_together_ends_in_words_on_every_rank(found):
    for rank in found:
        said = rank["refused"]
        for name, words in REFUSED.items():
            assert said[name].startswith("ValueError: "), name
            assert words in said[name]
        assert said["NaN of one rank"] == "[nan, nan]", "all of them raise, or none"
        assert said["nobody"] == "None"
        assert said["one"] == "2", "the first rank had nothing to do"


def test_in_one_process():
    assert vote_of(torch.nn.Linear(1, 1)) is None
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised"):
        JointDecision()
    assert gather_traces(None) is None


def test_a_rank_outside_of_the_group(tmp_path: Path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="rank 0 is not in the group"):
            JointDecision(dist.GroupMember.NON_GROUP_MEMBER)
        score = torch.tensor([0.25, torch.nan])
        torch.testing.assert_close(JointDecision().least(score), score, equal_nan=True)
    finally:
        dist.destroy_process_group()
