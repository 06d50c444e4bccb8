"""Everything real: Valkey, a worker for each lane, the service, a model folder; all of it over HTTP."""

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from ncml.images import fit, to_png

ROOT = Path(__file__).parents[2]


def until_ready(client: httpx2.Client, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx2.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        assert time.monotonic() < deadline, "the stack did not become ready"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def client(valkey_server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client of a whole stack."""
    models = tmp_path_factory.mktemp("models")
    from tests.worker import synthetic
    synthetic.write_model(models, "smoke")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"NCML_REDIS_URL": valkey_server.url, "OMP_NUM_THREADS": "1", "NCML_MAX_BODY_BYTES": str(2**20)}
    commands = [
        [sys.executable, "tests/worker/synthetic.py", valkey_server.url, str(models), lane] for lane in ("score", "generate")
    ]
    commands.append(
        [sys.executable, "-m", "uvicorn", "--factory", "service.app:from_environment", "--port", str(port)]
    )
    log = (models.parent / "log").open("w")
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log) for command in commands]
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            until_ready(http)
            yield http
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(30)
        log.close()


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_schemathesis_finds_nothing(client: httpx2.Client, tmp_path: Path) -> None:
    """The event stream is left to its own test: it ends when its job does."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{client.base_url}/openapi.json",
        "--exclude-operation-id", "follow_job", "--exclude-checks", "positive_data_acceptance", "--max-examples", "20", "--seed", "1",
        "--request-timeout", "20", "--generation-database", "none", "--no-color", "--continue-on-failure",
    ]  # fmt: skip
    hooks = {"SCHEMATHESIS_HOOKS": str(Path(__file__).with_name("strategies.py"))}
    run = subprocess.run(command, env=os.environ | hooks, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
