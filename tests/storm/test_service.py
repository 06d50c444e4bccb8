"""The service under load, with hostile uploads, dropped streams and long use, on a real queue with real workers.

The short form runs with the other tests; the long form is `pytest -m slow tests/storm`. Latencies are printed but not
checked, because they depend on the machine; a client that waits too long still fails the test.
"""

import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest

from ncml.images import to_png
from tests.conftest import alive, eventually
from tests.memory import Peak
from tests.service import costly
from tests.service.hostile import corpus
from tests.storm.service import MIB, SLOW, Service
from tests.worker.fleet import Fleet, generate
from tests.worker.synthetic import write_model

IMAGES = [to_png(np.full((8, 8, 3), level, np.uint8)) for level in range(256)]


def quantile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


# Overload


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=SLOW)])
def test_requests_beyond_the_limit_are_refused_and_all_others_succeed(
    fleet: Fleet, serve: Callable[..., Service], rounds: int, record_property: Callable[[str, object], None]
) -> None:
    """500 requests from 100 clients at a queue of 64: each succeeds, or is refused with the time to retry after."""
    write_model(fleet.models, batch_s=0.2, image_s=0.0)
    worker = fleet.start(max_batch=16)
    service = serve(max_waiting=64)

    async def request_score(http: httpx2.AsyncClient, turn: asyncio.Semaphore, i: int) -> tuple[int, str]:
        headers = {"prefer": "respond-async"} if i % 2 else {}
        async with turn:
            answer = await http.post("/score", files={"image": IMAGES[i % 256]}, headers=headers)
        if answer.status_code == 429:
            worker.send_signal(signal.SIGCONT)
            assert answer.json()["type"] == "urn:ncml:problem:queue-full"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        if answer.status_code == 200:
            assert answer.json()["results"][0]["bpd"] == (i % 256) / 32
        return answer.status_code, answer.headers.get("x-job-id", "")

    async def storm() -> list[tuple[int, str]]:
        limits = httpx2.Limits(max_connections=100)
        async with httpx2.AsyncClient(base_url=service.url, timeout=300, limits=limits) as http:
            turn = asyncio.Semaphore(100)
            return list(await asyncio.gather(*(request_score(http, turn, i) for i in range(500))))

    with service.client() as http:
        http.post("/score", files={"image": IMAGES[0]})
    pinger_script = str(Path(__file__).with_name("pinger.py"))
    pinging = [sys.executable, pinger_script, "127.0.0.1", str(service.port), "/healthz", "0.02"]
    with (
        subprocess.Popen(pinging, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as pinger,
        Peak(service.process) as memory,
    ):
        for _ in range(rounds):
            worker.send_signal(signal.SIGSTOP)  # until the queue is full, however slow the clients are
            answers = asyncio.run(storm())
            codes = Counter(code for code, _ in answers)
            assert codes[200] + codes[202] + codes[429] == 500, codes
            assert codes[429] > 0
            accepted = [job_id for code, job_id in answers if code != 429]
            assert {view.status for view in fleet.wait(accepted)} == {"succeeded"}
        health = json.loads(pinger.communicate("")[0])
    record_property("healthz_p99_s", quantile(health, 99))
    print(f"{codes}, /healthz p50 {quantile(health, 50) * 1e3:.1f} ms, p99 {quantile(health, 99) * 1e3:.1f} ms of "
          f"{len(health)}, memory +{memory.growth / MIB:.1f} MiB")  # fmt: skip
    assert memory.growth < 100 * MIB
    fleet.check(accepted)


# Streams


def test_a_stream_that_is_dropped_repeatedly_neither_misses_nor_repeats_events(
    fleet: Fleet, serve: Callable[..., Service]
) -> None:
    write_model(fleet.models, batch_s=5.0, image_s=0.0, rows=100)
    fleet.start()
    service = serve()

    def follow(path: str, received: list[tuple[str, str]], events: int | None = None) -> bool:
        """Read `events` events, or all; return whether the stream ended."""
        headers = {"last-event-id": received[-1][0]} if received else {}
        with service.client() as http, http.stream("GET", path, headers=headers) as stream:
            name = ""
            for line in stream.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("id: "):
                    received.append((line.removeprefix("id: "), name))
                    events = None if events is None else events - 1
                    if events == 0:
                        return False
        return True

    with service.client() as http:
        submitted = http.post("/generate", headers={"prefer": "respond-async"})
    path = f"{submitted.headers['location']}/events"

    def drop(seed: int) -> tuple[list[tuple[str, str]], int]:
        pick, received, drops = random.Random(seed), [], 0
        while not follow(path, received, pick.randint(1, 4)):
            drops += 1
            time.sleep(pick.uniform(0, 0.3))
        return received, drops

    whole: list[tuple[str, str]] = []
    with ThreadPoolExecutor(4) as pool:
        undisturbed = pool.submit(follow, path, whole)
        dropped = list(pool.map(drop, range(3)))
        assert undisturbed.result()
    names = [name for _, name in whole]
    assert names[:2] == ["queued", "running"]
    assert names[-1] == "succeeded"
    assert names[2:-1] == ["progress"] * (len(names) - 3)
    assert len(names) > 20
    for received, drops in dropped:
        assert drops >= 3
        assert [*dict.fromkeys(received)] == received == whole
    again: list[tuple[str, str]] = []
    assert follow(path, again)  # long after the end
    assert again == whole
    with service.client() as http:
        assert http.get(path, headers={"last-event-id": whole[-1][0]}).status_code == 204


# Hostile uploads


def test_hostile_uploads_neither_block_the_service_nor_grow_its_memory(
    fleet: Fleet, serve: Callable[..., Service]
) -> None:
    fleet.start()
    service = serve()
    with service.client() as http:
        for name in ("PNG-whole", "TIFF-whole", "WEBP-whole"):
            http.post("/score", files={"image": corpus()[name]})  # loads the decoders
        with Peak(service.process) as memory:
            for name, data in corpus().items():
                answer = http.post("/score", files={"image": data})
                assert answer.status_code in (200, 413, 422), (name, answer.text)
    assert memory.growth < 150 * MIB
    assert '"level": "error"' not in service.log.read_text()


@pytest.mark.parametrize("scores", [pytest.param(10, id="short"), pytest.param(200, marks=SLOW, id="long")])
def test_scores_succeed_beside_expensive_uploads(fleet: Fleet, serve: Callable[..., Service], scores: int) -> None:
    """Eight clients repeatedly send the largest JPEG of 120 scans, which takes more than a second of a core."""
    fleet.start()
    service = serve()
    hostile, over = costly.LARGE_FILES["jpeg-120-scans"](), threading.Event()
    answers = Counter[int]()

    def attack(_: int) -> None:
        with service.client() as http:
            while not over.is_set():
                answers[http.post("/score", files={"image": hostile}).status_code] += 1

    def latencies(http: httpx2.Client) -> list[float]:
        seconds: list[float] = []
        for i in range(scores):
            began = time.monotonic()
            answer = http.post("/score", files={"image": IMAGES[i % 256]})
            assert answer.status_code == 200, answer.text
            seconds.append(time.monotonic() - began)
        return seconds

    with service.client() as http, ThreadPoolExecutor(8) as pool:
        latencies(http)
        idle = latencies(http)
        with Peak(service.process) as memory:
            attackers = pool.map(attack, range(8))
            try:
                eventually(answers.total)
                beside = latencies(http)
            finally:
                over.set()
            list(attackers)
    print(f"score p50 {statistics.median(idle) * 1e3:.0f} ms idle, {statistics.median(beside) * 1e3:.0f} ms beside "
          f"8 hostile clients ({dict(answers)}); service +{memory.growth / MIB:.0f} MiB")  # fmt: skip
    assert answers.keys() <= {200, 422, 503}
    assert memory.growth < 100 * MIB


@pytest.mark.parametrize("attempts", [pytest.param(1, id="short"), pytest.param(20, marks=SLOW, id="long")])
def test_calibrations_are_accepted_or_refused_beside_hostile_ones(
    fleet: Fleet, serve: Callable[..., Service], attempts: int
) -> None:
    """Two clients repeatedly send a zip of 562 flat images, which would take a core ten minutes."""
    fleet.start()
    service = serve(allow_calibration=1, decode_request_s=10)
    hostile, over, seconds, statuses = costly.archive_of_flat_images(), threading.Event(), list[float](), Counter[int]()

    def calibrate(host: int, name: str, files: list[tuple[str, tuple[str, bytes]]]) -> int:
        address = httpx2.HTTPTransport(local_address=f"127.0.0.{host}")
        with httpx2.Client(base_url=service.url, transport=address, timeout=120) as http:
            query = {"name": name}
            return http.post("/calibrate", params=query, files=files, headers={"Prefer": "respond-async"}).status_code

    def attack(host: int) -> None:
        while not over.is_set():
            assert calibrate(host, f"hostile-{host}", [("image", ("a.zip", hostile))]) in (202, 503)

    good = [("image", (f"{i}.png", data)) for i, data in enumerate(IMAGES[:40])]
    with ThreadPoolExecutor(2) as pool:
        attackers = [pool.submit(attack, host) for host in (2, 3)]
        try:
            time.sleep(1)
            while statuses[202] < attempts:
                began = time.monotonic()
                statuses[calibrate(4, f"good-{statuses[202]}", good)] += 1
                seconds.append(time.monotonic() - began)
        finally:
            over.set()
        for attacker in attackers:
            attacker.result()
    print(f"beside two hostile calibrations another is answered within {max(seconds):.1f} s: {dict(statuses)}")
    assert statuses.keys() <= {202, 503}


def test_decoding_ends_when_its_client_is_gone(fleet: Fleet, serve: Callable[..., Service]) -> None:
    fleet.start()
    service = serve()
    hostile = costly.progressive_jpeg(costly.SIDE, 120)

    def decoding() -> list[psutil.Process]:
        return alive(service.process.children(recursive=True), psutil.STATUS_RUNNING)

    def score_small() -> int:
        with service.client() as http:
            return http.post("/score", files={"image": IMAGES[0]}).status_code

    assert score_small() == 200
    eventually(lambda: not decoding() and (time.sleep(0.1), not decoding())[1])  # all processes have started
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        head = f"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: {len(hostile)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + hostile)
        (decoder,) = eventually(decoding, every_s=0.001)
        decoder.suspend()  # it would answer within a second
    eventually(lambda: not alive([decoder]), timeout_s=30)  # without a client: one that stands still ends after 60 s
    assert score_small() == 200


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_the_job_of_a_client_that_is_gone_is_canceled(
    fleet: Fleet, serve: Callable[..., Service], version: str
) -> None:
    write_model(fleet.models, batch_s=600.0, image_s=0.0)
    fleet.start()
    service = serve()
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        head = f"POST /generate HTTP/{version}\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(head.encode())
        (key,) = eventually(lambda: fleet.queue.redis.keys("rq:job:*"))
    job_id = key.decode().removeprefix("rq:job:")
    eventually(lambda: fleet.queue.view(job_id).status == "canceled" or fleet.queue.view(job_id).is_canceling)


# Stops


@pytest.mark.parametrize("stops", [1, pytest.param(50, marks=SLOW)])
def test_every_request_is_answered_before_the_service_ends(
    fleet: Fleet, serve: Callable[..., Service], stops: int
) -> None:
    """38 clients: each gets the address of its job, its result, or a 503 that says that there is no job."""
    write_model(fleet.models, batch_s=0.2, image_s=0.0)
    fleet.start(max_batch=1)
    hostile = costly.progressive_jpeg(costly.SIDE, 100)
    writers: list[asyncio.StreamWriter] = []

    async def request(port: int, head: str, body: bytes = b"", missing: int = 0) -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        kind = "Content-Type: image/png\r\n" if body else ""
        head = f"{head} HTTP/1.1\r\nHost: localhost\r\n{kind}Content-Length: {len(body) + missing}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writers.append(writer)
        return reader

    async def stop(service: Service, followed: list[str], after_s: float) -> list[list[str]]:
        port = service.port
        generating = [request(port, f"POST /generate?seed={i}") for i in range(24)]
        following = [request(port, f"GET /jobs/{job_id}/events") for job_id in followed]
        decoding = [request(port, "POST /score", hostile) for _ in range(3)]
        arriving = [request(port, "POST /score", IMAGES[0], 100) for _ in range(3)]
        groups = [await asyncio.gather(*group) for group in (generating, following, decoding, arriving)]
        await asyncio.sleep(after_s)
        service.process.terminate()
        answers = [[(await reader.read()).decode("latin-1") for reader in group] for group in groups]
        for writer in writers:
            writer.close()
        return answers

    for i in range(stops):
        service = serve(graceful_s=5, decode_cpu_s=600)
        followed = [fleet.queue.submit(generate(seed=seed)) for seed in range(8)]
        generated, streams, decoded, arrived = asyncio.run(stop(service, followed, random.Random(i).uniform(1, 2)))
        for answer in generated + decoded:  # an image may have been decoded just before the end
            assert answer.startswith(("HTTP/1.1 200 ", "HTTP/1.1 202 ", "HTTP/1.1 503 ")), answer[-500:]
            assert "\r\nlocation: /jobs/" in answer.lower() or not answer.startswith("HTTP/1.1 202 ")
        assert all("event: stopping" in stream or "event: succeeded" in stream for stream in streams)
        assert all('"urn:ncml:problem:stopping"' in answer for answer in arrived)
        assert service.process.wait(60) in (0, None)
        fleet.cancel_waiting()


# Who asked


def test_the_id_of_a_request_reaches_the_job_the_worker_and_the_logs(
    fleet: Fleet, serve: Callable[..., Service]
) -> None:
    fleet.start()
    service = serve()
    with service.client(headers={"x-request-id": "order-7"}) as http:
        answer = http.post("/score?class=hungry", files={"image": IMAGES[3]})
        assert answer.json()["request_id"] == answer.headers["x-request-id"] == "order-7"
        job_id = answer.headers["x-job-id"]
        assert http.get(f"/jobs/{job_id}", headers={"x-request-id": "look"}).json()["request_id"] == "order-7"
    served = [json.loads(line) for line in service.log.read_text().splitlines() if line.startswith("{")]
    assert [line["message"] for line in served if line.get("request") == "order-7"] == ["POST /score 500"]
    worked = [json.loads(line) for line in fleet.log.read_text().splitlines()]
    about = [line["message"] for line in worked if line.get("job") == job_id and line.get("request") == "order-7"]
    assert about == ["job started", "job ended"]


# Long use


@pytest.mark.parametrize("scores", [pytest.param(5000, marks=SLOW)])
def test_memory_does_not_grow_in_any_process(
    valkey_server, valkey_url: str, model_folder: Path, tmp_path: Path, serve: Callable[..., Service], scores: int
) -> None:
    """5,000 scores by a real model, each deleted by its client; the first 1,000 fill caches and arenas."""
    command = [sys.executable, "-m", "ncml.cli", "worker", "--models", str(model_folder.parent), "--threads", "1"]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(command, env=os.environ | {"NCML_REDIS_URL": valkey_url}, stderr=log)
    try:
        service = serve()
        engine = next(
            child for child in psutil.Process(worker.pid).children() if "spawn_main" in " ".join(child.cmdline())
        )
        processes = {
            "service": service.process, "worker": psutil.Process(worker.pid), "engine": engine,
            "queue": psutil.Process(valkey_server.process.pid),
        }  # fmt: skip

        with service.client(limits=httpx2.Limits(max_connections=8)) as http, ThreadPoolExecutor(8) as pool:

            def request_score(i: int) -> None:
                answer = http.post("/score?map=1", files={"image": IMAGES[i % 256]})
                assert answer.status_code == 200, answer.text
                assert http.delete(f"/jobs/{answer.headers['x-job-id']}").status_code == 204

            def used() -> dict[str, float]:
                return {name: process.memory_info().rss / MIB for name, process in processes.items()}

            list(pool.map(request_score, range(1000)))
            before = used()
            list(pool.map(request_score, range(1000, 1000 + scores)))
            after = used()
        grown = {name: round(after[name] - before[name], 1) for name in processes}
        print(f"MiB after 1,000 scores {before}; grown by {grown} after {scores} more")
        assert max(grown.values()) < 16, (before, grown)
    finally:
        worker.terminate()
        worker.wait(60)
