"""The command line, run as a person runs it: in a process of its own."""

import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ncml import cli

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, model_folder: Path) -> Run:
    environment = os.environ | {"NCML_MODELS": str(model_folder.parent), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}

    def ncml(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ncml.cli", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return ncml


def picture(path: Path, height: int = 8, width: int = 8, seed: int = 0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_score_json_agrees_with_the_library(run: Run, tmp_path: Path, model_folder: Path) -> None:
    import ncml

    files = [picture(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    done = run("score", *(f.name for f in files), "--model", model_folder.name, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    model = ncml.load(model_folder)
    assert answer["model"] == {"name": model.name, "version": model.version}
    assert [row["file"] for row in answer["results"]] == [f.name for f in files]
    expected = [s.bpd for s in model.score(np.stack([read(f) for f in files]))]
    assert [row["bpd"] for row in answer["results"]] == pytest.approx(expected, rel=1e-5)
    assert answer["results"][0]["log_likelihood"] == pytest.approx(-expected[0] * 8 * 8 * 3 * np.log(2), rel=1e-5)


def test_score_prints_a_line_for_each_picture(run: Run, tmp_path: Path, model_folder: Path) -> None:
    picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg", 20, 30)
    done = run("score", "a.png", "b.jpg", "-m", str(model_folder), "--class", "dark", "--noise", "5")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("bits/dim" in line and name in line for line, name in zip(lines, ("a.png", "b.jpg"), strict=True))


def test_generate_writes_the_grid_that_its_seed_means(run: Run, tmp_path: Path, model_folder: Path) -> None:
    common = ("--class", "light", "--model", model_folder.name, "--json")
    done = run("generate", "-n", "4", "--seed", "7", "-o", "grid.png", *common)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seeds"] == [7, 8, 9, 10]
    grid = read(tmp_path / "grid.png")
    assert grid.shape == (16, 16, 3)
    alone = run("generate", "--seed", "8", "-o", "one.png", *common)
    assert alone.returncode == 0, alone.stderr
    np.testing.assert_array_equal(read(tmp_path / "one.png"), grid[:8, 8:])


def test_generate_without_a_seed_tells_the_one_it_drew(run: Run, tmp_path: Path, model_folder: Path) -> None:
    model = ("--model", model_folder.name, "--noise", "0")
    first = run("generate", "-o", "a.png", *model)
    assert first.returncode == 0, first.stderr
    seed = first.stdout.split("seed ")[1].strip(" )\n")
    assert run("generate", "-o", "b.png", "--seed", seed, *model).returncode == 0
    np.testing.assert_array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))


def test_complete_keeps_the_half_that_it_was_given(run: Run, tmp_path: Path, model_folder: Path) -> None:
    whole = read(picture(tmp_path / "whole.png"))
    Image.fromarray(whole[:4]).save(tmp_path / "half.png")
    done = run("complete", "half.png", "--keep", "top", "-n", "2", "-o", "full.png", "-m", model_folder.name, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["keep"] == "top"
    full = read(tmp_path / "full.png")
    assert full.shape == (8, 16, 3)
    np.testing.assert_array_equal(full[:4, :8], whole[:4])
    np.testing.assert_array_equal(full[:4, 8:], whole[:4])
    assert not np.array_equal(full[4:, :8], full[4:, 8:])


def test_models_lists_what_can_be_named(run: Run, model_folder: Path) -> None:
    done = run("models", "--json")
    assert done.returncode == 0, done.stderr
    listed = {m["name"]: m for m in json.loads(done.stdout)["models"]}
    assert listed[model_folder.name]["classes"] == ["dark", "light"]
    assert listed[model_folder.name]["height"] == 8
    assert model_folder.name in run("models").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scor", "x.png"], "there is no command 'scor': did you mean score?"),
        (["score"], "no picture is named"),
        (["score", "missing.png"], "missing.png"),
        (["score", "text.png"], "text.png is not an image"),
        (["score", "ok.png", "--josn"], "--josn. Perhaps you meant: --json"),
        (["score", "ok.png", "--model", "tinny"], "there is no model 'tinny': did you mean tiny?"),
        (["score", "ok.png", "--model", "."], "config.json"),
        (["score", "ok.png", "--class", "cat"], "dark, light"),
        (["score", "ok.png", "--noise", "-1"], "noise"),
        (["score", "ok.png", "--device", "abacus"], "abacus"),
        (["generate", "-n", "many", "-o", "a.png"], "'many'"),
        (["generate", "-n", "0", "-o", "a.png"], "n"),
        (["generate", "-n", "2"], "--output"),
        (["generate", "-o", "a.gif"], "does not end in .png"),
        (["generate", "-o", "no/such/a.png"], "cannot be written"),
        (["generate", "-o", "a.png", "--seed", "-3"], "seed"),
        (["generate", "-o", "a.png", "--steps", "-1"], "steps"),
        (["generate", "-o", "a.png", "--solver", "huen"], "heun"),
        (["complete", "ok.png", "-o", "a.png", "--keep", "middle"], "middle"),
        (["complete", "missing.png", "-o", "a.png"], "missing.png"),
        (["train", "smok", "--data", "x", "--out", "y"], "did you mean smoke?"),
        (["train", "smoke", "--data", "no-such-data", "--out", "y"], "no-such-data"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCML_MODELS", str(model_folder.parent))
    (tmp_path / "text.png").write_text("hello")
    picture(tmp_path / "ok.png")
    status = cli.main([*arguments, *([] if "--model" in arguments or arguments[0] == "train" else ["--model", "tiny"])])
    printed, complaint = capsys.readouterr()
    assert (status, printed) == (2, ""), complaint
    assert said in complaint
    assert complaint.startswith("ncml: ")
    assert complaint.count("\n") == 1


def test_a_mistake_leaves_the_process_with_status_2_and_no_traceback(run: Run) -> None:
    done = run("score", "missing.png", "--model", "tiny")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "missing.png" in done.stderr


def test_help_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ncml.cli", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert time.monotonic() - begun < 10
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "tyro" in imported
    assert imported.isdisjoint({"torch", "datasets"})
    for command in ("train", "score", "generate", "complete", "models", "serve", "worker"):
        assert command in done.stdout


def test_every_option_is_known_here() -> None:
    """A changed or lost option breaks people's scripts: change this list knowingly."""
    options = {
        "score": {"model", "class_", "noise", "device", "as_json"},
        "generate": {"output", "number", "class_", "seed", "noise", "steps", "solver", "model", "device", "as_json"},
        "models": {"as_json"},
    }
    options["complete"] = options["generate"] | {"keep"}
    for command in cli.COMMANDS:
        if command.__name__ in options:
            parameters = inspect.signature(command).parameters.values()
            assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == options.pop(command.__name__)
    assert not options


def test_a_reader_that_leaves_early_is_no_error() -> None:
    piped = f"{sys.executable} -m ncml.cli models | true"
    done = subprocess.run(["/bin/bash", "-c", piped], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
