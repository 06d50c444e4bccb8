"""The results of a service as objects. Members that another release of the service adds are ignored."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeAlias

import numpy as np
from PIL import Image

from ncml.images import open_image
from ncml.images.tiling import Box, Tiling
from ncml.results import Detection, ImageArray, Scan, Score, Verdict, ViewDetection, ViewVerdict

Document = Mapping[str, Any]
"""A JSON object."""


def _select(cls: type, document: Document) -> dict[str, Any]:
    """Return the members of a document that are fields of a class."""
    return {member.name: document[member.name] for member in fields(cls) if member.name in document}


def read_scores(document: Document, files: Sequence[str | None]) -> list[Score]:
    """Read the scores of the images in files."""
    return [_read_score(result, file) for result, file in zip(document["results"], files, strict=True)]


def _read_score(document: Document, file: str | None) -> Score:
    values, verdict = document.get("map"), document.get("ood")
    return Score(
        document["bpd"],
        document["log_likelihood"],
        map=np.array(values, np.float32) if values else None,
        ood=Verdict(**_select(Verdict, verdict)) if verdict else None,
        statistics=document.get("statistics"),
        flipped_bpd=(document.get("sanity") or {}).get("flipped_bpd"),
        file=file,
        detection=_read_detection(document["detection"]) if document.get("detection") else None,
    )


def _read_detection(document: Document) -> Detection:
    values = _select(Detection, document)
    values |= {name: Box(**document[name]) for name in ("box", "covered")}
    values["views"] = {
        name: ViewDetection(view["score"], view["standardised"], view["part"], Box(**view["box"]))
        for name, view in document["views"].items()
    }
    values["differences"] = tuple(document.get("differences", ()))
    if document.get("map"):
        values["grid"] = np.array(document["map"], np.float32)
    return Detection(**values)


def read_scan(document: Document) -> Scan:
    """Read a scan."""
    values: dict[str, Any] = _select(Scan, document)
    values["box"] = Box(**document["box"])
    values["tile"] = Tiling(document["tile_height"], document["tile_width"], document["tile_overlap"])
    values["views"] = {name: ViewVerdict(**_select(ViewVerdict, view)) for name, view in document["views"].items()}
    if document.get("tiles"):
        values["grid"] = np.array(document["tiles"], np.float32)
    return Scan(**values)


@dataclass(frozen=True)
class Generated:
    """Generated images, or completions of one."""

    images: ImageArray = field(repr=False)
    """uint8 [N, H, W, 3], which a notebook shows as a grid."""
    seeds: tuple[int, ...]
    """The seed of each image."""
    model: str
    version: str

    @classmethod
    def from_document(cls, document: Document) -> Self:
        """Read images."""
        files = [base64.b64decode(image["png"]) for image in document["images"]]
        # Pillow itself would try all its formats, and run Ghostscript for one of them.
        images = np.stack([open_image(file) for file in files])
        seeds = tuple(image["seed"] for image in document["images"])
        return cls(images.view(ImageArray), seeds, document["model"]["name"], document["model"]["version"])

    def _repr_png_(self) -> bytes | None:
        """Return the images as a PNG, as a grid if there are several."""
        return self.images._repr_png_()

    @property
    def pil(self) -> list[Image.Image]:
        """The images as Pillow images."""
        return [Image.fromarray(image) for image in self.images]


@dataclass(frozen=True)
class JobProgress:
    """The progress of a running job."""

    stage: str
    step: int
    total: int
    done: int
    """Finished images."""
    n: int


@dataclass(frozen=True)
class Job:
    """The state of a job."""

    id: str
    status: str
    """queued, running, succeeded, failed, canceled or expired."""
    task: str
    n: int
    position: int | None = None
    """Number of waiting jobs ahead of it in its lane; None unless it is waiting."""
    progress: JobProgress | None = None

    @classmethod
    def from_document(cls, document: Document) -> Self:
        """Read a job."""
        progress = document.get("progress")
        values: dict[str, Any] = _select(cls, document)
        values["progress"] = progress and JobProgress(**_select(JobProgress, progress))
        return cls(**values)

    @property
    def has_ended(self) -> bool:
        """Whether the job is in a final state."""
        return self.status not in ("queued", "running")


Result: TypeAlias = list[Score] | Scan | Generated | dict[str, Any]
"""What the method returns that creates a job of this kind."""


def read_result(document: Document) -> Result:
    """Read the result of a job of any kind; the files of scores are those that the request named."""
    if "results" in document:
        return read_scores(document, [result.get("file") for result in document["results"]])
    if "images" in document:
        return Generated.from_document(document)
    return read_scan(document) if "views" in document else dict(document)
