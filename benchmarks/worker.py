"""Measure the overhead of the queue and the benefit of its batches, on 2 cores.

    python benchmarks/worker.py [--model FOLDER] [--json]

1. Jobs per second at batch sizes 1, 4, 16 and 32 with a synthetic engine that takes 50 ms per batch and 2 ms per image.
   Goal: batch 16 at least 9 times batch 1 (the engine's times allow 10.1).
2. Scores through the queue, one image per job, compared with the same model and images in this process in batches of
   the same size, both on one thread, alternating in short rounds; the best round of each counts. Goal: at least 0.9.
   The share of time in which the engine computes is reported as well, because it does not depend on other load.
3. Latency of a score while 64 images are being generated, compared with an idle machine, one thread per lane.
   Goal: 95th percentile at most 3 times.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the in-process side has the same threads as the engine
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import ncml
from ncml.model import Model
from ncml.runtime import reuse_freed_memory
from tests.conftest import Valkey, eventually
from tests.worker.fleet import Fleet, score
from tests.worker.synthetic import write_model
from worker.contract import GenerateJob, Pixels, ScoreJob
from worker.queue import JobQueue

BATCH = 32


@contextlib.contextmanager
def real_worker(queue: JobQueue, url: str, model: Path, *lanes: str) -> Iterator[None]:
    """Run `ncml worker` with one thread."""
    existing = {worker.name for worker in queue.monitor.workers()}
    command = [sys.executable, "-m", "ncml.cli", "worker", "--models", str(model.parent), "--threads", "1"]
    worker = subprocess.Popen(
        [*command, "--redis-url", url, "--max-batch", str(BATCH), "--drain-s", "0", "--lane", *lanes],
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: {w.name for w in queue.monitor.workers() if w.models} - existing, 120)
        yield
    finally:
        worker.terminate()
        worker.wait()


def duration(queue: JobQueue, ids: list[str], timeout_s: float = 600) -> float:
    """Return the seconds from the first start to the last end of the jobs, by the server's clock."""
    eventually(lambda: queue.view(ids[-1]).status.is_terminal, timeout_s, every_s=0.01)
    views = [eventually(lambda i=i: (v := queue.view(i)).status.is_terminal and v, timeout_s) for i in ids]
    assert all(view.status == "succeeded" for view in views)
    return max(view.ended_at or 0 for view in views) - min(view.started_at or 0 for view in views)


def batching(url: str, folder: Path) -> dict[str, float]:
    """Return jobs per second by batch size."""
    write_model(folder / "models", batch_s=0.05, image_s=0.002)
    rates: dict[str, float] = {}
    for size in (1, 4, 16, 32):
        fleet = Fleet(url, folder / "models", folder / "log")
        try:
            jobs = 40 if size == 1 else 32 * size
            ids = [fleet.queue.submit(score()) for _ in range(jobs)]
            fleet.start("score", max_batch=size)
            rates[str(size)] = jobs / duration(fleet.queue, ids)
        finally:
            fleet.stop()
    return rates


def throughput(queue: JobQueue, url: str, folder: Path, model: Model, rounds: int = 8) -> dict[str, float]:
    """Return images per second through the queue and in this process, alternating; the best round counts."""
    n = 4 * BATCH
    images = np.random.default_rng(0).integers(0, 256, (n, model.height, model.width, 3), np.uint8)
    jobs = [
        ScoreJob(model=folder.name, images=(Pixels(height=model.height, width=model.width, data=i.tobytes()),))
        for i in images
    ]
    queued: list[float] = []
    direct: list[float] = []
    shares: list[float] = []  # share of the time from the first submission to the last result
    with real_worker(queue, url, folder, "score"):
        duration(queue, [queue.submit(job) for job in jobs[:BATCH]])  # warm up
        model.score(images[:BATCH])
        for _ in range(rounds):
            started = time.monotonic()
            for at in range(0, n, BATCH):
                model.score(images[at : at + BATCH])
            direct.append(n / (time.monotonic() - started))
            started = time.monotonic()
            ids = [queue.submit(job) for job in jobs]
            duration(queue, ids)
            elapsed_s = time.monotonic() - started
            queued.append(n / elapsed_s)
            batches = {view.timing.compute_s or 0 for view in map(queue.view, ids) if view.timing}
            shares.append(sum(batches) / elapsed_s)
    return {"in_process": max(direct), "through_queue": max(queued), "engine_busy": statistics.median(shares)}


def latency(queue: JobQueue, url: str, folder: Path, model: Model, samples: int = 60) -> dict[str, float]:
    """Return the seconds from submission to the end of a single score, idle and while 64 images are generated."""
    pixels = Pixels(height=model.height, width=model.width, data=bytes(model.height * model.width * 3))
    job = ScoreJob(model=folder.name, images=(pixels,))

    def measure() -> list[float]:
        times: list[float] = []
        for _ in range(samples):
            started = time.monotonic()
            job_id = queue.submit(job)
            eventually(lambda i=job_id: queue.view(i).status.is_terminal, every_s=0.001)
            times.append(time.monotonic() - started)
            time.sleep(0.02)
        return times

    with real_worker(queue, url, folder, "score"), real_worker(queue, url, folder, "generate"):
        measure()
        idle = measure()
        generation_id = queue.submit(GenerateJob(model=folder.name, n=64, steps=20))
        eventually(lambda: queue.view(generation_id).progress, 120)
        busy = measure()
        still_running = queue.view(generation_id).status == "running"
        queue.cancel(generation_id)
    assert still_running, "the generation ended before the measurement: generate more images"
    p95_s = {name: statistics.quantiles(times, n=20)[18] for name, times in (("idle", idle), ("busy", busy))}
    return {
        "idle_p50_s": statistics.median(idle), "busy_p50_s": statistics.median(busy),
        "idle_p95_s": p95_s["idle"], "busy_p95_s": p95_s["busy"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "models" / "cifar10")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        reuse_freed_memory()  # as the engine does
        model = ncml.load(arguments.model)
    except ncml.ModelError as error:
        parser.error(str(error))
    server = Valkey()
    server.start()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.closing(JobQueue.from_url(server.url)) as queue,
        ):
            rates = batching(server.url, Path(folder))
            scores = throughput(queue, server.url, arguments.model, model)
            latencies = latency(queue, server.url, arguments.model, model)
    finally:
        server.stop()
    ratios = {
        "batch_16_over_1": rates["16"] / rates["1"],
        "queue_over_in_process": scores["through_queue"] / scores["in_process"],
        "busy_over_idle_p95": latencies["busy_p95_s"] / latencies["idle_p95_s"],
    }
    if arguments.json:
        print(json.dumps({"jobs_per_s": rates, "scores_per_s": scores, "latency": latencies, "ratios": ratios}))
        return
    print("synthetic engine, jobs/s:", "  ".join(f"batch {size}: {rate:.1f}" for size, rate in rates.items()))
    print(f"  batch 16 / batch 1: {ratios['batch_16_over_1']:.2f}   (goal: at least 9)")
    print(
        f"scores of {arguments.model.name}, images/s: in process: {scores['in_process']:.1f}"
        f"  through the queue: {scores['through_queue']:.1f}  (engine busy {scores['engine_busy']:.1%} of the time)"
    )
    print(f"  through the queue / in process: {ratios['queue_over_in_process']:.3f}   (goal: at least 0.9)")
    print("latency of a score, ms:", "  ".join(f"{k[:-2]}: {1000 * v:.1f}" for k, v in latencies.items()))
    print(f"  p95 while 64 images are generated / idle: {ratios['busy_over_idle_p95']:.2f}   (goal: at most 3)")


if __name__ == "__main__":
    main()
