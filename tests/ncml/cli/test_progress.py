"""Progress on a stderr that is a terminal, and on one that is not."""

import contextlib
import itertools
import sys
from pathlib import Path

import pytest

from ncml.cli import score_output, terminal
from ncml.progress import Progress


def test_lines_of_progress_state_the_time_that_a_stage_has_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0, 10)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
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
