"""`ncml adapt` from a folder of good images to a detector that judges."""

import json
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
from PIL import Image

import ncml
from ncml.calibration import division
from ncml.cli import main as cli
from ncml.images import alterations, open_image
from ncml.paths import find_model
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
    done = capsys.readouterr()
    assert "holds a detector already" not in done.err
    result = json.loads(done.out)
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


def test_a_detector_that_is_replaced_and_the_command_to_try_the_new_one_are_reported(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_good_images(tmp_path / "good")
    monkeypatch.chdir(tmp_path)
    command = ["adapt", "good", "--model", str(model.folder), "--group", "image", "--no-power", "--out", "cifar10"]
    assert cli.main([*command, "--keep-images"]) == 0
    try_it = capsys.readouterr().err.splitlines()[-1].split()
    assert find_model(try_it[-1]).samefile("cifar10")  # rather than the bundled model of that name
    replaced = "ncml: cifar10 holds a detector already: the new one replaces it"
    assert cli.main([*command, "--keep-images", "--tolerate-brightness", "15"]) == 0
    done = capsys.readouterr()
    assert replaced in done.err.splitlines()
    assert "made for images up to 15% brighter or darker than the good ones" in done.out.splitlines()
    assert cli.main(command) == 0
    assert f"{replaced}, and the images that it keeps are deleted" in capsys.readouterr().err.splitlines()


def test_a_full_disk_is_reported_before_anything_is_computed(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_good_images(tmp_path / "good")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(division, "find_scenes", lambda *_, **__: pytest.fail("it computes"))
    out = tmp_path / "mine"
    assert cli.main(["adapt", str(tmp_path / "good"), "--model", str(model.folder), "--out", str(out)]) == 2
    assert f"ncml: {out}: No space left on device (" in capsys.readouterr().err
    assert not out.exists()


def test_the_last_line_names_the_pictures_of_what_is_found_and_missed(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = next(alteration for alteration in alterations.ALTERATIONS if alteration.kind == "noise")
    monkeypatch.setattr("ncml.calibration.altered_originals.ALTERATIONS", (noise,))
    save_good_images(tmp_path / "good")
    arguments = ["adapt", str(tmp_path / "good"), "--model", str(model.folder), "--group", "image"]
    assert cli.main([*arguments, "--out", str(tmp_path / "mine")]) == 0
    pictures = tmp_path / "mine" / "detector.jpg"
    lines = capsys.readouterr().out.splitlines()
    last_line = lines[-1]
    assert len(lines) == len({*lines})
    assert last_line == f"examples of what it finds and misses are shown in {pictures}"
    assert open_image(pictures).shape[1] >= 144


def test_a_detector_is_reported_before_its_power_so_that_an_interruption_leaves_it_complete(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_good_images(tmp_path / "good")
    monkeypatch.chdir(tmp_path)

    def interrupt(*_arguments: object, **_options: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("ncml.calibration.detector.measure_power", interrupt)
    command = ["adapt", "good", "--model", str(model.folder), "--group", "image", "--out", "mine"]
    assert cli.main(command) == 130
    printed, error = capsys.readouterr()
    assert "flags 5% of good images on average" in printed
    assert printed.splitlines()[-1] == "the images that are unlike the others are shown in mine/suspects.png"
    assert error.endswith("ncml: stopped: mine is complete without its power, which was not measured\n")
    assert open_image("mine/suspects.png").any()
    adapted = ncml.load("mine")
    assert "flags 5% of good images on average" in adapted.card.partition("## Detector")[2]
    assert adapted.detector is not None
    assert adapted.detector.power is None
    assert cli.main([*command, "--json"]) == 130
    assert capsys.readouterr().out == ""


def test_a_detector_that_keeps_its_images_is_updated(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_good_images(tmp_path / "good")
    monkeypatch.chdir(tmp_path)
    save_good_images(tmp_path / "aside", seed=1, count=3)
    common = ["--no-power", "--json"]
    options = ["--model", str(model.folder), "--group", "image", "--keep-images", "--out", "mine"]
    assert cli.main(["adapt", "good", *options, *common, "--check", "aside"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["reviewed"], made["check"]["images"]) == (None, 3)
    (tmp_path / "flagged").mkdir()
    (tmp_path / "good" / "007.png").rename(tmp_path / "flagged" / "dark.png")
    save_image = Image.open(tmp_path / "flagged" / "dark.png").point(lambda level: level + 3)
    save_image.save(tmp_path / "flagged" / "dark.png")
    (tmp_path / "bad").mkdir()
    save_image.point(lambda level: 255 - level).save(tmp_path / "bad" / "white.png")
    update = ["adapt", "flagged", "--update", "mine", "--defective", "bad", "--check", "aside"]
    assert cli.main([*update, "--out", "next", *common]) == 0
    updated = json.loads(capsys.readouterr().out)
    assert updated["n_fit"] == made["n_fit"] + 1
    assert updated["n_rank"] == made["n_rank"]
    assert updated["reviewed"].keys() == {"images", "still_flagged", "defective", "learned", "found"}
    assert updated["reviewed"]["images"] == updated["reviewed"]["defective"] == updated["reviewed"]["found"] == 1
    assert (updated["check"]["images"], updated["check"].keys()) == (3, {"images", "flagged"})
    before, flagged = updated["comparison"]
    assert before.startswith("of 1 added defective image, the former version finds 1 and this one ")
    assert flagged.startswith("the former version flags ")
    assert flagged.endswith(" of the 3 good images that took no part")
    assert cli.main(["adapt", "good", *options, "--check", "good"]) == 2
    error = capsys.readouterr().err
    assert "59 images of 59 cannot check the detector" in error
    assert ": remove 000.png, 001.png, 002.png, " in error
    assert "058.png, 059.png from the folder, or" in error
    refused, replaced = [*update[:4], "--check", "good"], "holds a detector already: the new one replaces it"
    assert cli.main([*refused, "--out", "next"]) == 2
    assert f"ncml: next {replaced}, and the images that it keeps are deleted\n" in capsys.readouterr().err
    assert cli.main([*refused, "--out", "mine"]) == 2
    assert replaced not in capsys.readouterr().err
    assert cli.main(["adapt", "good", *options, "--check", "nowhere"]) == 2
    assert "nowhere is not a folder: name a folder of good images that have no part" in capsys.readouterr().err
    assert cli.main([*update, "--group", "image", "--out", "other"]) == 2
    assert "--update uses the options of the detector itself: omit --group" in capsys.readouterr().err
    assert cli.main([*update, "--tolerate-brightness", "5", "--out", "other"]) == 2
    assert "--update uses the options of the detector itself: omit --tolerate-brightness" in capsys.readouterr().err
    assert cli.main(["adapt", "nowhere", "--tolerate-brightness", "60", "--out", "other"]) == 2
    assert "tolerated change of brightness must be between 0 and 50%, not 60%" in capsys.readouterr().err
    assert cli.main(["adapt", "flagged", "--update", str(model.folder), "--out", "other"]) == 2
    assert "is not a detector: make one with ncml adapt" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
