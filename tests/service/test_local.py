"""The supervisor with real processes of other kinds than its own: what it restarts, refuses, stops and reaps."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from service import local
from service.local import Child, ServeError, Supervisor

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.02)


def test_a_child_that_dies_is_started_again_with_growing_pauses(tmp_path: Path) -> None:
    said: list[str] = []
    child = Child("sleeper", SLEEP, pause_s=0.05)
    supervisor = Supervisor([[child]], tmp_path, said.append)
    try:
        for attempt in range(3):
            until(lambda: supervisor.tend() or child.running())
            assert child.process is not None
            os.kill(child.process.pid, signal.SIGKILL)
            child.process.wait()
            supervisor.tend()
            assert f"killed by signal 9; starting it again in {0.05 * 2**attempt:g} s" in said[-1]
    finally:
        supervisor.stop()
    assert len(said) == 3


def test_a_child_that_had_been_well_is_started_again_soon(tmp_path: Path) -> None:
    said: list[str] = []
    child = Child("sleeper", SLEEP, pause_s=16.0)
    supervisor = Supervisor([[child]], tmp_path, said.append)
    supervisor.tend()
    try:
        assert child.process is not None
        child.started -= 2 * local.BACKOFF_S[1]
        child.process.kill()
        child.process.wait()
        supervisor.tend()
        assert len(said) == 1
        assert said[0].startswith("the sleeper was killed by signal 9; starting it again in 0.5 s")
    finally:
        supervisor.stop()


def test_a_child_that_refuses_its_setup_ends_the_stack(tmp_path: Path) -> None:
    child = Child("picky one", python("print('ncml: colour: must be blue'); raise SystemExit(2)"))
    supervisor = Supervisor([[child]], tmp_path, print)
    supervisor.tend()
    assert child.process is not None
    child.process.wait()
    with pytest.raises(ServeError, match="the picky one cannot run as it is set up: colour: must be blue"):
        supervisor.tend()


def test_stop_goes_stage_by_stage_and_leaves_no_descendant(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    polite = python(
        "import signal, sys, time\n"
        f"def bye(*_): open({str(journal)!r}, 'a').write(sys.argv[1]); sys.exit()\n"
        "signal.signal(signal.SIGTERM, bye); print('up', flush=True); time.sleep(600)"
    )
    stubborn = python(
        "import signal, subprocess, sys, time\n"
        f"subprocess.Popen({SLEEP!r})\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    )
    first, second = Child("first", [*polite, "1"]), Child("second", [*polite, "2"])
    third = Child("stubborn one", stubborn)
    supervisor = Supervisor([[first], [second, third]], tmp_path, print, grace_s=1.0)
    supervisor.tend()
    parents = [psutil.Process(child.process.pid) for child in supervisor.children if child.process]
    until(parents[-1].children)
    family = [*parents, *parents[-1].children()]
    time.sleep(1)  # signal handlers in place
    supervisor.stop()
    assert journal.read_text() == "21"
    assert len(family) == 4
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not (tmp_path / "children.json").exists()


def test_reap_ends_only_what_the_record_means(tmp_path: Path) -> None:
    orphan, stranger = (subprocess.Popen(SLEEP) for _ in range(2))
    born = {child.pid: psutil.Process(child.pid).create_time() for child in (orphan, stranger)}
    record = tmp_path / "children.json"
    record.write_text(
        json.dumps([[orphan.pid, born[orphan.pid]], [stranger.pid, born[stranger.pid] - 100], [2**22, 0.0]])
    )
    try:
        assert local.reap(record) == 1
        assert orphan.poll() is not None
        assert stranger.poll() is None
        assert not record.exists()
        assert local.reap(record) == 0
    finally:
        stranger.kill()
        stranger.wait()
        orphan.wait()


def test_reap_survives_a_record_cut_short(tmp_path: Path) -> None:
    record = tmp_path / "children.json"
    record.write_text("[[12")
    assert local.reap(record) == 0
    assert not record.exists()


def test_one_supervisor_for_a_directory(tmp_path: Path) -> None:
    with local.claim(tmp_path), pytest.raises(ServeError, match="another `ncml serve` is using"), local.claim(tmp_path):
        pass
    with local.claim(tmp_path):
        pass


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServeError, match="NCML_DATA_DIR"), local.claim(tmp_path / "file" / "below"):
        pass


def test_a_port_in_use_and_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port} on 127.0.0.1 cannot be used .*--port"):
            local.free_port("127.0.0.1", port)
    assert local.free_port("127.0.0.1", port) == port
    assert 0 < local.free_port("127.0.0.1", 0) < 65536
    with pytest.raises(ServeError, match="0 to 65535"):
        local.free_port("127.0.0.1", 70_000)
    with pytest.raises(ServeError, match="cannot be used"):
        local.free_port("no.such.host.invalid", 0)


@pytest.mark.parametrize(("cores", "shares"), [(1, [1, 1]), (2, [1, 1]), (3, [1, 2]), (8, [4, 4]), (9, [4, 5])])
def test_cores_are_split_between_the_lanes(cores: int, shares: list[int]) -> None:
    assert local.split_cores(cores, 2) == shares


def test_a_data_directory_too_deep_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="too long for a socket: set NCML_DATA_DIR"):
        local.socket_path(tmp_path / ("deep" * 30))
