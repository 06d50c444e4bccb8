"""`ncml watch` in its own process: files that arrive are judged once, through stops, kills and full disks."""

import errno
import functools
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

import ncml
from ncml.cli import main as cli
from ncml.cli.earlier_rows import STAMP_COLUMNS, stamp
from ncml.cli.notices import Notices, _document  # pyright: ignore[reportPrivateUsage]
from ncml.cli.rows import Row, Scorer
from ncml.cli.score_output import TEXT_COLUMNS
from ncml.cli.table import Table
from ncml.cli.watch_loop import Watch
from ncml.paths import Location, printable
from tests.conftest import eventually, full_disk
from tests.flow.commands.conftest import rows
from tests.receiver import Receiver, write_secret

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "incoming"
    folder.mkdir()
    return folder


@pytest.fixture
def start(start_watch: Start, folder: Path, tmp_path: Path) -> Start:
    """Start the command; what it prints goes to `log`."""
    return functools.partial(start_watch, str(folder), "-o", str(tmp_path / "verdicts.csv"), out="log")


def save(path: Path, seed: int) -> None:
    """Write the random image of a seed under another name, and rename it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path.with_name(f".{path.name}"), "PNG")
    path.with_name(f".{path.name}").rename(path)


def count(tmp_path: Path) -> int:
    return len(rows(tmp_path))


def flagged_seed(model: ncml.Model, tmp_path: Path) -> int:
    """Return the seed of an image that is flagged."""
    for seed in range(100):
        save(tmp_path / "candidate.png", seed)
        (score,) = model.score(tmp_path / "candidate.png")
        if score.ood and score.ood.is_ood:
            return seed
    pytest.fail("no image is flagged")


def stop(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGINT)
    return process.wait(120)


@pytest.mark.parametrize("files", [400, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_each_file_is_judged_once_through_stops_and_a_kill(
    start: Start, folder: Path, tmp_path: Path, calibrated: ncml.Model, files: int
) -> None:
    def arrive() -> None:
        for i in range(files):
            save(folder / f"{i:05}.png", i)

    arriving = threading.Thread(target=arrive)
    process = start()
    arriving.start()
    eventually(lambda: count(tmp_path) > files // 8)
    assert stop(process) == 0
    process = start()
    eventually(lambda: count(tmp_path) > files // 4)
    process.kill()
    process.wait()
    process = start("--json")
    eventually(lambda: count(tmp_path) > files // 2)
    process.terminate()
    assert process.wait(120) == 0
    arriving.join()
    process = start()
    eventually(lambda: count(tmp_path) == files, 1200)
    assert stop(process) == 0
    judged = rows(tmp_path)
    assert Counter(row["file"] for row in judged) == Counter(str(folder / f"{i:05}.png") for i in range(files))
    compared = judged[:: files // 20]
    expected = calibrated.score([row["file"] for row in compared])
    assert [float(row["p_value"]) for row in compared] == [score.ood.p_value for score in expected if score.ood]
    flagged = sum(row["is_ood"] == "1" for row in judged)
    last = (tmp_path / "log").read_text().splitlines()[-2:]
    assert any(line.startswith(f"{files} judged, 0 waiting, {flagged} flagged") for line in last)


def test_flagged_images_are_moved_to_where_their_rows_say_and_none_is_replaced(
    start: Start, folder: Path, tmp_path: Path, calibrated: ncml.Model
) -> None:
    seed, moved = flagged_seed(calibrated, tmp_path), tmp_path / "flagged"
    process = start("--json", "--move-flagged", str(moved))
    for _ in range(2):
        (folder / "line 1").mkdir(exist_ok=True)
        save(folder / "line 1" / "noise.png", seed)
        eventually(lambda: not (folder / "line 1" / "noise.png").exists())
    eventually(lambda: count(tmp_path) == 2)
    assert stop(process) == 0
    judged = rows(tmp_path)
    assert {row["is_ood"] for row in judged} == {"1"}
    first, second = moved / "line 1" / "noise.png", moved / "line 1" / "noise-1.png"
    assert [row["moved_to"] for row in judged] == [str(first), str(second)]
    printed = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert [row["moved_to"] for row in printed] == [str(first), str(second)]
    assert {*(moved / "line 1").iterdir()} == {first, second}
    second.rename(folder / "line 1" / "noise.png")  # as after a kill between row and move
    first.unlink()
    start("--move-flagged", str(moved))
    eventually(second.exists)
    assert count(tmp_path) == 2


def test_a_row_is_printed_after_its_image_was_moved_to_a_name_that_no_other_image_gets(
    folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "flagged"
    moved.mkdir()
    save(moved / "a.png", 0)
    names = ["a.png", "a-1.png", "b.png"]
    for seed, name in enumerate(names):
        save(folder / name, seed)
    columns = ["file", "is_ood", "bytes", "modified", "moved_to", "error"]
    verdicts = Table(tmp_path / "verdicts.csv", columns, texts=TEXT_COLUMNS, constants={}, is_endless=True)
    printed: dict[str, str] = {}

    def judge(paths: list[Location]) -> list[Row]:
        return [{"file": str(path), "is_ood": path.name != "b.png"} for path in paths]

    def show(row: Row) -> None:
        printed[Path(row["file"]).name] = row["moved_to"]
        assert Path(row["file"]).exists() == (not row["moved_to"])
        assert not row["moved_to"] or Path(row["moved_to"]).exists()
        if len(printed) == 3:
            signal.raise_signal(signal.SIGINT)

    Watch(folder, verdicts, Scorer(judge, 3), None, moved, show, judge="a model").run(0.05)
    assert printed == {"a.png": str(moved / "a-1.png"), "a-1.png": str(moved / "a-1-1.png"), "b.png": ""}
    assert {Path(row["file"]).name: row["moved_to"] for row in verdicts.rows()} == printed


def test_an_image_that_has_replaced_a_flagged_one_before_its_move_succeeded_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "flagged"
    moved.write_text("a file, so that no image can be moved yet")
    save(folder / "a.png", 0)
    columns = ["file", "is_ood", "bytes", "modified", "moved_to", "error"]
    verdicts = Table(tmp_path / "verdicts.csv", columns, texts=TEXT_COLUMNS, constants={}, is_endless=True)
    shown: list[Row] = []

    def judge(paths: list[Location]) -> list[Row]:
        return [{"file": str(path), "is_ood": not shown} for path in paths]

    def show(row: Row) -> None:
        shown.append(row)
        if len(shown) == 1:
            save(folder / "a.png", 1)
        elif len(shown) == 2:
            moved.unlink()
            save(folder / "b.png", 2)
        else:
            signal.raise_signal(signal.SIGINT)

    Watch(folder, verdicts, Scorer(judge, 1), None, moved, show, judge="a model").run(0.05)
    assert [row["is_ood"] for row in verdicts.rows()] == ["1", "0", "0"]
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png"]
    assert capsys.readouterr().err.count("cannot be moved") == 1


def test_an_image_that_cannot_be_moved_does_not_keep_others_from_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "flagged"
    moved.mkdir()
    for name in ("part-1", "part-2"):
        (folder / name).mkdir()
        (moved / name).write_text("a file, so that this folder cannot be made")
        save(folder / name / "a.png", 0)
    save(folder / "z.png", 1)
    columns = ["file", "is_ood", "bytes", "modified", "moved_to", "error"]
    verdicts = Table(tmp_path / "verdicts.csv", columns, texts=TEXT_COLUMNS, constants={}, is_endless=True)
    shown: list[Row] = []

    def show(row: Row) -> None:
        shown.append(row)
        if len(shown) == 3:
            signal.raise_signal(signal.SIGINT)

    def judge(paths: list[Location]) -> list[Row]:
        return [{"file": str(path), "is_ood": True} for path in paths]

    Watch(folder, verdicts, Scorer(judge, 3), None, moved, show, judge="a model").run(0.05)
    assert (moved / "z.png").exists()
    assert sorted(path.name for path in folder.rglob("*.png")) == ["a.png", "a.png"]
    [line] = [line for line in capsys.readouterr().err.splitlines() if "cannot be moved" in line]
    assert ", and 1 more cannot be moved; trying again" in line


def test_an_image_that_is_replaced_while_it_is_judged_has_a_row_for_its_successor_only(
    folder: Path, tmp_path: Path
) -> None:
    save(folder / "a.png", 0)
    columns = ["file", "is_ood", "bytes", "modified", "moved_to", "error"]
    verdicts = Table(tmp_path / "verdicts.csv", columns, texts=TEXT_COLUMNS, constants={}, is_endless=True)
    calls = 0

    def judge(paths: list[Location]) -> list[Row]:
        nonlocal calls
        calls += 1
        if calls == 1:
            save(folder / "a.png", 1)
        elif (folder / "b.png").exists():
            signal.raise_signal(signal.SIGINT)
        else:
            save(folder / "b.png", 2)
        return [{"file": str(path), "is_ood": calls == 1} for path in paths]

    moved = tmp_path / "flagged"
    Watch(folder, verdicts, Scorer(judge, 1), None, moved, lambda _: None, judge="a model").run(0.05)
    assert [(Path(row["file"]).name, row["is_ood"]) for row in verdicts.rows()] == [("a.png", "0"), ("b.png", "0")]
    assert not moved.exists()


def test_a_flagged_image_is_moved_although_an_earlier_run_moved_none(
    start: Start, folder: Path, tmp_path: Path, calibrated: ncml.Model
) -> None:
    process = start()
    save(folder / "noise.png", flagged_seed(calibrated, tmp_path))
    eventually(lambda: count(tmp_path) == 1)
    process.kill()
    process.wait()
    start("--move-flagged", str(tmp_path / "flagged"))
    moved = tmp_path / "flagged" / "noise.png"
    eventually(moved.exists)
    assert not (folder / "noise.png").exists()
    assert [row["moved_to"] for row in rows(tmp_path)] == [""]
    assert (
        f"{folder / 'noise.png'}, which an earlier run flagged, is moved to {moved}" in (tmp_path / "log").read_text()
    )


def test_many_flagged_images_that_an_earlier_run_did_not_move_are_not_compared_with_each_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, comparisons = ["file", "is_ood", "bytes", "modified", "moved_to", "error"], Counter[str]()
    verdicts = Table(tmp_path / "verdicts.csv", columns, texts=TEXT_COLUMNS, constants={}, is_endless=True)
    for number in range(200):
        path = folder / f"{number}.png"
        path.touch()
        verdicts.add([{"file": printable(path), "is_ood": 1} | stamp(path)])

    def is_equal(path: Path, other: object) -> bool:
        comparisons["=="] += 1
        return str(path) == str(other)

    monkeypatch.setattr(type(tmp_path), "__eq__", is_equal)
    watch = Watch(folder, verdicts, Scorer(lambda _: [], 1), None, tmp_path / "flagged", print, judge="a model")
    assert len(watch._to_move) == 200
    assert comparisons["=="] < 10 * 200


def test_a_flagged_image_whose_file_name_is_not_utf_8_is_moved_after_a_restart(folder: Path, tmp_path: Path) -> None:
    save(folder / "a.png", 0)
    (folder / "a.png").rename(folder / os.fsdecode(b"Pr\xfcfling.png"))
    columns, moved = ["file", "is_ood", "bytes", "modified", "moved_to", "error"], tmp_path / "flagged"

    def judge(paths: list[Location]) -> list[Row]:
        return [{"file": printable(path), "is_ood": path.name != "b.png"} for path in paths]

    for target in (None, moved):
        verdicts = Table(tmp_path / "verdicts.csv", columns, texts=TEXT_COLUMNS, constants={}, is_endless=True)
        stop: Callable[[Row], None] = lambda row: signal.raise_signal(signal.SIGINT)  # noqa: E731
        Watch(folder, verdicts, Scorer(judge, 1), None, target, stop, judge="a model").run(0.05)
        save(folder / "b.png", 1)
    assert [path.name for path in folder.iterdir()] == ["b.png"]
    assert [path.name for path in moved.iterdir()] == [os.fsdecode(b"Pr\xfcfling.png")]


def test_a_table_of_an_earlier_release_is_not_continued(
    folder: Path, calibrated: ncml.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "verdicts.csv"
    table.write_text(content := "file,bpd,is_ood,bytes,modified,error\n")
    assert cli.main(["watch", str(folder), "--model", str(calibrated.folder), "-o", str(table)]) == 2
    assert capsys.readouterr().err == (
        f"ncml: {table} was started by another command, model, calibration or release of ncml: remove it, or choose "
        "another --output.\n"
    )
    assert table.read_text() == content


def test_a_table_of_another_folder_is_continued_without_moving_its_images(
    start: Start, folder: Path, tmp_path: Path, calibrated: ncml.Model
) -> None:
    seed, other = flagged_seed(calibrated, tmp_path), tmp_path / "other"
    other.mkdir()
    process = start()
    save(folder / "noise.png", seed)
    eventually(lambda: count(tmp_path) == 1)
    assert stop(process) == 0
    folder.rename(tmp_path / "kept")
    other.rename(folder)
    table = (tmp_path / "verdicts.csv").read_text()
    (tmp_path / "verdicts.csv").write_text(table.replace(str(folder), str(tmp_path / "kept")))
    start("--move-flagged", str(tmp_path / "flagged"))
    save(folder / "noise.png", seed)
    eventually((tmp_path / "flagged" / "noise.png").exists)
    assert (tmp_path / "kept" / "noise.png").exists()


def test_flagged_images_and_the_alarm_are_sent_to_a_webhook_through_a_kill(
    start: Start, folder: Path, tmp_path: Path, calibrated: ncml.Model
) -> None:
    seed, receiver = flagged_seed(calibrated, tmp_path), Receiver()
    options = ("--webhook", receiver.url, "--webhook-secret-file", str(write_secret(tmp_path)))
    process = start(*options)  # before the receiver
    for i in range(40):
        save(folder / f"{i:02}.png", seed)
    eventually(lambda: count(tmp_path) == 40)
    eventually(lambda: "a message cannot be sent to the webhook" in (tmp_path / "log").read_text())
    process.kill()
    process.wait()
    receiver.start()
    process = start(*options)
    save(folder / "last.png", seed)
    eventually(lambda: any(m["data"].get("file") == str(folder / "last.png") for _, m in receiver.messages))
    assert stop(process) == 0
    receiver.stop()
    assert not receiver.faults
    sent = [message for _, message in receiver.messages]
    flagged = [row for row in rows(tmp_path) if row["is_ood"] == "1"]
    assert [m["data"]["file"] for m in sent if m["type"] == "image.flagged"] == [row["file"] for row in flagged]
    assert {m["data"]["calibration"] for m in sent} == {flagged[0]["calibration"]}
    assert set(receiver.counts.values()) == {1}
    log = (tmp_path / "log").read_text()
    alarms = [int(number) for number in re.findall(r"ALARM at image (\d+)", log)]
    assert [m["data"]["images"] for m in sent if m["type"] == "stream.alarm"] == alarms
    assert alarms
    assert f"the alarm of image {alarms[-1]} continues" in log
    judge = "with the calibration default of loud, which flags 5% of good images on average"
    assert log.count(f"watching {folder} {judge}") == 2
    assert log.count("an alarm is raised if more images are flagged than the calibration expects: after ") == 1


def test_a_message_has_the_cells_of_its_row_also_when_it_is_repeated(folder: Path, tmp_path: Path) -> None:
    save(folder / "a.png", 0)
    columns, constants = ["file", "is_ood", "statistic", *STAMP_COLUMNS, "moved_to", "error"], {"statistic": "all"}
    bodies: list[dict[str, str]] = []
    for _ in range(2):
        verdicts = Table(tmp_path / "verdicts.csv", columns, texts=TEXT_COLUMNS, constants=constants, is_endless=True)
        notices = MagicMock(Notices)
        notices.host = "hooks.example.org"

        def judge(paths: list[Location]) -> list[Row]:
            return [{"file": str(path), "is_ood": True, "statistic": "a view"} for path in paths]

        def show(_: Row) -> None:
            signal.raise_signal(signal.SIGINT)

        watch = Watch(folder, verdicts, Scorer(judge, 1), None, None, show, notices, judge="a model")
        if not verdicts.done:
            watch.run(0.05)
        [(_, _, data)] = [call.args for call in notices.add.call_args_list]
        bodies.append(_document(data))
    assert bodies[0] == bodies[1] == _document(next(iter(verdicts.rows())))


def test_a_file_is_judged_when_its_slow_writer_has_finished(start: Start, folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "whole.png", 3)
    content = (tmp_path / "whole.png").read_bytes()
    with (folder / "slow.png").open("wb", buffering=0) as file:
        file.write(content[: len(content) // 2])
        start("--json")
        eventually(lambda: "1 image is there already" in (tmp_path / "log").read_text())
        time.sleep(1)  # enough on most machines to find that half of the file is no image
        assert count(tmp_path) == 0
        file.write(content[len(content) // 2 :])
    eventually(lambda: count(tmp_path) == 1)
    (row,) = rows(tmp_path)
    assert (row["error"], row["bytes"]) == ("", str(len(content)))


def test_a_folder_that_vanishes_and_returns_is_watched_again(start: Start, folder: Path, tmp_path: Path) -> None:
    start("--poll", "0.1")
    save(folder / "0.png", 0)
    eventually(lambda: count(tmp_path) == 1)
    folder.rename(tmp_path / "elsewhere")
    eventually(lambda: "cannot be read" in (tmp_path / "log").read_text())
    (tmp_path / "elsewhere").rename(folder)
    save(folder / "1.png", 1)
    eventually(lambda: count(tmp_path) == 2)


def test_outputs_on_a_full_disk_do_not_end_the_watch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(paths: list[Location]) -> list[Row]:
        return [{"file": str(path), "is_ood": 0} for path in paths]

    def show(row: Row) -> None:
        print(Path(row["file"]).name, flush=True)
        if row["file"].endswith("1.png"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("ncml.cli.watch_loop.RETRY_S", 0.1)
    save(folder / "0.png", 0), save(folder / "1.png", 1)
    columns = ["file", "is_ood", "bytes", "modified", "moved_to", "error"]
    verdicts = Table(tmp_path / "verdicts.csv", columns, texts=TEXT_COLUMNS, constants={}, is_endless=True)
    with Path("/dev/full").open("w") as out, Path("/dev/full").open("w") as log, (tmp_path / "out").open("w") as freed:
        monkeypatch.setattr("sys.stdout", out), monkeypatch.setattr("sys.stderr", log)
        space = threading.Timer(0.5, lambda: [os.dup2(freed.fileno(), stream.fileno()) for stream in (out, log)])
        space.start()
        Watch(folder, verdicts, Scorer(judge, 1), None, None, show, judge="a model").run(0.05)
        space.join()
    assert [line for line in (tmp_path / "out").read_text().splitlines() if line.endswith(".png")] == ["0.png", "1.png"]


def test_rows_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv", ["file"], texts=["file"], constants={}, is_endless=True)
    table.add([{"file": "before"}])
    with full_disk(), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        table.add([{"file": "x" * 50}, {"file": "y" * 50}])
    table.add([{"file": "after"}])
    assert [row["file"] for row in table.rows()] == ["before", "after"]


def test_two_processes_do_not_append_to_one_table(start: Start, folder: Path, tmp_path: Path) -> None:
    start()
    eventually((tmp_path / "verdicts.csv").exists)
    second = start()
    assert second.wait(120) == 2
    assert "another ncml watch appends to" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("incoming --move-flagged incoming/flagged", "must not contain each other: name a folder elsewhere."),
        ("incoming --move-flagged .", "must not contain each other: name a folder elsewhere."),
        ("missing", "missing cannot be read: there is no such file or folder."),
        ("image.png", "image.png is not a folder: name the one in which images arrive."),
        ("incoming -o table.parquet", "table.parquet must end in .csv: rows are appended as images arrive."),
        ("incoming --poll 0", "--poll must be 0.05 to 3600 seconds, not 0."),
        (
            "incoming --webhook http://localhost/",
            "--webhook needs --webhook-secret-file, or NCML_WEBHOOK_SECRET_FILE, to sign with.",
        ),
        ("incoming --api-key k", "--api-key requires --server: add --server, or omit --api-key."),
        ("incoming --calibration strict", "there is no calibration 'strict': choose from default."),
    ],
)
def test_mistakes_are_one_sentence(
    options: str, message: str, folder: Path, calibrated: ncml.Model, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "image.png", 0)
    assert cli.main(["watch", *options.split(), "--model", str(calibrated.folder)]) == 2
    output = capsys.readouterr()
    assert output.err.endswith(f"{message}\n")
    assert output.err.count("\n") == 1
    assert not (tmp_path / "verdicts.csv").exists()
