"""A table on disk: rows persist, and a run resumes only its own table."""

import contextlib
import errno
import os
from pathlib import Path

import pytest

from ncml.cli.stored_table import open_table
from ncml.cli.table import Table, read
from ncml.errors import InputError

COLUMNS = ("file", "x", "model")


def table(path: Path, model: str = "m1", columns: tuple[str, ...] = COLUMNS) -> Table:
    return Table(path, columns, texts=("file", "model"), constants={"model": model})


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_rows_are_written_immediately_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    first = table(path)
    first.add([{"file": "a,b", "x": 1.5}, {"file": "c"}])
    assert not path.exists()
    again = table(path)
    assert (again.done, again.last) == (2, "c")
    again.add([{"file": "d", "x": 0.1}])
    assert list(again.numbers("x")) == [1.5, 0.1]
    again.finish({"twice": lambda row: str(2 * float(row["x"])) if row["x"] else ""})
    assert lines(path) == ["file,x,model,twice", '"a,b",1.5,m1,3.0', "c,,m1,", "d,0.1,m1,0.2"]
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize("name", ["=1+1.png", "+a.png", "-a.png", "@a.png"])
def test_a_file_that_is_named_like_a_formula_is_a_path_in_csv(name: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table(path).add([{"file": name, "x": -1}, {"file": f"in/{name}"}])
    assert lines(tmp_path / "t.csv.part")[1:] == [f"./{name},-1,m1", f"in/{name},,m1"]
    again = table(path)
    assert [row["file"] for row in again.rows()] == [name, f"in/{name}"]
    again.keep(1)
    assert table(path).last == name
    again.finish()
    assert lines(path)[1:] == [f"./{name},-1,m1"]
    assert [row["file"] for row in read(path, ["file"])] == [name]


def test_rows_are_on_the_disk_when_they_have_been_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, sizes = os.fsync, dict[int, int]()

    def record(descriptor: int) -> None:
        fsync(descriptor)
        sizes[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", record)
    made = table(tmp_path / "t.csv")
    assert tmp_path.stat().st_ino in sizes
    for name in "ab":
        made.add([{"file": name, "x": 1}])
        stored = made.part.stat()
        assert sizes[stored.st_ino] == stored.st_size
    made.finish()
    stored = made.path.stat()
    assert sizes[stored.st_ino] == stored.st_size


def test_rows_that_do_not_reach_the_disk_are_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = table(tmp_path / "t.csv")
    made.add([{"file": "a", "x": 1}])

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=f"No space left on device: '{made.part}'"):
            made.add([{"file": "b", "x": 2}])
        with pytest.raises(OSError, match=r"No space left on device: '.*t\.csv\.new'"):
            made.finish()
    assert [row["file"] for row in made.rows()] == ["a"]


def test_no_rows_are_added_where_the_table_was_moved_away(tmp_path: Path) -> None:
    """In a new file, as after a rotation, they would have no header."""
    made = table(tmp_path / "t.csv")
    made.part.rename(tmp_path / "moved.csv")
    with pytest.raises(FileNotFoundError):
        made.add([{"file": "a", "x": 1}])
    assert [path.name for path in tmp_path.iterdir()] == ["moved.csv"]


def test_a_table_that_another_command_writes_is_refused(tmp_path: Path) -> None:
    def opened(name: str = "t.csv") -> contextlib.AbstractContextManager[Table]:
        return open_table(tmp_path / name, ["file"], texts=["file"], constants={})

    with opened() as made:
        made.add([{"file": "a"}])
        with pytest.raises(InputError, match=r"another ncml score writes .*t\.csv: wait for it, or choose another"):
            opened().__enter__()
        with opened("other.csv"):
            pass
    with opened() as resumed:
        assert resumed.done == 1
        resumed.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.csv.part", "t.csv"]


def test_a_row_has_the_constants_of_its_table_whatever_its_own_cells_say(tmp_path: Path) -> None:
    table(tmp_path / "t.csv").add([{"file": "a", "x": 1, "model": "of the row"}])
    assert table(tmp_path / "t.csv").done == 1


def test_an_incomplete_row_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table(path).add([{"file": "a", "x": 1}, {"file": "b", "x": 2}])
    part = tmp_path / "t.csv.part"
    part.write_bytes(part.read_bytes()[:-3])
    again = table(path)
    assert (again.done, again.last) == (1, "a")
    again.add([{"file": "b", "x": 2}])
    again.finish()
    assert lines(path)[1:] == ["a,1,m1", "b,2,m1"]


def test_a_truncated_header_is_not_resumed(tmp_path: Path) -> None:
    table(tmp_path / "t.csv")
    (tmp_path / "t.csv.part").write_text("file,")
    with pytest.raises(InputError, match="started by another command"):
        table(tmp_path / "t.csv")


@pytest.mark.parametrize("arguments", [{"model": "m2"}, {"columns": ("file", "y", "model")}])
def test_another_run_s_table_is_not_changed(tmp_path: Path, arguments: dict) -> None:
    table(tmp_path / "t.csv").add([{"file": "a", "x": 1}])
    with pytest.raises(
        InputError, match=r"t\.csv\.part was started by another command, model, calibration or release of ncml"
    ):
        table(tmp_path / "t.csv", **arguments)
    assert table(tmp_path / "t.csv").done == 1


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\xff", b"file,x,model\na,much,m1\n", b"f" * 200_000 + b"\n"])
def test_a_file_that_is_not_a_partial_table_is_not_changed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv.part").write_bytes(content)
    with pytest.raises(InputError, match="started by another command, model, calibration or release of ncml"):
        table(tmp_path / "t.csv")


def test_missing_optional_columns_are_empty(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.parquet")
    for name in ("t.csv", "t.parquet"):
        made = table(tmp_path / name)
        made.add([{"file": "a", "x": 1.25}])
        made.finish()
        assert list(read(tmp_path / name, ["x"], optional=["model", "noise"])) == [
            {"x": "1.25", "model": "m1", "noise": ""}
        ]


def test_parquet_has_numbers_text_and_nulls(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    made = table(path)
    made.add([{"file": "a", "x": 1.25}, {"file": "b"}])
    made.finish()
    assert parquet.read_table(path).to_pylist() == [
        {"file": "a", "x": 1.25, "model": "m1"},
        {"file": "b", "x": None, "model": "m1"},
    ]
    assert list(read(path, ["x", "file"])) == [{"x": "1.25", "file": "a"}, {"x": "", "file": "b"}]


def test_paths_and_suffixes_are_checked_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in \.csv or \.parquet"):
        table(tmp_path / "t.xlsx")
    with pytest.raises(InputError, match="cannot be written"):
        table(tmp_path / "no" / "t.csv")


def test_a_table_that_is_not_of_scores_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not a table of ncml score --output: it lacks file"):
        list(read(tmp_path / "t.csv", ["file"]))
    (tmp_path / "t.csv").write_text("file,b\n" + "1" * 200_000 + ",2\n")  # beyond what a field may have
    with pytest.raises(InputError, match="not a table of ncml score"):
        list(read(tmp_path / "t.csv", ["file"]))
    (tmp_path / "t.parquet").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not a table of ncml score"):
        list(read(tmp_path / "t.parquet", ["file"]))
