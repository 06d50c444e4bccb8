"""Files in a folder are found once they are complete, each state once."""

import os
import time
from pathlib import Path

import pytest

from ncml.cli import arrivals
from ncml.cli.arrivals import Arrivals, Stamp


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that arrivals read; a test advances it."""
    now = [1000.0]
    monkeypatch.setattr(arrivals.time, "monotonic", lambda: now[0])
    return now


def names(complete: list[arrivals.Arrival]) -> list[str]:
    return [arrival.path.name for arrival in complete]


def test_a_file_is_complete_once_it_has_not_changed_for_a_while(tmp_path: Path, clock: list[float]) -> None:
    files = Arrivals(tmp_path, lambda path, state: False)
    (tmp_path / "a.png").write_bytes(b"half")
    assert files.complete() == []
    assert files.next_check_s() == pytest.approx(arrivals.QUIET_S)
    clock[0] += arrivals.QUIET_S - 0.01
    (tmp_path / "a.png").write_bytes(b"the whole file")
    assert files.complete() == []
    clock[0] += arrivals.QUIET_S - 0.01
    assert files.complete() == []
    clock[0] += 0.02
    assert names(files.complete()) == ["a.png"]
    assert files.next_check_s() == 0


def test_files_are_in_the_order_of_their_times_and_judged_states_are_left_out(
    tmp_path: Path, clock: list[float]
) -> None:
    judged: dict[Path, Stamp] = {}
    files = Arrivals(tmp_path, lambda path, state: judged.get(path) == state)
    (tmp_path / "below").mkdir()
    for index, name in enumerate(("c.PNG", "below/a.jpg", "b.tiff", ".hidden.png", "notes.txt", "d.png.part")):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (index, index))
    files.complete()
    clock[0] += 1
    complete = files.complete()
    assert names(complete) == ["c.PNG", "a.jpg", "b.tiff"]
    for arrival in complete[:2]:
        judged[arrival.path] = arrival.stamp
        files.judged(arrival)
    assert names(files.complete()) == ["b.tiff"]
    (tmp_path / "c.PNG").write_text("another image under the same name")
    assert names(files.complete()) == ["b.tiff"]
    clock[0] += 1
    assert names(files.complete()) == ["b.tiff", "c.PNG"]


def test_a_file_that_is_deleted_before_it_is_read_is_forgotten(tmp_path: Path, clock: list[float]) -> None:
    files = Arrivals(tmp_path, lambda path, state: False)
    (tmp_path / "a.png").write_bytes(b"1")
    files.complete()
    clock[0] += 1
    (arrival,) = files.complete()
    assert not files.has_changed(arrival)
    arrival.path.unlink()
    assert files.has_changed(arrival)
    assert files.complete() == []
    assert len(files) == 0


def test_a_file_that_cannot_be_read_is_invalid_only_after_it_has_not_changed_for_longer(
    tmp_path: Path, clock: list[float]
) -> None:
    files = Arrivals(tmp_path, lambda path, state: False)
    (tmp_path / "a.png").write_bytes(b"half of an image whose writer pauses")
    files.complete()
    clock[0] += 1
    (arrival,) = files.complete()
    assert files.may_be_incomplete(arrival)
    assert files.complete() == []
    clock[0] += 1
    assert names(files.complete()) == ["a.png"]  # it is tried again soon
    clock[0] += arrivals.PATIENCE_S
    (arrival,) = files.complete()
    assert not files.may_be_incomplete(arrival)


def test_a_folder_that_vanishes_is_an_error_until_it_returns(tmp_path: Path, clock: list[float]) -> None:
    folder = tmp_path / "mounted"
    files = Arrivals(folder, lambda path, state: False)
    with pytest.raises(OSError, match="mounted"):
        files.complete()
    folder.mkdir()
    (folder / "a.png").write_bytes(b"1")
    files.complete()
    folder.rename(tmp_path / "gone")
    with pytest.raises(OSError, match="mounted"):
        files.complete()
    (tmp_path / "gone").rename(folder)
    clock[0] += 1
    assert names(files.complete()) == ["a.png"]


def test_many_files_are_listed_quickly_enough(tmp_path: Path) -> None:
    """Nothing is read: 10,000 files take far less than a minute on any machine."""
    for i in range(10_000):
        (tmp_path / f"{i:05}.png").touch()
    files = Arrivals(tmp_path, lambda path, state: False)
    began = time.process_time()
    files.complete()
    assert len(files) == 10_000
    assert time.process_time() - began < 60
