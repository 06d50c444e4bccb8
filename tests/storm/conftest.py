"""Workers with a synthetic model, and a service process on their queue."""

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.conftest import eventually, free_port
from tests.storm.service import Service
from tests.worker.fleet import Fleet
from tests.worker.synthetic import write_model


@pytest.fixture
def fleet(valkey_url: str, tmp_path: Path) -> Iterator[Fleet]:
    write_model(tmp_path / "models", batch_s=0.05, image_s=0.001)
    fleet = Fleet(valkey_url, tmp_path / "models", tmp_path / "worker.log")
    yield fleet
    fleet.stop()


@pytest.fixture
def serve(valkey_url: str, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start a service with this limit of open files and these settings, once workers serve both lanes."""
    with contextlib.ExitStack() as stack:

        def start(files: int = 8192, graceful_s: int = 35, **settings: object) -> Service:
            port, log = free_port(), tmp_path / "service.log"
            command = [sys.executable, "-m", "service", "--port", str(port), "--graceful-s", str(graceful_s)]
            environment = {f"NCML_{name.upper()}": str(value) for name, value in settings.items()}
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command,
                    env=os.environ | {"NCML_REDIS_URL": valkey_url} | environment,
                    stderr=out,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
                )
            stack.callback(process.wait, 40)
            stack.callback(process.terminate)
            service = Service(port, psutil.Process(process.pid), log)

            def ready() -> bool:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx2.TransportError):
                    return httpx2.get(f"{service.url}/readyz").status_code == 200
                return False

            eventually(ready)
            return service

        yield start
