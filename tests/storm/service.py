"""A service process on a fleet's queue, and the peak memory of a process."""

import threading
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import pytest

MIB = 2**20
SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Service:
    """A service process on the fleet's queue."""

    port: int
    process: psutil.Process
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: object) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, **options)


class Peak:
    """The peak memory of a process in bytes, sampled while the context is open."""

    def __init__(self, process: psutil.Process) -> None:
        self.process, self.over = process, threading.Event()
        self.before = self.most = process.memory_info().rss

    def __enter__(self) -> "Peak":
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.over.wait(0.02):
            self.most = max(self.most, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    @property
    def growth(self) -> int:
        return self.most - self.before
