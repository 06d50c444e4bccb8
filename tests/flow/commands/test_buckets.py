"""Commands on a bucket: `ncml watch` in its own process, and models that are made from its images."""

import functools
import json
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import ncml
from ncml import checkpoint
from ncml.cli import main as cli
from ncml.cli.rows import Row, Scorer
from ncml.cli.score_output import TEXT_COLUMNS
from ncml.cli.table import Table
from ncml.cli.watch_loop import Watch
from ncml.errors import InputError
from ncml.images import to_png
from ncml.images.decoding import MAX_BYTES
from ncml.object_storage import StoragePath
from ncml.paths import Location, printable
from tests.conftest import eventually
from tests.detectors import save_good_images, use_small_scale
from tests.flow.commands.conftest import rows
from tests.ncml import nets
from tests.s3 import S3

Start = Callable[..., subprocess.Popen[str]]


def image(seed: int) -> bytes:
    return to_png(nets.images(1, seed=seed).numpy()[0])


@pytest.fixture
def start(start_watch: Start, s3: S3) -> Start:
    """Start `ncml watch` of the bucket; it prints to `out` and `log`."""
    return functools.partial(start_watch, "s3://line/in", "--poll", "0.1", AWS_MAX_ATTEMPTS="1")


def log(tmp_path: Path) -> str:
    return (tmp_path / "log").read_text()


def test_each_object_is_judged_once_through_a_stop_and_a_kill(s3: S3, start: Start, tmp_path: Path) -> None:
    def arrive() -> None:
        for i in range(120):
            s3.put(f"in/{i % 3}/{i:03}.png", image(i))

    process = start("--json")  # before there is an object
    arriving = threading.Thread(target=arrive)
    arriving.start()
    eventually(lambda: len(rows(tmp_path)) > 20)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0
    printed = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [row["file"] for row in printed] == [row["file"] for row in rows(tmp_path)]
    assert {"p_value", "is_ood", "bytes", "modified"} <= printed[0].keys()
    process = start()
    eventually(lambda: len(rows(tmp_path)) > 60)
    process.kill()
    process.wait()
    arriving.join()
    start()
    eventually(lambda: len(rows(tmp_path)) == 120)
    s3.put("in/0/000.png", image(500) + b"longer")  # another image under the name of one that was judged
    eventually(lambda: len(rows(tmp_path)) == 121)
    counts = Counter(row["file"] for row in rows(tmp_path))
    assert counts.pop("s3://line/in/0/000.png") == 2
    assert counts == {f"s3://line/in/{i % 3}/{i:03}.png": 1 for i in range(1, 120)}
    assert "Traceback" not in log(tmp_path)


def test_objects_are_judged_once_if_times_are_listed_with_milliseconds(s3: S3, start: Start, tmp_path: Path) -> None:
    s3.fraction = "123"  # as MinIO does, which reports the time of a single object in seconds
    for i in range(3):
        s3.put(f"in/{i}.png", image(i))
    start()
    eventually(lambda: len(rows(tmp_path)) == 3)
    s3.put("in/0.png", image(0) + b"longer")
    eventually(lambda: len(rows(tmp_path)) == 4)
    assert Counter(row["file"] for row in rows(tmp_path))["s3://line/in/0.png"] == 2
    assert {row["modified"].partition(".")[2] for row in rows(tmp_path)} == {"123000000Z"}


def test_watching_continues_after_an_outage_of_the_storage(s3: S3, start: Start, tmp_path: Path) -> None:
    s3.put("in/0.png", image(0))
    start()
    eventually(lambda: len(rows(tmp_path)) == 1)
    s3.refuse = lambda method, path: ("403 Forbidden", "ExpiredToken") if path.endswith(".png") else None
    s3.put("in/1.png", image(1))
    eventually(lambda: "s3://line/in/1.png cannot be read: ExpiredToken" in log(tmp_path))
    s3.refuse = lambda method, path: ("403 Forbidden", "ExpiredToken")
    eventually(lambda: "s3://line/in cannot be read: ExpiredToken" in log(tmp_path))
    s3.refuse = lambda method, path: None
    eventually(lambda: len(rows(tmp_path)) == 2)
    assert [row["error"] for row in rows(tmp_path)] == ["", ""]


@pytest.mark.parametrize(("status", "code"), [("500 Error", "InternalError"), ("403 Forbidden", "AccessDenied")])
def test_an_object_that_storage_does_not_deliver_is_reported_once_and_does_not_hold_up_others(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str, code: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("ncml.cli.watch_loop.RETRY_S", 0.01)
    monkeypatch.setattr("ncml.cli.arrivals.FIRST_RETRY_S", 0.05)
    for i in range(3):
        s3.put(f"in/{i}.png", image(i))
    shown, refused = list[str](), list[str]()

    def refuse(method: str, path: str) -> tuple[str, str] | None:
        if not path.endswith("0.png") or (len(shown) == 2 and len(refused) > 5):
            return None
        refused.append(method)
        if len(refused) == 50:  # others wait for this one
            os.kill(os.getpid(), signal.SIGINT)
        return status, code

    def judge(paths: list[Location]) -> list[Row]:
        rows: list[Row] = []
        for path in paths:
            assert isinstance(path, StoragePath)
            rows.append({"file": printable(path)})
            try:
                path.read(MAX_BYTES)
                rows[-1]["is_ood"] = False
            except InputError as error:
                rows[-1]["error"] = str(error)
        return rows

    def show(row: Row) -> None:
        shown.append(row["file"])
        if len(shown) == 3:
            signal.raise_signal(signal.SIGINT)

    s3.refuse = refuse
    columns = ["file", "is_ood", "bytes", "modified", "moved_to", "error"]
    verdicts = Table(tmp_path / "verdicts.csv", columns, texts=TEXT_COLUMNS, constants={}, is_endless=True)
    Watch(StoragePath("s3://line/in"), verdicts, Scorer(judge, 3), None, None, show, judge="a model").run(0.05)
    assert shown == ["s3://line/in/1.png", "s3://line/in/2.png", "s3://line/in/0.png"]
    assert [row["error"] for row in verdicts.rows()] == ["", "", ""]
    assert capsys.readouterr().err.count("s3://line/in/0.png cannot be read") == 1


def test_watching_uses_new_credentials_when_those_in_a_file_have_expired(
    s3: S3, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_key(name: str) -> None:
        credentials.write_text(f"[default]\naws_access_key_id = {name}\naws_secret_access_key = a-secret\n")

    credentials = tmp_path / "credentials"
    write_key("morning")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    s3.put("in/0.png", image(0))
    start()
    eventually(lambda: len(rows(tmp_path)) == 1)
    s3.expired = "morning"
    s3.put("in/1.png", image(1))
    eventually(lambda: "ExpiredToken" in log(tmp_path))
    write_key("evening")
    eventually(lambda: len(rows(tmp_path)) == 2)
    assert [row["error"] for row in rows(tmp_path)] == ["", ""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("s3://missing/in", "s3://missing/in cannot be read: there is no such bucket, folder or file."),
        (
            "s3://line/in --move-flagged rejects",
            "--move-flagged does not move objects in storage: omit it, or watch a folder of this machine.",
        ),
        ("s3://line/in -o s3://line/verdicts.csv", "output must be on this machine, not in object storage"),
        ("s3://line/in/a.png", "s3://line/in/a.png is not a folder: name the one in which images arrive."),
    ],
)
def test_mistakes_are_one_sentence(
    options: str, message: str, s3: S3, calibrated: ncml.Model, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["watch", *options.split(), "--model", str(calibrated.folder)]) == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1
    assert not (tmp_path / "verdicts.csv").exists()


def test_a_run_trained_on_a_bucket_is_the_one_trained_on_a_copy(s3: S3, tmp_path: Path) -> None:
    nets.save_images(tmp_path / "photos", nets.images(30).numpy())
    s3.put_folder(tmp_path / "photos", "photos")
    for source, out in ((str(tmp_path / "photos"), "here"), ("s3://line/photos", "there")):
        command = ["train", "smoke", "--data", source, "--out", str(tmp_path / out), "--max-images", "32"]
        assert cli.main(command) == 0
    here, there = (checkpoint.describe(tmp_path / out) for out in ("here", "there"))
    assert here.version == there.version
    assert "datasets:" not in (tmp_path / "there" / "card.md").read_text()  # as of a dataset of the Hub


def test_a_detector_made_from_a_bucket_is_the_one_made_from_a_copy(
    model: ncml.Model, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_small_scale(monkeypatch)
    save_good_images(tmp_path / "good")
    s3.put_folder(tmp_path / "good", "good")
    results: list[dict[str, object]] = []
    for source, out in ((str(tmp_path / "good"), "here"), ("s3://line/good", "there")):
        command = ["adapt", source, "--model", str(model.folder), "--group", "image", "--no-power", "--json"]
        command.append("--keep-images")
        assert cli.main([*command, "--out", str(tmp_path / out)]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert [result["calibration"] for result in results] == [results[0]["calibration"]] * 2
    assert results[1]["suspicious"] == ["007.png"]
    kept = sorted(path.name for path in (tmp_path / "there" / "images" / "good").iterdir())
    assert kept == [f"{i:03}.png" for i in range(60)]


def test_an_evaluation_of_a_bucket_is_that_of_a_copy(
    model: ncml.Model, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    nets.save_images(tmp_path / "photos", nets.images(12).numpy())
    s3.put_folder(tmp_path / "photos", "photos")
    measured: list[object] = []
    for source, out in (("photos", "here"), ("s3://line/photos", "there")):
        command = ["evaluate", "likelihood", "--data", source, "--model", str(model.folder), "--out", out, "--json"]
        assert cli.main(command) == 0
        measured.append(json.loads(capsys.readouterr().out)["bpd"])
    assert measured[0] == measured[1]
    assert cli.main(["evaluate", "likelihood", "--data", "s3://line/none", "--model", str(model.folder)]) == 2
    assert capsys.readouterr().err == "ncml: s3://line/none cannot be read: there is no such bucket, folder or file.\n"
