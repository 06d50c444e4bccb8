"""Progress on a stderr that is a terminal, and on one that is not."""

import contextlib
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ncml.cli import rows, score_output, terminal
from ncml.progress import OnProgress, Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds pass between two looks at the clock."""
    seconds = itertools.count(0, 10)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(seconds))


@pytest.mark.usefixtures("clock")
def test_lines_of_progress_state_the_time_that_a_stage_has_left(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress_bar() as on_progress:
        for stage, total, note in (("align", 6, ""), ("train", 8, "5.1 bits/dim")):
            for done in range(1, total + 1):
                on_progress(Progress(stage, done, total, note))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "align 3/6, about 30 s left",
        "align 6/6, about 0 s left",
        "train 3/8, about 50 s left, 5.1 bits/dim",
        "train 6/8, about 20 s left, 5.1 bits/dim",
    ]


@pytest.mark.usefixtures("clock")
def test_parts_of_a_step_do_not_change_the_time_that_a_step_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress_bar() as on_progress:
        for done in range(4):
            for part in range(1, 4):
                on_progress(Progress("score", done, 5, f"tiles {part}/3"))
    assert capsys.readouterr().err.splitlines() == [
        "score 0/5, tiles 3/3",
        "score 1/5, about 100 s left, tiles 3/3",
        "score 2/5, about 70 s left, tiles 3/3",
        "score 3/5, about 40 s left, tiles 3/3",
    ]


@pytest.mark.parametrize("output", [None, "t.csv"])
def test_large_images_are_counted_on_one_bar_that_also_shows_the_tiles_of_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None
) -> None:
    class Scanner:
        def scan(self, path: Path, tile_size: int | None, callback: OnProgress) -> SimpleNamespace:
            callback(Progress("tiles", 2, 2))
            return SimpleNamespace(to_dict=lambda: {"score": 1.0, "tiles": 2})

    for name in "ab":
        (tmp_path / name).write_text("read by the scanner")
    bars: list[list[Progress]] = []

    def show() -> contextlib.nullcontext[OnProgress]:
        bars.append([])
        return contextlib.nullcontext(bars[-1].append)

    monkeypatch.setattr(score_output, "progress_bar", show)
    skipped = rows.SkippedFiles()
    for files, expected in (
        (("a", "b"), [(0, 2, "tiles 2/2"), (1, 2, ""), (1, 2, "tiles 2/2"), (2, 2, "")]),
        (("a",), [(2, 2, "")]),
    ):
        inputs = score_output.Inputs(tuple(tmp_path / name for name in files))
        scorer = rows.tile_scorer(Scanner(), None, None, skipped)  # type: ignore[arg-type]
        bars.clear()
        if output is None:
            score_output.score_in_memory(inputs, scorer, None, None)
        else:
            table = tmp_path / f"{len(files)}-{output}"
            score_output.score_to_table(table, inputs, scorer, None, ("file", "score", "is_ood", "tiles"), {}, skipped)
        assert [(bar.done, bar.total, bar.note) for bar in bars[-1]] == expected
        assert not any(bars[:-1])


def test_results_go_to_a_file_while_a_terminal_shows_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with terminal.progress_bar() as on_progress:
        on_progress(Progress("score", 1, 2))
        print("a result")
    captured = capsys.readouterr()
    assert captured.out == "a result\n"
    assert "score" in captured.err


def test_a_stage_of_unknown_length_has_a_count_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0, 10)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.progress_bar() as on_progress:
        for done in range(1000, 7000, 1000):
            on_progress(Progress("list", done, 0))
    assert capsys.readouterr().err.splitlines() == ["list 3000", "list 6000"]


def test_the_files_of_a_large_folder_are_counted_with_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(2100):
        (tmp_path / f"{i}.png").touch()
    shown: list[Progress] = []
    monkeypatch.setattr(score_output, "progress_bar", lambda: contextlib.nullcontext(shown.append))
    assert score_output._count(score_output.Inputs((tmp_path,))) == 2100
    assert [(progress.stage, progress.done, progress.total) for progress in shown] == [
        ("list", 1000, 0),
        ("list", 2000, 0),
    ]
