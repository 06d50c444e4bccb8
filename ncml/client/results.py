"""What a service answers, as objects. Members that a service of another release adds are ignored."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncml.images.tiling import Box, TileSize, blend

Document = Mapping[str, Any]
"""A JSON object."""


def _select(cls: type, document: Document) -> dict[str, Any]:
    """Return the members of a document that are fields of a class."""
    return {member.name: document[member.name] for member in fields(cls) if member.name in document}


@dataclass(frozen=True)
class Verdict:
    """The out-of-distribution verdict: a higher score and a smaller p-value mean more out-of-distribution."""

    statistic: str
    score: float
    p_value: float
    threshold: float
    is_ood: bool
    calibration: str = "default"
    is_weak: bool = False

    @classmethod
    def of(cls, document: Document) -> Self:
        """Read a verdict."""
        return cls(**_select(cls, document))


@dataclass(frozen=True)
class Score:
    """The likelihood of one image."""

    bpd: float
    """Bits per dimension; lower means more likely."""
    log_likelihood: float
    """Nats of the whole image, at the model's size."""
    ood: Verdict | None = None
    statistics: dict[str, float] = field(default_factory=dict)
    flipped_bpd: float | None = None
    """With `sanity`: bits per dimension with every lowest bit flipped."""
    map: NDArray[np.float32] | None = None
    """With `map`: bits per dimension of each pixel, [H, W]."""
    file: str | None = None
    """The name of its file; None if it was sent without one."""

    @classmethod
    def of(cls, document: Document) -> Self:
        """Read a score."""
        values: dict[str, Any] = _select(cls, document) | {"statistics": document.get("statistics") or {}}
        if values.get("ood"):
            values["ood"] = Verdict.of(document["ood"])
        if values.get("map"):
            values["map"] = np.array(document["map"], np.float32)
        if sanity := document.get("sanity"):
            values["flipped_bpd"] = sanity["flipped_bpd"]
        return cls(**values)


@dataclass(frozen=True)
class ViewVerdict:
    """An image in one view of its tiles."""

    score: float
    p_value: float
    threshold: float


@dataclass(frozen=True)
class Scan:
    """A large image, judged by its tiles. Score, threshold, box and grid are those of one view."""

    view: str
    """The view in which the image lies furthest beyond good ones: worst_tile, peak or mean."""
    score: float
    p_value: float | None
    """Of all views together; None if tiles are not calibrated, as are the next two."""
    threshold: float | None
    is_ood: bool | None
    box: Box
    """The part that the view points at."""
    tile: TileSize
    height: int
    """Of the image."""
    width: int
    rows: int
    """Of tiles."""
    columns: int
    views: dict[str, ViewVerdict]
    """The image in each view; {} if tiles are not calibrated."""
    is_weak: bool | None
    grid: NDArray[np.float32] | None = None
    """With `map`: the score of each tile, [rows, columns]."""

    @classmethod
    def of(cls, document: Document) -> Self:
        """Read a scan."""
        values: dict[str, Any] = _select(cls, document)
        values["box"] = Box(**document["box"])
        values["tile"] = TileSize(document["tile_height"], document["tile_width"])
        values["views"] = {name: ViewVerdict(**_select(ViewVerdict, view)) for name, view in document["views"].items()}
        if document.get("tiles"):
            values["grid"] = np.array(document["tiles"], np.float32)
        return cls(**values)

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.rows * self.columns

    @cached_property
    def map(self) -> NDArray[np.float32]:
        """The tiles' scores blended where they overlap, [height, width]; needs the option `map`."""
        if self.grid is None:
            raise ValueError("this scan has no map: scan the image with map=True")
        return blend(self.grid, self.tile, self.height, self.width)


@dataclass(frozen=True)
class Generated:
    """Generated images, or completions of one."""

    images: NDArray[np.uint8]
    """[N, H, W, 3]"""
    seeds: tuple[int, ...]
    """The seed of each image."""
    model: str
    version: str

    @classmethod
    def of(cls, document: Document) -> Self:
        """Read images."""
        files = [base64.b64decode(image["png"]) for image in document["images"]]
        images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
        seeds = tuple(image["seed"] for image in document["images"])
        return cls(images, seeds, document["model"]["name"], document["model"]["version"])

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
    """Jobs before it in its lane."""
    progress: JobProgress | None = None

    @classmethod
    def of(cls, document: Document) -> Self:
        """Read a job."""
        progress = document.get("progress")
        values: dict[str, Any] = _select(cls, document)
        values["progress"] = progress and JobProgress(**_select(JobProgress, progress))
        return cls(**values)

    @property
    def has_ended(self) -> bool:
        """Whether the job is in a final state."""
        return self.status not in ("queued", "running")
