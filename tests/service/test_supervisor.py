"""The supervisor with arbitrary processes: what it restarts, refuses, stops and ends at the next start."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from service.children import BACKOFF_S, Child, ServeError, Supervisor, terminate_orphans
from tests.conftest import alive, eventually

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_child_that_dies_is_restarted_with_growing_pauses(tmp_path: Path) -> None:
    messages: list[str] = []
    child = Child("sleeper", SLEEP, pause_s=0.05)
    supervisor = Supervisor([[child]], tmp_path, messages.append)
    try:
        for attempt in range(3):
            eventually(lambda: supervisor.start_due() or child.running())
            assert child.process is not None
            os.kill(child.process.pid, signal.SIGKILL)
            child.process.wait()
            supervisor.start_due()
            assert f"killed by signal 9; restarting it in {0.05 * 2**attempt:g} s" in messages[-1]
    finally:
        supervisor.stop()
    assert len(messages) == 3


def test_a_child_that_was_healthy_is_restarted_without_a_long_pause(tmp_path: Path) -> None:
    messages: list[str] = []
    child = Child("sleeper", SLEEP, pause_s=16.0)
    supervisor = Supervisor([[child]], tmp_path, messages.append)
    supervisor.start_due()
    try:
        assert child.process is not None
        child.started -= 2 * BACKOFF_S[1]
        child.process.kill()
        child.process.wait()
        supervisor.start_due()
        assert len(messages) == 1
        assert messages[0].startswith("the sleeper was killed by signal 9; restarting it in 0.5 s")
    finally:
        supervisor.stop()


def test_the_log_of_a_child_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.children.MAX_LOG_BYTES", 10_000)
    code = "import itertools, time\nfor i in itertools.count(): print(i, flush=True); time.sleep(1e-4)"
    supervisor = Supervisor([[Child("talker", python(code))]], tmp_path, print)
    log, previous = tmp_path / "talker.log", tmp_path / "talker.previous.log"
    try:
        for _ in range(2):
            previous.unlink(missing_ok=True)
            eventually(lambda: supervisor.start_due() or previous.exists())
            assert previous.stat().st_size > 10_000
        eventually(lambda: log.read_text().count("\n") > 1)
    finally:
        supervisor.stop()
    first = int(log.read_text().split()[0])
    assert first > int(previous.read_text().split()[-1])
    Supervisor([[Child("talker", SLEEP)]], tmp_path, print)
    assert not log.exists()
    assert not previous.exists()


def test_a_child_with_an_invalid_setup_ends_the_stack(tmp_path: Path) -> None:
    child = Child("picky one", python("print('ncml: colour: must be blue'); raise SystemExit(2)"))
    supervisor = Supervisor([[child]], tmp_path, print)
    supervisor.start_due()
    assert child.process is not None
    child.process.wait()
    with pytest.raises(ServeError, match="the picky one cannot run with this setup: colour: must be blue"):
        supervisor.start_due()


def test_the_reason_for_which_a_child_ends_is_reported_from_its_log(tmp_path: Path) -> None:
    messages: list[str] = []
    child = Child("queue", python("print('loading'); print('Bad file format'); raise SystemExit(1)"))
    supervisor = Supervisor([[child]], tmp_path, messages.append)
    supervisor.start_due()
    assert child.process is not None
    child.process.wait()
    supervisor.start_due()
    assert messages == [
        f"the queue exited with status 1 (Bad file format); restarting it in 0.5 s ({tmp_path / 'queue.log'})"
    ]


def test_children_are_stopped_by_stages_and_no_descendant_remains(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    polite = python(
        "import signal, sys, time\n"
        f"def bye(*_): open({str(journal)!r}, 'a').write(sys.argv[1]); sys.exit()\n"
        f"signal.signal(signal.SIGTERM, bye); open({str(tmp_path)!r} + '/ready' + sys.argv[1], 'w')\n"
        "time.sleep(600)"
    )
    stubborn = python(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen({SLEEP!r})\n"
        "time.sleep(600)"
    )
    first, second = Child("first", [*polite, "1"]), Child("second", [*polite, "2"])
    third = Child("stubborn one", stubborn)
    supervisor = Supervisor([[first], [second, third]], tmp_path, print, grace_s=1.0)
    supervisor.start_due()
    parents = [psutil.Process(child.process.pid) for child in supervisor.children if child.process]
    eventually(lambda: parents[-1].children() and all((tmp_path / f"ready{number}").exists() for number in (1, 2)))
    family = [*parents, *parents[-1].children()]
    supervisor.stop()
    assert journal.read_text() == "21"
    assert len(family) == 4
    assert alive(family) == []
    assert not (tmp_path / "children.json").exists()


def test_only_recorded_orphans_are_terminated(tmp_path: Path) -> None:
    orphan, stranger = (subprocess.Popen(SLEEP) for _ in range(2))
    born = {child.pid: psutil.Process(child.pid).create_time() for child in (orphan, stranger)}
    record = tmp_path / "children.json"
    record.write_text(
        json.dumps([[orphan.pid, born[orphan.pid]], [stranger.pid, born[stranger.pid] - 100], [2**22, 0.0]])
    )
    try:
        assert terminate_orphans(record) == 1
        assert orphan.poll() is not None
        assert stranger.poll() is None
        assert not record.exists()
        assert terminate_orphans(record) == 0
    finally:
        stranger.kill()
        stranger.wait()
        orphan.wait()


def test_a_truncated_record_is_ignored(tmp_path: Path) -> None:
    record = tmp_path / "children.json"
    record.write_text("[[12")
    assert terminate_orphans(record) == 0
    assert not record.exists()


def test_children_run_without_a_record_if_the_disk_is_full(tmp_path: Path) -> None:
    child = Child("sleeper", SLEEP)
    supervisor = Supervisor([[child]], tmp_path, print)
    (tmp_path / "children.tmp").mkdir()  # so that it cannot be written
    supervisor.start_due()
    try:
        assert child.running()
    finally:
        supervisor.stop()
