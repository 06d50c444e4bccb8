"""The options of `ncml train` for a run that continues a saved one."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import ncml
from ncml import checkpoint, runtime
from ncml.cli import main as cli
from ncml.evaluation import recommendation
from ncml.training.folder import STATE
from tests.ncml import nets


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images `photos` and the run `run`, whose learning rates are a quarter of the recipe's."""
    folder = tmp_path_factory.mktemp("saved")
    nets.save_images(folder / "photos", nets.images(30).numpy())
    assert train(folder, "run", "--max-images", "64", "--schedule", "constant", "--learning-rate", "5e-4") == 0
    return folder


def train(folder: Path, out: str, *options: str, recipe: str = "smoke") -> int:
    return cli.main(["train", recipe, "--data", str(folder / "photos"), "--out", str(folder / out), *options])


def learning_rate(folder: Path) -> float:
    return ncml.load(folder).config.training.learning_rate


def test_a_resumed_run_keeps_its_learning_rate_unless_another_is_given(saved: Path) -> None:
    for name, rate in ("same", ()), ("stated", ("5e-4",)), ("lower", ("1e-4",)):
        shutil.copytree(saved / "run", saved / name)
        assert (
            train(saved, name, "--resume", "--max-images", "96", *(f"--learning-rate={value}" for value in rate)) == 0
        )
    assert [learning_rate(saved / name) for name in ("same", "stated", "lower")] == [5e-4, 5e-4, 1e-4]
    same, stated, lower = (load_file(saved / name / STATE) for name in ("same", "stated", "lower"))
    assert all(torch.equal(same[name], stated[name]) for name in same)
    assert not all(torch.equal(same[name], lower[name]) for name in same)


def test_the_same_command_resumes_a_run_with_a_constant_rate(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message of a stopped run asks for --resume to be added to the command."""
    shutil.copytree(saved / "run", saved / "constant")
    assert train(saved, "constant", "--schedule", "constant", "--max-images", "96", "--resume") == 0
    assert ncml.load(saved / "constant").config.training.cooldown_fraction == 0
    assert train(saved, "constant", "--schedule", "cooldown", "--resume") == 2
    expected = "ncml: --schedule is cooldown, but that of the run is constant: omit --schedule."
    assert capsys.readouterr().err.splitlines()[-1] == expected


@pytest.mark.parametrize("objective", ["ncml", "mle"])
def test_a_run_is_tuned_even_if_another_model_has_its_name(
    saved: Path, tmp_path: Path, model: ncml.Model, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    shutil.copytree(model.folder, tmp_path / "models" / "mine")
    checkpoint.write_sampling(tmp_path / "models" / "mine", {"noise": 5.0})
    tuned: list[Path] = []
    monkeypatch.setattr(recommendation, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(recommendation, "recommend", lambda model, *_, **__: tuned.append(model.folder) or Mock())
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "smoke", "--data", str(saved / "photos"), "--out", "mine", "--objective", objective]
    assert cli.main([*arguments, "--max-images", "32"]) == 0
    assert tuned == [tmp_path / "mine"]
    checkpoint.write_sampling(tmp_path / "mine", {"noise": 0.0})
    assert cli.main([*arguments, "--max-images", "32", "--resume"]) == 0
    assert tuned == [tmp_path / "mine"]  # not again


def test_a_branch_keeps_the_learning_rate_of_its_run(saved: Path) -> None:
    branch = ("--cooldown-from", str(saved / "run"), "--max-images", "128")
    assert train(saved, "branch", *branch) == 0
    assert learning_rate(saved / "branch") == 5e-4


def test_the_precision_follows_the_processor_and_then_the_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's bf16 needs instructions for it, without which fp32 is faster; a resumed run keeps its precision."""
    features = saved / "cpuinfo"
    monkeypatch.setattr(runtime, "CPU_INFO", features)

    def precision(out: str, *options: str) -> str:
        assert train(saved, out, "--size", "8", *options, recipe="cifar10_tiny") == 0
        return ncml.load(saved / out).config.training.precision

    for flags, expected in ("fma avx2", "fp32"), ("avx512f avx512_bf16", "bf16"):
        features.write_text(f"processor : 0\nflags : fpu {flags} sse\n")
        assert precision(expected, "--max-images", "16") == expected
    assert precision("fp32", "--resume", "--max-images", "32") == "fp32"
    features.unlink()
    assert precision("bf16", "--resume", "--max-images", "32") == "bf16"
    assert precision("bf16", "--resume", "--max-images", "48", "--precision", "fp32") == "fp32"
    assert precision("unknown", "--max-images", "16") == "fp32"
