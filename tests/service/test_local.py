"""`ncml serve` without its processes: directories, ports, sockets and cores."""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service import local
from service.children import ServeError, Supervisor
from service.settings import Settings
from tests.service.live import served
from worker.queue import JobQueue


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    """A supervisor without children; the handlers of signals are restored afterwards."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield Supervisor([], tmp_path, print)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_request_a_stop(supervisor: Supervisor, signum: int) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    local.stop_on_signals(supervisor)
    os.kill(os.getpid(), signum)
    assert supervisor.stopping.wait(5)


def test_a_hangup_that_nohup_ignores_stays_ignored(supervisor: Supervisor) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    local.stop_on_signals(supervisor)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not supervisor.stopping.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    assert supervisor.stopping.wait(5)


def test_a_closed_terminal_does_not_cut_a_stop_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP requests a stop, which reports its progress before it ends the processes."""
    terminal, end = os.openpty()
    os.close(terminal)
    stderr = os.fdopen(end, "w")
    monkeypatch.setattr(sys, "stderr", stderr)
    local.report("stopping")
    with pytest.raises(OSError, match="Input/output error"):  # of what it has not printed
        stderr.close()


def test_a_directory_has_one_supervisor(tmp_path: Path) -> None:
    with local.lock(tmp_path), pytest.raises(ServeError, match="another `ncml serve` is using"), local.lock(tmp_path):
        pass
    with local.lock(tmp_path):
        pass


def test_a_directory_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServeError, match="NCML_DATA_DIR"), local.lock(tmp_path / "file" / "below"):
        pass


def test_a_port_in_use_is_refused_and_a_free_one_is_found() -> None:
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        port = occupied.getsockname()[1]
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


def test_a_data_directory_with_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="too long for a socket: set NCML_DATA_DIR"):
        local.socket_path(tmp_path / ("deep" * 30))


def test_a_data_directory_with_characters_that_separate_the_parts_of_addresses() -> None:
    directory = Path("/srv/C# 100%41?")
    with contextlib.closing(JobQueue.from_url(local.queue_url(directory))) as queue:
        assert queue.redis.connection_pool.connection_kwargs["path"] == f"{directory}/valkey.sock"


def test_what_a_start_waits_for_is_named(new_client: Callable[..., TestClient], worker, configure) -> None:
    assert (
        local.unreadiness(f"http://127.0.0.1:{local.free_port('127.0.0.1', 0)}") == "the service does not respond yet"
    )
    with served(new_client().app) as url:
        assert not local.unreadiness(url)
        worker.appear_as()
        reason = "No worker with a loaded model serves the score or generate lane yet"
        assert local.unreadiness(url) == reason
        configure(min_replicas_to_write=1)  # it refuses all writes, as on a full disk
        assert local.unreadiness(url).startswith("The queue refuses new jobs: ")


def test_a_service_is_served_under_the_names_of_its_address() -> None:
    loopback = ["localhost", "127.0.0.1", "[::1]"]
    assert local.host_names("127.0.0.1") == loopback
    assert local.host_names("::1") == loopback
    assert local.host_names("images.example.org") == [*loopback, "images.example.org"]
    everywhere = local.host_names("0.0.0.0")
    assert socket.gethostname() in everywhere
    assert Settings(allowed_hosts=everywhere).allowed_hosts == tuple(everywhere)


@pytest.mark.parametrize(("host", "keys", "warns"), [("127.0.0.1", "", 0), ("0.0.0.0", "", 1), ("0.0.0.0", "keys", 0)])
def test_a_start_warns_if_other_machines_need_no_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    host: str,
    keys: str,
    warns: int,
) -> None:
    monkeypatch.setenv("NCML_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(local, "stop_on_signals", lambda supervisor: None)
    monkeypatch.setattr(local, "supervise", lambda supervisor, url: None)  # no process starts
    if keys:
        monkeypatch.setenv("NCML_API_KEYS_FILE", str(tmp_path / keys))
    local.main(host=host, port=0)
    assert capsys.readouterr().err.count("anyone who can reach this machine can use the service") == warns


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("0.0.0.0", "localhost"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
        ("fd00::5", "[fd00::5]"),
        ("images.example.org",) * 2,
    ],
)
def test_the_address_of_the_service_can_be_opened(host: str, name: str) -> None:
    assert local.service_url(host, 8000) == f"http://{name}:8000"
