"""What workers publish through the queue: the models they serve, their own state, and the depth of each queue.

Does not import RQ, Redis, torch or numpy. JSON through pydantic, as in `worker.contract`.
"""

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, Field

from ncml.limits import DETECTOR, Keep, View
from ncml.options import DEFAULT_FIELDS, select_defaults, with_fields
from ncml.sampling.defaults import SamplingLimits
from worker.contract import FrozenModel, Lane, Priority
from worker.job_results import ModelRef


class Preprocessing(FrozenModel):
    """The rules that resize images to the model's size; part of each calibration."""

    name: str
    version: int


class Histogram(FrozenModel):
    """Counts of a statistic between neighbouring edges."""

    edges: tuple[float, ...] = Field(description="ascending, one more than the counts")
    counts: tuple[int, ...]


class Power(FrozenModel):
    """The shares of images that a calibration flags, measured when it was made."""

    images: int = Field(description="held-out images that were judged, unchanged and after each change")
    good: float = Field(description="share of the unchanged images that is flagged")
    processed: dict[str, float] = Field(description="share flagged after barely visible processing, by its name")
    altered: dict[str, float] = Field(description="share flagged after a standard alteration, by its name")
    foreign: dict[str, float] = Field(description="share flagged of foreign images, by their kind")


class Calibration(FrozenModel):
    """A calibration that gives OOD verdicts."""

    version: str = Field(description="digest of the calibration, 64 hex digits")
    statistic: str = Field(description="default statistic of the verdict")
    false_positive_rate: float = Field(description="share of in-distribution images that are flagged as OOD")
    threshold: float = Field(description="threshold of that statistic; a higher score is OOD")
    thresholds: dict[str, float] = Field(description="threshold of every statistic")
    n_fit: int = Field(description="held-out images that the statistics are estimated on")
    n_rank: int = Field(description="other held-out images, among which an image is ranked")
    smallest_p: float = Field(description="smallest possible p-value, 1 / (n_rank + 1)")
    tolerate: tuple[str, ...] = Field(default=(), description="processing that is not flagged: jpeg, resize")
    weakness: str = Field(default="", description='why the calibration is weak, in a clause; "" if it is not')
    power: Power | None = Field(default=None, description="what it flags; null if that was not measured")
    preprocessing: str = Field(description="rules that resized its images to the model's size")
    histograms: dict[str, Histogram] = Field(description="histogram of every statistic over the ranking images")


class TileCalibration(FrozenModel):
    """The calibration that gives verdicts on images in tiles."""

    version: str = Field(description="digest of the calibration, 64 hex digits")
    height: int = Field(description="height of a tile in pixels")
    width: int = Field(description="width of a tile in pixels")
    overlap: float = Field(default=0.5, description="share of a tile that neighbours have in common")
    false_positive_rate: float = Field(description="share of good images that are flagged as OOD")
    threshold: float = Field(description="threshold of the view worst_tile")
    thresholds: dict[View, float] = Field(default={}, description="threshold by view; an image above any is OOD")
    n_fit: int = Field(description="good images whose tiles the statistic is estimated on")
    n_rank: int = Field(description="other good images, among which an image is ranked")
    smallest_p: float = Field(description="smallest possible p-value, up to 3 / (n_rank + 1) with three views")
    weakness: str = Field(default="", description='why the calibration is weak, in a clause; "" if it is not')


class PowerPicture(FrozenModel):
    """An example of an alteration that a detector finds or misses, as part of its sheet of pictures."""

    kind: str = Field(description="the kind of alteration, as in `shares`")
    size: str = Field(description="its size in words, as in `shares`")
    is_found: bool = Field(description="whether this image is flagged")
    left: int = Field(description="position on the sheet, in pixels")
    top: int
    width: int
    height: int


class PowerPictures(FrozenModel):
    """The sheet of pictures that `/models/{name}/pictures` returns, and what each picture on it shows."""

    sha256: str = Field(description="digest of the sheet, 64 hex digits")
    examples: tuple[PowerPicture, ...] = Field(
        description="for each alteration, the first image that is missed and the first that is found, where there is "
        "one; the worst kinds first"
    )


class DetectorPower(FrozenModel):
    """The shares of altered good images that a detector flags, altered in their own pixels when it was made."""

    images: int = Field(description="good images that were altered")
    shares: dict[str, dict[str, float]] = Field(
        description="share flagged by kind of alteration, by size and contrast in words, from the least to the greatest"
    )
    smallest_found: dict[str, str | None] = Field(
        description="the smallest size of which nine of ten are flagged, by kind of alteration; null if there is none"
    )
    foreign: dict[str, float] = Field(description="share flagged of foreign images, by their kind")
    pictures: PowerPictures | None = Field(
        default=None, description="examples of what it finds and misses; null for a detector of an earlier version"
    )


class DetectorCalibration(FrozenModel):
    """A detector, which gives verdicts on images at their own size by several views."""

    version: str = Field(description="digest of the calibration, 64 hex digits")
    false_positive_rate: float = Field(description="share of good images that are flagged as OOD")
    confidence: float | None = Field(
        description="probability with which this very detector flags at most that share; null: it does so on average"
    )
    cutoff: float = Field(
        description="p-value at or below which an image is flagged; with a confidence, below the false-positive rate"
    )
    rate_bound: float = Field(
        description="share of good images that this very detector flags at most, with a confidence of 95%"
    )
    threshold: float = Field(description="score above which an image is flagged")
    smallest_p: float = Field(description="smallest possible p-value, 1 / (ranking_scenes + 1)")
    n_fit: int = Field(description="good images from which the views are estimated")
    n_rank: int = Field(description="other good images, among which an image is ranked")
    estimation_scenes: int = Field(description="scenes of the former: near-duplicates are one scene")
    ranking_scenes: int = Field(description="scenes of the latter; ranks count scenes")
    weakness: str = Field(default="", description='why the detector is weak, in a clause; "" if it is not')
    descriptions: dict[str, str] = Field(
        default={}, description="at which size a view judges and what vanishes there, in a sentence"
    )
    notes: tuple[str, ...] = Field(default=(), description="what should be known about the good images")
    keeps_images: bool = Field(default=False, description="whether it keeps its good images, so that it can be updated")
    power: DetectorPower | None = Field(default=None, description="what it finds; null if that was not measured")


class Batching(FrozenModel):
    """How a worker samples batches on a CPU so that a seed gives the same bytes in every batch."""

    groups: Literal["fast", "fixed"] = Field(description="groups in which batches are sampled; fixed ones are slower")
    check: Literal["passed", "failed", "error", "skipped"] = Field(
        description="check of fast groups on the worker's machine; error: it did not run; skipped: NCML_BATCHING is set"
    )
    detail: str = Field(description="the reason, in one sentence")


@with_fields(DEFAULT_FIELDS)
class ModelDescriptor(FrozenModel):
    """A model that a worker serves."""

    name: str
    version: str
    height: int
    width: int
    classes: tuple[str, ...] = Field(description="empty for a model without classes")
    noise: float = Field(description="largest noise level, at t = T, in grey levels")
    generates: bool = Field(
        default=True,
        description="whether it generates and completes images: like those that its weights were trained on, also if "
        "it was calibrated on others or is a detector of them; false: a base of detectors, only scores",
    )
    keeps: tuple[Keep, ...] = Field(description="known halves from which images are completed exactly")
    stepped_solver: str = Field(description="the default solver for more than one step")
    solvers: dict[str, int] = Field(
        description="every solver and its default number of steps; a solver with 1 accepts no other number"
    )
    preprocessing: Preprocessing
    calibrations: dict[str, Calibration] = Field(
        default={}, description="all calibrations by name, including the default one"
    )
    tiles: TileCalibration | None = None
    detector: DetectorCalibration | None = Field(
        default=None, description="how images are judged at their own size, if the model is a detector"
    )
    batching: Batching | None = Field(
        default=None,
        description="how the latest generating worker samples; null before this is known, and on a GPU, where images "
        "may differ between batches",
    )
    metrics: dict[str, float] = Field(default={})
    card: str = Field(default="", description="markdown")

    @property
    def default_calibration(self) -> Calibration | None:
        """The calibration of requests that name none."""
        return self.calibrations.get("default")

    @property
    def verdicts(self) -> tuple[str, ...]:
        """The names under which requests select a verdict."""
        return (*self.calibrations, *(() if self.detector is None else (DETECTOR,)))

    @property
    def sampling_limits(self) -> SamplingLimits:
        """The ranges and the defaults of sampling options."""
        return SamplingLimits(
            max_noise=self.noise,
            recommended=select_defaults(self),
            stepped_solver=self.stepped_solver,
            solvers=self.solvers,
            has_classes=bool(self.classes),
            generates=self.generates,
        )


class WorkerState(StrEnum):
    """The state of a worker process."""

    LOADING = "loading"
    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"


class WorkerInfo(FrozenModel):
    """A live worker, published in Redis with a time to live."""

    name: str
    lanes: tuple[Lane, ...]
    state: WorkerState
    models: tuple[ModelRef, ...]
    started_at: float
    pace: dict[Lane, float] = Field(default={}, description="jobs per second of each lane, while it is busy")
    has_all_models: bool = Field(default=True, description="false while it has not read all model folders yet")
    faults: dict[str, str] = Field(default={}, description="why model folders cannot be used, by name")


class PublishedWorker(BaseModel):
    """What a worker publishes: its state and the models it serves."""

    info: WorkerInfo
    descriptors: tuple[str, ...] = Field(
        description="digests of the models' descriptors, which have keys of their own: most never change"
    )


class QueueDepth(FrozenModel):
    """The number of jobs that wait in one queue."""

    lane: Lane
    priority: Priority
    depth: int
    oldest_age_s: float = Field(description="0 for an empty queue")
