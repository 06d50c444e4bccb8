"""`ncml worker` as a process, with a real model."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

import ncml
from tests.conftest import eventually, free_port
from worker.contract import CompleteJob, GenerateJob, Pixels, ScoreJob
from worker.job_results import ImagesResult, ScoreResult
from worker.main import main as worker_main
from worker.queue import JobQueue

COMMAND = [sys.executable, "-m", "ncml.cli", "worker"]


@pytest.fixture
def queue(valkey_url: str) -> Iterator[JobQueue]:
    with contextlib.closing(JobQueue.from_url(valkey_url)) as queue:
        yield queue


@pytest.mark.usefixtures("one_thread")
def test_a_real_model_returns_the_same_through_the_queue_as_in_process(
    queue: JobQueue, valkey_url: str, model_folder: Path, tmp_path: Path
) -> None:
    port = free_port()
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        worker = subprocess.Popen(
            [*COMMAND, "--models", str(model_folder.parent), "--metrics-port", str(port), "--threads", "1"],
            env=os.environ | {"NCML_REDIS_URL": valkey_url, "XDG_CACHE_HOME": str(tmp_path)},
            stderr=stderr,
        )
    try:
        eventually(lambda: [model for model in queue.monitor.models() if model.batching])  # checked once it is idle
        [descriptor] = queue.monitor.models()
        model = ncml.load(model_folder)
        assert (descriptor.name, descriptor.version) == ("tiny", model.version)
        assert (descriptor.classes, descriptor.keeps, descriptor.noise) == (model.classes, model.keeps, model.noise)
        assert descriptor.card.startswith("# tiny")
        assert descriptor.batching is not None
        assert descriptor.batching.check in ("passed", "failed")

        images = np.random.default_rng(0).integers(0, 256, (3, model.height, model.width, 3), np.uint8)
        pixels = tuple(Pixels(height=model.height, width=model.width, data=image.tobytes()) for image in images)
        name = model.classes[1]
        ids = [
            queue.submit(ScoreJob(model="tiny", images=pixels, class_name=name, noise=2.0, map=True)),
            queue.submit(GenerateJob(model="tiny", n=2, seed=5, class_name=name, steps=2)),
            queue.submit(GenerateJob(model="tiny", n=1, seed=6, steps=2)),
            queue.submit(CompleteJob(model="tiny", image=pixels[0], n=2, seed=1, noise=0.0)),
            queue.submit(GenerateJob(model="tiny", class_name="unicorn")),
            queue.submit(ScoreJob(model="tiny", images=pixels)),
        ]
        eventually(lambda: all(queue.view(job_id).status.is_terminal for job_id in ids))

        scored = queue.result(ids[0])
        assert isinstance(scored, ScoreResult)
        for score, expected in zip(scored.results, model.score(images, classes=name, noise=2.0, map=True), strict=True):
            assert score.bpd == pytest.approx(expected.bpd, rel=1e-5)
            assert score.map
            assert expected.map is not None
            np.testing.assert_allclose(
                np.frombuffer(score.map, "<f4").reshape(expected.map.shape), expected.map, rtol=1e-3
            )
        drawn = [_images(queue, job_id) for job_id in ids[1:4]]
        np.testing.assert_array_equal(drawn[0], model.generate(2, classes=name, seeds=5, steps=2))
        np.testing.assert_array_equal(drawn[1], model.generate(1, seeds=6, steps=2))
        np.testing.assert_array_equal(drawn[2], model.complete(images[0], n=2, seeds=1, noise=0))
        error = queue.view(ids[4]).error
        assert error
        assert (error.reason, error.field) == ("input", "class")
        assert "unicorn" in error.detail

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=300) as response:
            text = response.read().decode()
        assert 'ncml_jobs_finished_total{model="tiny",outcome="succeeded",task="generate"} 2.0' in text
        assert 'ncml_score_bpd_count{model="tiny"} 3.0' in text
        assert 'stage="refine"' in text
        assert 'ncml_worker_state{state="loading"} 0.0' in text  # the health check of docker-compose.yml
        assert 'ncml_images_total{model="tiny",task="complete"} 2.0' in text
        labels = f'check="{descriptor.batching.check}",groups="{descriptor.batching.groups}"'
        assert f'ncml_model_batching{{{labels},model="tiny",version="{model.version}"}} 1.0' in text
    finally:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=300) == 0
    assert queue.monitor.workers() == []
    assert "traceback" not in log.read_text()
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["batching"] for entry in entries if entry["message"] == "model served"] == [
        None,
        descriptor.batching.model_dump(),
    ]
    assert any("batches are sampled in" in entry["message"] for entry in entries)


def _images(queue: JobQueue, job_id: str) -> np.ndarray:
    result = queue.result(job_id)
    assert isinstance(result, ImagesResult)
    blob = queue.blob(result.images.blob)
    assert blob
    shape = result.images.n, result.images.height, result.images.width, 3
    return np.frombuffer(blob, np.uint8).reshape(shape)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--max-batch", "0"], "--max-batch must be at least 1, not 0"),
        (["--window-ms", "-1"], "--window-ms must be a number of at least 0, not -1.0"),
        (["--drain-s", "nan"], "--drain-s must be a number of at least 0, not nan"),
        (["--hang-s", "0"], "--hang-s must be more than 0, not 0.0"),
        (["--metrics-port", "70000"], "--metrics-port must be 0 to 65535, not 70000"),
        (["--redis-url", "localhost"], "--redis-url: this is not the address of a queue"),
        (["--metrics-port", "{taken}"], "--metrics-port {taken} cannot be opened: Address already in use"),
        (["--lane", "paint"], "'paint'"),
        (["--lane"], "--lane needs a lane: score, generate or both"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(arguments: list[str], line: str) -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        taken = str(listener.getsockname()[1])
        command = [*COMMAND, *(argument.replace("{taken}", taken) for argument in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert line.replace("{taken}", taken) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_batching_is_refused_in_one_line() -> None:
    environment = os.environ | {"NCML_BATCHING": "slow"}
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr == "ncml: NCML_BATCHING must be auto, fast or fixed, not 'slow'.\n"


def test_a_worker_waits_until_the_queue_is_available() -> None:
    command = [*COMMAND, "--redis-url", f"redis://127.0.0.1:{free_port()}/0"]
    worker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert worker.stderr
    line = next(line for line in worker.stderr if "does not answer" in line)
    assert '"level": "warning"' in line
    assert worker.poll() is None
    time.sleep(1)  # about five attempts
    worker.terminate()
    messages = worker.stderr.read()
    assert worker.wait(timeout=300) == 0
    assert "does not answer" not in messages
    worker.stderr.close()


def test_a_server_that_is_too_old_is_named(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis.Redis, "info", lambda client, section: {"redis_version": "6.2.14"})
    with pytest.raises(ncml.NcmlError, match=r"the queue's server is Redis 6.2.14: use Redis 7 or newer, or Valkey"):
        worker_main(redis_url=valkey_url)
