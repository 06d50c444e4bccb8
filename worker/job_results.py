"""What comes back for a job through the queue: its result, its state and progress, and its events.

JSON through pydantic, as in `worker.contract`, which has the jobs.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, TypeAdapter

from ncml.limits import View
from worker.contract import FrozenModel, JobStatus, Priority, Task


def _float_bytes(value: Any) -> Any:
    """Convert a numpy array to its little-endian float32 bytes, without importing numpy."""
    return value.astype("<f4").tobytes() if hasattr(value, "astype") else value


FloatBytes = Annotated[bytes, BeforeValidator(_float_bytes)]


class ModelRef(FrozenModel):
    """A model and its version."""

    name: str
    version: str


class Timing(FrozenModel):
    """How long a job waited and ran."""

    queue_s: float = Field(description="from submission to the start of its last attempt, in seconds")
    compute_s: float | None = Field(default=None, description="in the engine, in seconds; null until the job has ended")
    batch_size: int | None = Field(default=None, description="images in the largest batch that the job was part of")


class Ood(FrozenModel):
    """The verdict of a calibrated model. A higher score and a smaller p-value mean more out-of-distribution."""

    statistic: str = Field(description="the statistic that decides; of a detector, the view with the largest part")
    score: float = Field(description="OOD score, the value of this statistic")
    p_value: float = Field(
        description="share of the ranking images (of a detector: scenes) that score at least as high, image included"
    )
    threshold: float = Field(description="an image that scores above it is out-of-distribution")
    is_ood: bool = Field(description="whether the OOD score is above the threshold")
    calibration: str = Field(default="default", description="name of the calibration")
    calibration_version: str = Field(description="version of the calibration, as in /models")
    is_weak: bool = Field(
        default=False, description="whether the calibration is weak; its `weakness` in /models explains why"
    )


class Box(FrozenModel):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


class ViewDetection(FrozenModel):
    """An image in one view of a detector. A higher score means more out-of-distribution."""

    score: float = Field(description="score of the view, in its own unit")
    standardised: float = Field(description="the score in deviations of good images above their median")
    part: float = Field(
        description="the part of the view in the score of the image, at least 0: all parts add up to that score"
    )
    box: Box = Field(description="the part of the image that the view points at")


class DetectionValues(FrozenModel):
    """An image, judged by a detector at its own size by several views."""

    width: int = Field(description="Width of the image in pixels.")
    height: int
    view: str = Field(description="The view with the largest part in the score. Box and map belong to this view.")
    score: float = Field(description="Sum of the parts of all views: higher means more out-of-distribution.")
    p_value: float = Field(
        description="The rank of this score among good images, or scenes of them: small for an image unlike them."
    )
    threshold: float = Field(description="An image that scores above it is out-of-distribution.")
    is_ood: bool
    is_weak: bool = Field(description="Whether the detector is weak; its `weakness` in /models explains why.")
    box: Box = Field(description="The part of the image that the view points at.")
    views: dict[str, ViewDetection] = Field(description="The image in every view.")
    at_least_as_unusual: int = Field(description="Number of the ranking images that score at least as high.")
    ranking_images: int = Field(description="Number of good images among which the image is ranked.")
    calibration_version: str = Field(description="Version of the detector, as in /models.")
    covered: Box = Field(description="The part of the image that the map covers.")
    differences: tuple[str, ...] = Field(
        default=(),
        description="What distinguishes the image from all good ones at first sight, a clause each: its size, that "
        "it is grey, that the part has another size, or that it was not found.",
    )


class Detection(DetectionValues):
    """An image judged by a detector, with its map."""

    rows: int = Field(description="rows of the map; 0 if the view has none")
    columns: int
    grid: FloatBytes | None = Field(
        default=None,
        description="rows * columns little-endian float32, row-major: local scores, evenly spaced over `covered`; None "
        "if not requested",
    )
    backdrop: bytes | None = Field(
        default=None, description="a JPEG file of the image in grey, reduced, on which a map is drawn"
    )


class Score(FrozenModel):
    """The likelihood of one image."""

    bpd: float = Field(description="bits per dimension")
    log_likelihood: float = Field(description="nats per image")
    ood: Ood | None = Field(default=None, description="None if not requested or the model is not calibrated")
    statistics: dict[str, float] = Field(default={}, description="the requested statistics, by name")
    flipped_bpd: float | None = Field(default=None, description="bits/dim with every least significant bit flipped")
    map: FloatBytes | None = Field(
        default=None, description="height * width little-endian float32, row-major: bits/dim per pixel"
    )
    detection: Detection | None = Field(default=None, description="None unless a detector gives the verdict")


class ViewVerdict(FrozenModel):
    """An image in one view of its tiles. A higher score and a smaller p-value mean more out-of-distribution."""

    score: float = Field(description="OOD score in this view")
    p_value: float = Field(description="rank among whole good images in this view alone")
    threshold: float = Field(description="an image that scores above it is out-of-distribution")


class ScanValues(FrozenModel):
    """An image, judged by its tiles. If tiles are not calibrated, the members of the verdict are null."""

    width: int = Field(description="Width of the image in pixels.")
    height: int
    tile_width: int = Field(description="Width of each tile in pixels.")
    tile_height: int
    tile_overlap: float = Field(default=0.5, description="Share of a tile that neighbours have in common, or more.")
    rows: int = Field(description="Rows of tiles.")
    columns: int
    view: View = Field(
        description="The view in which the image differs most from good ones: `worst_tile` (a region), `peak` (a small "
        "defect) or `mean` (the whole image). Score, threshold, box and tiles belong to this view."
    )
    score: float = Field(description="OOD score: higher means more out-of-distribution.")
    p_value: float | None = Field(
        description="The image's rank among whole good images, over all views: small for an image unlike them."
    )
    threshold: float | None = Field(description="An image that scores above it in this view is out-of-distribution.")
    is_ood: bool | None = Field(description="Whether the image is above the threshold in any view.")
    box: Box = Field(description="The part of the image that the view points at; for `mean`, all of it.")
    views: dict[View, ViewVerdict] = Field(
        default={}, description="The image in every view, with its rank in that view alone."
    )
    is_weak: bool | None = Field(
        default=None,
        description="Whether the calibration of tiles is weak, so that its false-positive rate is not reliable.",
    )
    calibration_version: str | None = Field(default=None, description="Version of the calibration of tiles.")


class Scan(ScanValues):
    """An image judged by its tiles, with their scores."""

    tiles: FloatBytes | None = Field(
        default=None, description="rows * columns little-endian float32, row-major: the OOD score of each tile"
    )


class StoredImages(FrozenModel):
    """n images, stored as a blob for a limited time: uint8, n * height * width * 3 bytes, NHWC, row-major."""

    blob: str = Field(description="key for JobQueue.blob, which returns None after the time to live")
    n: int
    height: int
    width: int


class ScoreResult(FrozenModel):
    """The result of a ScoreJob; `results[i]` belongs to `images[i]`, and maps have this height and width."""

    task: Literal[Task.SCORE] = Task.SCORE
    model: ModelRef
    height: int
    width: int
    results: tuple[Score, ...]
    timing: Timing


class ScanResult(FrozenModel):
    """The result of a ScanJob."""

    task: Literal[Task.SCAN] = Task.SCAN
    model: ModelRef
    scan: Scan
    timing: Timing


class ImagesResult(FrozenModel):
    """The result of a GenerateJob or a CompleteJob; image i used `seeds[i]`."""

    task: Literal[Task.GENERATE, Task.COMPLETE]
    model: ModelRef
    images: StoredImages
    seeds: tuple[int, ...]
    timing: Timing


class ReviewCounts(FrozenModel):
    """What became of the reviewed images in a new version of a detector."""

    good: int = Field(description="flagged images that are good and became estimation images, also in earlier updates")
    still_flagged: int = Field(description="how many would be flagged if only images of other scenes had joined")
    defective: int = Field(description="defective images, also of earlier updates")
    found: int = Field(description="how many of them it flags, each by what was learned without it")
    added: int = Field(default=0, description="defective images that the former version had not")
    found_added: int = Field(default=0, description="how many of these it flags, each by what was learned without it")
    found_before: int = Field(description="how many of these the former version flags")


class Calibrated(FrozenModel):
    """The calibration of a new model, and a summary of what it can and cannot detect."""

    n_fit: int = Field(description="images that the statistics are estimated on")
    n_rank: int = Field(description="other images, among which an image is ranked")
    smallest_p: float
    weakness: str = Field(default="", description='why it is weak, in a clause; "" if it is not')
    summary: str = Field(description="what it can and cannot detect, in a sentence")
    reviews: ReviewCounts | None = Field(default=None, description="of an update; null otherwise")


class CalibrateResult(FrozenModel):
    """The result of a CalibrateJob or an UpdateJob; `model` is the new one."""

    task: Literal[Task.CALIBRATE, Task.UPDATE] = Task.CALIBRATE
    model: ModelRef
    calibration: Calibrated
    skipped: tuple[str, ...]
    timing: Timing


Result: TypeAlias = ScoreResult | ScanResult | ImagesResult | CalibrateResult
RESULT: TypeAdapter[Result] = TypeAdapter(Annotated[Result, Field(discriminator="task")])
"""Reads and writes any result."""


class Moment(FrozenModel):
    """A moment of a running job. If the job is computed in chunks, `done` counts its finished images."""

    stage: str = Field(description='"score", "judge", "tiles", "noisy_sampling", "refine", "fit", "rank" or "power"')
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


class JobError(FrozenModel):
    """Why a job did not succeed; `detail` is one sentence for the user."""

    field: str | None = Field(default=None, description="name of the invalid parameter; null: none is invalid")
    detail: str
    reason: Literal["input", "model", "timeout", "canceled", "expired", "engine", "worker"]

    @property
    def for_operators(self) -> dict[str, str]:
        """What logs and traces contain: of input that is refused, not the detail, which may name a client's files."""
        if self.reason == "input":
            return {"reason": self.reason} | ({"field": self.field} if self.field else {})
        return {"reason": self.reason, "detail": self.detail}


class WorkerFault(Exception):
    """The worker is not set up for a job. Its text is for the client: a sentence without paths."""


CANCELED = JobError(reason="canceled", detail="the job was canceled on request")
DAMAGED = JobError(reason="worker", detail="the record of the job is damaged")
EXPIRED = JobError(reason="expired", detail="no worker started the job in time; try again later")


@dataclass(frozen=True)
class JobEnding:
    """The end of a job: its status, and its result, with the images to store as `blob`, or its error."""

    status: JobStatus
    error: JobError | None = None
    result: Result | None = None
    blob: bytes = b""
    timing: Timing | None = None


class Webhook(FrozenModel):
    """The delivery of the end of a job to the webhook that its request named."""

    id: str = Field(description="The `webhook-id` of every attempt.")
    state: Literal["waiting", "delivered", "failed"] = Field(
        description="`waiting` until the receiver has accepted it; `failed` once it is not tried any more."
    )
    attempts: int = Field(description="Number of attempts so far.")


class JobView(FrozenModel):
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
    files: tuple[str, ...] = Field(default=(), description="names of the images' files, given by the submitter")
    digests: tuple[str, ...] = Field(
        default=(), description="SHA-256 of each file that a detector judges, given by the submitter"
    )
    format: str = Field(default="", description="format of the result that the request named, given by the submitter")
    n: int
    created_at: float = Field(description="seconds since 1970, as are the next three fields")
    started_at: float | None = None
    start_by: float | None = Field(default=None, description="a waiting job that has not started by then expires")
    ended_at: float | None = None
    timing: Timing | None = None
    progress: Progress | None = None
    error: JobError | None = None
    webhook: Webhook | None = Field(default=None, description="None if the request named none")
    is_canceling: bool = Field(default=False, description="whether it was canceled, and its worker has not stopped yet")


class Event(FrozenModel):
    """One entry of a job's event stream. The last entry has a terminal `status`."""

    id: str = Field(description="pass it as `after` to resume the stream")
    kind: Literal["status", "progress"]
    status: JobStatus | None = None
    progress: Progress | None = None
    error: JobError | None = None
