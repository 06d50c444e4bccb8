"""A finished table is updated: rows of files that have not changed are kept, all others are scored."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ncml.cli.rows import Row, Scorer, SkippedFiles
from ncml.cli.score_output import Inputs, format_summary, score_to_table
from ncml.cli.table import read
from ncml.errors import InputError

COLUMNS = ("file", "bpd", "p_value", "is_ood")
Update = Callable[..., tuple[Row, list[str]]]


@pytest.fixture(params=["t.csv", "t.parquet"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path for a table, and a folder `new` with the files a, b, c and d beside it."""
    if request.param.endswith("parquet"):
        pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    Path("new").mkdir()
    for name in "abcd":
        (Path("new") / name).write_text(name)
    return Path(request.param)


def update(
    output: Path,
    *files: str,
    fdr: float | None = None,
    maps: Path | None = None,
    columns: tuple[str, ...] = COLUMNS,
    concurrency: int = 1,
    batch_size: int = 2,
    **constants: str,
) -> tuple[Row, list[str]]:
    """Score files into a table; return its summary, and the names of the files that were scored."""
    scored: list[str] = []

    def score(paths: list[Path]) -> list[Row]:
        scored.extend(path.name for path in paths)
        rows: list[Row] = []
        for path in paths:
            text = path.read_text()
            rows.append(
                {"file": str(path)} | ({"error": "no"} if text == "bad" else {"bpd": len(text), "p_value": 0.5})
            )
        return rows

    inputs = Inputs(tuple(Path(file) for file in files or ("new",)), output, maps)
    scorer = Scorer(score, batch_size, concurrency)
    summary = score_to_table(output, inputs, scorer, fdr, columns, {"model": "m"} | constants, SkippedFiles())
    return summary, scored


def cells(output: Path, column: str) -> list[str]:
    return [row[column] for row in read(output, [column])]


@pytest.mark.parametrize("concurrency", [1, 2])
def test_only_new_and_changed_files_are_scored_again(output: Path, concurrency: int) -> None:
    assert update(output)[1] == ["a", "b", "c", "d"]
    size, modified = cells(output, "bytes"), cells(output, "modified")
    assert update(output, concurrency=concurrency) == (
        {"output": str(output), "images": 4, "kept": 4, "skipped": 0, "flagged": 0}, [],
    )  # fmt: skip
    assert (cells(output, "bytes"), cells(output, "modified")) == (size, modified)

    Path("new/b").write_text("B2")  # another size
    stat = Path("new/c").stat()
    Path("new/c").write_text("C")  # the same size, another time
    os.utime("new/c", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    Path("new/a").unlink()
    for name in ("aa", "e"):
        (Path("new") / name).write_text(name)
    summary, scored = update(output, concurrency=concurrency)
    assert sorted(scored) == ["aa", "b", "c", "e"]
    assert cells(output, "file") == [f"new/{name}" for name in ("aa", "b", "c", "d", "e")]
    assert [float(cell) for cell in cells(output, "bpd")] == [2, 2, 1, 1, 1]
    assert summary["kept"] == 1
    counts = "5 images, 1 of them unchanged since the table was written, 1 discovery at a false discovery rate of 0.1"
    assert format_summary(summary | {"fdr": 0.1, "discoveries": 1}).startswith(counts)
    assert update(output)[1] == []


def test_a_table_of_another_model_and_an_empty_file_are_replaced(output: Path) -> None:
    update(output)
    for other in ({"model": "n"}, {"model": "n", "noise": "5.0"}, {"model": "n"}, {"columns": (*COLUMNS, "llr")}):
        assert update(output, **other)[1] == ["a", "b", "c", "d"]
        assert update(output, **other)[1] == []
    output.write_bytes(b"")
    assert update(output)[1] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("content", ["Teil,Menge\nnew/a,1\n", "file,bpd\nnew/a,1\n"])
def test_a_file_that_is_no_table_of_scores_is_refused(output: Path, content: str) -> None:
    output.write_text(content)
    with pytest.raises(InputError, match=rf"{output} is not a table of ncml score: delete it, or choose another"):
        update(output)
    assert (output.read_text(), list(Path().glob("*.part"))) == (content, [])


def test_a_table_with_rows_of_other_files_is_refused(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update(output, fdr=0.5)
    content = output.read_bytes()
    for files, rows in ((["new/b"], "3 files that are"), (["new/a", "new/b", "new/d"], "1 file that is")):
        for fdr in (None, 0.5):
            with pytest.raises(InputError, match=f"{output} has rows of {rows} not to be scored, such as new/"):
                update(output, *files, fdr=fdr)
    assert (output.read_bytes(), list(Path().glob("*.part"))) == (content, [])

    Path("new/a").unlink()
    assert update(output, "new/../new")[0]["images"] == 3  # the row of a deleted file goes
    monkeypatch.chdir("new")
    with pytest.raises(InputError, match="rows of 3 files that are not to be scored"):
        update(Path("..", output), "b", "c", "d")


def test_a_table_with_discoveries_is_updated_and_they_are_computed_again(output: Path) -> None:
    update(output, fdr=0.9)
    assert {float(cell) for cell in cells(output, "discovery")} == {1}
    assert update(output, fdr=0.1)[1] == []
    assert {float(cell) for cell in cells(output, "discovery")} == {0}
    assert update(output)[1] == []


def test_unreadable_files_are_tried_again(output: Path) -> None:
    Path("new/b").write_text("bad")
    update(output)
    summary, scored = update(output)
    assert (summary["images"], summary["skipped"], scored) == (3, 1, ["b"])


def test_files_in_another_order_are_scored_again_only_if_they_are_not_found(output: Path) -> None:
    update(output, "new/a", "new/b", "new/c", "new/d")
    assert update(output, "new/c", "new/d", "new/a", "new/b", "new/d")[1] == ["a", "b", "d"]
    assert cells(output, "file") == ["new/c", "new/d", "new/a", "new/b", "new/d"]


def test_with_heat_maps_every_image_is_scored(output: Path) -> None:
    update(output)
    assert update(output, maps=Path("maps"))[1] == ["a", "b", "c", "d"]


def test_an_interrupted_update_resumes_and_rows_of_files_that_changed_since_are_dropped(output: Path) -> None:
    update(output)
    for name in "bcd":
        (Path("new") / name).write_text(name * 2)

    def fail(paths: list[Path]) -> list[Row]:
        if Path("new/c") in paths:
            raise RuntimeError
        return [{"file": str(path), "bpd": 7} for path in paths]

    scorer = Scorer(fail, 1)
    with pytest.raises(RuntimeError):
        score_to_table(output, Inputs((Path("new"),), output), scorer, None, COLUMNS, {"model": "m"}, SkippedFiles())
    Path("new/b").write_text("bbb")
    assert update(output)[1] == ["b", "c", "d"]
    assert [float(cell) for cell in cells(output, "bpd")] == [1, 3, 2, 2]
