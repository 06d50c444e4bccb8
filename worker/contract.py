"""What crosses the queue for a job: its specification, and the states that it goes through. JSON through pydantic.

Imports no RQ, Redis, torch or numpy. Images are uint8 HWC RGB bytes (row-major, values 0..255) at the model's size; an
image to be judged at its own size, or scanned in tiles, may stay in its file format. In JSON bytes are base64. Every
model is frozen. A job refuses unknown fields, so that one with parameters of a newer service fails with a clear error
instead of being computed without them. What workers write ignores them, so that a service can read what newer workers
add.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypeAlias

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from ncml.limits import MAX_IMAGES_PER_REQUEST, MAX_JUDGED_IMAGES, MAX_SEED, Keep
from ncml.options import REQUEST_FIELDS, SamplingOptions, ScoreOptions, select_options, with_fields

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Names of new models: only characters that are valid in folder names on every system."""

JOB_ID = r"^[A-Za-z0-9_-]{1,64}$"

REVIEW_ID = r"^[0-9a-f]{16}$"

EVENT_ID = r"^[0-9]{1,19}(-[0-9]{1,19})?$"
"""Ids of stream entries in Valkey."""


class Lane(StrEnum):
    """The kind of work of one engine. Scores are quick, so they have their own lane."""

    SCORE = "score"
    GENERATE = "generate"


class Task(StrEnum):
    """The task of a job."""

    SCORE = "score"
    SCAN = "scan"
    GENERATE = "generate"
    COMPLETE = "complete"
    CALIBRATE = "calibrate"
    UPDATE = "update"

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


def held_name(lane: Lane) -> str:
    """Return the name of the queue of a lane's jobs whose input is not complete; no worker claims them."""
    return f"ncml:{lane}:held"


class FrozenModel(BaseModel):
    """The base of every model that crosses the queue; it ignores unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="strings"
    )

    @classmethod
    def of(cls, source: object, **others: Any) -> Self:
        """Return a model whose fields are `others` and, for the rest, the attributes of an object."""
        names = [name for name in cls.model_fields if name not in others and hasattr(source, name)]
        # Read here, because pydantic would read a mapping, such as the library's `Score`, by its keys.
        attributes = {name: getattr(source, name) for name in names}
        return cls.model_validate(attributes | others, from_attributes=True)


class _StrictModel(FrozenModel):
    """The base of jobs and their parts, which refuse unknown fields."""

    model_config = ConfigDict(extra="forbid")


class Pixels(_StrictModel):
    """One image: `data` holds height * width * 3 bytes, uint8 HWC RGB in row-major order."""

    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    data: bytes

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if len(self.data) != self.height * self.width * 3:
            raise ValueError(
                f"data has {len(self.data)} bytes; {self.height} x {self.width} RGB needs "
                f"{self.height * self.width * 3}"
            )
        return self


class Original(_StrictModel):
    """An image at its own size: its pixels, or its file."""

    pixels: bytes | None = Field(default=None, description="uint8 HWC RGB; None: the image is sent as a file")
    file: bytes | None = Field(default=None, min_length=1, description="the image file, already decoded once")
    height: int = Field(ge=1, description="height of the image in pixels; a larger image is not decoded")
    width: int = Field(ge=1, description="width of the image in pixels")

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if (self.pixels is None) == (self.file is None):
            raise ValueError("an image is sent as pixels or as a file")
        if self.pixels is not None and len(self.pixels) != self.height * self.width * 3:
            raise ValueError(f"pixels has {len(self.pixels)} bytes, not {self.height * self.width * 3}")
        return self


class _Job(_StrictModel):
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


class ScoreJob(ScoreOptions, _Job):
    """Bits per dimension of each image; with `originals` also the verdict of a detector on each."""

    task: Literal[Task.SCORE] = Task.SCORE
    images: tuple[Pixels, ...] = Field(min_length=1, max_length=MAX_IMAGES_PER_REQUEST)
    class_name: str | None = Field(default=None, description="None: the null class")
    statistics: tuple[str, ...] | Literal["all"] = Field(default=(), description="statistics to return, by name")
    originals: tuple[Original, ...] = Field(
        default=(),
        max_length=MAX_JUDGED_IMAGES,
        description="the same images at their own sizes, for the verdict of a detector; () for other verdicts",
    )

    @model_validator(mode="after")
    def _check_images(self) -> Self:
        if len({(image.height, image.width) for image in self.images}) > 1:
            raise ValueError("images differ in size; send images of the model's size")
        if self.originals and len(self.originals) != len(self.images):
            raise ValueError(f"there are {len(self.originals)} originals of {len(self.images)} images")
        return self

    @property
    def n(self) -> int:
        """The number of images that the job adds to a batch."""
        return len(self.images)


class LongJob(_Job):
    """A job that is a batch by itself, and that shorter jobs of its lane interrupt."""

    @property
    def n(self) -> int:
        """The number of images that the job adds to a batch."""
        return 1


class ScanJob(Original, LongJob):
    """Judge an image larger than the model by its overlapping tiles."""

    task: Literal[Task.SCAN] = Task.SCAN
    tile_size: int | None = Field(
        default=None, ge=1, description="shorter side in pixels; None: the calibrated one, or the model's"
    )
    map: bool = Field(default=False, description="also return the score of each tile")


@with_fields(REQUEST_FIELDS)
class SamplingJob(_Job):
    """The fields that generation and completion share. Image i of the job uses `seed + i`."""

    n: int = Field(default=1, ge=1, le=MAX_IMAGES_PER_REQUEST)
    class_name: str | None = Field(default=None, description="None: no class")
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if self.seed + self.n - 1 > MAX_SEED:
            raise ValueError(f"seed + n - 1 exceeds {MAX_SEED}; choose a smaller seed")
        return self

    @property
    def sampling(self) -> SamplingOptions:
        """The options of sampling, which all images of a batch share."""
        return select_options(self)

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


class CalibrateJob(LongJob):
    """Calibrate a copy of the model on good images, which becomes a new model with this name."""

    task: Literal[Task.CALIBRATE] = Task.CALIBRATE
    name: str = Field(pattern=MODEL_NAME, max_length=64, description="name of the new model folder")
    images: int = Field(
        ge=0, description="number of images, each of this height and width; 0: they are not decoded yet"
    )
    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    pixels: bytes = Field(description="uint8 NHWC RGB, row-major")
    false_positive_rate: float = Field(default=0.05, gt=0, lt=1)
    skipped: tuple[str, ...] = Field(default=(), description="why other images were not used, a sentence each")

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if len(self.pixels) != self.images * self.height * self.width * 3:
            raise ValueError(f"pixels has {len(self.pixels)} bytes, which is not {self.images} images")
        return self


class ReviewedImage(_StrictModel):
    """An image that a client has reviewed, which the detector has judged before."""

    name: str = Field(pattern=MODEL_NAME, max_length=100, description="name in messages, and of the file")
    scene_name: str = Field(default="", description="name that the client gave the file, which can state its scene")
    file: bytes = Field(min_length=1)


class UpdateJob(LongJob):
    """Make a new version of the detector, under this name, from the images that it keeps and from reviewed ones."""

    task: Literal[Task.UPDATE] = Task.UPDATE
    name: str = Field(pattern=MODEL_NAME, max_length=64, description="name of the new model folder")
    reviewed: tuple[ReviewedImage, ...] = Field(default=(), description="images that it flagged although they are good")
    defective: tuple[ReviewedImage, ...] = Field(default=(), description="images that should be flagged")


Job: TypeAlias = ScoreJob | ScanJob | GenerateJob | CompleteJob | CalibrateJob | UpdateJob
JOB: TypeAdapter[Job] = TypeAdapter(Annotated[Job, Field(discriminator="task")])
"""Reads and writes any job: `JOB.validate_json(text)`, `JOB.dump_json(job)`."""


def is_alone(job: Job) -> bool:
    """Return whether a job is a batch by itself: large images take memory, and fill a batch without others."""
    return isinstance(job, LongJob) or (isinstance(job, ScoreJob) and bool(job.originals))


INDIVIDUAL_FIELDS = frozenset(
    {"priority", "request_id", "timeout_s", "start_within_s", "class_name", "images", "image", "pixels", "file"}
    | {"originals", "n", "seed", "skipped", "reviewed", "defective"}
)
"""Fields in which the jobs of a batch may differ: those of single images, and those that do not change a result."""


def batch_key(job: Job) -> str:
    """Return what jobs of one batch have in common, as JSON: every field that is not individual, and the images' shape.

    A batch is computed with the options of its first job, so a new field belongs to the key unless it is listed in
    `INDIVIDUAL_FIELDS`. Jobs that are computed alone (`is_alone`) share no batch.
    """
    fields = {name: value for name, value in job if name not in INDIVIDUAL_FIELDS}
    match job:
        case ScoreJob():
            fields["shape"] = job.images[0].height, job.images[0].width
            if job.statistics != "all":
                fields["statistics"] = sorted(set(job.statistics))
        case CompleteJob():
            fields["shape"] = job.image.height, job.image.width
        case _:
            pass
    return pydantic_core.to_json(fields).decode()
