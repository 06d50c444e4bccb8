"""What HTTP and the queue add to a score, measured side by side in one run: one thread for the model on both sides.

Scored is without a verdict, one pass of the network: with one the model takes longer, and all else weighs less.

    python benchmarks/service.py [--model FOLDER] [--json]

1. Latency of POST /score for one picture on an idle machine, against reading and scoring the same file in this process,
   in turn. Goal: at most 12 ms more at the median.
2. Pictures a second with 32 clients of one picture at a time, against in-process batches of the worker's size.
   Goal: at least 0.85.
3. What a subscriber to a job's events costs: processor time of the service for 32 streams that wait.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the in-process side has the same threads as the engine
sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx2
import numpy as np
import psutil

import ncml
from ncml.images import open_image, resize_to, to_png
from ncml.model import Model
from ncml.runtime import reuse_freed_memory
from tests.conftest import Valkey

BATCH = 32
CLIENTS = 32
STREAMS = 32


@contextlib.contextmanager
def stack(url: str, folder: Path, log: Path) -> Iterator[tuple[httpx2.Client, psutil.Process]]:
    """A worker for scores and the service; a client and the service's process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"NCML_REDIS_URL": url, "NCML_READY_LANES": '["score"]'}
    worker = [sys.executable, "-m", "ncml.cli", "worker", "--models", str(folder.parent), "--threads", "1"]
    commands = [
        [*worker, "--max-batch", str(BATCH), "--drain-s", "0", "--lane", "score"],
        [sys.executable, "-m", "uvicorn", "--factory", "service.app:from_environment", "--port", str(port)],
    ]
    with log.open("w") as out:
        processes = [subprocess.Popen(command, env=environment, stderr=out) for command in commands]
    limits = httpx2.Limits(max_connections=CLIENTS + STREAMS)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as http:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(httpx2.TransportError):
                    if http.get("/readyz").status_code == 200:
                        break
                if time.monotonic() > deadline:
                    raise SystemExit(f"the stack did not become ready:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield http, psutil.Process(processes[1].pid)
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()


def score(http: httpx2.Client, model: Model, file: bytes) -> None:
    answer = http.post(f"/score?model={model.name}&ood=0", files={"image": file})
    assert answer.status_code == 200, answer.text


def directly(model: Model, files: list[bytes]) -> None:
    model.score(np.stack([resize_to(open_image(file), model.height, model.width) for file in files]), ood=False)


def latency(http: httpx2.Client, model: Model, file: bytes, samples: int = 300) -> dict[str, float]:
    """Seconds of one score, over HTTP and in this process, in turn."""
    over_http: list[float] = []
    in_process: list[float] = []
    for i in range(samples + 20):
        for times, run in (
            (over_http, lambda: score(http, model, file)),
            (in_process, lambda: directly(model, [file])),
        ):
            began = time.perf_counter()
            run()
            if i >= 20:  # the first ones warm caches up
                times.append(time.perf_counter() - began)
            time.sleep(0.005)
    http_p = statistics.quantiles(over_http, n=100)
    own_p = statistics.quantiles(in_process, n=100)
    return {
        "http_p50_s": http_p[49], "http_p99_s": http_p[98], "in_process_p50_s": own_p[49],
        "in_process_p99_s": own_p[98], "added_p50_s": http_p[49] - own_p[49],
    }  # fmt: skip


def throughput(http: httpx2.Client, model: Model, files: list[bytes], rounds: int = 3) -> dict[str, float]:
    """Pictures a second over HTTP and in this process, in turn; the best round of each counts."""
    over_http: list[float] = []
    in_process: list[float] = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(rounds):
            began = time.perf_counter()
            for at in range(0, len(files), BATCH):
                directly(model, files[at : at + BATCH])
            in_process.append(len(files) / (time.perf_counter() - began))
            began = time.perf_counter()
            list(pool.map(lambda file: score(http, model, file), files))
            over_http.append(len(files) / (time.perf_counter() - began))
    ratio = max(over_http) / max(in_process)
    return {"http": max(over_http), "in_process": max(in_process), "ratio": ratio}


def subscribers(http: httpx2.Client, service: psutil.Process, url: str, seconds: float = 10) -> dict[str, float]:
    """Processor seconds a second of the service, alone and with streams of a job that nobody starts."""
    from worker.contract import GenerateJob
    from worker.queue import JobQueue

    with contextlib.closing(JobQueue.from_url(url)) as queue:
        job_id = queue.submit(GenerateJob(model="nobody"))
        connected = threading.Barrier(STREAMS + 1)

        def follow() -> None:
            with http.stream("GET", f"/jobs/{job_id}/events", timeout=None) as stream:
                lines = stream.iter_lines()
                next(lines)
                connected.wait()
                for _ in lines:
                    pass

        def load() -> float:
            before = sum(service.cpu_times()[:2])
            time.sleep(seconds)
            return (sum(service.cpu_times()[:2]) - before) / seconds

        idle = load()
        threads = [threading.Thread(target=follow) for _ in range(STREAMS)]
        for thread in threads:
            thread.start()
        connected.wait()
        busy = load()
        queue.cancel(job_id)
        for thread in threads:
            thread.join()
    return {"cpu_share_each": (busy - idle) / STREAMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "models" / "cifar10")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    reuse_freed_memory()  # as the engine does
    model = ncml.load(arguments.model)
    rng = np.random.default_rng(0)
    files = [to_png(rng.integers(0, 256, (model.height, model.width, 3), np.uint8)) for _ in range(16 * BATCH)]
    server = Valkey()
    server.start()
    try:
        with (
            tempfile.TemporaryDirectory() as where,
            stack(server.url, arguments.model.resolve(), Path(where) / "log") as (http, service),
        ):
            found = {
                "latency": latency(http, model, files[0]),
                "throughput": throughput(http, model, files),
                "subscriber": subscribers(http, service, server.url),
            }
    finally:
        server.stop()
    if arguments.json:
        print(json.dumps(found))
        return
    times, rates, streams = found["latency"], found["throughput"], found["subscriber"]
    print(f"one picture   over HTTP p50 {times['http_p50_s'] * 1e3:.1f} ms, p99 {times['http_p99_s'] * 1e3:.1f} ms")
    print(f"              in process p50 {times['in_process_p50_s'] * 1e3:.1f} ms")
    print(f"              added at p50 {times['added_p50_s'] * 1e3:.1f} ms (goal: at most 12)")
    print(f"{CLIENTS} clients    over HTTP {rates['http']:.0f} pictures/s, in process {rates['in_process']:.0f}")
    print(f"              ratio {rates['ratio']:.2f} (goal: at least 0.85)")
    print(f"subscriber    {streams['cpu_share_each'] * 100:.3f} % of a core")


if __name__ == "__main__":
    main()
