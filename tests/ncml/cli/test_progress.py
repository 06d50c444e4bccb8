"""Progress on a stderr that is not a terminal."""

import itertools

import pytest

from ncml.cli import terminal
from ncml.progress import Progress


def test_lines_of_progress_state_the_time_that_a_stage_has_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0, 10)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.progress_bar() as on_progress:
        for stage, total in (("align", 6), ("rank", 8)):
            for done in range(1, total + 1):
                on_progress(Progress(stage, done, total))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "align 3/6, about 30 s left",
        "align 6/6, about 0 s left",
        "rank 3/8, about 50 s left",
        "rank 6/8, about 20 s left",
    ]
