"""A supervisor of child processes: start in order, restart what dies, stop in reverse, and leave nothing behind.

Each child gets its own session, so that Ctrl-C reaches the supervisor alone and the stop order holds. On Linux the
kernel ends a child whose supervisor was killed; on every system, the next start ends the children that were recorded.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ncml.errors import NcmlError
from ncml.signals import SignalEvent

STOP_GRACE_S = 15.0
"""Time between the request to stop a child and killing it."""
BACKOFF_S = (0.5, 30.0)
"""First and longest pause before a child that died is restarted; each pause is twice the previous one."""
MAX_REASON = 200
"""Characters of the last line of a child's log that are reported if it ends by itself."""
MAX_LOG_BYTES = 32 * 2**20
"""Size at which the log of a child becomes its previous log, and a new one begins."""
INVALID_SETUP_STATUS = 2
"""Exit status of a command with an invalid setup, which a restart would not change."""


class ServeError(NcmlError):
    """The local stack cannot be started as configured."""


@dataclass
class Child:
    """One supervised process and its restart state."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict[str, str])
    orphan_signal: int = signal.SIGKILL  # sent by the kernel when the supervisor is killed
    process: subprocess.Popen[bytes] | None = None
    pause_s: float = BACKOFF_S[0]
    due: float = 0.0  # monotonic time of the next start
    started: float = 0.0

    def start(self, log: Path) -> None:
        """Start the process in its own session; its output is appended to `log`."""
        with open(log, "ab", opener=_open_private) as output:
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
        """Return whether the process is alive."""
        return self.process is not None and self.process.poll() is None


def _open_private(path: str, flags: int) -> int:
    """Open a log for its owner only, as one of an earlier version may not be: it names clients and their addresses."""
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor


def _die_with_parent(signum: int) -> Callable[[], None] | None:
    """Return a function with which a child requests `signum` for when its parent dies; None except on Linux."""
    if sys.platform != "linux":
        return None
    libc, parent, set_parent_death_signal = ctypes.CDLL(None), os.getpid(), 1

    def in_child() -> None:
        libc.prctl(set_parent_death_signal, signum)
        if os.getppid() != parent:  # it died before the line above
            os.kill(os.getpid(), signum)

    return in_child


class Supervisor:
    """Starts the stages of children in order, restarts what dies, and stops the stages in reverse.

    `report` receives one line per notable event. `directory` holds the record of children and their logs, which begin
    with this supervisor; the latest `MAX_LOG_BYTES` are kept, and at most twice as many.
    """

    def __init__(
        self, stages: list[list[Child]], directory: Path, report: Callable[[str], None], grace_s: float = STOP_GRACE_S
    ) -> None:
        self.stages = stages
        self.record = directory / "children.json"
        self.logs = {child.name: directory / f"{child.name.replace(' ', '-')}.log" for child in self.children}
        for log in self.logs.values():
            log.unlink(missing_ok=True)
            _previous(log).unlink(missing_ok=True)
        self.report = report
        self.grace_s = grace_s
        self.stopping = SignalEvent()

    @property
    def children(self) -> list[Child]:
        """Every child, in start order."""
        return [child for stage in self.stages for child in stage]

    def start_due(self) -> None:
        """Start every child that is due; raises `ServeError` for a child whose setup is invalid."""
        changed = False
        for child in self.children:
            _limit_size(self.logs[child.name])
            if child.running():
                continue
            now = time.monotonic()
            if child.process is not None:
                self._schedule_restart(child, child.process.returncode, now)
                child.process = None
            if now >= child.due and not self.stopping.is_set():
                child.start(self.logs[child.name])
                changed = True
        if changed:
            self._write_record()

    def _schedule_restart(self, child: Child, status: int, now: float) -> None:
        last_line = "" if status < 0 else _last_line(self.logs[child.name])
        if status == INVALID_SETUP_STATUS:
            raise ServeError(f"the {child.name} cannot run with this setup: {last_line.removeprefix('ncml: ')}")
        first_pause_s, longest_pause_s = BACKOFF_S
        if now - child.started > longest_pause_s:  # it was healthy
            child.pause_s = first_pause_s
        child.due = now + child.pause_s
        cause = f"was killed by signal {-status}"
        if status >= 0:
            cause = f"exited with status {status}" + (last_line and f" ({last_line[:MAX_REASON]})")
        self.report(f"the {child.name} {cause}; restarting it in {child.pause_s:g} s ({self.logs[child.name]})")
        child.pause_s = min(2 * child.pause_s, longest_pause_s)

    def request_stop(self, *_: object) -> None:
        """Set `stopping`; usable as a signal handler."""
        self.stopping.set()

    def stop(self) -> None:
        """Stop the stages in reverse: each is terminated, gets `grace_s`, and is then killed with its descendants."""
        for stage in reversed(self.stages):
            terminate(
                [psutil.Process(child.process.pid) for child in stage if child.process and child.running()],
                self.grace_s,
            )
            for child in stage:
                if child.process:
                    child.process.wait()
        self.record.unlink(missing_ok=True)

    def _write_record(self) -> None:
        entries: list[tuple[int, float]] = []
        for pid in [child.process.pid for child in self.children if child.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                entries.append((pid, psutil.Process(pid).create_time()))
        partial = self.record.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk, on which the children continue
            partial.write_text(json.dumps(entries))
            partial.replace(self.record)


def _previous(log: Path) -> Path:
    return log.with_suffix(".previous.log")


def _last_line(log: Path) -> str:
    """Return the last line of a log; "" if it is empty or was deleted."""
    with contextlib.suppress(FileNotFoundError):
        return log.read_text(errors="replace").strip().rpartition("\n")[2]
    return ""


def _limit_size(log: Path) -> None:
    """Begin a new log if this one is too large. Its process appends to the file, so the content is moved instead."""
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        with contextlib.suppress(OSError):  # a full disk, on which the next line frees space
            shutil.copy(log, _previous(log))  # with its mode
        os.truncate(log, 0)


def terminate_orphans(record: Path) -> int:
    """Terminate what a killed supervisor left behind, by its record; return the number of those processes.

    Process ids are reused, so the recorded start time must match as well.
    """
    if not record.exists():
        return 0
    try:
        entries = [(int(pid), float(created)) for pid, created in json.loads(record.read_text())]
    except (ValueError, TypeError):
        entries = []  # truncated by a full disk; on Linux the kernel has ended the processes
    orphans: list[psutil.Process] = []
    for pid, created in entries:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                orphans.append(process)
    terminate(orphans)
    record.unlink()
    return len(orphans)


def terminate(processes: list[psutil.Process], grace_s: float = STOP_GRACE_S) -> None:
    """Terminate processes, wait for them, then kill what remains of them and of their descendants."""
    family: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [process, *process.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _wait_for_exit(processes, grace_s)
    for process in _wait_for_exit(family, 1):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait_for_exit(family, 5)


def _wait_for_exit(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Return the processes that still run after `timeout_s`. Zombies have exited, even where no init reaps them."""
    deadline = time.monotonic() + timeout_s
    while True:
        running: list[psutil.Process] = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    running.append(process)
        if not running or time.monotonic() > deadline:
            return running
        time.sleep(0.02)
