"""Measure the overhead of HTTP and the queue on a score, with one thread for the model.

Scores have no verdict, so that they take one pass of the network; with a verdict, the model takes longer and the
overhead is relatively smaller.

    python benchmarks/service.py [--model FOLDER] [--json] [--traces]

1. Latency of POST /score for one image on an idle machine, compared with decoding and scoring the same file in this
   process, alternating. Goal: at most 12 ms more at the median.
2. Images per second with 32 clients that send one image at a time, compared with in-process batches of the worker's
   size. Goal: at least 0.85.
3. Cost of following a job's events: processor time of the service for each of 32 idle streams.

With --traces, only the cost of traces is measured: the latency of POST /score with a stack that exports traces to a
collector in this process, compared with two stacks that do not, alternating. The difference between these two shows the
error of the measurement. Goal: at most 1 ms more at the median.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
from tests.conftest import Valkey, free_port

BATCH = 32
CLIENTS = 32
STREAMS = 32


@contextlib.contextmanager
def stack(
    url: str, folder: Path, log: Path, variables: Mapping[str, str] = {}
) -> Iterator[tuple[httpx2.Client, psutil.Process]]:
    """Run a score worker and the service with additional environment variables; yield a client and the service."""
    port = free_port()
    environment = os.environ | {"NCML_REDIS_URL": url, "NCML_READY_LANES": '["score"]'} | variables
    worker = [sys.executable, "-m", "ncml.cli", "worker", "--models", str(folder.parent), "--threads", "1"]
    commands = [
        [*worker, "--max-batch", str(BATCH), "--drain-s", "0", "--lane", "score"],
        [sys.executable, "-m", "service", "--port", str(port)],
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
    response = http.post(f"/score?model={model.name}&ood=0", files={"image": file})
    assert response.status_code == 200, response.text


def score_in_process(model: Model, files: list[bytes]) -> None:
    model.score(np.stack([resize_to(open_image(file), model.height, model.width) for file in files]), ood=False)


def alternate(samples: int, *runs: Callable[[], None]) -> list[list[float]]:
    """Return the seconds of each run of several functions, which alternate."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(samples + 20):
        for seconds, run in zip(times, runs, strict=True):
            started = time.perf_counter()
            run()
            if i >= 20:  # the first runs warm up the caches
                seconds.append(time.perf_counter() - started)
            time.sleep(0.005)
    return times


def latency(http: httpx2.Client, model: Model, file: bytes, samples: int = 300) -> dict[str, float]:
    """Return the seconds of one score, over HTTP and in this process, alternating."""
    over_http, in_process = alternate(
        samples, lambda: score(http, model, file), lambda: score_in_process(model, [file])
    )
    http_p = statistics.quantiles(over_http, n=100)
    in_process_p = statistics.quantiles(in_process, n=100)
    return {
        "http_p50_s": http_p[49], "http_p99_s": http_p[98], "in_process_p50_s": in_process_p[49],
        "in_process_p99_s": in_process_p[98], "added_p50_s": http_p[49] - in_process_p[49],
    }  # fmt: skip


def throughput(http: httpx2.Client, model: Model, files: list[bytes], rounds: int = 3) -> dict[str, float]:
    """Return images per second over HTTP and in this process, alternating; the best round of each counts."""
    over_http: list[float] = []
    in_process: list[float] = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(rounds):
            started = time.perf_counter()
            for at in range(0, len(files), BATCH):
                score_in_process(model, files[at : at + BATCH])
            in_process.append(len(files) / (time.perf_counter() - started))
            started = time.perf_counter()
            list(pool.map(lambda file: score(http, model, file), files))
            over_http.append(len(files) / (time.perf_counter() - started))
    ratio = max(over_http) / max(in_process)
    return {"http": max(over_http), "in_process": max(in_process), "ratio": ratio}


def subscribers(http: httpx2.Client, service: psutil.Process, url: str, seconds: float = 10) -> dict[str, float]:
    """Return the processor load of the service per event stream, for a job that never starts."""
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


class Collector(BaseHTTPRequestHandler):
    """A collector that accepts traces and discards them."""

    received = 0

    def do_POST(self) -> None:
        """Accept a batch of spans."""
        self.rfile.read(int(self.headers["content-length"]))
        Collector.received += 1
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def traces(model: Model, folder: Path, file: bytes, samples: int = 1000) -> dict[str, float]:
    """Return the median seconds of a score with three stacks, alternating: without traces, with them, and without."""
    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}"}
    with contextlib.ExitStack() as cleanup:
        clients: list[httpx2.Client] = []
        for variables in ({}, endpoint, {}):
            server = Valkey()
            server.start()
            cleanup.callback(server.stop)
            log = Path(cleanup.enter_context(tempfile.TemporaryDirectory())) / "log"
            clients.append(cleanup.enter_context(stack(server.url, folder, log, variables))[0])
        times = alternate(samples, *(partial(score, http, model, file) for http in clients))
    collector.shutdown()
    assert Collector.received
    return dict(zip(("without_p50_s", "with_p50_s", "again_without_p50_s"), map(statistics.median, times), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "models" / "cifar10")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--traces", action="store_true", help="measure the cost of traces instead")
    arguments = parser.parse_args()
    reuse_freed_memory()  # as the engine does
    model = ncml.load(arguments.model)
    rng = np.random.default_rng(0)
    files = [to_png(rng.integers(0, 256, (model.height, model.width, 3), np.uint8)) for _ in range(16 * BATCH)]
    if arguments.traces:
        cost = traces(model, arguments.model.resolve(), files[0])
        without, with_traces, again = (1e3 * seconds for seconds in cost.values())
        added = with_traces - (without + again) / 2
        text = f"one image     p50 {without:.2f} ms without traces, {with_traces:.2f} with, {again:.2f} without again"
        text += f"\n              added at p50 {added:+.2f} ms (goal: at most 1)"
        print(json.dumps(cost) if arguments.json else text)
        return
    server = Valkey()
    server.start()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            stack(server.url, arguments.model.resolve(), Path(folder) / "log") as (http, service),
        ):
            results = {
                "latency": latency(http, model, files[0]),
                "throughput": throughput(http, model, files),
                "subscriber": subscribers(http, service, server.url),
            }
    finally:
        server.stop()
    if arguments.json:
        print(json.dumps(results))
        return
    times, rates, streams = results["latency"], results["throughput"], results["subscriber"]
    print(f"one image     over HTTP p50 {times['http_p50_s'] * 1e3:.1f} ms, p99 {times['http_p99_s'] * 1e3:.1f} ms")
    print(f"              in process p50 {times['in_process_p50_s'] * 1e3:.1f} ms")
    print(f"              added at p50 {times['added_p50_s'] * 1e3:.1f} ms (goal: at most 12)")
    print(f"{CLIENTS} clients    over HTTP {rates['http']:.0f} images/s, in process {rates['in_process']:.0f}")
    print(f"              ratio {rates['ratio']:.2f} (goal: at least 0.85)")
    print(f"subscriber    {streams['cpu_share_each'] * 100:.3f} % of a core")


if __name__ == "__main__":
    main()
