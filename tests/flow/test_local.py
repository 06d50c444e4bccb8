"""`ncml serve` as a user runs it, with real processes, and what remains after it ends or is killed."""

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.conftest import alive, eventually, free_port

SERVE = [sys.executable, "-m", "ncml.cli", "serve", "--port", "0"]


class Stack:
    """One running `ncml serve`."""

    def __init__(self, environment: dict[str, str], log: Path, arguments: tuple[str, ...] = ()) -> None:
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [*SERVE, *arguments],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.match(r"ncml is ready on (http://localhost:\d+) ", line)
        assert match, f"{line!r}\n{log.read_text()}"
        self.url = match[1]

    def worker(self, lane: str) -> int | None:
        """Return the process id of a lane's worker."""
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if {"worker", lane} <= set(process.cmdline()):
                    return process.pid
        return None

    @property
    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def score(self) -> httpx2.Response:
        file = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), 77, np.uint8)).save(file, "PNG")
        return httpx2.post(f"{self.url}/score", files={"image": ("grey.png", file.getvalue())}, timeout=60)

    def interrupt(self) -> int:
        os.kill(self.process.pid, signal.SIGINT)
        status = self.process.wait(60)
        self.close()
        return status

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*self.family, psutil.Process(self.process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The folder of temporary files of each `ncml serve`; its name is short, because sockets lie in it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def start(tmp_path: Path, temporary: Path, model_folder: Path) -> Iterator[Callable[..., Stack]]:
    environment = {
        "NCML_DATA_DIR": str(tmp_path / "state"),
        "NCML_MODELS": str(model_folder.parent),
        "TMPDIR": str(temporary),
    }
    stacks: list[Stack] = []

    def start_stack(*arguments: str) -> Stack:
        stacks.append(Stack(environment, tmp_path / f"log{len(stacks)}", arguments))
        return stacks[-1]

    yield start_stack
    for stack in stacks:
        stack.close()


def test_serve_responds_and_ctrl_c_leaves_nothing(start: Callable[..., Stack], temporary: Path) -> None:
    port = free_port(2)
    stack = start("--metrics-port", str(port))
    family = stack.family
    assert len(family) >= 4  # queue, service, two workers
    response = stack.score()
    assert response.status_code == 200, response.text
    assert response.json()["results"][0]["bpd"] > 0

    def has_finished_a_job(lane: int) -> bool:
        text = httpx2.get(f"http://127.0.0.1:{port + lane}/metrics", timeout=60).text
        return 'ncml_jobs_finished_total{model="' in text

    eventually(lambda: has_finished_a_job(0))
    assert not has_finished_a_job(1)
    assert stack.interrupt() == 0
    assert alive(family) == []
    assert list(temporary.iterdir()) == []
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{stack.url}/healthz", timeout=60)


def test_clients_that_wait_are_answered_before_serve_ends(start: Callable[..., Stack]) -> None:
    stack = start()
    worker = stack.worker("generate")
    assert worker is not None
    os.kill(worker, signal.SIGSTOP)

    def post(seed: int, **headers: str) -> httpx2.Response:
        return httpx2.post(f"{stack.url}/generate", params={"seed": seed}, headers=headers, timeout=60)

    def waiting() -> float:
        text = httpx2.get(f"{stack.url}/metrics", timeout=60).text
        return sum(map(float, re.findall(r'ncml_queue_depth\{queue="ncml:generate.*\} (\S+)', text)))

    followed = post(0, prefer="respond-async").headers["location"]
    with ThreadPoolExecutor(31) as pool:
        stream = pool.submit(httpx2.get, f"{stack.url}{followed}/events", timeout=60)
        requests = [pool.submit(post, seed) for seed in range(1, 31)]
        eventually(lambda: waiting() == 31)
        os.kill(stack.process.pid, signal.SIGTERM)
        answers = [request.result() for request in requests]
        os.kill(worker, signal.SIGCONT)
    assert [answer.status_code for answer in answers] == [202] * 30
    assert all(answer.headers["location"].startswith("/jobs/") for answer in answers)
    assert "event: stopping" in stream.result().text
    assert stack.process.wait(60) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a killed parent at once")
def test_a_killed_supervisor_leaves_no_process_and_the_next_start_works(start: Callable[..., Stack]) -> None:
    stack = start()
    family = stack.family
    bpd = stack.score().json()["results"][0]["bpd"]
    os.kill(stack.process.pid, signal.SIGKILL)
    stack.process.wait()
    second = start()  # immediately: it waits for processes that are still ending
    eventually(
        lambda: alive(family) == []
    )  # engines end on their own once their worker is gone, and nothing waits for them
    assert second.score().json()["results"][0]["bpd"] == bpd
    assert second.interrupt() == 0


def test_a_killed_worker_is_restarted(start: Callable[..., Stack]) -> None:
    stack = start()
    victim = stack.worker("score")
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: stack.worker("score") not in (None, victim))
    assert stack.score().status_code == 200
    assert stack.interrupt() == 0


def refusal(environment: dict[str, str], *arguments: str) -> list[str]:
    """Return the lines that `ncml serve` writes to stderr when it refuses to start."""
    done = subprocess.run(
        [*SERVE[:-2], *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_an_invalid_setup_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "models" / "named").mkdir(parents=True)
    (tmp_path / "models" / "named" / "config.json").touch()
    environment = {"NCML_DATA_DIR": str(tmp_path), "NCML_MODELS": str(tmp_path / "models")}
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        for lines in (refusal(environment, "--port", str(port)), refusal(environment | {"PORT": str(port)})):
            assert len(lines) == 1
            assert f"port {port} on 127.0.0.1 cannot be used" in lines[0]
        (line,) = refusal(environment, "--port", "0", "--metrics-port", str(port))
        assert f"port {port} on 127.0.0.1 cannot be used" in line
        assert line.endswith("choose another with --metrics-port")
    (line,) = refusal(environment | {"PORT": "http"})
    assert "PORT is 'http'" in line
    (line,) = refusal(environment | {"NCML_DATA_DIR": "/proc/none"}, "--port", "0")
    assert "NCML_DATA_DIR" in line
    (line,) = refusal(environment | {"NCML_MODELS": str(tmp_path / "nowhere")})
    assert "there is no model in" in line
    assert "nowhere" in line


def test_an_invalid_setting_is_named(tmp_path: Path, model_folder: Path) -> None:
    environment = {"NCML_DATA_DIR": str(tmp_path), "NCML_MODELS": str(model_folder.parent), "NCML_WAIT_S": "-1"}
    assert refusal(environment, "--port", "0") == ["ncml: NCML_WAIT_S is '-1'; it must be at least 0."]
    assert not (tmp_path / "children.json").exists()
