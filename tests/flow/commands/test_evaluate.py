"""`ncml evaluate`: its folder, resuming, and its errors for bad input."""

import csv
import json
import re
import subprocess
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ncml
from ncml.cli import main as cli
from ncml.config import SOLVERS
from ncml.evaluation import bootstrap, report_folder, samples
from tests.ncml import nets
from tests.ncml.nets import save_images

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def evaluate(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCML_MODELS", str(models))
    for columns in ("COLUMNS", "CLASS_COLUMNS"):
        monkeypatch.setattr(samples, columns, 6)
    monkeypatch.setattr(samples, "SHEET_IMAGES", 12)
    for solver, steps in SOLVERS.items():
        monkeypatch.setitem(SOLVERS, solver, min(steps, 4))
    monkeypatch.setattr(bootstrap, "RESAMPLES", 100)
    for name, pixels in zip("ab", nets.images(24, seed=2).numpy().reshape(2, 12, 8, 8, 3), strict=True):
        save_images(tmp_path / "cifar10" / name, pixels)
    save_images(tmp_path / "noise", np.random.default_rng(0).integers(256, size=(15, 8, 8, 3), dtype=np.uint8))

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        status = cli.main(["evaluate", *arguments, "--data", "cifar10", "--out", "out"])
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return command


def without_provenance(answer: dict[str, Any]) -> dict[str, Any]:
    assert "PyTorch" in answer["made"]["machine"]
    return {name: value for name, value in answer.items() if name != "made"}


@pytest.mark.timeout(900)
def test_evaluate_all_writes_the_report_and_resumes(evaluate: Run, tmp_path: Path) -> None:
    today = date.today().isoformat()  # the run may end on the next day
    limits = ("--limit", "8", "--limit", "likelihood=12")
    small = (*limits, "--ood", "noise", "--model", "mine", "--json")
    done = evaluate("all", *small)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert list(answer) == list(report_folder.KINDS)
    assert all("not_measured" not in section for section in answer.values()), answer
    bpd = answer["likelihood"]["bpd"]
    assert list(bpd) == ["0", "0.5", "1"]
    assert bpd["0"]["n"] == 12
    assert bpd["0"]["interval"][0] < bpd["0"]["value"] < bpd["0"]["interval"][1]
    assert answer["sanity"]["compression"]["decodes_exactly"] is True
    assert set(answer["ood"]["auroc"]) == {"noise", "constant", "uniform"}
    low, high = answer["ood"]["intervals"]["auroc"]["noise"]["multiscale"]
    assert low <= answer["ood"]["auroc"]["noise"]["multiscale"] <= high
    assert answer["ood"]["n"] == dict.fromkeys(("cifar10", "noise", "constant", "uniform"), 8)
    measured = answer["fid"]["measured"]
    assert {method: quality["n"] for method, quality in measured.items()} == dict.fromkeys(
        (
            "direct (t = 0)",
            *(f"noisy at {noise} grey levels, refined (Tweedie)" for noise in ("10", "2.5")),
            "defaults, of all classes in turn: guidance 1",
        ),
        8,
    )
    assert measured["direct (t = 0)"]["white_noise"]["n"] == measured["direct (t = 0)"]["recall"]["n"] == 8
    compared = answer["fid"]["solvers"]
    solved = [f"{solver}, {steps} step{'s'[: steps > 1]}" for solver, steps in SOLVERS.items()]
    assert {method: quality["n"] for method, quality in compared.items()} == dict.fromkeys(
        ("direct (t = 0)", *solved), 8
    )
    assert compared["tweedie, 1 step"]["kernel"]["value"] == answer["fid"]["sweep"]["steps"][0]["value"]
    assert "no floor" in " ".join(answer["fid"]["notes"])  # a folder of images has no splits
    assert "has no test split" in " ".join(answer["likelihood"]["notes"])
    needs = f"{bpd['0.5']['value']:.3f}"
    finding = f"NCPN (NCML-VP), 3.61, is not reproduced: the model mine needs {needs}."
    assert finding in " ".join(answer["likelihood"]["findings"])
    out = tmp_path / "out"
    pages = {path.name: path.read_text() for path in out.glob("*.md")}
    index = pages.pop("report.md")
    assert re.findall(r"\]\((.*)\)", index) == [f"{kind}.md" for kind in report_folder.KINDS]
    for kind, section in answer.items():
        listed = "".join(f"- {finding}\n" for finding in section["findings"])
        assert bool(listed) == (kind != "samples")
        assert pages[f"{kind}.md"].partition("\n\n")[2].startswith(f"{listed}\n" if listed else "`")
        assert listed in index
    report = "\n".join(pages.values())
    made = answer["likelihood"]["made"]
    assert made["date"] in (today, date.today().isoformat())
    version = answer["likelihood"]["model"]["version"]
    assert f"mine {version[:12]}; {made['machine']}; {made['date']}; this part took {made['took']}" in report
    for title in ("Table 1", "Figure 2", "Figure 4", "Table 2", "Table 4", "Figures 1 and 5", "published"):
        assert title in report
    for file in (line.split("](")[1].rstrip(")") for line in report.splitlines() if line.startswith("![")):
        with Image.open(out / file) as image:
            assert image.size[0] > 100
    rows = list(csv.DictReader((out / "likelihood.csv").read_text().splitlines()))
    assert rows[0]["model"] == "mine"
    assert float(rows[0]["pi = 0"]) == pytest.approx(bpd["0"]["value"], abs=1e-5)
    assert {row["source"] for row in rows[1:]} == {"published"}
    measured = {path: path.stat().st_mtime_ns for path in (out / "measured").glob("*.npz")}
    again = evaluate("likelihood", *small)
    assert without_provenance(json.loads(again.stdout)) == without_provenance(answer["likelihood"])
    assert {path: path.stat().st_mtime_ns for path in (out / "measured").glob("*.npz")} == measured


def test_several_models_are_compared_in_one_table(evaluate: Run, tmp_path: Path) -> None:
    both = ("--limit", "8", "--model", "mine", "--model", "mle")
    done = evaluate("robustness", *both, "--json")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["models"]
    assert (first["model"]["name"], second["model"]["name"]) == ("mine", "mle")
    assert (len(first["grey_levels"]), second["grey_levels"]) == (8, [0.0])
    done = evaluate("samples", *both)
    assert done.returncode == 0, done.stderr
    assert "out/completions.png" in done.stdout
    done = evaluate("ood", *both)
    assert done.returncode == 0, done.stderr
    assert "mle was left out: this model is not calibrated" in done.stdout


def test_unreadable_sets_are_noted_and_the_others_measured(evaluate: Run, tmp_path: Path) -> None:
    (tmp_path / "noise" / "003.png").write_bytes(b"cut short")
    (tmp_path / "empty").mkdir()
    few = ("--limit", "8", "--model", "mine")
    done = evaluate("ood", *few, "--ood", "empty", "--ood", "noise", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer["auroc"]) == {"noise", "constant", "uniform"}
    notes = " ".join(answer["notes"])
    assert "empty was left out: 'empty' contains no readable image" in notes
    assert "noise: 1 file could not be read" in notes
    done = evaluate("ood", *few, "--ood", "noise:valid", "--json")
    assert "noise is a folder of images, which has no splits: omit :valid." in done.stdout + done.stderr


def test_sets_with_the_same_name_are_distinguished(evaluate: Run, tmp_path: Path) -> None:
    save_images(tmp_path / "A" / "cifar10", nets.images(12, seed=3).numpy())
    save_images(tmp_path / "B" / "cifar10", np.random.default_rng(1).integers(256, size=(12, 8, 8, 3), dtype=np.uint8))
    others = ("--ood", "A/cifar10", "--ood", "B/cifar10", "--ood", "./cifar10")
    done = evaluate("ood", "--limit", "9", "--model", "mine", *others, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer["n"]) == {"cifar10", "A/cifar10", "B/cifar10", "constant", "uniform"}
    assert answer["data"] == "cifar10"
    near, far = (answer["auroc"][f"{name}/cifar10"]["multiscale"] for name in "AB")
    assert near < 0.95 < far
    assert "./cifar10 was left out: its images are those of the in-distribution set cifar10" in " ".join(
        answer["notes"]
    )


def test_models_without_noise_have_no_table_of_refinement(evaluate: Run, tmp_path: Path) -> None:
    done = evaluate("fid", "--limit", "8", "--model", "mle")
    assert done.returncode == 0, done.stderr
    assert "direct (t = 0)" in done.stdout
    assert "Every solver" not in done.stdout + (tmp_path / "out" / "fid.md").read_text()
    assert (tmp_path / "out" / "quality_solvers.csv").read_text().count("\n") == 1


@pytest.mark.parametrize("batching", ["fast", "fixed"])
def test_a_trajectory_shows_each_moment_of_all_its_images_once(
    models: Path, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    drawn: list[tuple[str, np.ndarray]] = []
    monkeypatch.setattr(samples, "draw_sheet", drawn.extend)
    samples.trajectory(ncml.load(models / "mine", batching=batching), "mine")
    names, pixels = zip(*drawn, strict=True)
    assert names == (*(f"row {row}" for row in (2, 4, 6, 8)), *(f"refined, step {step}" for step in (5, 10, 15, 20)))
    for row, images in zip((2, 4, 6), pixels, strict=False):
        is_drawn = (images != images[:, -1:]).any((0, 2, 3))
        assert is_drawn[:row].all()
        assert not is_drawn[row:].any()


def test_the_key_of_the_shuffled_sheet_names_the_class_of_each_image(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, drawn = ncml.load(models / "mine"), []
    monkeypatch.setattr(samples, "draw_sheet", drawn.extend)
    monkeypatch.setattr(samples, "SHEET_IMAGES", 20)
    inputs = SimpleNamespace(cache=SimpleNamespace(on_progress=lambda progress: None))
    _, key = samples.blind_sheet(inputs, model, "mine")  # type: ignore[arg-type]
    assert sorted(key) == ["a"] * 10 + ["b"] * 10
    assert key[:10] != ["a", "b"] * 5
    assert [name for name, _ in drawn] == ["1 to 10", "11 to 20"]
    for start, (_, images) in zip((0, 10), drawn, strict=True):
        alone = [model.generate(1, classes=key[start + i], seeds=50_000 + start + i)[0] for i in range(10)]
        assert np.array_equal(images, alone)


def test_mistakes_are_reported_in_one_line(evaluate: Run, tmp_path: Path) -> None:
    for arguments, message in [
        (("ood", "--model", "mle"), "mle: this model is not calibrated"),
        (("likelihood", "--model", "nobody"), "there is no model 'nobody'"),
        (("likelihood", "--model", "mine", "--limit", "many"), "--limit many is not valid"),
        (("everything", "--model", "mine"), "everything"),
    ]:
        done = evaluate(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
        assert message in done.stderr
    for file in (tmp_path / "cifar10").glob("*/*.png"):
        file.unlink()
    assert "no readable image" in evaluate("likelihood", "--model", "mine").stderr
