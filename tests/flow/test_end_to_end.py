"""The real stack over HTTP: Valkey, a worker for each lane, the service and a model folder."""

import base64
import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
import redis
from PIL import Image

import ncml
from ncml.calibration import tile_estimation
from ncml.images import grid, heat, open_image, resize_to, to_png
from ncml.limits import KEEPS
from tests.conftest import free_port
from tests.memory import Peak
from worker.contract import JobStatus
from worker.queue import JobQueue

ROOT = Path(__file__).parents[2]
SIDES = {"top": np.s_[:4], "bottom": np.s_[4:], "left": np.s_[:, :4], "right": np.s_[:, 4:]}


@dataclass
class Stack:
    http: httpx2.Client
    port: int
    model: ncml.Model
    wall: ncml.Model
    queue: JobQueue
    service: psutil.Process


@contextlib.contextmanager
def running(commands: list[list[str]], log: Path, **environment: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run processes, and terminate them in reverse order at the end."""
    with log.open("w") as out:
        environ = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        processes = [subprocess.Popen(command, env=environ, stderr=out) for command in commands]
        try:
            yield processes
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                process.wait(60)


def service(port: int) -> list[str]:
    return [sys.executable, "-m", "service", "--port", str(port)]


def until(http: httpx2.Client, path: str, status: int, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx2.TransportError):
            if http.get(path).status_code == status:
                return
        assert time.monotonic() < deadline, f"{path} did not answer {status}"
        time.sleep(0.05)


BRICK = open_image(ROOT / "docs" / "brick.png")
"""A photograph of a wall, 512 x 512 pixels: calibration uses its left half, the tests score its right half."""


@pytest.fixture(scope="module")
def models(one_thread: None, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with calibrated tiles: a small network with random weights, and the bundled one, on walls."""
    folder = tmp_path_factory.mktemp("calibrated")
    rng = np.random.default_rng(0)

    def calibrate(name: str, source: Path, images: list[np.ndarray]) -> None:
        model = ncml.load(shutil.copytree(source, folder / name))
        loaders = [lambda image=image: image for image in images]
        tile_estimation.calibrate(model, loaders[:5], loaders[5:]).save(model.folder)

    calibrate("tiny", model_folder, [rng.integers(0, 256, (16, 12, 3), dtype=np.uint8) for _ in range(24)])
    corners = rng.integers(0, (512 - 48, 256 - 48), (24, 2))
    calibrate("wall", ROOT / "models" / "cifar10", [BRICK[top : top + 48, left : left + 48] for top, left in corners])
    return folder


@pytest.fixture(scope="module")
def stack(valkey_server, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Workers of both lanes and the service."""
    with contextlib.closing(redis.Redis.from_url(valkey_server.url)) as client:
        client.flushall()
    port = free_port()
    worker = [
        sys.executable,
        "-m",
        "ncml.cli",
        "worker",
        "--models",
        str(models),
        "--threads",
        "1",
        "--lane",
    ]
    commands = [[*worker, "score"], [*worker, "generate"], service(port)]
    settings = {"NCML_REDIS_URL": valkey_server.url, "NCML_MAX_BODY_BYTES": str(2**20)}
    with (
        running(commands, tmp_path_factory.mktemp("stack") / "log", **settings) as processes,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
        contextlib.closing(JobQueue.from_url(valkey_server.url)) as queue,
    ):
        until(http, "/readyz", 200)
        model, wall = ncml.load(models / "tiny"), ncml.load(models / "wall")
        yield Stack(http, port, model, wall, queue, psutil.Process(processes[-1].pid))


@pytest.fixture
def image_HWC() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


# The three endpoints agree with the library.


def test_scores_equal_those_of_the_model(stack: Stack, image_HWC: np.ndarray) -> None:
    large = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    response = stack.http.post("/score", files=[("image", to_png(image_HWC)), ("image", to_png(large))])
    assert response.status_code == 200, response.text
    body = response.json()
    expected = stack.model.score(np.stack([image_HWC, resize_to(large, 8, 8)]))
    for result, score in zip(body["results"], expected, strict=True):
        assert result["bpd"] == pytest.approx(score.bpd, rel=1e-6)
        assert result["log_likelihood"] == pytest.approx(score.log_likelihood, rel=1e-6)
        assert result["bpd"] == pytest.approx(-result["log_likelihood"] / np.log(2) / 192)
    assert body["model"] == {"name": "tiny", "version": stack.model.version}
    assert body["timing"]["batch_size"] == 2
    assert body["timing"]["compute_s"] > 0


def test_scores_can_have_a_class_a_noise_level_and_a_map(stack: Stack, image_HWC: np.ndarray) -> None:
    params = {"class": "light", "noise": 5, "map": 1}
    [result] = stack.http.post("/score", params=params, files={"image": to_png(image_HWC)}).json()["results"]
    [score] = stack.model.score(image_HWC, classes="light", noise=5.0, map=True)
    assert result["bpd"] == pytest.approx(score.bpd, rel=1e-6)
    assert np.allclose(result["map"], score.map, atol=1e-3)
    [bare] = stack.http.post("/score", files={"image": to_png(image_HWC)}).json()["results"]
    assert bare["bpd"] != result["bpd"]


def test_images_equal_those_of_the_model_and_its_seeds(stack: Stack) -> None:
    params = {"class": "dark", "n": 3, "seed": 11, "noise": 4, "solver": "tweedie", "guidance": 2, "temperature": 0.9}
    expected = stack.model.generate(
        3, classes="dark", seeds=11, noise=4.0, solver="tweedie", guidance=2.0, temperature=0.9
    )
    response = stack.http.post("/generate", params=params)
    assert response.status_code == 200, response.text
    assert response.headers["x-seed"] == "11"
    assert np.array_equal(pixels(response.content), grid(expected))
    alone = stack.http.post("/generate", json=params | {"n": 1, "seed": 12})
    assert np.array_equal(pixels(alone.content), expected[1])
    archive = zipfile.ZipFile(
        io.BytesIO(stack.http.post("/generate", data=params, headers={"accept": "application/zip"}).content)
    )
    assert np.array_equal(pixels(archive.read("02-seed-13.png")), expected[2])
    arrays = np.load(
        io.BytesIO(stack.http.post("/generate", params=params, headers={"accept": "application/x-npz"}).content)
    )
    assert np.array_equal(arrays["images"], expected)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_completion_keeps_the_known_half(stack: Stack, image_HWC: np.ndarray, keep: str) -> None:
    assert keep in stack.model.keeps
    half = np.ascontiguousarray(image_HWC[SIDES[keep]])
    params = {"keep": keep, "seed": 4, "n": 2, "noise": 0}
    response = stack.http.post(
        "/complete", params=params, files={"image": to_png(half)}, headers={"accept": "application/json"}
    )
    assert response.status_code == 200, response.text
    full = [pixels(base64.b64decode(image["png"])) for image in response.json()["images"]]
    for image in full:
        assert np.array_equal(image[SIDES[keep]], half)
    assert not np.array_equal(full[0], full[1])
    assert np.array_equal(np.stack(full), stack.model.complete(image_HWC, keep=keep, n=2, seeds=4, noise=0.0))


def test_a_defect_in_a_wall_is_found(stack: Stack) -> None:
    """Without a patch of its texture the wall is out-of-distribution; the service locates it as the library does."""
    wall = BRICK[200:280, 300:396].copy()
    wall[24:56, 40:80] = wall.mean((0, 1))
    request = {"params": {"model": "wall", "tile": 1, "map": 1}, "files": {"image": to_png(wall)}}
    response = stack.http.post("/score", **request)
    assert response.status_code == 200, response.text
    body, expected = response.json(), stack.wall.scan(wall)
    assert (body["width"], body["height"], body["rows"], body["columns"]) == (96, 80, 4, 5)
    assert body["score"] == pytest.approx(expected.score, rel=1e-4)
    assert (body["p_value"], body["threshold"]) == pytest.approx((expected.p_value, expected.threshold))
    assert body["is_ood"] is expected.is_ood is True
    assert body["calibration_version"] == stack.wall.tiles.version
    assert tuple(body["box"].values()) == expected.box
    assert 40 - 32 < body["box"]["left"] < 80
    assert 24 - 32 < body["box"]["top"] < 56
    np.testing.assert_allclose(body["tiles"], expected.grid, rtol=1e-3)
    result = f"/jobs/{body['id']}/result"
    arrays = np.load(io.BytesIO(stack.http.get(result, headers={"accept": "application/x-npz"}).content))
    np.testing.assert_allclose(arrays["map"], expected.map, rtol=1e-3)
    rendered = pixels(stack.http.get(result, headers={"accept": "image/png"}).content)
    expected_map = heat.render(expected.map, *heat.score_range(expected.map, expected.threshold))
    assert np.abs(rendered.astype(int) - expected_map).max() <= 4
    calibration = stack.http.get("/models/wall").json()["tiles"]
    assert (calibration["width"], calibration["n_rank"], calibration["version"]) == (32, 19, stack.wall.tiles.version)


def test_a_good_wall_is_not_flagged(stack: Stack) -> None:
    request = {"params": {"model": "wall", "tile": 1}, "files": {"image": to_png(BRICK[200:264, 300:364])}}
    response = stack.http.post("/score", **request, headers={"prefer": "respond-async"})
    assert response.status_code == 202
    body = stack.http.get(f"{response.headers['location']}/result", headers={"prefer": "wait=30"}).json()
    assert body["is_ood"] is False
    assert body["p_value"] > 1 / 20
    assert "tiles" not in body


# Jobs


def test_a_job_is_followed_to_its_end(stack: Stack) -> None:
    submitted = stack.http.post("/generate?n=4&seed=2&noise=0&format=npz", headers={"prefer": "respond-async"})
    assert submitted.status_code == 202
    location = submitted.headers["location"]
    with stack.http.stream("GET", f"{location}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        names = [line.removeprefix("event: ") for line in stream.iter_lines() if line.startswith("event: ")]
    assert names[:2] == ["queued", "running"]
    assert names[-1] == "succeeded"
    assert set(names[2:-1]) <= {"progress"}
    body = stack.http.get(location).json()
    assert body["status"] == "succeeded"
    assert body["model"]["version"] == stack.model.version
    assert body["links"] == submitted.json()["links"]
    expected = stack.model.generate(4, seeds=2, noise=0.0)
    result = stack.http.get(body["links"]["result"])  # in the format of the request
    assert np.array_equal(np.load(io.BytesIO(result.content))["images"], expected)
    in_the_default = stack.http.get(f"{location}/result")
    assert np.array_equal(pixels(in_the_default.content), grid(expected))


def long_job(stack: Stack) -> str:
    """Start a job that practically runs until it is canceled; return its address."""
    submitted = stack.http.post(
        "/generate?n=64&steps=1000&solver=predictor-corrector", headers={"prefer": "respond-async"}
    )
    location = submitted.headers["location"]
    while stack.http.get(location).json()["status"] == "queued":
        time.sleep(0.02)
    return location


def test_a_running_job_has_a_preview_and_is_canceled(stack: Stack) -> None:
    location = long_job(stack)
    deadline = time.monotonic() + 100
    while not ((progress := stack.http.get(location).json()["progress"]) and progress["preview"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    preview = stack.http.get(progress["preview"])
    assert preview.headers["x-progress"].startswith("stage=noisy_sampling, step=")
    image = pixels(preview.content)
    assert image.shape[0] % 8 == image.shape[1] % 8 == 0
    assert image.size > 8 * 8 * 3
    assert stack.http.get(f"{location}/result").status_code == 202
    assert stack.http.post(f"{location}/cancel").json()["status"] == "canceled"
    assert stack.http.get(location).json()["status"] == "canceled"
    assert stack.http.get(f"{location}/result", headers={"prefer": "wait=20"}).status_code == 410
    assert stack.http.post(f"{location}/cancel").json()["status"] == "canceled"


def test_a_client_that_disconnects_cancels_its_job(stack: Stack) -> None:
    path = b"/generate?n=64&steps=1000&solver=predictor-corrector"
    request = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    existing = set(stack.queue.redis.keys("ncml:events:*"))
    with socket.create_connection(("127.0.0.1", stack.port)) as connection:
        connection.sendall(request)
        deadline = time.monotonic() + 100
        while not (new := set(stack.queue.redis.keys("ncml:events:*")) - existing):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        job_id = new.pop().decode().removeprefix("ncml:events:")
        while stack.queue.view(job_id).status is JobStatus.QUEUED:
            time.sleep(0.02)
        assert stack.queue.view(job_id).status is JobStatus.RUNNING
    while not (view := stack.queue.view(job_id)).status.is_terminal:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert view.status is JobStatus.CANCELED


def test_fifty_posts_with_the_same_key_create_one_job(stack: Stack) -> None:
    existing = set(stack.queue.redis.keys("rq:job:*"))

    def post(_: int) -> tuple[int, str, bytes]:
        response = stack.http.post("/generate?noise=0", headers={"idempotency-key": "fifty"})
        return response.status_code, response.headers["x-job-id"], response.content

    with ThreadPoolExecutor(50) as pool:
        responses = set(pool.map(post, range(50)))
    assert len(responses) == 1
    assert responses.pop()[0] == 200
    assert len(set(stack.queue.redis.keys("rq:job:*")) - existing) == 1


def test_a_deleted_job_leaves_no_key(stack: Stack) -> None:
    job_id = stack.http.post("/generate?noise=0").headers["x-job-id"]
    location = long_job(stack)
    for path in (f"/jobs/{job_id}", location):
        assert stack.http.delete(path).status_code == 204
        assert stack.http.get(path).status_code == 404
        assert [key for key in stack.queue.redis.keys("*") if path.removeprefix("/jobs/").encode() in key] == []


def test_concurrent_requests_are_all_answered_correctly(stack: Stack) -> None:
    levels = list(range(0, 240, 5))
    images = [np.full((8, 8, 3), level, np.uint8) for level in levels]
    expected = [score.bpd for score in stack.model.score(np.stack(images))]

    def post(image_HWC: np.ndarray) -> dict:
        return stack.http.post("/score", files={"image": to_png(image_HWC)}).json()

    with ThreadPoolExecutor(16) as pool:
        bodies = list(pool.map(post, images))
    assert [body["results"][0]["bpd"] for body in bodies] == pytest.approx(expected, rel=1e-5)
    assert max(body["timing"]["batch_size"] for body in bodies) > 1


# Refusals that need the real stack


def test_a_decompression_bomb_takes_no_memory(stack: Stack) -> None:
    out = io.BytesIO()
    Image.new("1", (16000, 16000)).save(out, "PNG")
    assert len(out.getvalue()) < 2**20
    stack.http.post("/score", files={"image": b"warm"})
    with Peak(stack.service, children=True) as memory:  # it decodes images in other processes
        for _ in range(5):
            response = stack.http.post("/score", files={"image": out.getvalue()})
            assert response.status_code == 413
            assert response.json()["errors"][0]["field"] == "image"
    assert memory.growth < 30 * 2**20


def test_an_endless_body_is_refused(stack: Stack) -> None:
    """The refusal arrives once the limit is exceeded, while the client is still sending."""
    with socket.create_connection(("127.0.0.1", stack.port), timeout=20) as connection:
        connection.sendall(
            b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(20):
                connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        head = connection.recv(65536)
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"application/problem+json" in head


def test_unknown_classes_and_invalid_steps_are_refused(stack: Stack) -> None:
    response = stack.http.post("/generate?class=unicorn")
    assert response.status_code == 422
    assert "dark, light" in response.json()["detail"]
    assert stack.http.get("/models/tiny").json()["classes"] == ["dark", "light"]
    response = stack.http.post("/generate?solver=tweedie&steps=3")
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "steps"


def test_the_default_solver_is_the_one_that_models_lists(stack: Stack) -> None:
    descriptor = stack.http.get("/models/tiny").json()
    for steps, solver in ((1, descriptor["solver"]), (3, descriptor["stepped_solver"])):
        default = stack.http.post(f"/generate?seed=1&steps={steps}")
        assert default.status_code == 200, default.text
        named = stack.http.post(f"/generate?seed=1&steps={steps}&solver={solver}")
        assert np.array_equal(pixels(default.content), pixels(named.content))
    assert descriptor["solvers"][descriptor["solver"]] == 1


def test_metrics_describe_the_queue_and_the_workers(stack: Stack) -> None:
    image = to_png(np.zeros((8, 8, 3), np.uint8))
    assert stack.http.post("/score", files={"image": image}).status_code == 200
    text = stack.http.get("/metrics").text
    assert "ncml_redis_up 1.0" in text
    assert re.search(r'ncml_workers\{lane="score",state="(idle|busy)"\} 1\.0', text)
    assert f'ncml_model_info{{model="tiny",version="{stack.model.version}"}} 1.0' in text
    assert re.search(r'ncml_jobs_enqueued_total\{model="tiny",priority="normal",task="score"\} \d', text)


def test_without_workers_or_queue_the_response_is_an_immediate_503(new_valkey: Callable, tmp_path: Path) -> None:
    valkey, port = new_valkey(), free_port()
    with (
        running([service(port)], tmp_path / "log", NCML_REDIS_URL=valkey.url),
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        until(http, "/healthz", 200)
        for kind in ("no-worker", "queue-down"):
            started = time.monotonic()
            response = http.post("/score", files={"image": to_png(np.zeros((8, 8, 3), np.uint8))})
            assert time.monotonic() - started < 10
            assert response.status_code == 503
            assert response.json()["type"] == f"urn:ncml:problem:{kind}"
            assert int(response.headers["retry-after"]) > 0
            assert http.get("/readyz").status_code == 503
            assert http.get("/healthz").status_code == 200
            if kind == "no-worker":
                valkey.kill()
        valkey.start()
        until(http, "/models", 200)


def test_schemathesis_finds_no_fault(stack: Stack, tmp_path: Path) -> None:
    """Requests generated from the OpenAPI document: no 5xx, and no response that it does not describe.

    Excluded are the event stream, which has its own test, and the check that every request that matches its schema is
    accepted: a schema cannot list the classes and models that exist.
    """
    flow = ROOT / "tests" / "flow"
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(flow / "schemathesis.toml"),
        "run", f"{stack.http.base_url}/openapi.json", "--url", str(stack.http.base_url),
        "--exclude-operation-id", "follow_job", "--exclude-checks", "positive_data_acceptance",
        "--max-examples", "5", "--seed", "1", "--request-timeout", "20",
        "--header", "Prefer: wait=1",
        "--generation-database", "none", "--no-color", "--continue-on-failure",
    ]  # fmt: skip
    hooks = {"SCHEMATHESIS_HOOKS": str(flow / "strategies.py")}
    run = subprocess.run(command, env=os.environ | hooks, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"Selected: (\d+)/\d+\n\s+Tested: \1\n", run.stdout), run.stdout  # none was left out
