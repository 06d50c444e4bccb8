"""Worker processes, and the state in which a queue must be once all jobs have ended."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ncml.images import to_png
from tests.conftest import eventually
from tests.worker.synthetic import HEIGHT, WIDTH
from worker.contract import CompleteJob, GenerateJob, JobStatus, Lane, Pixels, ScanJob, ScoreJob
from worker.job_results import ImagesResult, JobView
from worker.queue import JobQueue

ROOT = Path(__file__).parents[2]
PIXELS = Pixels(height=HEIGHT, width=WIDTH, data=bytes(range(HEIGHT * WIDTH * 3)))


def score(**fields: Any) -> ScoreJob:
    return ScoreJob(**{"model": "synthetic", "images": (PIXELS,)} | fields)


def scan(image: np.ndarray, **fields: Any) -> ScanJob:
    """Return a job that scans a uint8 (H, W, 3) image."""
    height, width = image.shape[:2]
    return ScanJob(**{"model": "synthetic", "file": to_png(image), "height": height, "width": width} | fields)


def generate(**fields: Any) -> GenerateJob:
    return GenerateJob(**{"model": "synthetic"} | fields)


def complete(**fields: Any) -> CompleteJob:
    return CompleteJob(**{"model": "synthetic", "image": PIXELS} | fields)


class Fleet:
    """A queue and its worker processes, which all serve the models in `models`."""

    def __init__(self, url: str, models: Path, log: Path) -> None:
        self.url, self.models, self.log = url, models, log
        self.queue = JobQueue.from_url(url)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.by_name: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self, lanes: str = "score,generate", *, ready: bool = True, unusable: str | None = None, **options: float
    ) -> subprocess.Popen[bytes]:
        """Start a worker, and unless `ready` is False wait for all its models but `unusable`, which cannot be served.

        Options are fields of its settings.
        """
        folders = {folder.name for folder in self.models.glob("*")} - {unusable}
        earlier_names = self._workers_with(folders)
        command = [sys.executable, "tests/worker/synthetic.py", self.url, str(self.models), lanes]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*command, *(f"{name}={value}" for name, value in options.items())],
                cwd=ROOT, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        if ready:
            (name,) = eventually(lambda: self._workers_with(folders) - earlier_names)
            self.by_name[name] = process
        return process

    def _workers_with(self, folders: set[str]) -> set[str]:
        """Return the names of the workers that have published the models of all these folders."""
        workers = [worker for worker in self.queue.monitor.workers() if worker.models]
        return {worker.name for worker in workers if folders <= {model.name for model in worker.models}}

    def worker_of(self, job_id: str) -> subprocess.Popen[bytes]:
        """Return the worker that has claimed a job, once one has."""
        name = eventually(lambda: self.queue.redis.hget(f"rq:job:{job_id}", "worker_name"))
        return self.by_name[name.decode()]

    def engine_of(self, process: subprocess.Popen[bytes]) -> int:
        """Return the process id of a worker's engine."""
        children = psutil.Process(process.pid).children()
        return next(child.pid for child in children if "spawn_main" in " ".join(child.cmdline()))

    def wait(self, ids: Iterable[str], timeout_s: float = 300.0) -> list[JobView]:
        """Return the views of jobs once all have ended."""
        views: dict[str, JobView] = {}

        def ended() -> bool:
            for job_id in ids:
                if job_id not in views and (view := self.queue.view(job_id)).status.is_terminal:
                    views[job_id] = view
            return len(views) == len(ids)

        ids = list(ids)
        eventually(ended, timeout_s)
        return [views[job_id] for job_id in ids]

    def images(self, job_id: str) -> bytes:
        """Return the images of a job that succeeded."""
        result = self.queue.result(job_id)
        assert isinstance(result, ImagesResult)
        blob = self.queue.blob(result.images.blob)
        assert blob
        assert len(blob) == result.images.n * HEIGHT * WIDTH * 3
        return blob

    def check(self, ids: Iterable[str]) -> None:
        """Assert that every job ended exactly once, and that no key is left which does not expire."""
        redis = self.queue.redis
        for job_id in ids:
            entries = [entry[b"event"] for _, entry in redis.xrange(f"ncml:events:{job_id}")]
            terminal = [e for e in entries if any(f'"{s}"'.encode() in e for s in JobStatus if s.is_terminal)]
            assert len(terminal) == 1, f"job {job_id} ended {len(terminal)} times"
            assert entries[-1] == terminal[0], f"job {job_id} has events after its end"
        assert redis.zcard("ncml:leases") == 0
        assert [depth.depth for depth in self.queue.monitor.depths()] == [0] * 6
        unfinished = [key for key in redis.keys("*") if b":wip:" in key or b":intermediate" in key]
        assert unfinished == []
        permanent_prefixes = (
            b"rq:finished:",
            b"rq:failed:",
            b"rq:canceled:",
            b"rq:queues",
            b"rq:workers",
            b"ncml:wake:",
            b"ncml:workers",
        )
        leaked = [key for key in redis.keys("*") if redis.ttl(key) == -1 and not key.startswith(permanent_prefixes)]
        assert leaked == []

    def cancel_waiting(self) -> None:
        """Cancel the jobs that wait, and wait for those that run."""
        for lane in Lane:
            for job_id in self.queue.redis.lrange(f"rq:queue:ncml:{lane}:normal", 0, -1):
                self.queue.cancel(job_id.decode())
        eventually(lambda: self.queue.redis.zcard("ncml:leases") == 0)

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                    process.kill()
            process.wait()
        self.queue.close()
