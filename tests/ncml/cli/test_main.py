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
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ncml.cli import main as cli
from ncml.cli.terminal import write_file
from ncml.training.provenance import command
from tests.conftest import full_disk

Run = Callable[..., subprocess.CompletedProcess[str]]


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


def test_a_write_that_fails_names_the_file_and_leaves_the_former_one(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    output.write_bytes(b"former")
    output.chmod(0o640)
    with full_disk():
        done = run("generate", "--model", "tiny", "--seed", "1", "-o", "out.png")
    assert (done.returncode, done.stderr) == (2, f"ncml: out.png: {os.strerror(errno.EFBIG)}\n")
    assert (output.read_bytes(), list(tmp_path.iterdir())) == (b"former", [output])
    assert run("generate", "--model", "tiny", "--seed", "1", "-o", "out.png").returncode == 0
    assert (read(output).shape, output.stat().st_mode & 0o777) == ((8, 8, 3), 0o640)


def test_a_link_and_a_pipe_are_written_and_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        write_file(tmp_path / name, b"new")
    assert (os.read(reader, 9), (tmp_path / "file").read_bytes()) == (b"new", b"new")
    os.close(reader)
    assert (tmp_path / "link").is_symlink()


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
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
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


def test_the_extra_of_a_missing_package_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: str) -> None:
        raise ModuleNotFoundError(name="pyarrow")

    monkeypatch.setattr("ncml.checkpoint.describe", fails)
    assert run("models").stderr == (
        "ncml: pyarrow is not installed: run pip install -e '.[parquet]' in the clone of ncml.\n"
    )
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert set(cli.EXTRAS.values()) <= project["optional-dependencies"].keys()


def test_a_name_that_cannot_be_written_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncml.checkpoint.describe", lambda model: os.fsdecode(b"caf\xe9").encode())
    done = run("models")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ncml: 'caf\\udce9' is not UTF-8, which is required here: choose another name.\n"


def test_a_bug_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncml.checkpoint.describe", lambda model: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run("models")


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
        (["complete", "-", "-o", "a.png"], "ncml: - cannot be read: there is no such file or folder; name standard"),
        (["compress", "-", "-o", "a.ncml"], "; name standard input /dev/stdin"),
        (["decompress", "-", "-o", "a"], "; name standard input /dev/stdin"),
        (["complete", "missing.png", "-o", "a.png"], "ncml: missing.png cannot be read"),
        (["complete", "ok.png", "-o", "ok.png"], "ok.png is read by this command and would be replaced"),
        (["compress", "photos", "-o", "photos/a.png"], "photos/a.png is read by this command and would be replaced"),
        (["drift", "ok.png", "--plot", "ok.png"], "ok.png is read by this command and would be replaced"),
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
        (["train", "smoke", "--data", "x", "--out", ".y"], "--out .y cannot be served: a model's name"),
        (["train", "smoke", "--data", "x", "--out", "y" * 201], "at most 200 printable characters, none of them @"),
        (["adapt", "photos", "--out", "y@1/"], "--out y@1 cannot be served: a model's name"),
        (["pull", "me/y", "--out", "y@1"], "--out y@1 cannot be served: a model's name"),
        (["train", "smoke", "--data", "x", "--out", "y", "--size", "30"], "must be multiples of 4, not 30x30"),
        (["train", "smoke", "--data", "empty", "--out", "y", "--init-from", "tinny"], "did you mean tiny?"),
        (
            ["train", "smoke", "--data", "empty", "--out", "y", "--tracker", "nothing.at:all"],
            "no tracker 'nothing.at:all' (No module named 'nothing'): name it as module:function, and add",
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
    names_model = "--model" in arguments or arguments[0] in ("train", "pull")
    done = run(*arguments, *([] if names_model else ["--model", "tiny"]))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("ncml: ")
    assert done.stderr.count("\n") == 1
    assert "None" not in done.stderr


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


def test_help_is_printed_on_a_narrow_terminal_and_beside_a_module_that_hides_a_package(tmp_path: Path) -> None:
    (tmp_path / "worker.py").touch()
    code = "from ncml.cli.main import main; main(['--help'])"
    search_path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"COLUMNS": "5", "PYTHONPATH": search_path}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "Exit status" in done.stdout


def test_every_option_of_every_command_is_explained() -> None:
    for name, location in cli.commands().items():
        command = pkgutil.resolve_name(location)
        for option in inspect.signature(command).parameters.values():
            doc = inspect.getdoc(command) or ""
            assert re.search(rf"^\s*{option.name}: ", doc, re.M) or "help=" in str(option.annotation), (name, option)


def test_an_option_that_switches_something_off_says_so_and_has_no_default() -> None:
    for name, location in cli.commands().items():
        for option in inspect.signature(pkgutil.resolve_name(location)).parameters.values():
            if option.default is True:  # --no-NAME, whose description as NAME would be its opposite
                described = str(option.annotation)
                assert "help=" in described, (name, option)
                assert "help_behavior_hint=''" in described, (name, option)
