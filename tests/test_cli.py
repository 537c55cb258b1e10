"""`ee-diffusion calibrate` on a tiny pipeline: the file it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DDIMScheduler
from factories import pipeline
from tree import ROOT

from ee_diffusion.cli.errors import TRACEBACK, said_in_one_line
from ee_diffusion.cli.main import SAMPLERS as cli_samplers
from ee_diffusion.cli.main import main
from ee_diffusion.core.policy import Policy
from ee_diffusion.diffusion.exits.cached import CachedOutputExits
from ee_diffusion.diffusion.pipelines.sampling import SAMPLERS
from ee_diffusion.edge_cloud.codec import KINDS
from ee_diffusion.edge_cloud.flags import ENCODINGS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipeline().save_pretrained(folder)
    return folder


def words(model: Path, output: Path, *more: object) -> list[str]:
    settings = ["--num_inference_steps", 6, "--guidance_scale", 2.0, "--count", 8, "--batch_size", 4]
    return [str(word) for word in ("calibrate", "--model", model, "--output", output, *settings, *more)]


def test_a_budget_takes_the_safest_within_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "policy.json"
    values = ["--kind", "deediff", "--values", 0.33, 0.4, 0.45, 0.6]
    assert main(words(model, output, *values, "--budget", 0.8)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("deediff")]
    costs = [float(line.split(": ")[1].split(" ")[0]) for line in lines]
    assert len(costs) == 4
    first = next(place for place, cost in enumerate(costs) if cost <= 0.8)
    assert first > 0
    policy = Policy.load(output)
    assert policy.criterion.threshold == pytest.approx(1 - [0.33, 0.4, 0.45, 0.6][first])
    assert dict(policy.made_for)["num_inference_steps"] == "6"


@pytest.mark.parametrize("kind", ["per_step_error_threshold", "accumulated_error_budget"])
def test_a_risk_takes_the_boldest_that_keeps_it(kind: str, model: Path, tmp_path: Path):
    output = tmp_path / "policy.json"
    goal = ["--kind", kind, "--values", 1e-6, 1e-5, 100.0, "--risk", 0.5, "--delta", 0.2, "--cap", 1e-8]
    assert main(words(model, output, *goal)) == 0
    number = {"per_step_error_threshold": "threshold", "accumulated_error_budget": "budget"}[kind]
    bold = Policy.load(output)
    assert main(words(model, output, *goal[:-6], "--risk", 0.5, "--cap", 1e9)) == 0
    boldest = Policy.load(output)
    assert getattr(bold.criterion, number) != getattr(boldest.criterion, number)
    pipe = pipeline()
    pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    pipe([1], 6, 2.0, exit_policy=boldest)


def test_searched_schedules_are_candidates_too(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "policy.json"
    goal = ["--kind", "static_cache_schedule", "--values", 0.3, 0.5, "--search_count", 2, "--budget", 0.6]
    assert main(words(model, output, *goal)) == 0
    assert "static_cache_schedule 0.5: 0.500 of the blocks" in capsys.readouterr().out
    policy = Policy.load(output)
    assert policy.criterion is None
    assert [depth > 0 for depth in policy.schedule.depths].count(True) == 3
    assert main(words(model, output, *goal[:2], "--values", 0.3, 1.5, "--budget", 0.6)) == 2
    assert "below 1" in capsys.readouterr().err
    assert main(words(model, output, *goal[:2], "--values", 0.5, 0.52, "--search_count", 2, "--budget", 0.6)) == 0
    assert "static_cache_schedule 0.52" not in capsys.readouterr().out, "the same schedule once more"


def test_memory_of_another_kind_is_refused_before_it_is_used(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    pipe = pipeline()
    cosine = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    made = {
        "schedule": (CachedOutputExits.for_pipeline(pipe.transformer, cosine), "another noise schedule"),
        "short": (
            CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, length=1),
            "caches 1 predictions, expected 2",
        ),
    }
    for name, (exits, told) in made.items():
        exits.save_pretrained(tmp_path / name)
        assert main(words(model, tmp_path / "policy.json", "--cache", tmp_path / name, "--budget", 0.6)) == 2
        assert told in capsys.readouterr().err


def test_memory_is_weighed_by_the_courses_that_are_searched(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output, folder = tmp_path / "policy.json", tmp_path / "memory"
    goal = ["--kind", "static_cache_schedule", "--values", 0.5, "--search_count", 2, "--budget", 0.6]
    assert main(words(model, output, *goal, "--cached_type", "epsilon")) == 0
    line = float(capsys.readouterr().out.split("loss ")[1].split()[0])
    assert main(words(model, output, *goal, "--fit_cache", folder)) == 0
    fitted = float(capsys.readouterr().out.split("loss ")[1].split()[0])
    assert fitted < line
    pipe = pipeline()
    pipe.exits = CachedOutputExits.from_pretrained(folder)
    assert (pipe.exits.config.cached_type, pipe.exits.config.fitted_steps) == ("epsilon", 6)
    pipe([1], 6, 2.0, exit_policy=Policy.load(output))
    pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type="epsilon")
    told = r"calibrated for weights \w+, this run has \w+; exits settings .* are pipe.exits those"
    with pytest.raises(ValueError, match=told):
        pipe([1], 6, 2.0, exit_policy=Policy.load(output))
    assert main(words(model, output, "--kind", "accumulated_error_budget", "--budget", 0.6, "--fit_cache", folder)) == 2
    assert "expected it with static_cache_schedule" in capsys.readouterr().err
    assert main(words(model, output, *goal, "--fit_cache", output)) == 2
    assert "expected the name of a folder" in capsys.readouterr().err
    for taken, what in ((model, "is a pipeline"), (model / "transformer", "holds a UViTTransformer2DModel")):
        before = {path: path.read_bytes() for path in taken.rglob("*") if path.is_file()}
        assert main(words(model, output, *goal, "--fit_cache", taken)) == 2
        assert what in capsys.readouterr().err
        assert {path: path.read_bytes() for path in taken.rglob("*") if path.is_file()} == before
    clean = tmp_path / "clean"
    pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler)
    pipe.exits.save_pretrained(clean)
    assert main(words(model, output, *goal, "--cache", clean, "--fit_cache", folder)) == 0, "of the type of --cache"
    assert CachedOutputExits.from_pretrained(folder).config.cached_type == "sample"


def test_noise_is_remembered_where_that_is_asked_for(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "policy.json"
    goal = ["--kind", "per_step_error_threshold", "--values", 1e-6, "--budget", 1.0, "--cached_type"]
    assert main(words(model, output, *goal, "epsilon")) == 0
    pipe = pipeline()
    for cached_type in ("epsilon", "sample"):
        pipe.exits = CachedOutputExits.for_pipeline(pipe.transformer, pipe.scheduler, cached_type=cached_type)
        if cached_type == "epsilon":
            pipe([1], 6, 2.0, exit_policy=Policy.load(output))
    with pytest.raises(ValueError, match="calibrated for exits settings"):
        pipe([1], 6, 2.0, exit_policy=Policy.load(output))
    folder = tmp_path / "memory"
    pipe.exits.save_pretrained(folder)
    assert main(words(model, output, *goal, "epsilon", "--cache", folder)) == 2
    assert "cache 'sample'" in capsys.readouterr().err


def test_none_certified_is_an_answer_and_writes_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output, goal = tmp_path / "policy.json", ["--risk", 0.4, "--delta", 0.1]
    assert main(words(model, output, "--kind", "deediff", "--values", 0.6, *goal, "--cap", 1e-12)) == 1
    assert "none certified" in capsys.readouterr().out  # whatever differs counts as loss 1
    assert not output.exists()


def test_dry_run_prints_and_bad_flags_are_refused_before_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    output = tmp_path / "policy.json"
    assert main(words(model, output, "--budget", 0.5, "--dry-run")) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "static_cache_schedule"
    for more, message in (
        (["--budget", 1.5], "expected a share of the blocks"),
        (["--risk", 0.1], "--risk needs --cap"),
        (["--risk", 1.5, "--cap", 1], "expected a risk in"),
        (["--risk", 0.1, "--cap", 1, "--delta", 2], "expected a probability"),
        (["--budget", 0.5, "--delta", 0.1], "with --risk"),
        (["--budget", 0.5, "--cap", 0.1], "expected it with --risk"),
        (
            ["--budget", 0.5, "--kind", "deediff", "--cached_type", "epsilon"],
            "--cached_type with --kind deediff, expected it with",
        ),
        (["--budget", 0.5, "--kind", "deediff", "--power", 1], "--power with --kind deediff"),
        (
            ["--budget", 0.5, "--decay", 0.5],
            "--decay with --kind static_cache_schedule, expected it with accumulated_error_budget",
        ),
        (["--budget", 0.5, "--kind", "accumulated_error_budget", "--decay", 3], "decay=3.0, expected a share"),
        (["--budget", 0.5, "--power", "nan"], "power=nan, expected a number in"),
        (
            ["--budget", 0.5, "--kind", "accumulated_error_budget", "--search_count", 3],
            "--search_count with --kind accumulated_error_budget",
        ),
        (["--budget", 0.5, "--model", "/no/where"], "model=/no/where, expected a folder that is there"),
        (["--budget", 0.5, "--cache", "./memory"], "cache=./memory, expected a folder that is there"),
        (["--budget", 0.5, "--values", 0.2, 0.1], "the safest first"),
        (["--budget", 0.5, "--count", 0], "at least 1 each"),
        (["--budget", 0.5, "--values", "nan"], "the safest first"),
        (["--budget", 0.5, "--guidance_scale", "nan"], "expected a finite number"),
        (["--risk", 0.1, "--cap", "inf"], "a positive cap"),
        (["--risk", 0.01, "--cap", 1, "--delta", 0.1], "expected --count 230 or more"),
        (["--budget", 0.5, "--output", tmp_path], "is a folder"),
        (["--budget", 0.5, "--output", tmp_path / "nowhere" / "p.json"], "there is no folder"),
    ):
        assert main(words(model, output, *more)) == 2
        said = capsys.readouterr().err
        assert said.startswith("ee-diffusion calibrate: error: ")
        assert message in said
        assert said.count("\n") == 1
    assert not output.exists()


def test_a_traceback_is_there_for_who_wants_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(ValueError, match="expected a share"):
        main(words(model, tmp_path / "policy.json", "--budget", 1.5))


@pytest.mark.parametrize("script", ["eval.generate", "train.fit_step_cache"])
def test_a_scripts_error_is_one_line_and_a_bug_is_a_traceback(script: str, tmp_path: Path):
    command = [sys.executable, "-m", script, "--model", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2
    assert said.startswith(f"{script.rpartition('.')[2]}.py: error: ")
    assert "nowhere" in said
    assert "Traceback" not in done.stderr
    with pytest.raises(KeyError):
        said_in_one_line("a bug", lambda: {}["a"])


def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def work() -> None:
        raise KeyboardInterrupt

    assert said_in_one_line("a script", work) == 130
    assert capsys.readouterr().err == "a script: interrupted\n"
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(KeyboardInterrupt):
        said_in_one_line("a script", work)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(words(tmp_path / "nowhere", tmp_path / "policy.json", "--budget", 0.5)) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_classifier_is_calibrated_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "config.json").write_text("{}")
    assert main(words(tmp_path, tmp_path / "policy.json", "--kind", "deediff", "--values", 0.4, "--budget", 0.5)) == 2
    assert "expected a pipeline's folder; classifiers: eval/classify.py --risk" in capsys.readouterr().err


def test_a_budget_out_of_reach_says_what_is_in_reach(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(words(model, tmp_path / "policy.json", "--kind", "deediff", "--values", 0.01, "--budget", 0.5)) == 1
    assert "no candidate keeps to 0.5 of the blocks: the boldest takes 1.000" in capsys.readouterr().out


def test_names_that_the_flags_know_are_those_there_are():
    assert tuple(sorted(SAMPLERS)) == cli_samplers
    assert tuple(sorted(KINDS)) == ENCODINGS


def test_help_loads_no_model_library_and_a_missing_extra_is_named():
    block = "import sys; sys.modules['grpc'] = None; from ee_diffusion.cli.main import main, parser; parser(); "
    light = "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules); "
    serve = "sys.exit(main(['cloud', 'serve', '--model', 'parts', '--port', '1']))"
    done = subprocess.run([sys.executable, "-c", block + light + serve], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "needs the extra `cloud`, grpc is not installed" in done.stderr


def test_the_commands_of_edge_and_cloud_are_there(capsys: pytest.CaptureFixture):
    for command, flag in (("cloud serve", "--port"), ("edge split", "--exits"), ("edge generate", "--threshold")):
        with pytest.raises(SystemExit) as stopped:
            main([*command.split(), "--help"])
        assert stopped.value.code == 0
        assert flag in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "calibrate" in capsys.readouterr().out


def test_run_as_a_module_it_knows_all_of_itself(tmp_path: Path):
    """`python -m` runs the file from top to bottom: what stands behind its last line is not there yet."""
    (tmp_path / "file").write_text("")
    words = [
        "calibrate",
        "--kind",
        "static_cache_schedule",
        "--budget",
        "0.5",
        "--fit_cache",
        "file",
        "--output",
        "p.json",
    ]
    command = [sys.executable, "-m", "ee_diffusion.cli.main", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "fit_cache=file is a file" in done.stderr
