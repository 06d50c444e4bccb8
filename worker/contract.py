"""What crosses the queue: job specifications, results, states, progress, model descriptors. JSON through pydantic.

Knows no RQ, no Redis, no torch and no numpy. Pictures are raw uint8 HWC RGB bytes (row-major, values 0..255) at the
model's size, but for one that is to be cut into tiles, which stays the file that it came as; in JSON they are base64.
Every model here is frozen and refuses unknown fields, so a payload of another version fails with a sentence instead of
being half understood.
"""

import hashlib
from dataclasses import astuple
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from ncml.limits import MAX_IMAGES_PER_REQUEST, MAX_SEED, MAX_STEPS, Keep
from ncml.sampling.options import SamplingLimits, SamplingOptions


class Lane(StrEnum):
    """The kind of work that one engine does: quick scores never stand behind what takes long."""

    SCORE = "score"
    GENERATE = "generate"


class Task(StrEnum):
    """What a job asks for."""

    SCORE = "score"
    SCAN = "scan"
    GENERATE = "generate"
    COMPLETE = "complete"

    @property
    def lane(self) -> Lane:
        """The lane whose workers do this task."""
        return Lane.SCORE if self is Task.SCORE else Lane.GENERATE


class Priority(StrEnum):
    """Within a lane every waiting job of a higher priority is claimed first. Members are in that order."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class JobStatus(StrEnum):
    """Where a job stands; each job reaches exactly one terminal state, once."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        """True when the job will never change again."""
        return self not in {JobStatus.QUEUED, JobStatus.RUNNING}


def queue_name(lane: Lane, priority: Priority) -> str:
    """The queue of a lane and a priority: `ncml:{lane}:{priority}`."""
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
    """One picture: `data` holds height * width * 3 bytes, uint8 HWC RGB in row-major order."""

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
    """What every job says."""

    model: str = Field(min_length=1, max_length=200, description="name of the model folder")
    version: str | None = Field(
        default=None, description="64 hex digits; None: the version being served when the job starts"
    )
    priority: Priority = Priority.NORMAL
    request_id: str = Field(
        default="", max_length=200, description="the HTTP request that this job came from, for logs"
    )
    timeout_s: float = Field(default=600.0, gt=0, le=86_400, description="a job running longer fails")
    start_within_s: float = Field(default=3600.0, gt=0, le=86_400, description="a job not started by then expires")


class ScoreJob(_Job):
    """Bits per dimension of each image."""

    task: Literal[Task.SCORE] = Task.SCORE
    images: tuple[Pixels, ...] = Field(min_length=1, max_length=MAX_IMAGES_PER_REQUEST)
    class_name: str | None = Field(default=None, description="None: the null class")
    noise: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="grey levels; 0 is the clean image")
    map: bool = Field(default=False, description="also return bits/dim for each pixel")
    ood: bool = Field(default=True, description="also give a verdict, if the model is calibrated; False: one pass")
    statistic: str | None = Field(default=None, description="which one gives the verdict; None: the calibration's")
    statistics: tuple[str, ...] | Literal["all"] = Field(default=(), description="those to return by name")
    sanity: bool = Field(default=False, description="also score the image with every least significant bit flipped")

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if len({(image.height, image.width) for image in self.images}) > 1:
            raise ValueError("images differ in size; all images of one job have the model's size")
        return self

    @property
    def n(self) -> int:
        """How many images this job adds to a batch."""
        return len(self.images)


class ScanJob(_Job):
    """A picture larger than the model, judged by the worst of the overlapping tiles that it is cut into."""

    task: Literal[Task.SCAN] = Task.SCAN
    file: bytes = Field(min_length=1, description="the picture's file: its pixels would be many times as large")
    height: int = Field(ge=1, description="of the picture in pixels, as is the width: no more of them are decoded")
    width: int = Field(ge=1)
    tile_size: int | None = Field(default=None, ge=1, description="the shorter side; None: calibrated, or the model's")
    map: bool = Field(default=False, description="also return the score of each tile")

    @property
    def n(self) -> int:
        """How many images this job adds to a batch."""
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
        description="starting noise in grey levels; None: the model's; 0: direct",
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
    """Draw n new images."""

    task: Literal[Task.GENERATE] = Task.GENERATE


class CompleteJob(SamplingJob):
    """Fill in the unknown half of `image` (a canvas of the model's size, whose unknown half is ignored) n times."""

    task: Literal[Task.COMPLETE] = Task.COMPLETE
    image: Pixels
    keep: Keep = "top"


Job: TypeAlias = ScoreJob | ScanJob | GenerateJob | CompleteJob
JOB: TypeAdapter[Job] = TypeAdapter(Annotated[Job, Field(discriminator="task")])
"""Reads and writes any job: `JOB.validate_json(text)`, `JOB.dump_json(job)`."""


def batch_key(job: Job) -> str:
    """What two jobs must share to be computed in one batch: task, model, version, shape and sampler settings.

    Classes, seeds, priorities and pictures differ freely within a batch, but for scans, which have one file.
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
    """A model and the version that did the work."""

    name: str
    version: str


class Timing(_Message):
    """Where the time of a job went."""

    queue_s: float = Field(description="from submission to the start of its last attempt, in seconds")
    compute_s: float | None = Field(default=None, description="in the engine, in seconds; None while unfinished")
    batch_size: int | None = Field(default=None, description="images in the largest batch that it was computed in")


class Ood(_Message):
    """The verdict of a calibrated model. `score` is higher, `p_value` smaller, for an image that belongs less."""

    statistic: str
    score: float
    p_value: float
    threshold: float
    is_ood: bool


class Score(_Message):
    """The likelihood of one image."""

    bpd: float = Field(description="bits per dimension")
    log_likelihood: float = Field(description="nats per image")
    ood: Ood | None = Field(default=None, description="None where it was not wanted or the model is not calibrated")
    statistics: dict[str, float] = Field(default={}, description="those that were asked for, by name")
    flipped_bpd: float | None = Field(default=None, description="bits/dim with every least significant bit flipped")
    map: FloatBytes | None = Field(
        default=None, description="height * width little-endian float32, row-major: bits/dim per pixel"
    )


class Box(_Message):
    """A part of a picture, in pixels."""

    left: int
    top: int
    width: int
    height: int


class Scan(_Message):
    """A picture of this height and width, judged by its tiles. `score` is higher for one that belongs less."""

    height: int
    width: int
    rows: int = Field(description="of tiles, as are the columns")
    columns: int
    score: float = Field(description="that of the worst tile")
    p_value: float | None = Field(description="its rank among whole good pictures; None where tiles are not calibrated")
    threshold: float | None
    is_ood: bool | None
    box: Box = Field(description="the worst tile; all have its size")
    tiles: FloatBytes | None = Field(
        default=None, description="rows * columns little-endian float32, row-major: the score of each tile"
    )


class Pictures(_Message):
    """n pictures that lie in a blob for a while: uint8, n * height * width * 3 bytes, NHWC, row-major."""

    blob: str = Field(description="pass it to JobQueue.blob; past its time to live that returns None")
    n: int
    height: int
    width: int


class ScoreResult(_Message):
    """The answer to a ScoreJob; `results[i]` belongs to `images[i]`, and maps have this height and width."""

    task: Literal[Task.SCORE] = Task.SCORE
    model: ModelRef
    height: int
    width: int
    results: tuple[Score, ...]
    timing: Timing


class ScanResult(_Message):
    """The answer to a ScanJob."""

    task: Literal[Task.SCAN] = Task.SCAN
    model: ModelRef
    scan: Scan
    timing: Timing


class PictureResult(_Message):
    """The answer to a GenerateJob or a CompleteJob; picture i was drawn with `seeds[i]`."""

    task: Literal[Task.GENERATE, Task.COMPLETE]
    model: ModelRef
    pictures: Pictures
    seeds: tuple[int, ...]
    timing: Timing


Result: TypeAlias = ScoreResult | ScanResult | PictureResult
RESULT: TypeAdapter[Result] = TypeAdapter(Annotated[Result, Field(discriminator="task")])
"""Reads and writes any result."""


class Moment(_Message):
    """A moment of a running job. For a job cut into chunks, `done` of its images are already finished."""

    stage: str = Field(description='"score", "tiles", "noisy_sampling" or "refine"')
    step: int
    total: int
    done: int = 0


class Progress(Moment):
    """How far a running job of `n` images is."""

    n: int = 1
    preview: bool = Field(default=False, description="whether there is a preview: see JobQueue.preview")


class Preview(Moment):
    """What pictures of a job looked like at a moment: those of the chunk being drawn, uint8 NHWC in `data`."""

    n: int
    height: int
    width: int
    data: bytes


class JobError(_Message):
    """Why a job did not succeed, in one sentence for the user."""

    field: str | None = Field(
        default=None, description="the parameter at fault, as the user knows it; None: none of them"
    )
    detail: str
    reason: Literal["input", "model", "timeout", "canceled", "expired", "engine", "worker"]


class JobView(_Message):
    """What anyone may see of a job."""

    id: str
    status: JobStatus
    task: Task
    model: ModelRef | None = Field(description="None until the result is there, unless a version was asked for")
    model_name: str
    priority: Priority
    request_id: str
    fingerprint: str = Field(default="", description="what the submitter said to recognise the job by")
    owner: str = Field(default="", description="whom the submitter said that the job belongs to")
    n: int
    created_at: float = Field(description="seconds since 1970, as are the next two")
    started_at: float | None = None
    ended_at: float | None = None
    timing: Timing | None = None
    progress: Progress | None = None
    error: JobError | None = None


class Event(_Message):
    """One entry of a job's progress stream. The entry whose `status` is terminal is the last."""

    id: str = Field(description="resumes the stream: pass it as `after`")
    kind: Literal["status", "progress"]
    status: JobStatus | None = None
    progress: Progress | None = None
    error: JobError | None = None


class Preprocessing(_Message):
    """How pictures are brought to the model's size; quoted by calibrations."""

    name: str
    version: int


class Histogram(_Message):
    """How often a statistic fell between each two neighbouring edges."""

    edges: tuple[float, ...] = Field(description="ascending, one more than there are counts")
    counts: tuple[int, ...]


class Calibration(_Message):
    """What the OOD verdicts of a model rest on."""

    version: str = Field(description="digest of the calibration, 64 hex digits")
    statistic: str = Field(description="the one that gives the verdict unless another is asked for")
    false_positive_rate: float = Field(description="the share of in-distribution images that a verdict calls OOD")
    threshold: float = Field(description="of that statistic: a higher score is OOD")
    thresholds: dict[str, float] = Field(description="of every statistic")
    n_fit: int = Field(description="held-out images that the statistics were fitted to")
    n_rank: int = Field(description="other held-out images, among which an image is ranked")
    smallest_p: float = Field(description="the smallest p-value that there can be, 1 / (n_rank + 1)")
    preprocessing: str = Field(description="the rules by which its images were brought to the model's size")
    histograms: dict[str, Histogram] = Field(description="of some statistics over the images of the ranking")


class TileCalibration(_Message):
    """What the verdicts on pictures that are cut into tiles rest on."""

    version: str = Field(description="digest of the calibration, 64 hex digits")
    height: int = Field(description="of a tile in pixels, as is the width")
    width: int
    false_positive_rate: float = Field(description="the share of good pictures that a verdict calls OOD")
    threshold: float = Field(description="a picture whose worst tile scores higher is OOD")
    n_fit: int = Field(description="good pictures that gave tiles to fit")
    n_rank: int = Field(description="other good pictures, among which a picture is ranked")
    smallest_p: float = Field(description="the smallest p-value that there can be, 1 / (n_rank + 1)")


class Batching(_Message):
    """How a worker samples batches on a CPU so that a seed is the same bytes in each."""

    groups: Literal["fast", "fixed"] = Field(description="in which batches are sampled; fixed ones are slower")
    check: Literal["passed", "failed", "error", "skipped"] = Field(
        description="of the fast groups on the worker's machine. error: it did not run. skipped: NCML_BATCHING is set"
    )
    detail: str = Field(description="the reason, in one sentence")


class ModelDescriptor(_Message):
    """What a worker says about a model that it serves."""

    name: str
    version: str
    height: int
    width: int
    classes: tuple[str, ...] = Field(description="() for a model without classes")
    noise: float = Field(description="grey levels at T: the largest starting noise, and the default")
    keeps: tuple[Keep, ...] = Field(description="halves it completes exactly")
    solver: str = Field(description="the default solver")
    stepped_solver: str = Field(description="the default solver for more than one step")
    solvers: dict[str, int] = Field(description="every solver and its default number of steps; 1: it takes no other")
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
    """What a worker process is doing."""

    LOADING = "loading"
    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"


class WorkerInfo(_Message):
    """A live worker, as published in Redis with a time to live."""

    name: str
    lanes: tuple[Lane, ...]
    state: WorkerState
    device: str
    max_batch: int
    models: tuple[ModelRef, ...]
    started_at: float
    seen_at: float
    pace: dict[Lane, float] = Field(default={}, description="jobs a second of each lane, while it works on them")


class QueueDepth(_Message):
    """How much waits in one queue."""

    lane: Lane
    priority: Priority
    depth: int
    oldest_age_s: float = Field(description="0 for an empty queue")
