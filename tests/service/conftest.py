"""A fake `worker.queue.JobQueue` in this process, and an application that uses it."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import redis
from starlette.testclient import TestClient

from ncml.images import open_image, reduced_grey_jpeg
from ncml.images.tiling import Tiling
from service.app import create_app
from service.settings import Settings
from worker.contract import (
    CalibrateJob,
    CompleteJob,
    GenerateJob,
    Job,
    JobStatus,
    Lane,
    Original,
    Priority,
    ScanJob,
    ScoreJob,
    Task,
)
from worker.descriptors import (
    Calibration,
    DetectorCalibration,
    DetectorPower,
    Histogram,
    ModelDescriptor,
    Preprocessing,
    QueueDepth,
    TileCalibration,
    WorkerInfo,
    WorkerState,
)
from worker.queue import DuplicateJob, JobNotFound, QueueFull, QueueOutOfMemory
from worker.results import (
    CANCELED,
    Box,
    Calibrated,
    CalibrateResult,
    Detection,
    Event,
    ImagesResult,
    JobEnding,
    JobError,
    JobView,
    ModelRef,
    Ood,
    Preview,
    Progress,
    Result,
    Scan,
    ScanResult,
    Score,
    ScoreResult,
    StoredImages,
    Timing,
    ViewDetection,
    ViewVerdict,
)

CALIBRATION = Calibration(
    version="c0" * 32,
    statistic="multiscale",
    false_positive_rate=0.05,
    threshold=100,
    thresholds={"multiscale": 100, "bpd": 50},
    n_fit=20,
    n_rank=99,
    smallest_p=0.01,
    preprocessing="centre-crop-bicubic v1",
    histograms={"bpd": Histogram(edges=(0, 50, 100), counts=(60, 39))},
)
WEAK = CALIBRATION.model_copy(
    update={"thresholds": {"multiscale": 200}, "threshold": 200, "weakness": "it ranks among 19 images"}
)
MODEL = ModelDescriptor(
    name="tiny",
    version="a1" * 32,
    height=8,
    width=8,
    classes=("cat", "dog"),
    noise=10.0,
    keeps=("top",),
    solver="tweedie",
    stepped_solver="heun",
    solvers={"heun": 10, "tweedie": 1},
    preprocessing=Preprocessing(name="centre-crop-bicubic", version=1),
    calibrations={"default": CALIBRATION, "weak": WEAK},
    tiles=TileCalibration(
        version="71" * 32,
        height=8,
        width=8,
        false_positive_rate=0.05,
        threshold=100,
        n_fit=8,
        n_rank=20,
        smallest_p=0.048,
    ),
    metrics={"test_bpd": 3.5},
    card="# tiny",
)
WORKER = WorkerInfo(
    name="w1",
    lanes=(Lane.SCORE, Lane.GENERATE),
    state=WorkerState.IDLE,
    models=(ModelRef(name=MODEL.name, version=MODEL.version),),
    started_at=0,
)
TIMING = Timing(queue_s=0.001, compute_s=0.002, batch_size=1)


DETECTOR = DetectorCalibration(
    version="de" * 32,
    false_positive_rate=0.05,
    confidence=None,
    rate_bound=0.09,
    threshold=100,
    smallest_p=0.05,
    n_fit=12,
    n_rank=28,
    estimation_scenes=12,
    ranking_scenes=19,
    descriptions={"features": "patches are compared at 448x448"},
    power=DetectorPower(
        images=4,
        shares={"scratch": {"1 pixel wide": 0.25, "3 pixels wide": 1.0}},
        smallest_found={"scratch": "3 pixels wide"},
        foreign={"one colour": 1.0},
    ),
)


def _detection(original: Original, score: float, with_map: bool) -> Detection:
    """Return the verdict of the view `places`, whose map falls from the top left over the upper half."""
    height, width = original.height, original.width
    box = Box(left=0, top=0, width=width // 2, height=height // 4)
    return Detection(
        height=height,
        width=width,
        view="places",
        score=score,
        p_value=0.5,
        threshold=DETECTOR.threshold,
        is_ood=score > DETECTOR.threshold,
        is_weak=False,
        box=box,
        views={
            "places": ViewDetection(score=2 * score, standardised=score, box=box),
            "appearance": ViewDetection(score=1.5, standardised=-1.0, box=box),
        },
        at_least_as_unusual=3,
        ranking_images=DETECTOR.n_rank,
        calibration_version=DETECTOR.version,
        covered=Box(left=0, top=0, width=width, height=height // 2),
        rows=1,
        columns=2,
        grid=np.array([2.5, 0.5], "<f4").tobytes() if with_map else None,
        backdrop=reduced_grey_jpeg(np.full((height, width, 3), 200, np.uint8), 64) if with_map else None,
    )


def _verdict(job: ScoreJob, score: float) -> Ood | None:
    if job.originals:
        return Ood(
            statistic="places",
            score=score,
            p_value=0.5,
            threshold=DETECTOR.threshold,
            is_ood=score > DETECTOR.threshold,
            calibration="detector",
            calibration_version=DETECTOR.version,
        )
    if not job.ood or not MODEL.default_calibration:
        return None
    calibration = MODEL.calibrations[job.calibration or "default"]
    name = job.statistic or calibration.statistic
    threshold = calibration.thresholds[name]
    return Ood(
        statistic=name,
        score=score,
        p_value=0.5,
        threshold=threshold,
        is_ood=score > threshold,
        calibration=job.calibration or "default",
        calibration_version=calibration.version,
        is_weak=bool(calibration.weakness),
    )


@dataclass
class FakeQueue:
    """Each job ends `delay_s` after its submission, with the error `fails` or with a result derived from its input.

    The bpd of an image and each of its statistics are the mean of its pixels; with flipped bits bpd is 1 more. The
    score of a tile is the mean of its pixels, too. A generated image has the grey level seed modulo 256; a completion
    is its canvas with 7 in the lower half.
    """

    delay_s: float = 0.0
    fails: JobError | None = None
    down: bool = False
    full: bool = False
    served: list[ModelDescriptor] = field(default_factory=lambda: [MODEL])
    infos: list[WorkerInfo] = field(default_factory=lambda: [WORKER])
    jobs: dict[str, tuple[Job, float]] = field(default_factory=dict)
    canceled: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)
    fingerprints: dict[str, str] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    endings: dict[str, JobEnding] = field(default_factory=dict)
    waits: bool = False
    cancels_slowly: bool = False
    refuses: str | None = None
    rate: float = 0.0
    closed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def monitor(self) -> "FakeQueue":
        return self  # it is its own monitor

    @property
    def claimable(self) -> list[Job]:
        """The jobs that a worker may compute."""
        return [job for job_id, (job, _) in self.jobs.items() if job_id not in self.held]

    def _check_connection(self) -> None:
        if self.down:
            raise redis.ConnectionError("connection refused")

    def submit(
        self,
        job: Job,
        *,
        job_id: str | None = None,
        limit: int | None = None,
        byte_limit: int | None = None,
        fingerprint: str = "",
        owner: str = "",
        files: Sequence[str] = (),
        traceparent: str = "",
        held_s: float | None = None,
    ) -> str:
        self._check_connection()
        with self.lock:
            if job_id in self.jobs:
                raise DuplicateJob("taken")
            if self.refuses:
                raise QueueOutOfMemory("the queue is short of memory until earlier results expire")
            if self.full or (limit is not None and len(self.jobs) >= limit):
                raise QueueFull(f"{limit} jobs are waiting")
            job_id = job_id or f"job-{len(self.jobs)}"
            self.jobs[job_id] = (job, time.time())
            self.fingerprints[job_id] = fingerprint
            self.owners[job_id] = owner
            self.files[job_id] = tuple(files)
            if held_s is not None:
                self.held.add(job_id)
        return job_id

    def release(self, job_id: str, job: Job, *, byte_limit: int | None = None) -> bool:
        self._check_connection()
        if self.full:
            raise QueueFull("the jobs that wait hold too many bytes already")
        if self.view(job_id).status.is_terminal:
            return False
        self.jobs[job_id] = (job, time.time())
        self.held.discard(job_id)
        return True

    def end_held(self, job_id: str, job: Job, ending: JobEnding) -> None:
        self._check_connection()
        if not self.view(job_id).status.is_terminal:
            self.endings[job_id] = ending

    def refusal(self) -> str | None:
        self._check_connection()
        return self.refuses

    def forget(self, job_id: str, submitted: float | None = None) -> None:
        assert self.view(job_id).status.is_terminal
        del self.jobs[job_id]

    def cancel(self, job_id: str, submitted: float | None = None) -> JobView:
        if not self.view(job_id).status.is_terminal:
            self.canceled.add(job_id)
        return self.view(job_id)

    def view(self, job_id: str) -> JobView:
        self._check_connection()
        if job_id not in self.jobs:
            raise JobNotFound("no such job")
        job, at = self.jobs[job_id]
        is_held = job_id in self.held
        ended = not is_held and time.time() >= at + self.delay_s
        error = self.fails if ended else None
        status = JobStatus.SUCCEEDED if ended else JobStatus.QUEUED if self.waits or is_held else JobStatus.RUNNING
        is_canceling = job_id in self.canceled and self.cancels_slowly
        if job_id in self.canceled and not is_canceling:
            status, error = JobStatus.CANCELED, CANCELED
        elif job_id in self.endings:
            status, error = self.endings[job_id].status, self.endings[job_id].error
        elif error:
            status = JobStatus.EXPIRED if error.reason == "expired" else JobStatus.FAILED
        return JobView(
            id=job_id,
            status=status,
            task=job.task,
            model=ModelRef(name=MODEL.name, version=MODEL.version),
            model_name=job.model,
            priority=job.priority,
            request_id=job.request_id,
            fingerprint=self.fingerprints[job_id],
            owner=self.owners[job_id],
            files=self.files[job_id],
            n=job.n,
            created_at=at,
            started_at=at,
            ended_at=at + self.delay_s if status.is_terminal else None,
            timing=TIMING,
            progress=Progress(stage="refine", step=1, total=2, n=job.n, preview=True),
            error=error,
            is_canceling=is_canceling,
        )

    def result(self, job_id: str) -> Result | None:
        self._check_connection()
        if job_id in self.forgotten:
            return None
        job, _ = self.jobs[job_id]
        ref = ModelRef(name=MODEL.name, version=MODEL.version)
        if isinstance(job, ScoreJob):
            scores = []
            for index, image in enumerate(job.images):
                pixels = np.frombuffer(image.data, np.uint8)
                map_HW = pixels.reshape(8, 8, 3).mean(-1).astype("<f4").tobytes() if job.map else None
                mean = float(pixels.mean())
                names = ("multiscale", "bpd") if job.statistics == "all" else job.statistics
                scores.append(
                    Score(
                        bpd=mean,
                        log_likelihood=-1.0,
                        map=map_HW,
                        ood=_verdict(job, mean),
                        statistics=dict.fromkeys(names, mean),
                        flipped_bpd=mean + 1 if job.sanity else None,
                        detection=_detection(job.originals[index], mean, job.map) if job.originals else None,
                    )
                )
            return ScoreResult(model=ref, height=8, width=8, results=tuple(scores), timing=TIMING)
        if isinstance(job, ScanJob):
            return ScanResult(model=ref, scan=self._scan(job), timing=TIMING)
        if isinstance(job, CalibrateJob):
            calibrated = Calibrated(n_fit=20, n_rank=job.images - 20, smallest_p=0.05, weakness="", summary="It is.")
            new = ModelRef(name=job.name, version=ref.version)
            return CalibrateResult(model=new, calibration=calibrated, skipped=job.skipped, timing=TIMING)
        images = StoredImages(blob=f"ncml:blob:{job_id}", n=job.n, height=8, width=8)
        return ImagesResult(task=job.task, model=ref, images=images, seeds=job.seeds, timing=TIMING)

    def result_size(self, job_id: str) -> int:
        return 1000

    def _scan(self, job: ScanJob) -> Scan:
        image = open_image(job.file) if job.file else np.frombuffer(job.pixels or b"", np.uint8)
        image = image.reshape(job.height, job.width, 3)
        assert image.shape[:2] == (job.height, job.width)
        tile = Tiling.for_model(8, 8, job.tile_size)
        corners = tile.corners(job.height, job.width)
        means = [image[top : top + tile.height, left : left + tile.width].mean() for top, left in corners]
        top, left = corners[int(np.argmax(means))]
        rows, columns = tile.grid_shape(job.height, job.width)
        calibration = self.served[0].tiles
        return Scan(
            height=job.height,
            width=job.width,
            tile_height=tile.height,
            tile_width=tile.width,
            rows=rows,
            columns=columns,
            view="worst_tile",
            score=max(means),
            p_value=0.5 if calibration else None,
            threshold=calibration.threshold if calibration else None,
            is_ood=max(means) > calibration.threshold if calibration else None,
            box=Box(left=left, top=top, width=tile.width, height=tile.height),
            views={"worst_tile": ViewVerdict(score=max(means), p_value=0.5, threshold=100)} if calibration else {},
            is_weak=False if calibration else None,
            calibration_version=calibration.version if calibration else None,
            tiles=np.array(means, "<f4").tobytes() if job.map else None,
        )

    def blob(self, key: str) -> bytes | None:
        self._check_connection()
        job_id = key.split(":")[2]
        job, _ = self.jobs[job_id]
        if job_id in self.forgotten:
            return None
        if isinstance(job, CompleteJob):
            canvas = np.frombuffer(job.image.data, np.uint8).reshape(8, 8, 3).copy()
            canvas[4:] = 7
            return np.stack([canvas] * job.n).tobytes()
        assert isinstance(job, GenerateJob)
        return np.stack([np.full((8, 8, 3), seed % 256, np.uint8) for seed in job.seeds]).tobytes()

    def preview(self, job_id: str) -> Preview | None:
        self._check_connection()
        job, _ = self.jobs[job_id]
        if job_id in self.forgotten:
            return None
        return Preview(stage="refine", step=1, total=2, n=job.n, height=8, width=8, data=bytes(job.n * 8 * 8 * 3))

    async def wait(self, job_id: str, timeout_s: float, until: asyncio.Future[None] | None = None) -> JobView:
        deadline = time.time() + timeout_s
        while not (view := self.view(job_id)).status.is_terminal and time.time() < deadline:
            if until and until.done():
                break
            await asyncio.sleep(0.005)
        return view

    async def events(
        self, job_id: str, after: str = "0", *, tick_s: float = 15.0, until: asyncio.Future[None] | None = None
    ) -> AsyncGenerator[Event | None]:
        if not after[0].isdigit():
            raise JobNotFound("no such event")
        events = [
            Event(id="1-0", kind="status", status=JobStatus.QUEUED),
            Event(id="2-0", kind="status", status=JobStatus.RUNNING),
            Event(id="3-0", kind="progress", progress=self.view(job_id).progress),
            None,
        ]
        for event in events:
            if event is None or int(event.id[0]) > int(after[0]):
                yield event
        status = (await self.wait(job_id, 5, until)).status
        if int(after[0]) < 4 and not (until and until.done() and not status.is_terminal):
            yield Event(id="4-0", kind="status", status=status)

    def ping(self) -> bool:
        self._check_connection()
        return True

    def workers(self) -> list[WorkerInfo]:
        self._check_connection()
        return self.infos

    def models(self) -> list[ModelDescriptor]:
        self._check_connection()
        return self.served

    def service(self, lane: Lane) -> tuple[int, list[ModelDescriptor]]:
        self._check_connection()
        return sum(lane in info.lanes for info in self.infos), self.served

    def depths(self) -> list[QueueDepth]:
        self._check_connection()
        return [
            QueueDepth(lane=lane, priority=priority, depth=3, oldest_age_s=1.5)
            for lane in Lane
            for priority in Priority
        ]

    def longest_waits(self) -> dict[Task, float]:
        return {Task.SCORE: 0.0, Task.SCAN: 2.5}

    def depth(self, lane: Lane) -> int:
        return len(self.jobs)

    def memory(self) -> tuple[int, int]:
        return 7_000, 10_000

    def position(self, view: JobView) -> int | None:
        self._check_connection()
        return list(self.jobs).index(view.id) if view.status is JobStatus.QUEUED else None

    def pace(self, lane: Lane) -> float:
        return self.rate

    def close(self) -> None:
        self.closed += 1

    async def aclose(self) -> None:
        self.closed += 1


@pytest.fixture
def queue() -> FakeQueue:
    return FakeQueue()


@pytest.fixture
def new_client(queue: FakeQueue) -> Iterator[Callable[..., TestClient]]:
    """Return a function that creates a client of an application with the given settings."""
    clients: list[TestClient] = []

    def create(**settings: object) -> TestClient:
        app = create_app(Settings(**settings), queue)
        clients.append(TestClient(app, base_url="http://localhost", raise_server_exceptions=False).__enter__())
        return clients[-1]

    yield create
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(new_client: Callable[..., TestClient]) -> TestClient:
    return new_client()


@pytest.fixture
def detector(queue: FakeQueue) -> DetectorCalibration:
    """The calibration of a detector, which the model `tiny` becomes."""
    queue.served = [MODEL.model_copy(update={"detector": DETECTOR})]
    return DETECTOR


@pytest.fixture
def worker() -> WorkerInfo:
    return WORKER


@pytest.fixture
def model() -> ModelDescriptor:
    return MODEL
