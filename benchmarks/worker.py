"""What the queue and its batches cost and bring, each ratio measured side by side in one run, on 2 cores.

    python benchmarks/worker.py [--model FOLDER] [--json]

1. Jobs a second at batch sizes 1, 4, 16 and 32 with a synthetic engine of 50 ms a batch and 2 ms an image.
   Goal: batch 16 at least 9 times batch 1 (10.1 is what the engine's own times allow).
2. Scores through the queue, one image a job, against the same model scoring the same images in this process in batches
   of the same size, both on one thread, in short turns; the best turn of each counts. Goal: at least 0.9. The share of
   the time that the engine spent computing does not depend on what else the machine does, so it is given beside it.
3. Latency of a score while 64 images are being generated, against idle, one thread for each lane.
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
from tests.conftest import Valkey
from tests.worker.fleet import Fleet, eventually, score
from tests.worker.synthetic import write_model
from worker.contract import GenerateJob, Pixels, ScoreJob
from worker.queue import JobQueue

BATCH = 32


@contextlib.contextmanager
def real_worker(queue: JobQueue, url: str, model: Path, *lanes: str) -> Iterator[None]:
    """`ncml worker` on one thread."""
    known = {worker.name for worker in queue.workers()}
    command = [sys.executable, "-m", "ncml.cli", "worker", "--models", str(model.parent), "--threads", "1"]
    worker = subprocess.Popen(
        [*command, "--redis-url", url, "--max-batch", str(BATCH), "--drain-s", "0", "--lane", *lanes],
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: {w.name for w in queue.workers() if w.models} - known, 120)
        yield
    finally:
        worker.terminate()
        worker.wait()


def span(queue: JobQueue, ids: list[str], timeout_s: float = 600) -> float:
    """Seconds from the first start to the last end of some jobs, by the server's clock."""
    eventually(lambda: queue.view(ids[-1]).status.is_terminal, timeout_s, every_s=0.01)
    views = [eventually(lambda i=i: (v := queue.view(i)).status.is_terminal and v, timeout_s) for i in ids]
    assert all(view.status == "succeeded" for view in views)
    return max(view.ended_at or 0 for view in views) - min(view.started_at or 0 for view in views)


def batching(url: str, where: Path) -> dict[str, float]:
    """Jobs a second by batch size."""
    write_model(where / "models", batch_s=0.05, image_s=0.002)
    rates: dict[str, float] = {}
    for size in (1, 4, 16, 32):
        fleet = Fleet(url, where / "models", where / "log")
        try:
            jobs = 40 if size == 1 else 32 * size
            ids = [fleet.queue.submit(score()) for _ in range(jobs)]
            fleet.start("score", max_batch=size)
            rates[str(size)] = jobs / span(fleet.queue, ids)
        finally:
            fleet.stop()
    return rates


def throughput(queue: JobQueue, url: str, folder: Path, model: Model, rounds: int = 8) -> dict[str, float]:
    """Images a second through the queue and in this process, in turn; the best round of each counts."""
    n = 4 * BATCH
    images = np.random.default_rng(0).integers(0, 256, (n, model.height, model.width, 3), np.uint8)
    jobs = [
        ScoreJob(model=folder.name, images=(Pixels(height=model.height, width=model.width, data=i.tobytes()),))
        for i in images
    ]
    queued: list[float] = []
    direct: list[float] = []
    shares: list[float] = []  # of the time from the first submission to the last result
    with real_worker(queue, url, folder, "score"):
        span(queue, [queue.submit(job) for job in jobs[:BATCH]])  # warm
        model.score(images[:BATCH])
        for _ in range(rounds):
            began = time.monotonic()
            for at in range(0, n, BATCH):
                model.score(images[at : at + BATCH])
            direct.append(n / (time.monotonic() - began))
            began = time.monotonic()
            ids = [queue.submit(job) for job in jobs]
            span(queue, ids)
            took = time.monotonic() - began
            queued.append(n / took)
            batches = {view.timing.compute_s or 0 for view in map(queue.view, ids) if view.timing}
            shares.append(sum(batches) / took)
    return {"in_process": max(direct), "through_queue": max(queued), "engine_busy": statistics.median(shares)}


def latency(queue: JobQueue, url: str, folder: Path, model: Model, samples: int = 60) -> dict[str, float]:
    """Seconds from submission to the end of a lone score, idle and while 64 images are generated."""
    pixels = Pixels(height=model.height, width=model.width, data=bytes(model.height * model.width * 3))
    job = ScoreJob(model=folder.name, images=(pixels,))

    def measure() -> list[float]:
        times: list[float] = []
        for _ in range(samples):
            began = time.monotonic()
            job_id = queue.submit(job)
            eventually(lambda i=job_id: queue.view(i).status.is_terminal, every_s=0.001)
            times.append(time.monotonic() - began)
            time.sleep(0.02)
        return times

    with real_worker(queue, url, folder, "score"), real_worker(queue, url, folder, "generate"):
        measure()
        idle = measure()
        drawing = queue.submit(GenerateJob(model=folder.name, n=64, steps=20))
        eventually(lambda: queue.view(drawing).progress, 120)
        busy = measure()
        still = queue.view(drawing).status == "running"
        queue.cancel(drawing)
    assert still, "the generation ended before the measurement did: raise its size"
    q = {name: statistics.quantiles(times, n=20)[18] for name, times in (("idle", idle), ("busy", busy))}
    return {
        "idle_p50_s": statistics.median(idle), "busy_p50_s": statistics.median(busy),
        "idle_p95_s": q["idle"], "busy_p95_s": q["busy"],
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
            tempfile.TemporaryDirectory() as where,
            contextlib.closing(JobQueue.from_url(server.url)) as queue,
        ):
            rates = batching(server.url, Path(where))
            through = throughput(queue, server.url, arguments.model, model)
            wait = latency(queue, server.url, arguments.model, model)
    finally:
        server.stop()
    ratios = {
        "batch_16_over_1": rates["16"] / rates["1"],
        "queue_over_in_process": through["through_queue"] / through["in_process"],
        "busy_over_idle_p95": wait["busy_p95_s"] / wait["idle_p95_s"],
    }
    if arguments.json:
        print(json.dumps({"jobs_per_s": rates, "scores_per_s": through, "latency": wait, "ratios": ratios}))
        return
    print("synthetic engine, jobs/s:", "  ".join(f"batch {size}: {rate:.1f}" for size, rate in rates.items()))
    print(f"  batch 16 / batch 1: {ratios['batch_16_over_1']:.2f}   (goal: at least 9)")
    print(
        f"scores of {arguments.model.name}, images/s: in process: {through['in_process']:.1f}"
        f"  through the queue: {through['through_queue']:.1f}  (engine busy {through['engine_busy']:.1%} of the time)"
    )
    print(f"  through the queue / in process: {ratios['queue_over_in_process']:.3f}   (goal: at least 0.9)")
    print("latency of a score, ms:", "  ".join(f"{k[:-2]}: {1000 * v:.1f}" for k, v in wait.items()))
    print(f"  p95 while 64 images are drawn / idle: {ratios['busy_over_idle_p95']:.2f}   (goal: at most 3)")


if __name__ == "__main__":
    main()
