"""Commands on a bucket give what they give on a copy of it, and tables in it resume."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ncml
from ncml.cli import main as cli
from ncml.cli import rows as row_module
from ncml.cli import stored_table
from ncml.cli.table import read
from ncml.images import to_png
from tests.ncml import nets
from tests.s3 import S3

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, calibrated: ncml.Model, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(row_module, "BATCH", 4)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        status = cli.main([arguments[0], *arguments[1:], "--model", str(calibrated.folder)])
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return command


def image(seed: int) -> bytes:
    return to_png(nets.images(1, seed=seed).numpy()[0])


def fill(s3: S3, count: int, prefix: str = "in/") -> None:
    for i in range(count):
        s3.put(f"{prefix}{i:03}.png", image(i))


def image_requests(s3: S3) -> list[str]:
    return [path for path in s3.paths("GET") if path.endswith(".png")]


def rows(s3: S3, key: str = "verdicts.csv") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((s3.get(key) or b"").decode())))


def test_score_judges_a_bucket_as_a_copy_of_it(run: Run, s3: S3, tmp_path: Path) -> None:
    fill(s3, 5)
    s3.put("in/line 2/a#b.png", image(9))
    s3.put("in/notes.txt", b"no image")
    for key in s3.listed():
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s3.get(key) or b"")
    here, there = (json.loads(run("score", source, "--json").stdout) for source in ("in", "s3://line/in"))
    assert [row["file"] for row in there["results"]] == [f"s3://line/{row['file']}" for row in here["results"]]
    assert [row | {"file": ""} for row in there["results"]] == [row | {"file": ""} for row in here["results"]]
    assert [row["file"] for row in there["errors"]] == ["s3://line/in/notes.txt"]
    assert s3.requests.count(("GET", "/line/in/000.png")) == 1


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_in_a_bucket_is_read_again_and_only_new_images_are_judged(
    run: Run, s3: S3, suffix: str, tmp_path: Path
) -> None:
    fill(s3, 6)
    table = f"s3://line/verdicts{suffix}"
    done = run("score", "s3://line", "-o", table)
    assert done.returncode == 0
    assert done.stdout.startswith("6 images, ")
    assert done.stdout.endswith(f": {table}\n")
    assert "verdicts" + suffix in s3.listed()
    assert not any(key.endswith(".part") for key in s3.listed())
    fill(s3, 2, "in/new-")
    s3.put("in/003.png", image(77))
    s3.requests.clear()
    done = run("score", "s3://line", "-o", table)
    assert "5 of them unchanged since the table was written" in done.stdout
    assert sorted(image_requests(s3)) == ["/line/in/003.png", "/line/in/new-000.png", "/line/in/new-001.png"]
    copy = tmp_path / f"copy{suffix}"
    copy.write_bytes(s3.get(f"verdicts{suffix}") or b"")
    listed = list(read(copy, ["file", "bytes", "modified", "bpd"]))
    assert [row["file"] for row in listed] == sorted(f"s3://line/{key}" for key in s3.listed() if key.startswith("in/"))
    assert all(float(row["bytes"]) == len(s3.get(row["file"].removeprefix("s3://line/")) or b"") for row in listed)
    assert all(row["modified"].endswith("Z") for row in listed)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_its_rows_in_the_bucket_and_another_machine_resumes(
    run: Run, s3: S3, stop: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fill(s3, 20)
    add = stored_table.StoredTable.add
    calls = 0

    def add_twice(self: Any, new: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(stop)
        add(self, new)

    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, it is ignored
    try:
        with monkeypatch.context() as patch:
            patch.setattr(stored_table.StoredTable, "add", add_twice)
            assert run("score", "s3://line/in", "-o", "s3://line/verdicts.csv").returncode == 130
    finally:
        signal.signal(signal.SIGHUP, inherited)
    assert "verdicts.csv" not in s3.listed()
    assert len(rows(s3, "verdicts.csv.part")) == 8
    assert not list(tmp_path.glob("ncml-*"))
    s3.requests.clear()
    done = run("score", "s3://line/in", "-o", "s3://line/verdicts.csv")
    assert done.returncode == 0
    assert sorted(image_requests(s3)) == [f"/line/in/{i:03}.png" for i in range(8, 20)]
    assert [row["file"] for row in rows(s3)] == [f"s3://line/in/{i:03}.png" for i in range(20)]
    assert "verdicts.csv.part" not in s3.listed()


def test_rows_are_stored_while_the_command_runs(run: Run, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(s3, 8)
    monkeypatch.setattr(stored_table, "SAVE_S", 0.0)
    monkeypatch.setattr(stored_table, "UPLOAD_SHARE", 1e9)
    stored: list[int] = []

    def look(method: str, path: str) -> None:
        if path == "/line/in/004.png":
            stored.append(len(rows(s3, "verdicts.csv.part")))

    s3.before = look
    assert run("score", "s3://line/in", "-o", "s3://line/verdicts.csv").returncode == 0
    assert stored == [4]


def test_a_table_that_cannot_be_stored_is_refused_before_an_image_is_read(run: Run, s3: S3) -> None:
    fill(s3, 3)
    s3.refuse = lambda method, path: ("403 Forbidden", "AccessDenied") if method == "PUT" else None
    done = run("score", "s3://line/in", "-o", "s3://line/verdicts.csv")
    assert done.returncode == 2
    assert done.stderr == (
        "ncml: s3://line/verdicts.csv.part cannot be written: access is denied (AccessDenied): "
        "check the credentials and their rights.\n"
    )
    assert image_requests(s3) == []
    done = run("score", "s3://line/in", "-o", "https://host/verdicts.csv")
    assert "use s3://, gs:// or a file of this machine" in done.stderr


def test_a_table_of_another_command_is_not_continued(run: Run, s3: S3) -> None:
    fill(s3, 3)
    s3.put("verdicts.csv.part", b"file,other\r\nx,1\r\n")
    done = run("score", "s3://line/in", "-o", "s3://line/verdicts.csv")
    assert done.returncode == 2
    assert "s3://line/verdicts.csv.part was started by another command, model, calibration or release" in done.stderr
    assert s3.get("verdicts.csv.part") == b"file,other\r\nx,1\r\n"


def test_an_object_that_vanishes_after_it_is_listed_is_skipped(run: Run, s3: S3) -> None:
    fill(s3, 3)
    s3.before = lambda method, path: s3.remove("in/001.png") if path == "/line/in/001.png" else None
    done = run("score", "s3://line/in", "-o", "s3://line/verdicts.csv")
    reason = "s3://line/in/001.png cannot be read: there is no such bucket, folder or file."
    assert done.returncode == 0
    assert [row["error"] for row in rows(s3)] == ["", reason, ""]


def test_an_outage_ends_the_command_and_marks_no_image_as_unreadable(
    run: Run, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(s3, 12)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    def fail(method: str, path: str) -> tuple[str, str] | None:
        is_late = path.endswith(".png") and path >= "/line/in/005.png"
        return ("403 Forbidden", "ExpiredToken") if method == "GET" and is_late else None

    s3.refuse = fail
    done = run("score", "s3://line/in", "-o", "s3://line/verdicts.csv")
    assert done.returncode == 2
    assert "cannot be read: ExpiredToken: check the address, the credentials and the network." in done.stderr
    assert done.stderr.count("\n") == 1
    assert [row["error"] for row in rows(s3, "verdicts.csv.part")] == [""] * 4
    s3.refuse = lambda method, path: None
    assert run("score", "s3://line/in", "-o", "s3://line/verdicts.csv").returncode == 0
    assert [row["error"] for row in rows(s3)] == [""] * 12


def test_rows_are_kept_on_this_machine_if_storage_fails(run: Run, s3: S3) -> None:
    fill(s3, 8)
    s3.refuse = lambda method, path: ("403 Forbidden", "ExpiredToken") if len(image_requests(s3)) >= 8 else None
    done = run("score", "s3://line/in", "-o", "s3://line/verdicts.csv")
    assert done.returncode == 2
    assert "The rows so far are in " in done.stderr
    folder = Path(done.stderr.rpartition("The rows so far are in ")[2].strip().rstrip("."))
    kept = list(folder.iterdir())
    assert len(kept) == 1
    assert kept[0].read_text().count("\n") >= 1 + 4
    shutil.rmtree(folder)


def test_calibrations_on_a_bucket_and_on_a_copy_are_equal(
    model: ncml.Model, s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nets.save_images(tmp_path / "good", nets.images(84, seed=1).numpy())
    s3.put_folder(tmp_path / "good", "good")
    versions: list[str] = []
    for data in (str(tmp_path / "good"), "s3://line/good"):
        out = tmp_path / str(len(versions))
        command = ["calibrate", "--model", str(model.folder), "--data", data, "--unseen", "--out", str(out), "--json"]
        assert cli.main(command) == 0
        versions.append(json.loads(capsys.readouterr().out)["calibration"])
    assert versions[0] == versions[1]


def test_drift_reads_a_table_and_images_of_a_bucket(run: Run, s3: S3) -> None:
    fill(s3, 24)
    assert run("score", "s3://line/in", "-o", "s3://line/verdicts.csv").returncode == 0
    of_images, of_table = (run("drift", source, "--json") for source in ("s3://line/in", "s3://line/verdicts.csv"))
    assert of_images.stderr == of_table.stderr == ""
    assert json.loads(of_images.stdout) == json.loads(of_table.stdout)
    assert run("drift", "s3://line/other.csv").stderr.startswith(
        "ncml: s3://line/other.csv cannot be read: there is no"
    )


def test_the_environment_of_a_process_names_the_server(s3: S3, calibrated: ncml.Model, tmp_path: Path) -> None:
    fill(s3, 1)
    done = subprocess.run(
        [sys.executable, "-m", "ncml.cli", "score", "s3://line/in", "--model", str(calibrated.folder)],
        env=os.environ | s3.environment | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "s3://line/in/000.png" in done.stdout
