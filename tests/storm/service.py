"""A service process on a fleet's queue."""

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
        return httpx2.Client(base_url=self.url, timeout=300, **options)
