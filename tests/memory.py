"""The memory of processes."""

import contextlib
import threading
from pathlib import Path

import psutil


def peak() -> int:
    """Return the peak resident set of this process in bytes.

    `getrusage` would include that of the process that started this one.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Peak:
    """The peak memory of a process in bytes, sampled while the context is open; `children` adds its child processes."""

    def __init__(self, process: psutil.Process, *, children: bool = False) -> None:
        self.process, self.children, self.over = process, children, threading.Event()
        self.before = self.most = self._resident()

    def __enter__(self) -> "Peak":
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _resident(self) -> int:
        total = self.process.memory_info().rss
        for child in self.process.children(recursive=True) if self.children else ():
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end at any moment
                total += child.memory_info().rss
        return total

    def _sample(self) -> None:
        while not self.over.wait(0.02):
            self.most = max(self.most, self._resident())

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    @property
    def growth(self) -> int:
        return self.most - self.before
