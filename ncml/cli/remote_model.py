"""A model of a service, with the methods of `ncml.Model` that `ncml score` calls. Does not import torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ncml.errors import InputError, NcmlError, ServiceError
from ncml.images import PREPROCESSING, open_image
from ncml.images.reading import Image
from ncml.ood.calibrations import Calibrations
from ncml.ood.detector_calibration import NAME, STATISTIC
from ncml.options import leaves_verdict_to_detector
from ncml.paths import Location, escape_controls, printable
from ncml.progress import OnProgress, Progress, ignore_progress

if TYPE_CHECKING:
    from ncml.client import Client, JobProgress
    from ncml.results import Scan, Score

REQUESTS = 32
"""Requests in progress at once: enough that a fleet's workers always find jobs waiting."""
PATIENCE_S = 3600.0
"""Longest wait for a place in the queue."""

TIMEOUT_S = 30.0
"""Longest wait for a response."""


@dataclass(frozen=True)
class RemoteCalibration:
    """A calibration of images or tiles, or a detector, as the service describes it."""

    name: str
    version: str
    statistic: str
    false_positive_rate: float
    cutoff: float
    """The p-value at or below which an image is flagged: the rate, or less for a detector made with a confidence."""
    confidence: float | None
    threshold: float
    """The score of the statistic above which an image is flagged."""
    n_rank: int
    smallest_p: float
    weakness: str
    statistics: tuple[str, ...]

    @classmethod
    def from_document(cls, name: str, document: dict[str, Any]) -> "RemoteCalibration":
        """Read a calibration from the document of its model."""
        return cls(
            name=name,
            version=document["version"],
            statistic=STATISTIC if name == NAME else document.get("statistic", ""),
            false_positive_rate=document["false_positive_rate"],
            cutoff=document.get("cutoff", document["false_positive_rate"]),
            confidence=document.get("confidence"),
            threshold=document["threshold"],
            n_rank=document["n_rank"],
            smallest_p=document["smallest_p"],
            weakness=escape_controls(document.get("weakness", "")),
            statistics=tuple(document.get("thresholds", {})),
        )

    @property
    def is_weak(self) -> bool:
        """Whether the service reports that it is weak."""
        return bool(self.weakness)


class RemoteModel:
    """One version of a service's model: a run does not mix versions if the service replaces the model."""

    def __init__(self, client: "Client", document: dict[str, Any]) -> None:
        self._client, self.url = client, client.url
        self.name, self.version = escape_controls(str(document["name"])), str(document["version"])
        self.height, self.width = int(document["height"]), int(document["width"])
        calibrations = document.get("calibrations") or {}
        self.calibrations = Calibrations(
            {name: RemoteCalibration.from_document(name, entry) for name, entry in calibrations.items()}, {}
        )
        self.tiles, self.detector = (
            RemoteCalibration.from_document(name, document[name]) if document.get(name) else None
            for name in ("tiles", NAME)
        )
        self.missing_reason = self.calibrations.missing_reason
        if not calibrations:
            reason = "is not calibrated" if self.detector is None else "has no calibration besides its detector"
            self.missing_reason = f"the service's model {self.name} {reason}: run ncml calibrate where it is served."

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def _reference(self) -> str:
        return f"{self.name}@{self.version}"

    def judges(self, calibration: str | None, statistic: str | None) -> bool:
        """Return whether a detector gives the verdict of a call with these arguments, at images' own sizes."""
        return leaves_verdict_to_detector(calibration, statistic) and self.detector is not None

    def score(
        self, images: Sequence[Image], *, classes: str | None, statistics: Sequence[str], **options: Any
    ) -> "list[Score]":
        """Score images of the model's size, or any for a detector; the arguments are those of `Model.score`."""
        uses_detector = self.judges(options["calibration"], options["statistic"])
        if not options["ood"] or uses_detector or self.calibrations.select(options["calibration"]) is None:
            statistics = ()
        statistic_names = ",".join(statistics) or None
        return self._client.score(
            images, model=self._reference, class_=classes, statistics=statistic_names, priority="low", **options
        )

    def scan(self, path: Location, *, tile_size: int | None, callback: OnProgress = ignore_progress) -> "Scan":
        """Judge an image by its tiles; its file is sent as it is, after it has been checked to be an image."""
        open_image(path, field=printable(path))

        def report(progress: "JobProgress") -> None:
            callback(Progress("tiles", progress.step, progress.total))

        options: dict[str, Any] = {} if callback is ignore_progress else {"on_progress": report}
        return self._client.scan(path, model=self._reference, tile_size=tile_size, map=True, priority="low", **options)

    def statistic_names(self, calibration: RemoteCalibration | None, statistics: str) -> tuple[str, ...]:
        """Return the names in a comma-separated list; "all": every one of the calibration."""
        if calibration is None:
            raise InputError("statistics", f"--statistics needs a calibration: {self.missing_reason}")
        available = calibration.statistics
        names = available if statistics == "all" else tuple(dict.fromkeys(statistics.split(",")))
        for name in names:
            if name not in available:
                raise InputError("statistics", f"there is no statistic {name!r}: choose from {', '.join(available)}.")
        return names


def check_options(server: str, api_key: str, device: str) -> None:
    """Raise `InputError` for options that need a service, or that cannot be combined with one."""
    if server and device != "cpu":
        raise InputError("device", "--device cannot be combined with --server, whose workers choose theirs: omit it.")
    if api_key and not server:
        raise InputError("api_key", "--api-key requires --server: add --server, or omit --api-key.")


def connect(url: str, api_key: str, name: str) -> RemoteModel:
    """Return a model of a service, "" for its default; raise `ServiceError` or `InputError` if it cannot be used."""
    from ncml.client import Client

    client = Client(url, api_key=api_key or os.environ.get("NCML_API_KEY"), timeout_s=TIMEOUT_S, patience_s=PATIENCE_S)
    try:
        document = client.model(name) if name else _default_model(client)
        if document["preprocessing"] != PREPROCESSING:
            raise ServiceError(
                f"{client.url} preprocesses images by other rules: use the release of ncml that it runs."
            )
        return RemoteModel(client, document)
    except NcmlError:
        client.close()
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        client.close()
        detail = f"{client.url} does not describe models as an ncml service does: check the address."
        raise ServiceError(detail) from error


def _default_model(client: "Client") -> dict[str, Any]:
    models = client.models()
    if not models:
        raise ServiceError(f"{client.url} serves no model at the moment: start a worker, or try again later.")
    return next((model for model in models if model["default"]), models[0])
