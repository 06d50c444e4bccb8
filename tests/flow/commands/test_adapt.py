"""`ncml adapt` from a folder of good images to a detector that judges."""

import json
from pathlib import Path

import pytest

import ncml
from ncml.cli import main as cli
from ncml.images import alterations, open_image
from tests.detectors import save_good_images, use_small_scale


@pytest.fixture(autouse=True)
def _small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_scale(monkeypatch)


def test_a_folder_becomes_a_detector(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_good_images(tmp_path / "good")
    monkeypatch.chdir(tmp_path)
    command = ["adapt", "good", "--model", str(model.folder), "--group", "image", "--no-power", "--json"]
    assert cli.main([*command, "--out", "mine"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["suspicious"] == ["007.png"]
    assert result["n_fit"] + result["n_rank"] == 60
    assert result["pictures"] is None
    adapted = ncml.load("mine")
    assert adapted.version == model.version
    assert model.calibration is None  # the model itself is not changed
    assert cli.main(["score", "good/007.png", "--model", "mine", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["is_ood"]
    assert cli.main([*command, "--out", "good"]) == 2
    assert "good exists and is not a model folder" in capsys.readouterr().err


def test_the_last_line_names_the_pictures_of_what_is_found_and_missed(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = next(alteration for alteration in alterations.ALTERATIONS if alteration.kind == "noise")
    monkeypatch.setattr("ncml.calibration.altered_originals.ALTERATIONS", (noise,))
    save_good_images(tmp_path / "good")
    arguments = ["adapt", str(tmp_path / "good"), "--model", str(model.folder), "--group", "image"]
    assert cli.main([*arguments, "--out", str(tmp_path / "mine")]) == 0
    pictures = tmp_path / "mine" / "detector.jpg"
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line == f"examples of what it finds and misses are shown in {pictures}"
    assert open_image(pictures).shape[1] >= 144
