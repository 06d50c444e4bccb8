"""The command line: commands, errors and exit status."""

import errno
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncml.cli import main as cli
from ncml.training.provenance import command

Run = Callable[..., subprocess.CompletedProcess[str]]


def process(folder: Path, models: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "ncml.cli", *arguments],
        cwd=folder,
        env=os.environ | {"NCML_MODELS": str(models), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture
def run(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process, which has already imported torch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCML_MODELS", str(model_folder.parent))

    def ncml(*arguments: str) -> subprocess.CompletedProcess[str]:
        status = cli.main(arguments)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return ncml


def save_image(path: Path, height: int = 8, width: int = 8, seed: int = 0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_an_interrupt_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for message, line in (((), "ncml: stopped\n"), (("stopped after 32 images",), "ncml: stopped after 32 images\n")):

        def interrupted(arguments: list[str], message: tuple[str, ...] = message) -> None:
            raise KeyboardInterrupt(*message)

        monkeypatch.setattr(cli, "parse", interrupted)
        assert cli.main([]) == 130
        assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("argument", "written"),
    [
        ("/home/me/cats", "…/cats"),
        ("../../cats:test", "…/cats:test"),
        ("--data=/home/me/my cats", "--data=…/'my cats'"),
        ("models/mine", "models/mine"),
        ("--limit=fid=9", "--limit=fid=9"),
        ("owner/cats", "owner/cats"),
    ],
)
def test_a_recorded_command_does_not_name_private_folders(argument: str, written: str) -> None:
    assert command(["train", argument]) == f"ncml train {written}"


def test_train_writes_a_model_that_scores_and_a_card(run: Run, tmp_path: Path) -> None:
    for name in ("dark", "light"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            save_image(tmp_path / "pictures" / name / f"{i}.png", seed=i)
    command = ("train", "smoke", "--data", "pictures", "--out", "models/mine", "--max-images", "128", "--threads", "1")
    done = process(tmp_path, tmp_path / "models", *command, "--precision", "bf16", "--json")
    assert done.returncode == 0, done.stderr
    assert "bf16 on cpu" in done.stderr
    answer = json.loads(done.stdout)
    assert answer["model"]["name"] == "mine"
    assert answer["metrics"]["images_seen"] == 128
    assert "ncml train smoke --data pictures --out models/mine" in (tmp_path / "models/mine/card.md").read_text()
    scored = run("score", "pictures/dark/0.png", "--model", "models/mine", "--class", "dark", "--json")
    assert json.loads(scored.stdout)["model"] == answer["model"]
    again = run(*command)
    assert again.returncode == 2
    assert "--resume" in again.stderr


def test_score_json_agrees_with_the_library(run: Run, tmp_path: Path, model_folder: Path) -> None:
    import ncml

    files = [save_image(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    done = run("score", *(f.name for f in files), "--model", model_folder.name, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    model = ncml.load(model_folder)
    assert answer["model"] == {"name": model.name, "version": model.version}
    assert [row["file"] for row in answer["results"]] == [f.name for f in files]
    expected = [s.bpd for s in model.score(np.stack([read(f) for f in files]))]
    assert [row["bpd"] for row in answer["results"]] == pytest.approx(expected, rel=1e-5)
    assert answer["results"][0]["log_likelihood"] == pytest.approx(-expected[0] * 8 * 8 * 3 * np.log(2), rel=1e-5)


def test_score_prints_a_line_for_each_image(run: Run, tmp_path: Path, model_folder: Path) -> None:
    save_image(tmp_path / "a.png"), save_image(tmp_path / "b.jpg", 20, 30)
    done = run("score", "a.png", "b.jpg", "-m", str(model_folder), "--class", "dark", "--noise", "5")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("bits/dim" in line and name in line for line, name in zip(lines, ("a.png", "b.jpg"), strict=True))


def test_generate_writes_the_grid_of_its_seeds(run: Run, tmp_path: Path, model_folder: Path) -> None:
    common = ("--class", "light", "--model", model_folder.name, "--json")
    done = run("generate", "-n", "4", "--seed", "7", "-o", "grid.png", *common)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seeds"] == [7, 8, 9, 10]
    grid = read(tmp_path / "grid.png")
    assert grid.shape == (16, 16, 3)
    alone = run("generate", "--seed", "8", "-o", "one.png", *common)
    assert alone.returncode == 0, alone.stderr
    np.testing.assert_array_equal(read(tmp_path / "one.png"), grid[:8, 8:])


def test_generate_without_a_seed_prints_its_seed(run: Run, tmp_path: Path, model_folder: Path) -> None:
    model = ("--model", model_folder.name, "--noise", "0")
    first = run("generate", "-o", "a.png", *model)
    assert first.returncode == 0, first.stderr
    seed = first.stdout.split("seed ")[1].strip(" )\n")
    assert run("generate", "-o", "b.png", "--seed", seed, *model).returncode == 0
    np.testing.assert_array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))


def test_the_naive_sampler_is_the_reference(run: Run, tmp_path: Path) -> None:
    common = ("generate", "--seed", "3", "--noise", "0", "--model", "tiny")
    assert run(*common, "-o", "fast.png").returncode == 0
    assert run(*common, "-o", "naive.png", "--sampler", "naive").returncode == 0
    first = [read(tmp_path / name)[0, 0].tolist() for name in ("fast.png", "naive.png")]
    assert first[0] == first[1]  # later pixels may part: in fp32 a rounding may flip a choice
    assert run(*common, "-o", "no.png", "--sampler", "slow").returncode == 2


def test_complete_keeps_the_known_half(run: Run, tmp_path: Path, model_folder: Path) -> None:
    whole = read(save_image(tmp_path / "whole.png"))
    Image.fromarray(whole[:4]).save(tmp_path / "half.png")
    done = run("complete", "half.png", "--keep", "top", "-n", "2", "-o", "full.png", "-m", model_folder.name, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["keep"] == "top"
    full = read(tmp_path / "full.png")
    assert full.shape == (8, 16, 3)
    np.testing.assert_array_equal(full[:4, :8], whole[:4])
    np.testing.assert_array_equal(full[:4, 8:], whole[:4])
    assert not np.array_equal(full[4:, :8], full[4:, 8:])


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version").stdout == f"{version('ncml')}\n"


def test_models_lists_every_model(run: Run, model_folder: Path) -> None:
    done = run("models", "--json")
    assert done.returncode == 0, done.stderr
    listed = {m["name"]: m for m in json.loads(done.stdout)["models"]}
    assert listed[model_folder.name]["classes"] == ["dark", "light"]
    assert listed[model_folder.name]["height"] == 8
    assert model_folder.name in run("models").stdout


def test_a_broken_folder_does_not_hide_other_models(
    run: Run, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "broken").mkdir(parents=True)
    (tmp_path / "models" / "broken" / "config.json").write_text("{")
    shutil.copytree(model_folder, tmp_path / "models" / "tiny")
    monkeypatch.setenv("NCML_MODELS", str(tmp_path / "models"))
    done = run("models", "--json")
    assert (done.returncode, [m["name"] for m in json.loads(done.stdout)["models"]]) == (0, ["tiny"])
    assert done.stderr.startswith("ncml: skipped: ")
    assert "broken/config.json cannot be read as JSON" in done.stderr
    assert done.stderr.count("\n") == 1


def test_adding_a_model_folder_does_not_change_the_default(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("birds", "cifar10", "zebras"):
        shutil.copytree(model_folder, tmp_path / "models" / name)
    monkeypatch.setenv("NCML_MODELS", str(tmp_path / "models"))

    def default() -> list[str]:
        marked = [m["name"] for m in json.loads(run("models", "--json").stdout)["models"] if m["default"]]
        used = json.loads(run("generate", "--json", "-o", str(tmp_path / "x.png")).stdout)["model"]["name"]
        assert marked == [used]
        return marked

    assert default() == ["cifar10"]
    monkeypatch.setenv("NCML_DEFAULT_MODEL", "zebras")
    assert default() == ["zebras"]
    monkeypatch.delenv("NCML_DEFAULT_MODEL")
    shutil.rmtree(tmp_path / "models" / "cifar10")
    assert default() == ["birds"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "pictures.npy"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_reported_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(model: str) -> None:
        raise error

    monkeypatch.setattr("ncml.checkpoint.describe", fails)
    done = run("models")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("ncml: there is not enough memory: free some")


def test_a_name_that_cannot_be_written_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncml.checkpoint.describe", lambda model: os.fsdecode(b"caf\xe9").encode())
    done = run("models")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ncml: 'caf\\udce9' is not UTF-8, which is required here: choose another name.\n"


def test_a_bug_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncml.checkpoint.describe", lambda model: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run("models")


def test_training_without_enough_memory_ends_in_one_line(tmp_path: Path) -> None:
    """Images of 1024 x 1024 in batches of 32, with half a gibibyte of memory."""
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        save_image(tmp_path / "pictures" / f"{i}.png", seed=i)
    code = """
import resource, sys, torch, ncml.training.run
from ncml.cli.main import main
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29,) * 2)
sys.exit(main(sys.argv[1:]))
"""
    arguments = ("train", "smoke", "--data", "pictures", "--out", "mine", "--size", "1024", "--threads", "1")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("ncml: there is not enough memory"), done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_command_the_error_names_the_help(run: Run) -> None:
    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "ncml: a command is missing; see ncml --help.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scor", "x.png"], "there is no command 'scor': did you mean score?"),
        (["score"], "no image is given"),
        (["score", ""], "an argument is empty: give it a value, or omit it"),
        (["train", "smoke", "--data=", "--out", "y"], "an argument is empty"),
        (["score", "ok.png", "--device", "meta"], "there is no device 'meta': name cpu, cuda or cuda:N"),
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
        (["complete"], "ncml complete needs FILE and --output FILE.png; see ncml complete --help."),
        (["generate", "-o", "a.gif"], "a.gif must end in .png"),
        (["generate", "-o", "no/such/a.png"], "cannot be written"),
        (["drift", "photos", "--plot", "no/such/a.png"], "cannot be written"),
        (["drift", "photos", "--plot", "a.xyz"], "a.xyz must end in .png"),
        (["generate", "-o", "a.png", "--seed", "-3"], "seed"),
        (["generate", "-o", "a.png", "--steps", "-1"], "steps"),
        (["generate", "-o", "a.png", "--solver", "huen"], "heun"),
        (["generate", "-o", "a.png", "--noise", "0", "--solver", "heun"], "solver cannot be combined with noise=0"),
        (["generate", "-o", "a.png", "--noise", "0", "--steps", "7"], "steps cannot be combined with noise=0"),
        (["generate", "-n", "1000000000", "-o", "a.png"], "n must be 1 to 1024"),
        (["complete", "ok.png", "-o", "a.png", "--keep", "middle"], "middle"),
        (["generate", "-o", "a.png", "--threads", "0"], "--threads must be 1 to 256"),
        (["generate", "-o", "a.png", "--threads", "1000000000"], "--threads must be 1 to 256"),
        (["complete", "missing.png", "-o", "a.png"], "ncml: missing.png cannot be read"),
        (["score", "ok.png", "--device", "cuda:99"], "cuda:99"),
        (["train", "smok", "--data", "x", "--out", "y"], "did you mean smoke?"),
        (["train", "smoke", "--data", "empty", "--out", "y"], "no readable image"),
        (["train", "smoke", "--data", "./not/there", "--out", "y"], "there is no folder './not/there'"),
        (["train", "smoke", "--data", "ok.png", "--out", "y"], "ok.png is a file; name its folder instead"),
        (["train", "smoke", "--data", "x", "--out", "y", "--noise", "nan"], "--noise must be more than 0"),
        (["train", "smoke", "--data", "photos", "--out", "y", "--device", "cuda:99"], "cuda:99"),
        (
            ["train", "smoke", "--data", "empty", "--out", "y", "--device", "meta"],
            "there is no device 'meta': name cpu, cuda or cuda:N",
        ),
        (["train", "smoke", "--data", "x", "--out", "y", "--max-images", "0"], "--max-images must be more than 0"),
        (["train", "smoke", "--data", "x", "--out", "y", "--max-images", str(10**400)], "at most 1000000000000000"),
        (
            ["train", "smoke", "--data", "empty", "--out", "y", "--tracker", "os:getcwd"],
            "not a function of (folder, config)",
        ),
        (["train", "smoke", "--data", "x", "--out", "y", "--max-time", "45"], "such as 90s, 45m, 12h or 2d, not '45'"),
        (["train", "smoke", "--data", "x", "--out", "y", "--size", "big"], "such as 32 or 48x64, not 'big'"),
        (["train", "smoke", "--data", "empty", "--out", os.fsdecode(b"caf\xe9")], "caf\\xe9 is not UTF-8"),
        (["train", "smoke", "--data", "x", "--out", "y", "--size", "30"], "must be multiples of 4, not 30x30"),
        (["train", "smoke", "--data", "empty", "--out", "y", "--init-from", "tinny"], "did you mean tiny?"),
        (
            ["train", "smoke", "--data", "empty", "--out", "y", "--tracker", "nothing.at:all"],
            "no tracker 'nothing.at:all'",
        ),
        (["train", "smoke", "--data", "empty", "--out", "tiny"], "tiny already contains a finished model"),
        (["train", "smoke", "--data", "x", "--out", "y", "--objective", "gan"], "gan"),
    ],
)
def test_an_error_is_one_line_and_status_2(arguments: list[str], message: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    save_image(tmp_path / "ok.png")
    save_image(tmp_path / "photos" / "a.png")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    done = run(*arguments, *([] if "--model" in arguments or arguments[0] == "train" else ["--model", "tiny"]))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("ncml: ")
    assert done.stderr.count("\n") == 1
    assert "None" not in done.stderr


def test_an_unreachable_hub_is_reported_immediately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on port 9; the datasets library would retry six times and print each attempt."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    done = process(tmp_path, tmp_path, "train", "smoke", "--data", "some/pictures", "--out", "y")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "ncml: there is no folder 'some/pictures', and the Hugging Face Hub cannot be reached"
    )
    assert done.stderr.count("\n") == 1


def test_without_the_hub_a_name_is_looked_up_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = process(tmp_path, tmp_path, "train", "smoke", "--data", "some/pictures", "--out", "y")
    assert done.returncode == 2
    assert "'some/pictures' cannot be loaded" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_separate_process_behaves_the_same(tmp_path: Path, model_folder: Path) -> None:
    failed = process(tmp_path, model_folder.parent, "score", "missing.png", "--model", "tiny")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1
    save_image(tmp_path / "a.png")
    succeeded = process(tmp_path, model_folder.parent, "score", "a.png", "--model", "tiny")
    assert succeeded.returncode == 0
    assert succeeded.stderr == "ncml: no verdicts: this model is not calibrated: run ncml calibrate.\n"
    assert "a.png" in succeeded.stdout


WITHOUT_TORCH = """
0 --help
0 --version
0 models
0 models --json
2 scor x.png
2 score
2 score missing.png
2 score text.png
2 score empty
2 score ok.png --josn
2 score ok.png --model tinny
2 score ok.png --model .
2 score ok.png --class cat
2 score ok.png --noise 77
2 score ok.png --statistic likelihood
2 score ok.png --calibration strict
2 score ok.png --fdr 3
2 score ok.png --tile --tile-size 4
2 score ok.png --tile --tile-size 4000
2 score ok.png -o table.txt
2 score ok.png --device gpu
2 score ok.png --map ok.png
2 drift ok.png
2 drift ok.png --calibration strict
2 drift ok.png --alpha 7
2 drift ok.png --device gpu
2 drift ok.png --plot missing/a.png
2 drift ok.png --plot empty
2 drift ok.png --plot a.xyz
2 generate -o a.gif
2 generate -o a.png -n 0
2 generate -o a.png --seed -3
2 generate -o a.png --steps -1
2 generate -o a.png --solver huen
2 generate -o a.png --class cat
2 generate -o a.png --guidance 99
2 generate -o a.png --threads 0
2 generate -o a.png --device gpu
2 complete missing.png -o a.png
2 complete text.png -o a.png
2 calibrate --data empty --limit 0
2 calibrate --data ./not/there
2 calibrate --data empty --model tinny
2 calibrate --data empty
2 calibrate --data mixed
2 calibrate --data ./not/there --tile
2 calibrate --data empty --tile --tile-size 4
2 calibrate --data empty --tile --name strict
2 calibrate --data mixed --false-positive-rate 7
2 calibrate --data mixed --device gpu
2 calibrate --data mixed --model tiny --out ok.png/y
2 adapt ok.png --out y
2 adapt empty --out y --model tinny
2 adapt empty --out y
2 adapt mixed --out y
2 adapt mixed --out mixed
2 adapt mixed --out ok.png/y
2 adapt mixed --out y --false-positive-rate 7
2 adapt mixed --out y --device gpu
2 tune --data ./not/there --model tiny
2 tune --data empty --model tiny
2 tune --data mixed --model tiny --images 2
2 tune --data mixed --model tiny --device gpu
2 compress missing.png -o x
2 compress ok.png -o x --model tinny
2 compress ok.png ok.png -o x
2 compress ok.png -o x --device gpu
2 decompress missing -o x
2 decompress ok.png -o x
2 decompress bad.ncml -o x
2 decompress short.ncml -o x
2 evaluate nothing --data x
2 evaluate likelihood --data empty
2 evaluate likelihood --data ./not/there
2 evaluate likelihood --data mixed --limit some
2 evaluate likelihood --data mixed --model tinny
2 evaluate likelihood --data mixed --threads 0
2 evaluate likelihood --data mixed --out ok.png
2 evaluate likelihood --data mixed --device gpu
2 train smok --data x --out y
2 train smoke --data ./not/there --out y
2 train smoke --data empty --out y --init-from tinny
2 train smoke --data empty --out y --size 30
2 train smoke --data empty --out y
2 train smoke --data mixed --out y
2 train smoke --data mixed --out ok.png
2 train smoke --data mixed --out y --resume
2 train smoke --data mixed --out y --cooldown-from mixed
2 train smoke --data mixed --out y --tracker nothing
2 train smoke --data mixed --out y --noise 999
2 train smoke --data mixed --out y --max-images some
2 train smoke --data mixed --out y --threads 0
2 train smoke --data mixed --out y --device gpu
2 push tinny owner/name
2 push tiny name
2 pull name
"""
"""Commands that end before torch is imported, with their exit status."""


def test_help_lists_and_refusals_import_no_torch(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "bad.ncml").write_bytes(b"NCML\x01" + bytes(100))
    (tmp_path / "short.ncml").write_bytes(b"NCML\x01")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed" / "class").mkdir(parents=True)
    for name in ("ok.png", "mixed/a.png", "mixed/class/a.png"):
        save_image(tmp_path / name)
    code = """
import contextlib, io, sys
from ncml.cli.main import main
for line in sys.stdin:
    expected, *arguments = line.split()
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code or 0
    assert status == int(expected), (line, status, output.getvalue())
    heavy = {"torch", "pandas", "datasets", "scipy"} & sys.modules.keys()
    assert not heavy, (line, heavy)
    assert status == 0 or output.getvalue().count("\\n") == 1, (line, output.getvalue())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=WITHOUT_TORCH.strip(),
        cwd=tmp_path,
        env=os.environ | {"NCML_MODELS": str(model_folder.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr


def test_help_lists_every_command_without_importing_it(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert re.findall(r"• ([a-z]+)", text) == list(cli.commands())
    assert "Compute exact likelihoods and out-of-distribution verdicts" in text
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ncml.cli", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "tyro" in imported
    assert imported.isdisjoint({"numpy", "redis", "pydantic", "ncml.cli.score", "worker.main"})


def test_scoring_imports_no_compiler(tmp_path: Path, model_folder: Path) -> None:
    """PyTorch's compiler takes seconds to import, and building a network on the meta device would import it."""
    save_image(tmp_path / "a.png")
    code = "import sys; from ncml.cli.main import main; main(sys.argv[1:]); assert 'torch._dynamo' not in sys.modules"
    arguments = ("score", "a.png", "--model", str(model_folder))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr


def test_every_option_of_every_command_is_explained() -> None:
    for name, location in cli.commands().items():
        command = pkgutil.resolve_name(location)
        for option in inspect.signature(command).parameters.values():
            doc = inspect.getdoc(command) or ""
            assert re.search(rf"^\s*{option.name}: ", doc, re.M) or "help=" in str(option.annotation), (name, option)


def test_what_a_terminal_cannot_encode_is_escaped(tmp_path: Path, model_folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    done = process(tmp_path, model_folder.parent, "generate", "--model", "tiny", "--seed", "7", "-o", name)
    assert (done.returncode, done.stdout) == (0, "caf\\udce9.png  (seed 7)\n"), done.stderr


def test_a_reader_that_closes_early_is_not_an_error() -> None:
    piped = f"{sys.executable} -m ncml.cli models | true"
    done = subprocess.run(["/bin/bash", "-c", piped], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
