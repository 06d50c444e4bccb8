"""A service process on a fleet's queue, and large results in that queue."""

from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest

from ncml.images.tiling import Tiling
from tests.worker.fleet import PIXELS, score
from worker.contract import Job, JobStatus, ScanJob
from worker.job_results import Box, JobEnding, ModelRef, Result, Scan, ScanResult, Score, ScoreResult, Timing
from worker.leases import Leases
from worker.queue import JobQueue

MIB = 2**20
SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Service:
    """A service process on the fleet's queue."""

    port: int
    process: psutil.Process
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: object) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=300, **options)


MODEL = ModelRef(name="synthetic", version="a1" * 32)
TIMING = Timing(queue_s=0.0, compute_s=0.1, batch_size=1)


def store_scores(queue: JobQueue, n: int = 64) -> str:
    """Return a job with n scores and their maps of 32x32 pixels; call it before any worker runs."""
    map_HW = np.random.default_rng(0).uniform(0, 10, (32, 32)).astype("<f4").tobytes()
    scores = (Score(bpd=1.0, log_likelihood=-1.0, map=map_HW),) * n
    result = ScoreResult(model=MODEL, height=32, width=32, results=scores, timing=TIMING)
    return _store(queue, score(images=(PIXELS,) * n, map=True), result)


def store_scan(queue: JobQueue, side: int) -> str:
    """Return a job with the scan of a square image and its map; call it before any worker runs."""
    tile = Tiling(side // 32, side // 32)
    rows, columns = tile.grid_shape(side, side)
    scan = Scan(
        height=side, width=side, tile_height=tile.height, tile_width=tile.width, rows=rows, columns=columns,
        view="mean", score=1.0, p_value=None, threshold=None, is_ood=None, box=Box(left=0, top=0, width=8, height=8),
        tiles=np.random.default_rng(0).normal(size=(rows, columns)).astype("<f4").tobytes(),
    )  # fmt: skip
    job = ScanJob(model="synthetic", pixels=PIXELS.data, height=8, width=8, map=True)
    return _store(queue, job, ScanResult(model=MODEL, scan=scan, timing=TIMING))


def _store(queue: JobQueue, job: Job, result: Result) -> str:
    job_id = queue.submit(job)
    leases = Leases(queue, [job.task.lane], "w0")
    (claim,) = leases.claim(job.n)[1]
    ending = JobEnding(JobStatus.SUCCEEDED, result=result, timing=TIMING)
    assert leases.finish([(claim, ending)]) == [ending]
    return job_id
