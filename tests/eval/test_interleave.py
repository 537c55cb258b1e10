"""Turns and times of candidates, with draws that take as long as they are told to; what is kept, by what it was drawn with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import pipeline
from safetensors.torch import load_file, save_file

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import DepthPerStep
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.pipelines.sampling import Generated
from ee_diffusion.metrics.splits import seeds
from eval.harness import interleave, result_cache

FULL, OWN = (interleave.Candidate(name, name, None, None, 4) for name in ("full", "own"))
SECONDS = {"full": 2.0, "own": 1.0}


class Drawing:
    """Draws that are noted; the first of every candidate takes a hundred times as long as the others."""

    def __init__(self):
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, candidate, chosen, labels, first) -> Generated:
        cold = candidate.name not in {name for name, _, _ in self.calls}
        self.calls.append((candidate.name, first, len(chosen)))
        images = torch.tensor(chosen, dtype=torch.float32)[:, None, None, None]
        return Generated(images, None, ((100 if cold else 1) * SECONDS[candidate.name],))


def test_every_candidate_is_warm_and_another_begins_each_time():
    draw = Drawing()
    drawn = interleave.in_turns([FULL, OWN], draw, [5, 6, 7], [0, 1, 2], batch=2)
    warm_up = [("full", 0, 2), ("own", 0, 2)]
    assert draw.calls == [*warm_up, ("full", 0, 2), ("own", 0, 2), ("own", 2, 1), ("full", 2, 1)]
    assert {name: one.seconds for name, one in drawn.items()} == {"full": (2.0, 2.0), "own": (1.0, 1.0)}
    assert drawn["own"].images.flatten().tolist() == [5, 6, 7]


def test_a_time_is_the_candidates_over_the_full_models():
    draw = Drawing()
    times = interleave.clocked([FULL, OWN], draw, images=4, batch=2, num_classes=3)
    assert times == {"full": {"time": 1.0, "seconds": 4.0}, "own": {"time": 0.5, "seconds": 2.0}}


def test_the_clock_looks_at_the_first_test_images():
    asked = []
    interleave.clocked([FULL], lambda *call: asked.append(call) or Drawing()(*call), images=4, batch=2, num_classes=3)
    assert [call[1:] for call in asked[1:]] == [
        (seeds("test", 2), [0, 1], 0),
        (seeds("test", 2, first=2), [2, 0], 2),
    ]


def test_two_candidates_of_one_name_are_refused_before_anything_is_drawn():
    draw = Drawing()
    with pytest.raises(ValueError, match=r"called \['own'\]"):
        interleave.by_batch([FULL, OWN, OWN], draw, [1], [0], batch=1)
    assert not draw.calls


@pytest.mark.parametrize(
    "asked, count, batch, images",
    [
        (None, 128, 64, 128),
        (None, 100, 64, 64),
        (None, 300, 64, 128),
        (None, 4, 64, 4),
        (192, 300, 64, 192),
        (4, 4, 8, 4),
    ],
)
def test_the_clock_looks_at_whole_batches(asked: int | None, count: int, batch: int, images: int):
    assert interleave.clock_images_of(asked, count=count, batch=batch) == images


@pytest.mark.parametrize("asked, count, batch", [(65, 128, 64), (16, 128, 64), (0, 4, 2), (192, 128, 64), (None, 4, 0)])
def test_other_numbers_of_images_are_refused(asked: int | None, count: int, batch: int):
    with pytest.raises(ValueError, match="expected"):
        interleave.clock_images_of(asked, count=count, batch=batch)


def kept_in(folder: Path, settings: dict, contents: dict) -> tuple[interleave.Draw, Drawing]:
    draw = Drawing()
    return result_cache.kept(draw, folder, settings, lambda _: contents), draw


def test_what_was_drawn_is_read_again_only_under_the_same_settings_and_contents(tmp_path: Path):
    once = ({"steps": 4}, {"exits": "a"})
    for settings, contents, drawn_anew in (
        (*once, 1),
        (*once, 0),
        ({"steps": 5}, {"exits": "a"}, 1),
        ({"steps": 4}, {"exits": "b"}, 1),
        (*once, 0),
    ):
        again, draw = kept_in(tmp_path, settings, contents)
        found = again(OWN, [5, 6], [0, 1], 0)
        assert found.images.flatten().tolist() == [5, 6]
        assert found.seconds == ()
        assert len(draw.calls) == drawn_anew


@pytest.mark.parametrize("other", [{"chosen": [5, 7]}, {"labels": [0, 2]}, {"first": 2}, {"policy": True}])
def test_what_was_drawn_is_another_for_other_images_and_policies(tmp_path: Path, other: dict):
    again, draw = kept_in(tmp_path, {}, {})
    again(OWN, [5, 6], [0, 1], 0)
    policy = Policy(schedule=DepthPerStep((1,) * 4)) if "policy" in other else None
    one = interleave.Candidate("own", "own", None, policy, 4)
    again(one, other.get("chosen", [5, 6]), other.get("labels", [0, 1]), other.get("first", 0))
    assert len(draw.calls) == 2


def test_files_that_also_hold_seconds_can_be_read(tmp_path: Path):
    again, draw = kept_in(tmp_path, {}, {})
    again(OWN, [5, 6], [0, 1], 0)
    (path,) = tmp_path.glob("*.safetensors")
    save_file(load_file(path) | {"seconds": torch.tensor([3.0], dtype=torch.float64)}, path)
    found = again(OWN, [5, 6], [0, 1], 0)
    assert (found.images.flatten().tolist(), found.seconds, len(draw.calls)) == ([5, 6], (), 1)


def test_contents_are_weights_and_settings_not_folders():
    pipe = pipeline()
    exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    before = result_cache.contents(pipe, exits)
    assert before == result_cache.contents(pipe, exits)
    assert before["device"] == "cpu"
    assert before["versions"]["torch"] == torch.__version__
    assert (
        result_cache.contents(
            pipe, CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type="epsilon")
        )
        != before
    )
    assert result_cache.contents(pipe, None) != before
    with torch.no_grad():
        exits.error_estimator[2].bias += 1
    fitted = result_cache.contents(pipe, exits)
    assert (fitted["transformer"], fitted["exits"] == before["exits"]) == (before["transformer"], False)
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1)
    assert result_cache.contents(pipe, exits)["transformer"] != before["transformer"]
