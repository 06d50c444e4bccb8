"""What crosses the queue: job specifications, results, states, progress, model descriptors. JSON through pydantic.

Imports no RQ, Redis, torch or numpy. Images are uint8 HWC RGB bytes (row-major, values 0..255) at the model's size; an
image to be scanned in tiles stays in its file format. In JSON bytes are base64. Every model is frozen and refuses
unknown fields, so that a payload of another version fails with a clear error instead of being misread.
"""

import hashlib
from dataclasses import astuple
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from ncml.limits import MAX_IMAGES_PER_REQUEST, MAX_SEED, MAX_STEPS, Keep
from ncml.sampling.options import SamplingLimits, SamplingOptions


class Lane(StrEnum):
    """The kind of work of one engine. Scores are quick, so they have a lane of their own."""

    SCORE = "score"
    GENERATE = "generate"


class Task(StrEnum):
    """The task of a job."""

    SCORE = "score"
    SCAN = "scan"
    GENERATE = "generate"
    COMPLETE = "complete"

    @property
    def lane(self) -> Lane:
        """The lane whose workers compute this task."""
        return Lane.SCORE if self is Task.SCORE else Lane.GENERATE


class Priority(StrEnum):
    """Within a lane, all waiting jobs of a higher priority are claimed first. The members are in that order."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class JobStatus(StrEnum):
    """The state of a job. Each job reaches exactly one terminal state, once."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended."""
        return self not in {JobStatus.QUEUED, JobStatus.RUNNING}


def queue_name(lane: Lane, priority: Priority) -> str:
    """Return the name of the queue of a lane and a priority: `ncml:{lane}:{priority}`."""
    return f"ncml:{lane}:{priority}"


class _Message(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="strings"
    )


def _float_bytes(value: Any) -> Any:
    """Turn a numpy array into its little-endian float32 bytes, without importing numpy."""
    return value.astype("<f4").tobytes() if hasattr(value, "astype") else value


FloatBytes = Annotated[bytes, BeforeValidator(_float_bytes)]


class Pixels(_Message):
    """One image: `data` holds height * width * 3 bytes, uint8 HWC RGB in row-major order."""

    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    data: bytes

    @model_validator(mode="after")
    def _size(self) -> Self:
        if len(self.data) != self.height * self.width * 3:
            raise ValueError(
                f"data has {len(self.data)} bytes; {self.height} x {self.width} RGB needs "
                f"{self.height * self.width * 3}"
            )
        return self


class _Job(_Message):
    """The fields of every job."""

    model: str = Field(min_length=1, max_length=200, description="name of the model folder")
    version: str | None = Field(
        default=None, description="64 hex digits; None: the version being served when the job starts"
    )
    priority: Priority = Priority.NORMAL
    request_id: str = Field(default="", max_length=200, description="the HTTP request that submitted the job, for logs")
    timeout_s: float = Field(default=600.0, gt=0, le=86_400, description="a job that runs longer fails")
    start_within_s: float = Field(
        default=3600.0, gt=0, le=86_400, description="a job that has not started by then expires"
    )


class ScoreJob(_Job):
    """Bits per dimension of each image."""

    task: Literal[Task.SCORE] = Task.SCORE
    images: tuple[Pixels, ...] = Field(min_length=1, max_length=MAX_IMAGES_PER_REQUEST)
    class_name: str | None = Field(default=None, description="None: the null class")
    noise: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="grey levels; 0 is the clean image")
    map: bool = Field(default=False, description="also return bits/dim for each pixel")
    ood: bool = Field(default=True, description="also return a verdict, if the model is calibrated; False: one pass")
    statistic: str | None = Field(default=None, description="the statistic of the verdict; None: the calibration's")
    statistics: tuple[str, ...] | Literal["all"] = Field(default=(), description="statistics to return, by name")
    sanity: bool = Field(default=False, description="also score the image with every least significant bit flipped")

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if len({(image.height, image.width) for image in self.images}) > 1:
            raise ValueError("images differ in size; send images of the model's size")
        return self

    @property
    def n(self) -> int:
        """The number of images that the job adds to a batch."""
        return len(self.images)


class ScanJob(_Job):
    """Judge an image larger than the model by the worst of its overlapping tiles."""

    task: Literal[Task.SCAN] = Task.SCAN
    file: bytes = Field(min_length=1, description="the image file: its pixels would be many times as large")
    height: int = Field(ge=1, description="of the image in pixels, as is the width; a larger image is not decoded")
    width: int = Field(ge=1)
    tile_size: int | None = Field(
        default=None, ge=1, description="shorter side in pixels; None: the calibrated one, or the model's"
    )
    map: bool = Field(default=False, description="also return the score of each tile")

    @property
    def n(self) -> int:
        """The number of images that the job adds to a batch."""
        return 1


class SamplingJob(_Job):
    """The fields that generation and completion share. Image i of the job uses `seed + i`."""

    n: int = Field(default=1, ge=1, le=MAX_IMAGES_PER_REQUEST)
    class_name: str | None = Field(default=None, description="None: no class")
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    noise: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="start noise in grey levels; None: the model's; 0: without refinement",
    )
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="solver steps; None: the solver's default")
    solver: str | None = Field(default=None, max_length=64, description="None: the model's default for `steps`")

    @model_validator(mode="after")
    def _seeds_fit(self) -> Self:
        if self.seed + self.n - 1 > MAX_SEED:
            raise ValueError(f"seed + n - 1 exceeds {MAX_SEED}; choose a smaller seed")
        return self

    @property
    def sampling(self) -> SamplingOptions:
        """The options of sampling, which all images of a batch share."""
        return SamplingOptions(noise=self.noise, steps=self.steps, solver=self.solver)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each image."""
        return tuple(range(self.seed, self.seed + self.n))


class GenerateJob(SamplingJob):
    """Generate n images."""

    task: Literal[Task.GENERATE] = Task.GENERATE


class CompleteJob(SamplingJob):
    """Complete the unknown half of `image`, a canvas of the model's size, n times; its unknown half is ignored."""

    task: Literal[Task.COMPLETE] = Task.COMPLETE
    image: Pixels
    keep: Keep = "top"


Job: TypeAlias = ScoreJob | ScanJob | GenerateJob | CompleteJob
JOB: TypeAdapter[Job] = TypeAdapter(Annotated[Job, Field(discriminator="task")])
"""Reads and writes any job: `JOB.validate_json(text)`, `JOB.dump_json(job)`."""


def batch_key(job: Job) -> str:
    """Return what jobs of one batch have in common: task, model, version, shape and options.

    Classes, seeds, priorities and images differ freely within a batch, except that a batch of scans has one file.
    """
    parts: list[object] = [job.task, job.model, job.version or "current"]
    match job:
        case ScoreJob():
            statistics = job.statistics if job.statistics == "all" else ",".join(sorted(set(job.statistics)))
            parts += [job.images[0].height, job.images[0].width, job.noise, int(job.map), int(job.ood), job.statistic]
            parts += [statistics, int(job.sanity)]
        case ScanJob():
            parts += [hashlib.sha256(job.file).hexdigest(), job.tile_size]
        case GenerateJob():
            parts += astuple(job.sampling)
        case CompleteJob():
            parts += [job.image.height, job.image.width, job.keep, *astuple(job.sampling)]
    return "|".join("-" if part is None else str(part) for part in parts)


class ModelRef(_Message):
    """A model and its version."""

    name: str
    version: str


class Timing(_Message):
    """How long a job waited and ran."""

    queue_s: float = Field(description="from submission to the start of its last attempt, in seconds")
    compute_s: float | None = Field(default=None, description="in the engine, in seconds; None until the job has ended")
    batch_size: int | None = Field(default=None, description="images in the largest batch that the job was part of")


class Ood(_Message):
    """The verdict of a calibrated model. A higher score and a smaller p-value mean more out-of-distribution."""

    statistic: str
    score: float
    p_value: float
    threshold: float
    is_ood: bool


class Score(_Message):
    """The likelihood of one image."""

    bpd: float = Field(description="bits per dimension")
    log_likelihood: float = Field(description="nats per image")
    ood: Ood | None = Field(default=None, description="None if not requested or the model is not calibrated")
    statistics: dict[str, float] = Field(default={}, description="the requested statistics, by name")
    flipped_bpd: float | None = Field(default=None, description="bits/dim with every least significant bit flipped")
    map: FloatBytes | None = Field(
        default=None, description="height * width little-endian float32, row-major: bits/dim per pixel"
    )


class Box(_Message):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


class Scan(_Message):
    """An image of this height and width, judged by its tiles. A higher score means more out-of-distribution."""

    height: int
    width: int
    rows: int = Field(description="of tiles, as are the columns")
    columns: int
    score: float = Field(description="OOD score of the worst tile")
    p_value: float | None = Field(description="rank among whole good images; None if tiles are not calibrated")
    threshold: float | None
    is_ood: bool | None
    box: Box = Field(description="the worst tile; all tiles have its size")
    tiles: FloatBytes | None = Field(
        default=None, description="rows * columns little-endian float32, row-major: the OOD score of each tile"
    )


class Pictures(_Message):
    """n images, stored as a blob for a limited time: uint8, n * height * width * 3 bytes, NHWC, row-major."""

    blob: str = Field(description="key for JobQueue.blob, which returns None after the time to live")
    n: int
    height: int
    width: int


class ScoreResult(_Message):
    """The result of a ScoreJob; `results[i]` belongs to `images[i]`, and maps have this height and width."""

    task: Literal[Task.SCORE] = Task.SCORE
    model: ModelRef
    height: int
    width: int
    results: tuple[Score, ...]
    timing: Timing


class ScanResult(_Message):
    """The result of a ScanJob."""

    task: Literal[Task.SCAN] = Task.SCAN
    model: ModelRef
    scan: Scan
    timing: Timing


class PictureResult(_Message):
    """The result of a GenerateJob or a CompleteJob; image i used `seeds[i]`."""

    task: Literal[Task.GENERATE, Task.COMPLETE]
    model: ModelRef
    pictures: Pictures
    seeds: tuple[int, ...]
    timing: Timing


Result: TypeAlias = ScoreResult | ScanResult | PictureResult
RESULT: TypeAdapter[Result] = TypeAdapter(Annotated[Result, Field(discriminator="task")])
"""Reads and writes any result."""


class Moment(_Message):
    """A moment of a running job. If the job is computed in chunks, `done` counts its finished images."""

    stage: str = Field(description='"score", "tiles", "noisy_sampling" or "refine"')
    step: int
    total: int
    done: int = 0


class Progress(Moment):
    """The progress of a running job of `n` images."""

    n: int = 1
    preview: bool = Field(default=False, description="whether JobQueue.preview has a preview")


class Preview(Moment):
    """The images of the chunk being sampled, as they looked at one moment; uint8 NHWC in `data`."""

    n: int
    height: int
    width: int
    data: bytes


class JobError(_Message):
    """Why a job did not succeed; `detail` is one sentence for the user."""

    field: str | None = Field(default=None, description="name of the invalid parameter; None: none is invalid")
    detail: str
    reason: Literal["input", "model", "timeout", "canceled", "expired", "engine", "worker"]


class JobView(_Message):
    """The public state of a job."""

    id: str
    status: JobStatus
    task: Task
    model: ModelRef | None = Field(description="None before the result, unless the job names a version")
    model_name: str
    priority: Priority
    request_id: str
    fingerprint: str = Field(default="", description="digest of the request, given by the submitter")
    owner: str = Field(default="", description="owner of the job, given by the submitter")
    n: int
    created_at: float = Field(description="seconds since 1970, as are the next two fields")
    started_at: float | None = None
    ended_at: float | None = None
    timing: Timing | None = None
    progress: Progress | None = None
    error: JobError | None = None


class Event(_Message):
    """One entry of a job's event stream. The last entry has a terminal `status`."""

    id: str = Field(description="pass it as `after` to resume the stream")
    kind: Literal["status", "progress"]
    status: JobStatus | None = None
    progress: Progress | None = None
    error: JobError | None = None


class Preprocessing(_Message):
    """The rules that resize images to the model's size; part of each calibration."""

    name: str
    version: int


class Histogram(_Message):
    """Counts of a statistic between neighbouring edges."""

    edges: tuple[float, ...] = Field(description="ascending, one more than the counts")
    counts: tuple[int, ...]


class Calibration(_Message):
    """The calibration that gives a model's OOD verdicts."""

    version: str = Field(description="digest of the calibration, 64 hex digits")
    statistic: str = Field(description="default statistic of the verdict")
    false_positive_rate: float = Field(description="share of in-distribution images that are judged OOD")
    threshold: float = Field(description="of that statistic; a higher score is OOD")
    thresholds: dict[str, float] = Field(description="of every statistic")
    n_fit: int = Field(description="held-out images that the statistics are estimated on")
    n_rank: int = Field(description="other held-out images, among which an image is ranked")
    smallest_p: float = Field(description="smallest possible p-value, 1 / (n_rank + 1)")
    preprocessing: str = Field(description="rules that resized its images to the model's size")
    histograms: dict[str, Histogram] = Field(description="of the statistics over the ranking images")


class TileCalibration(_Message):
    """The calibration that gives verdicts on images in tiles."""

    version: str = Field(description="digest of the calibration, 64 hex digits")
    height: int = Field(description="of a tile in pixels, as is the width")
    width: int
    false_positive_rate: float = Field(description="share of good images that are judged OOD")
    threshold: float = Field(description="an image whose worst tile scores higher is OOD")
    n_fit: int = Field(description="good images whose tiles the statistic is estimated on")
    n_rank: int = Field(description="other good images, among which an image is ranked")
    smallest_p: float = Field(description="smallest possible p-value, 1 / (n_rank + 1)")


class Batching(_Message):
    """How a worker samples batches on a CPU so that a seed is the same bytes in each."""

    groups: Literal["fast", "fixed"] = Field(description="in which batches are sampled; fixed ones are slower")
    check: Literal["passed", "failed", "error", "skipped"] = Field(
        description="of the fast groups on the worker's machine. error: it did not run. skipped: NCML_BATCHING is set"
    )
    detail: str = Field(description="the reason, in one sentence")


class ModelDescriptor(_Message):
    """A model that a worker serves."""

    name: str
    version: str
    height: int
    width: int
    classes: tuple[str, ...] = Field(description="() for a model without classes")
    noise: float = Field(description="grey levels at T: the largest start noise, and the default")
    keeps: tuple[Keep, ...] = Field(description="known halves that are completed exactly")
    solver: str = Field(description="the default solver")
    stepped_solver: str = Field(description="the default solver for more than one step")
    solvers: dict[str, int] = Field(
        description="every solver and its default number of steps; 1 is the only number then"
    )
    preprocessing: Preprocessing
    calibration: Calibration | None = None
    tiles: TileCalibration | None = None
    batching: Batching | None = Field(
        default=None, description="of the latest worker that generates; null on a GPU, where batches may differ"
    )
    metrics: dict[str, float] = {}
    card: str = Field(default="", description="markdown")

    @property
    def sampling_limits(self) -> SamplingLimits:
        """The ranges and the defaults of sampling options."""
        return SamplingLimits(
            max_noise=self.noise, solver=self.solver, stepped_solver=self.stepped_solver, solvers=self.solvers
        )


class WorkerState(StrEnum):
    """The state of a worker process."""

    LOADING = "loading"
    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"


class WorkerInfo(_Message):
    """A live worker, published in Redis with a time to live."""

    name: str
    lanes: tuple[Lane, ...]
    state: WorkerState
    device: str
    max_batch: int
    models: tuple[ModelRef, ...]
    started_at: float
    seen_at: float
    pace: dict[Lane, float] = Field(default={}, description="jobs per second of each lane, while it is busy")


class QueueDepth(_Message):
    """The number of jobs that wait in one queue."""

    lane: Lane
    priority: Priority
    depth: int
    oldest_age_s: float = Field(description="0 for an empty queue")
