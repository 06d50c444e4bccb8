"""The options of the clients' methods that create jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

from ncml.client.documents import JobProgress
from ncml.limits import Keep
from ncml.options import SamplingOptions

OnJobProgress = Callable[[JobProgress], object]


class JobOptions(TypedDict, total=False):
    """Options of every job."""

    model: str | None
    priority: Literal["high", "normal", "low"]
    idempotency_key: str
    """By default a new one for each call, so that retries create no second job."""
    on_progress: OnJobProgress
    webhook: str | None
    """Address to which the service sends the end of each job."""


class ScoreOptions(JobOptions, total=False):
    """Options of `score`; those of `POST /score` without tiles."""

    class_: str | None
    noise: float
    map: bool
    ood: bool
    calibration: str | None
    statistic: str | None
    statistics: str | Sequence[str] | None
    sanity: bool


class ScanOptions(JobOptions, total=False):
    """Options of `scan`; those of `POST /score` with tiles."""

    tile_size: int | None
    map: bool


class GenerateOptions(JobOptions, SamplingOptions, total=False):
    """Options of `generate`; those of `POST /generate`."""

    class_: str | None
    seed: int | None


class CompleteOptions(GenerateOptions, total=False):
    """Options of `complete`; those of `POST /complete`."""

    keep: Keep | None


class CalibrateOptions(JobOptions, total=False):
    """Options of `calibrate`; those of `POST /calibrate`."""

    false_positive_rate: float


class UpdateOptions(JobOptions, total=False):
    """Options of `update`; those of `POST /update`."""
