"""`ncml calibrate`, `score` and `drift`, in the order in which a user runs them."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ncml
from ncml import images
from ncml.cli import local_model, score_output, terminal
from ncml.cli import main as cli
from ncml.cli import rows as row_module
from ncml.cli.table import read
from ncml.paths import list_files
from tests.ncml import nets

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, model: ncml.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    shutil.copytree(model.folder, tmp_path / "models" / "loud")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCML_MODELS", str(tmp_path / "models"))

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        status = cli.main(arguments)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return command


def write(folder: Path, count: int, seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(nets.images(count, *size, seed=seed).numpy()):
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03}.png")


@pytest.fixture(scope="module")
def calibrated_folder(model: ncml.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model, calibrated on the images that `calibrated` writes to `good`."""
    folder = tmp_path_factory.mktemp("calibrated")
    shutil.copytree(model.folder, folder / "loud")
    write(folder / "good", 84, 1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["calibrate", "--model", f"{folder / 'loud'}", "--data", f"{folder / 'good'}", "--unseen"]) == 0
    assert "24 images for estimation, 60 for ranking" in printed.getvalue()
    assert "the smallest p is 0.016" in printed.getvalue()
    return folder / "loud"


@pytest.fixture
def calibrated(run: Run, calibrated_folder: Path, tmp_path: Path) -> Run:
    write(tmp_path / "good", 84, 1)
    shutil.copytree(calibrated_folder, tmp_path / "models" / "loud", dirs_exist_ok=True)
    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_calibrate_reports_the_calibration(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "good", 84, 1)
    (tmp_path / "good" / "999.png").write_text("not an image")
    done = run("calibrate", "--model", "loud", "--data", "good", "--unseen", "--tolerate", "jpeg,resize", "--json")
    result = json.loads(done.stdout)
    model = ncml.load(tmp_path / "models" / "loud")
    assert model.calibration is not None
    assert result["calibration"] == model.calibration.version
    assert result["threshold"] == model.calibration.thresholds["multiscale_corr"]
    assert result["name"] == "default"
    assert result["power"] == model.calibration.power.to_json()
    assert (result["n_fit"], result["n_rank"], result["skipped"]) == (24, 60, 1)
    assert result["tolerate"] == list(model.calibration.tolerate) == ["jpeg", "resize"]
    assert result["suspicious"] == []
    done = run("drift", "good", "--model", "loud")
    assert done.returncode == 2
    assert "half of the ranking images of the calibration 'default' were processed" in done.stderr


def test_calibrate_shows_progress_while_it_generates_images(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "good", 39, 1)
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.0)
    monkeypatch.setattr(terminal, "QUIET_S", 0.0)
    done = run("calibrate", "--model", "loud", "--data", "good", "--unseen")
    assert "noisy sampling 8/8" in done.stderr


def test_calibrate_lists_images_that_are_unlike_the_others(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "good", 84, 1)
    (tmp_path / "good" / "011.png").write_text("not an image")
    Image.new("RGB", (8, 8)).save(tmp_path / "good" / "050.png")
    done = run("calibrate", "--model", "loud", "--data", "good", "--unseen")
    assert re.search(r"after barely visible processing: JPEG, quality 95 \(\d+%\), JPEG, quality 75 \(", done.stdout)
    listed = re.search(r"(\d+) of 83 images are unlike the others: (.*); remove any that is not good", done.stdout)
    assert listed, done.stdout
    assert len(listed[2].split(", ")) == int(listed[1]) < 10
    assert "050.png" in listed[2].split(", ")


def test_calibrations_are_made_and_selected_by_name(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 3, 2)
    made = calibrated(
        "calibrate", "--model", "loud", "--data", "good", "--unseen", "--tolerate", "jpeg", "--name", "tolerant"
    )
    assert made.returncode == 0, made.stderr
    model = ncml.load(tmp_path / "models" / "loud")
    assert list(model.calibrations.by_name) == ["default", "tolerant"]
    for heading in ("## Calibration default", "## Calibration tolerant"):
        assert model.card.count(heading) == 1
    arguments = ("score", "new", "--model", "loud", "--statistic", "llr", "--json")
    plain, tolerant = (
        json.loads(calibrated(*arguments, *option).stdout) for option in ([], ["--calibration", "tolerant"])
    )
    assert (plain["calibration"], tolerant["calibration"]) == ("default", "tolerant")
    for result in (plain, tolerant):
        calibration = model.calibrations.by_name[result["calibration"]]
        scores = [row["score"] for row in result["results"]]
        assert [row["p_value"] for row in result["results"]] == calibration.p_values("llr", np.array(scores)).tolist()
    assert calibrated(*arguments[:4], "-o", "t.csv", "--calibration", "tolerant").returncode == 0
    assert rows(tmp_path / "t.csv")[0]["calibration"] == model.calibrations.by_name["tolerant"].version[:12]
    done = calibrated(*arguments, "--calibration", "strict")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no calibration 'strict': choose from default, tolerant" in done.stderr


def test_a_copy_is_calibrated_and_the_model_is_not_changed(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "others", 84, 5)
    before = (tmp_path / "models" / "loud" / "calibration.json").read_bytes()
    arguments = ("calibrate", "--model", "loud", "--data", "others", "--unseen", "--out", "models/mine")
    done = calibrated(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("models/mine: 24 images for estimation")
    assert (tmp_path / "models" / "loud" / "calibration.json").read_bytes() == before
    original, copy = (ncml.load(tmp_path / "models" / name) for name in ("loud", "mine"))
    assert copy.version == original.version
    assert copy.calibration is not None
    assert original.calibration is not None
    assert copy.calibration.version != original.calibration.version
    assert calibrated(*arguments, "--name", "second").returncode == 0
    assert list(ncml.load(tmp_path / "models" / "mine").calibrations.by_name) == ["default", "second"]
    for out in ("good", "good/000.png"):
        refused = calibrated(*arguments[:-1], out)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert f"{out} exists and is not a model folder" in refused.stderr


def test_calibrations_of_a_newer_version_are_refused_before_the_data_is_read(calibrated: Run, tmp_path: Path) -> None:
    loud, mine = tmp_path / "models" / "loud", tmp_path / "models" / "mine"
    newer = '{"format": 3, "calibrations": {}}'
    (loud / "calibration.json").write_text(newer)
    write(tmp_path / "others", 1, 5)  # too few, which would be the second complaint
    in_place = ("calibrate", "--model", "loud", "--data", "others", "--unseen")
    as_copy = (*in_place, "--out", "models/mine")
    # A new copy has no calibrations that could be replaced.
    done = calibrated(*as_copy)
    assert done.returncode == 2
    assert "newer" not in done.stderr
    assert not mine.exists()
    shutil.copytree(loud, mine)
    for arguments in (in_place, as_copy):
        done = calibrated(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.endswith("calibration.json has format 3, newer than 2: upgrade ncml.\n")
    assert [(folder / "calibration.json").read_text() for folder in (loud, mine)] == [newer, newer]


def test_a_limit_takes_a_spread_sample(run: Run, tmp_path: Path) -> None:
    """Two folders, one of dark and one of light images: the first N images would all be of one kind."""
    for name, value in (("a", 20), ("b", 220)):
        folder = tmp_path / "good" / name
        folder.mkdir(parents=True)
        for i in range(70):
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(folder / f"{i:03}.png")
    done = run("calibrate", "--model", "loud", "--data", "good", "--unseen", "--limit", "20", "--json")
    assert done.returncode == 0, done.stderr
    calibration = ncml.load(tmp_path / "models" / "loud").calibration
    assert calibration is not None
    bits, counts = np.unique(calibration.ranked["bpd"], return_counts=True)
    assert len(bits) == 2
    assert counts.tolist() == [10, 10]


def test_images_of_cameras_that_take_turns_are_not_divided_by_camera(run: Run, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    for i in range(70):
        value = 20 if i % 7 < 2 else 220
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / "good" / f"{i:03}.png")
    assert run("calibrate", "--model", "loud", "--data", "good", "--unseen").returncode == 0
    calibration = ncml.load(tmp_path / "models" / "loud").calibration
    assert calibration is not None
    _, counts = np.unique(calibration.ranked["bpd"], return_counts=True)
    assert (len(counts), counts.sum()) == (2, 50)


def test_verdicts_of_a_weak_calibration_are_called_weak(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 2, 2)
    done = calibrated("score", "new", "--model", "loud")
    assert "ncml: the calibration is weak: it ranks among 60 images, and 76 are needed" in done.stderr
    result = json.loads(calibrated("score", "new", "--model", "loud", "--json").stdout)
    assert result["weakness"].startswith("it ranks among 60 images")


def test_without_unseen_the_held_out_parts_are_used(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "good", 84, 1)
    done = run("calibrate", "--model", "loud", "--data", "good")
    assert done.returncode == 2
    assert "4 images are too few to estimate the statistics" in done.stderr
    assert "--unseen uses all of them" in done.stderr
    assert run("calibrate", "--model", "loud", "--data", "good", "--unseen", "--limit", "20").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit must be more than 0"),
        (
            ["--name", "detector"],
            "the name detector selects the verdict of a detector (ncml adapt): choose another name",
        ),
        (["--out", "models/a@1"], "--out models/a@1 cannot be served: a model's name"),
        (["--tolerate", "jpg"], "no change 'jpg' to tolerate: did you mean jpeg?"),
        (["--unseen", "--false-positive-rate", "0"], "must be at least 1e-09 and less than 1, not 0"),
        (["--unseen", "--false-positive-rate", "1e-320"], "at least 1e-09 and less than 1"),
        (
            ["--unseen", "--false-positive-rate", "0.001"],
            "84 images are too few: use at least 1019 good images, 20 to estimate and 999 to rank",
        ),
        (["--tile", "--tolerate", "jpeg"], "omit --tolerate or --tile"),
        (["--tile", "--split", "test"], "--split does not apply to tiles: omit --split or --tile"),
        (["--tile", "--unseen"], "--unseen does not apply to tiles: omit --unseen or --tile"),
        (["--tile-size", "8"], "--tile-size requires --tile: add --tile, or omit --tile-size"),
        (["--tile-overlap", "0.25"], "--tile-overlap requires --tile: add --tile, or omit --tile-overlap"),
        (["--tile", "--tile-size", "4"], "at least the model's 8 pixels"),
        (["--tile", "--data", "nothing"], "nothing is not a folder"),
        (["--data", "empty"], "no readable image"),
        (["--tile", "--data", "empty"], "0 ranking images cannot support"),
        (["--tile", "--data", "tiny"], "smaller than a tile"),
    ],
)
def test_an_impossible_calibration_is_refused_in_one_line(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    write(tmp_path / "good", 84, 1)
    write(tmp_path / "tiny", 3, 1, (6, 6))
    (tmp_path / "empty").mkdir()
    data = [] if "--data" in arguments else ["--data", "good"]
    done = run("calibrate", "--model", "loud", *arguments, *data)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_is_scored_into_a_table(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new" / "deep", 70, 2)
    write(tmp_path / "new", 3, 3, mode="L")
    (tmp_path / "new" / "deep" / "030.png").write_bytes(b"\x89PNG but not an image")
    arguments = (
        "score",
        "new",
        "--model",
        "loud",
        "--output",
        "t.csv",
        "--statistics",
        "llr,typicality",
        "--fdr",
        "0.2",
    )
    done = calibrated(*arguments)
    assert done.returncode == 0, done.stderr
    assert "72 images" in done.stdout
    assert "discoveries at a false discovery rate of 0.2" in done.stdout
    assert "1 file was skipped" in done.stderr
    table = rows(tmp_path / "t.csv")
    assert len(table) == 73
    assert [row["file"] for row in table] == [str(p) for p in sorted(Path("new").glob("*.png"))] + [
        str(p) for p in sorted(Path("new/deep").iterdir())
    ]
    (broken,) = [row for row in table if row["error"]]
    assert broken["file"] == "new/deep/030.png"
    assert not broken["bpd"]
    model = ncml.load(tmp_path / "models" / "loud")
    for row in table[:4]:
        pixels = images.resize_to(images.open_image(row["file"]), 8, 8)
        (score,) = model.score(pixels, statistics=["llr", "typicality"])
        assert score.ood is not None
        assert float(row["bpd"]) == pytest.approx(score.bpd, rel=1e-5)
        assert float(row["p_value"]) == pytest.approx(score.ood.p_value)
        assert row["is_ood"] == str(int(score.ood.is_ood))
        assert float(row["llr"]) == pytest.approx(score.statistics["llr"], rel=1e-3, abs=1e-5)
    assert {row["discovery"] for row in table} <= {"", "0", "1"}


def test_an_interrupted_run_resumes(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 70, 2)
    arguments = ("score", "new", "--model", "loud", "--output", "t.csv")
    assert calibrated(*arguments).returncode == 0
    whole = (tmp_path / "t.csv").read_text()
    lines = whole.splitlines(keepends=True)
    marked = [*lines[:2], lines[2].replace(lines[2].split(",")[1], "123.0"), *lines[3:40], lines[40][:7]]
    (tmp_path / "t.csv").unlink()
    (tmp_path / "t.csv.part").write_text("".join(marked))
    assert calibrated(*arguments).returncode == 0
    table = rows(tmp_path / "t.csv")
    assert len(table) == 70
    assert table[1]["bpd"] == "123.0"  # rows on disk are not computed again
    assert [row["file"] for row in table] == [line.split(",")[0] for line in lines[1:]]
    (tmp_path / "t.csv.part").write_text("".join(marked))
    for other in (["--statistic", "llr"], ["--noise", "2"], ["--class", "a"], ["--only-bpd"], ["--statistics", "llr"]):
        done = calibrated(*arguments, *other)
        assert done.returncode == 2, other
        assert "was started by another command, model, calibration or release of ncml" in done.stderr
    (tmp_path / "new" / "000a.png").write_bytes((tmp_path / "new" / "000.png").read_bytes())
    done = calibrated(*arguments)
    assert done.returncode == 2
    assert "was started on other files" in done.stderr


def test_a_run_skips_unreadable_files(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 4, 2)
    (tmp_path / "new" / "000.png").write_bytes(b"")
    (tmp_path / "new" / "001.png").unlink()
    (tmp_path / "new" / "001.png").symlink_to("nowhere.png")
    whole = (tmp_path / "new" / "002.png").read_bytes()
    (tmp_path / "new" / "002.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "new" / "004.txt").write_text("notes")
    done = calibrated("score", "new", "--model", "loud")
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["new/003.png"]
    for name in ("000.png", "001.png", "002.png", "004.txt"):
        assert f"ncml: skipped: new/{name}" in done.stderr
    assert "4 files were skipped\n" in done.stderr
    assert "more" not in done.stderr


def test_the_first_skipped_files_are_listed_with_the_number_of_others(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 1, 2)
    for i in range(6):
        (tmp_path / "new" / f"{i}.txt").write_text("notes")
    arguments = ("score", "new", "--model", "loud")
    reported = {(): "-o FILE or --json lists all", ("-o", "t.csv"): "the column error of t.csv lists all"}
    for options, where in reported.items():
        printed = calibrated(*arguments, *options).stderr
        assert printed.count("ncml: skipped: new/") == 5
        assert f"ncml: skipped: and 1 more; {where}\nncml: 6 files were skipped\n" in printed
    assert len(json.loads(calibrated(*arguments, "--json").stdout)["errors"]) == 6


def test_a_name_that_is_not_utf_8_is_printed_with_an_escape(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 2, 2)
    (tmp_path / "new" / "000.png").rename(tmp_path / "new" / os.fsdecode(b"caf\xe9.png"))
    (tmp_path / "new" / os.fsdecode(b"\xe9.txt")).write_text("not an image")
    arguments = ("score", "new", "--model", "loud")
    names = ["new/001.png", "new/caf\\xe9.png", "new/\\xe9.txt"]
    for table in ("t.csv", "t.parquet"):
        done = calibrated(*arguments, "--output", table)
        assert done.returncode == 0, done.stderr
        assert "skipped: new/\\xe9.txt is not an image" in done.stderr
        assert [row["file"] for row in read(tmp_path / table, ["file"])] == names
    done = calibrated(*arguments, "--map", "maps")
    assert [line.split()[-1] for line in done.stdout.splitlines()] == names[:2]
    assert (tmp_path / "maps" / "new" / "caf\\xe9.png.png").is_file()
    assert [row["file"] for row in json.loads(calibrated(*arguments, "--json").stdout)["results"]] == names[:2]
    (tmp_path / "t.csv.part").write_text((tmp_path / "t.csv").read_text())
    assert calibrated(*arguments, "--output", "t.csv").returncode == 0  # it resumes, and nothing is left to do
    assert calibrated("calibrate", "--model", "loud", "--data", "new", "--unseen").stderr.startswith("ncml: 2 images")


def test_control_characters_of_a_name_forge_no_lines(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 2, 2)
    (tmp_path / "new" / "000.png").rename(tmp_path / "new" / "a\x1b[2J\nis_ood \x9b.png")
    arguments = ("score", "new", "--model", "loud")
    name = "new/a\\x1b[2J\\x0ais_ood \\xc2\\x9b.png"
    lines = calibrated(*arguments).stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].endswith(name)
    assert calibrated(*arguments, "--output", "t.csv").returncode == 0
    assert [row["file"] for row in read(tmp_path / "t.csv", ["file"])] == ["new/001.png", name]
    (tmp_path / "t.csv.part").write_text((tmp_path / "t.csv").read_text())
    assert calibrated(*arguments, "--output", "t.csv").returncode == 0  # it resumes, and nothing is left to do


def test_no_image_is_recorded_without_the_verdict_that_the_table_promises(
    calibrated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibration is removed after the command has begun, before its first image is scored."""
    load = local_model.load

    def load_without_calibration(*arguments: Any) -> ncml.Model:
        (tmp_path / "models" / "loud" / "calibration.json").unlink()
        return load(*arguments)

    monkeypatch.setattr(local_model, "load", load_without_calibration)
    done = calibrated("score", "good", "-o", "scores.csv")
    assert done.returncode == 2
    assert "the calibration of loud has been replaced or removed since this command started" in done.stderr
    assert not list(tmp_path.glob("scores.csv*"))


def test_a_pipe_among_the_files_of_a_folder_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "a.png")
    os.mkfifo(folder / "b.png")  # without a writer: reading it would not end
    assert [path.name for path in list_files([folder])] == ["a.png"]


def test_maps_of_images_in_different_folders_do_not_replace_each_other(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 2, 2)
    paths = ("new", f"{tmp_path / 'new'}", "new/../new")
    done = run("score", *paths, "--model", "loud", "--map", "maps")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(list((tmp_path / "maps").rglob("*.npz"))) == 6


def test_json_has_every_result(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 3, 2)
    (tmp_path / "new" / "junk.png").write_text("junk")
    done = calibrated("score", "new", "--model", "loud", "--statistics", "all", "--statistic", "llr", "--json")
    result = json.loads(done.stdout)
    assert (result["images"], result["skipped"], result["false_positive_rate"]) == (3, 1, 0.05)
    [error] = result["errors"]
    assert error["file"] == "new/junk.png"
    assert error["error"].startswith("new/junk.png is not an image")
    assert {"bpd", "llr", "multiscale", "score_norm_0", "p_value", "is_ood"} <= result["results"][0].keys()
    assert result["results"][0]["statistic"] == "llr"
    assert result["results"][0]["score"] == result["results"][0]["llr"]


def test_bits_per_dim_follow_the_conditions_with_any_statistics(calibrated: Run, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write(tmp_path / "new", 3, 2)
    model = ncml.load(tmp_path / "models" / "loud")
    pixels = np.stack([images.open_image(path) for path in sorted((tmp_path / "new").iterdir())])
    for options, conditions in (([], {}), (["--noise", "5", "--class", "a"], {"noise": 5, "classes": "a"})):
        expected = pytest.approx([score.bpd for score in model.score(pixels, **conditions)], rel=1e-5)
        common = ("score", "new", "--model", "loud", "--statistics", "all", *options)
        result = json.loads(calibrated(*common, "--json").stdout)
        assert [row["bpd"] for row in result["results"]] == expected
        assert calibrated(*common, "--output", "t.parquet").returncode == 0
        table = parquet.read_table(tmp_path / "t.parquet")
        assert len(set(table.column_names)) == len(table.column_names)
        assert table["bpd"].to_pylist() == expected
        assert {"llr", "multiscale"} < set(table.column_names)
    done = calibrated("score", "new", "--model", "loud", "--statistics", "llr,bpd", "--noise", "5")
    assert (done.returncode, done.stdout) == (2, "")
    assert "omit bpd from --statistics" in done.stderr


def test_lines_contain_the_verdict(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 2, 2)
    noise = 255 * np.random.default_rng(0).integers(0, 2, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "new" / "odd.png")
    done = calibrated("score", "new", "--model", "loud", "--fdr", "0.1")
    odd = next(line for line in done.stdout.splitlines() if "odd.png" in line)
    assert "p 0.0164 OOD *" in odd
    assert done.stdout.count("OOD") == 1
    assert "3 images, 1 flagged" in done.stderr


def test_detectors_are_mentioned_if_no_model_was_named(calibrated: Run, tmp_path: Path) -> None:
    assert "detectors" not in calibrated("score", "good/000.png").stderr
    shutil.copytree(tmp_path / "models" / "loud", tmp_path / "models" / "part")
    (tmp_path / "models" / "part" / "detector.json").write_text("{}")
    mentioned = "ncml: loud judged the images at 8x8 pixels; detectors judge them at their own size: --model part\n"
    assert mentioned in calibrated("score", "good/000.png").stderr
    for options in (("--model", "loud"), ("--only-bpd",), ("--json",)):
        assert "detectors" not in calibrated("score", "good/000.png", *options).stderr


def test_an_unreachable_false_discovery_rate_is_explained(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 20, 2)
    arguments = ("score", "new", "--model", "loud", "--fdr")
    done = calibrated(*arguments, "0.1")
    assert "0 discoveries at a false discovery rate of 0.1 (at p >= 0.016 at least 4 of these" in done.stderr
    done = calibrated(*arguments, "0.01", "-o", "t.csv")
    assert "(unreachable: p >= 0.016 is above the rate; calibrate with more ranking images)" in done.stdout
    assert json.loads(calibrated(*arguments, "0.1", "--json").stdout)["fdr_limit"]
    enough = {"images": 1000, "flagged": 60, "discoveries": 0, "fdr": 0.1}  # flagged, but with larger p-values
    assert score_output.explain_fdr(enough, 1 / 5001) == ""
    assert "at least 2 of these images" in score_output.explain_fdr(enough | {"flagged": 1}, 1 / 5001)


def test_large_images_are_written_to_the_table_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[Path] = []
    monkeypatch.setattr(row_module, "_concerns_image", lambda error, path: True)

    class Scanner:
        def scan(self, path: Path, **_: Any) -> None:
            scanned.append(path)
            raise ncml.InputError(str(path), "it is refused.")

    paths = [tmp_path / name for name in "abc"]
    scorer = row_module.tile_scorer(Scanner(), None, None, row_module.SkippedFiles())  # type: ignore[arg-type]
    batches = row_module.score_batches(paths, scorer)
    assert [len(next(batches)) for _ in paths[:2]] == [1, 1]
    assert scanned == paths[:2]


def test_maps_are_written_under_the_names_of_their_images(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new" / "deep", 2, 2)
    assert calibrated("score", "new", "--model", "loud", "--map", "maps").returncode == 0
    image = images.open_image(tmp_path / "maps" / "new" / "deep" / "001.png.png")
    assert image.shape == (256, 256, 3)
    numbers = np.load(tmp_path / "maps" / "new" / "deep" / "001.png.npz")["map"]
    (score,) = ncml.load(tmp_path / "models" / "loud").score(images.open_image(tmp_path / "new" / "deep" / "001.png"))
    assert numbers.mean() == pytest.approx(score.bpd, rel=1e-4)


def test_a_run_does_not_score_its_own_files(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "new", 2, 2)
    monkeypatch.chdir(tmp_path / "new")
    Path("loop.png").symlink_to("loop.png")
    for _ in range(2):
        done = run("score", ".", "--model", "loud", "--map", "maps", "--output", "t.csv")
        assert done.returncode == 0, done.stderr
        assert [row["file"] for row in rows(Path("t.csv"))] == ["000.png", "001.png", "loop.png"]
        assert len(list(Path("maps").rglob("*"))) == 4


def test_without_a_calibration_there_are_no_verdicts(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 2, 2)
    done = run("score", "new", "--model", "loud")
    assert done.returncode == 0
    assert " p " not in done.stdout
    assert "no verdicts: this model is not calibrated: run ncml calibrate" in done.stderr
    result = json.loads(run("score", "new", "--model", "loud", "--statistics", "all", "--json").stdout)
    assert result["uncalibrated"].startswith("this model is not calibrated")
    assert "p_value" not in result["results"][0]
    assert run("score", "new", "--model", "loud", "--only-bpd").stderr == "2 images\n"
    assert "uncalibrated" not in json.loads(run("score", "new", "--model", "loud", "--only-bpd", "--json").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "empty"], "no image in empty"),
        (["score", "empty", "--output", "t.csv"], "no image in empty"),
        (["score", "junk", "--output", "t.csv"], "junk/a.txt is not an image"),
        (["score", "new", "--output", "t.txt"], "must end in .csv or .parquet"),
        (["score", "new", "--output", "no/t.csv"], "no/t.csv cannot be written: make the folder no first"),
        (["score", "new", "--fdr", "0.1"], "--fdr needs p-values: this model is not calibrated"),
        *(
            (["score", "new", "--only-bpd", option, "llr"], "--only-bpd computes bits/dim and no statistic or verdict")
            for option in ("--statistic", "--statistics", "--calibration")
        ),
        (["score", "new", "--statistic", "all"], "no statistic 'all'"),
        (["score", "new", "--fdr", "2"], "false discovery rate must be more than 0"),
        (["score", "new", "--statistics", "lr"], "no statistic 'lr'"),
        (["score", "new", "--tile-size", "16"], "--tile-size requires --tile"),
        (["score", "new", "--tile", "--class", "a", "--only-bpd"], "cannot be combined with --class and --only-bpd"),
        (
            ["score", "new", "--tile"],
            "tiles cannot be scored: neither they nor whole images are calibrated: run ncml calibrate --tile.",
        ),
        (["drift", "new"], "drift is measured relative to a calibration, but this model is not calibrated"),
        (["score", "new", "--map", "."], "--map . contains new: name another folder"),
        (["drift"], "nothing to compare"),
    ],
)
def test_an_impossible_score_is_refused(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    write(tmp_path / "new", 2, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "a.txt").write_text("a")
    done = run(*arguments, "--model", "loud")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("t.*"))


def test_large_images_are_judged_by_their_tiles(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "good", 28, 3, (24, 20))
    write(tmp_path / "new", 3, 2, (24, 20))
    (tmp_path / "good" / "junk.png").write_text("junk")
    (tmp_path / "good" / "lost.png").symlink_to("nowhere.png")
    broken = images.open_image(tmp_path / "new" / "001.png")
    broken[6:, 6:] = 255 * np.random.default_rng(0).integers(0, 2, (18, 14, 3))
    Image.fromarray(broken).save(tmp_path / "new" / "001.png")
    made = run("calibrate", "--model", "loud", "--data", "good", "--tile")
    assert "8 images by their tiles for estimation, 20 for ranking  (2 could not be read)" in made.stdout, made.stderr
    arguments = ("score", "new", "--model", "loud", "--tile")
    result = json.loads(run(*arguments, "--json", "--map", "maps").stdout)
    flagged = [row["is_ood"] for row in result["results"]]
    assert flagged[1]
    assert result["results"][1]["p_value"] == 1 / 21
    assert min(result["results"][1][side] for side in ("left", "top")) >= 6  # the whole tile is noise
    assert np.load(tmp_path / "maps" / "new" / "001.png.npz")["map"].shape == (24, 20)
    assert images.open_image(tmp_path / "maps" / "new" / "001.png.png").shape == (24, 20, 3)
    assert run(*arguments, "--output", "t.csv").returncode == 0
    assert [row["is_ood"] for row in rows(tmp_path / "t.csv")] == [str(int(f)) for f in flagged]
    assert "p 0.0476 OOD  new/001.png" in run(*arguments).stdout
    write(tmp_path / "new" / "tiny", 1, 1, (6, 6))
    assert "skipped: new/tiny/000.png: an image of 6 x 6 pixels is smaller than a tile" in run(*arguments).stderr
    other = run(*arguments, "--tile-size", "16")
    assert "tiles were calibrated at 8 x 8 pixels" in other.stderr


def test_drift_refuses_a_detector(run: Run, detector_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "new", 1, seed=1)
    done = run("drift", "new", "--model", str(detector_folder))
    assert (done.returncode, done.stdout) == (2, "")
    assert "a detector has none: name a model that ncml calibrate made, or use the alarm of ncml watch" in done.stderr


def test_the_exit_status_reports_drift(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "same", 60, 7)
    done = calibrated("drift", "same", "--model", "loud", "--plot", "d.png")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"no drift found \(p [\d.]+ of the KS test of multiscale_corr, alpha 0.01\)", done.stdout.splitlines()[-1]
    )
    assert images.open_image(tmp_path / "d.png").shape[1] == 1200
    (tmp_path / "other").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(255 * rng.integers(0, 2, (8, 8, 3), np.uint8)).save(tmp_path / "other" / f"{i}.png")
    assert calibrated("score", "other", "--model", "loud", "--output", "t.parquet").returncode == 0
    done = calibrated("drift", "t.parquet", "--model", "loud", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 1
    assert result["drifted"] is True
    assert result["images"] == 40
    assert result["flagged"] > 0.9


def test_the_plot_of_drift_is_not_one_of_its_images(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "same", 21, 7)
    for _ in range(2):  # the second time, the plot lies among the images
        done = calibrated("drift", "same", "--model", "loud", "--plot", "same/drift.png", "--json")
        assert json.loads(done.stdout)["images"] == 21


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_drift_counts_an_image_of_a_table_and_a_folder_once(calibrated: Run, tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "new", 21, 7)
    assert calibrated("score", "new", "--model", "loud", "--output", f"t.{suffix}").returncode == 0

    def count(*sources: str) -> int:
        return json.loads(calibrated("drift", *sources, "--model", "loud", "--json").stdout)["images"]

    assert count(f"t.{suffix}", "new") == count(f"t.{suffix}", f"t.{suffix}") == count("new", "new") == 21
    shutil.copy(tmp_path / "new" / "000.png", tmp_path / "new" / "more.png")
    os.utime(tmp_path / "new" / "001.png", (0, 0))  # another image under the name of an earlier one
    assert count(f"t.{suffix}", str(tmp_path / "new")) == 23


def test_drift_counts_unreadable_files(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 21, 7)
    (tmp_path / "new" / "junk.png").write_text("junk")
    assert calibrated("drift", "new", "--model", "loud").stderr.endswith("1 file was skipped\n")
    assert json.loads(calibrated("drift", "new", "--model", "loud", "--json").stdout)["skipped"] == 1


def test_a_path_that_does_not_exist_is_refused(calibrated: Run) -> None:
    for command in ("score", "drift"):
        refused = calibrated(command, "nope.csv", "--model", "loud")
        message = "ncml: nope.csv cannot be read: there is no such file or folder.\n"
        assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", message)
        assert calibrated(command, "-").stderr.endswith("no such file or folder; name standard input /dev/stdin.\n")


def test_a_table_of_another_calibration_is_refused(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 30, 2)
    assert calibrated("score", "new", "--model", "loud", "--output", "t.csv").returncode == 0
    assert calibrated("calibrate", "--model", "loud", "--data", "good", "--unseen", "--limit", "22").returncode == 0
    done = calibrated("drift", "t.csv", "--model", "loud")
    assert done.returncode == 2
    assert re.search(r"t.csv has another calibration \(\w{12}, not \w{12}\): score the images again", done.stderr)


def test_a_table_without_verdicts_is_refused(calibrated: Run, tmp_path: Path) -> None:
    write(tmp_path / "new", 22, 2)
    assert calibrated("score", "new", "--model", "loud", "--output", "t.csv", "--only-bpd").returncode == 0
    assert "there is no image with a verdict in t.csv" in calibrated("drift", "t.csv", "--model", "loud").stderr


@pytest.mark.parametrize("options", [["--noise", "5"], ["--class", "a"]])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_under_other_conditions_is_refused(
    calibrated: Run, tmp_path: Path, options: list[str], suffix: str
) -> None:
    write(tmp_path / "new", 22, 2)
    assert calibrated("score", "new", "--model", "loud", "--output", f"t.{suffix}", *options).returncode == 0
    done = calibrated("drift", f"t.{suffix}", "--model", "loud")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"t.{suffix} was scored with --class or --noise" in done.stderr


@pytest.mark.parametrize("cell", ["many", "nan"])
def test_a_table_with_text_instead_of_numbers_is_refused(calibrated: Run, tmp_path: Path, cell: str) -> None:
    write(tmp_path / "new", 22, 2)
    assert calibrated("score", "new", "--model", "loud", "--output", "t.csv").returncode == 0
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(text.replace(rows(tmp_path / "t.csv")[3]["bpd"], cell))
    done = calibrated("drift", "t.csv", "--model", "loud")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"t.csv has '{cell}' where a number is expected" in done.stderr
