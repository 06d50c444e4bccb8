"""Responses: jobs and their results as JSON documents, and images as PNG, zip or npz."""

import base64
import io
import zipfile
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from fastapi import Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ncml.images import grid, heat, to_png
from ncml.images.tiling import TileSize, blend
from service.http import examples
from service.http.negotiation import JSON, NPZ, PNG, ZIP
from service.http.problems import FieldError, Problem, as_sentence
from worker.contract import (
    Box,
    JobError,
    JobStatus,
    JobView,
    ModelRef,
    Ood,
    PictureResult,
    Priority,
    Progress,
    ScanResult,
    ScoreResult,
    Task,
    Timing,
)
from worker.contract import Score as ImageScore

SCORE_OFFERS = (JSON, NPZ, PNG)
PICTURE_OFFERS = (PNG, JSON, ZIP, NPZ)


class Answer(BaseModel):
    """The first fields of every document about a job."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(description="The id of the job, for /jobs/{id}.")
    status: JobStatus


class Sanity(BaseModel):
    """A comparison of the image with itself after flipping every least significant bit."""

    flipped_bpd: float = Field(description="Bits per dimension of the image with flipped bits.")
    delta_bpd: float = Field(
        description="`flipped_bpd` minus `bpd`: positive if the likelihood of a natural image is sound."
    )


class Score(BaseModel):
    """The likelihood of one image. Members that were not requested are omitted."""

    bpd: float = Field(description="Bits per dimension: lower means more likely.")
    log_likelihood: float = Field(description="Nats of the whole image, at the model's size.")
    ood: Ood | None = Field(
        description="The out-of-distribution verdict; null with ood=0, and for a model that is not calibrated."
    )
    statistics: dict[str, float] | None = Field(
        default=None, description="OOD scores by statistic; higher means more out-of-distribution."
    )
    sanity: Sanity | None = None
    map: list[list[float]] | None = Field(default=None, description="Rows of bits per dimension, one number per pixel.")


class ScoreAnswer(Answer):
    """The likelihoods of the images, in the order in which they were sent."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"example": examples.SCORE})

    model: ModelRef
    results: list[Score]
    timing: Timing


class ScanAnswer(Answer):
    """The verdict on an image by its worst tile. If tiles are not calibrated, the verdict's members are null."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"example": examples.SCAN})

    model: ModelRef
    width: int = Field(description="Width of the image in pixels.")
    height: int
    tile_width: int = Field(description="Width of each tile in pixels; neighbours overlap by half.")
    tile_height: int
    rows: int = Field(description="Rows of tiles.")
    columns: int
    score: float = Field(description="OOD score of the worst tile: higher means more out-of-distribution.")
    p_value: float | None = Field(description="The image's rank among whole good images: small for one unlike them.")
    threshold: float | None = Field(description="An image that scores above it is out-of-distribution.")
    is_ood: bool | None
    box: Box = Field(description="The worst tile.")
    tiles: list[list[float]] | None = Field(default=None, description="With map=1: rows of OOD scores, one per tile.")
    timing: Timing


class Picture(BaseModel):
    """One generated image."""

    seed: int
    png: str = Field(description="The PNG file in base64.")


class PictureAnswer(Answer):
    """The images, in the order of their seeds."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"example": examples.IMAGES})

    model: ModelRef
    images: list[Picture]
    timing: Timing


class ProgressAnswer(BaseModel):
    """The progress of a running job."""

    stage: str = Field(description='"score", "tiles", "noisy_sampling" or "refine".')
    step: int
    total: int
    done: int = Field(description="Finished images of this job, if it is split into several batches.")
    n: int
    preview: str | None = Field(description="Where to get the current images.")


class Links(BaseModel):
    """Related resources."""

    self: str
    result: str
    events: str
    cancel: str


class JobAnswer(Answer):
    """The state of a job."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"example": examples.JOB})

    task: Task
    model: ModelRef | None = Field(
        description="Null until the version is known: with the result, unless the request named it."
    )
    n: int = Field(description="Images of this job.")
    priority: Priority
    position: int | None = Field(description="Jobs of its lane ahead of it; null unless it is waiting.")
    request_id: str = Field(description="The id of the request that created it, as in the logs.")
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    progress: ProgressAnswer | None
    error: JobError | None
    timing: Timing | None
    links: Links


ACCEPTED: dict[str, Any] = {
    "model": JobAnswer,
    "description": "The job did not finish within the wait; see Location.",
    "headers": {
        "Location": {"description": "The address of the job.", "schema": {"type": "string"}},
        "Retry-After": {"description": "Seconds to wait before the next attempt.", "schema": {"type": "integer"}},
    },
}
"""The 202 in the OpenAPI document."""


def progress_answer(job_id: str, progress: Progress) -> ProgressAnswer:
    """Return the document of a job's progress."""
    return ProgressAnswer(
        **progress.model_dump(exclude={"preview"}),
        preview=f"/jobs/{job_id}/preview" if progress.preview else None,
    )


def job_answer(view: JobView, position: int | None) -> JobAnswer:
    """Return the document of a job and its position in the queue."""
    base, progress = f"/jobs/{view.id}", view.progress
    if progress and view.status is JobStatus.SUCCEEDED:  # the last progress was reported before the end
        progress = progress.model_copy(update={"step": progress.total, "done": progress.n})
    return JobAnswer(
        id=view.id,
        status=view.status,
        task=view.task,
        model=view.model,
        n=view.n,
        priority=view.priority,
        position=position,
        request_id=view.request_id,
        created_at=datetime.fromtimestamp(view.created_at, UTC),
        started_at=None if view.started_at is None else datetime.fromtimestamp(view.started_at, UTC),
        ended_at=None if view.ended_at is None else datetime.fromtimestamp(view.ended_at, UTC),
        progress=progress_answer(view.id, progress) if progress else None,
        error=view.error,
        timing=view.timing,
        links=Links(self=base, result=f"{base}/result", events=f"{base}/events", cancel=f"{base}/cancel"),
    )


def job_response(view: JobView, position: int | None, retry_after_s: int, status: Literal[200, 202]) -> Response:
    """Return the document of a job; 202 adds its address and when to look again."""
    headers = {"X-Job-Id": view.id}
    if status == 202:
        headers |= {"Location": f"/jobs/{view.id}", "Retry-After": str(retry_after_s)}
    return Response(job_answer(view, position).model_dump_json(), status, headers, JSON)


def failure(view: JobView) -> Problem:
    """Return the problem of a job that ended without a result."""
    error = view.error or JobError(field=None, detail=f"the job {view.status}", reason="worker")
    status = {
        "input": 422, "model": 500, "timeout": 504, "canceled": 410, "expired": 504, "engine": 500, "worker": 500,
    }[error.reason]  # fmt: skip
    detail = as_sentence(error.detail, error.field)
    errors = [FieldError(field=error.field, detail=detail)] if error.field else []
    return Problem(status, detail, kind=f"job-{error.reason}", errors=errors, headers={"X-Job-Id": view.id})


def score_response(view: JobView, result: ScoreResult, media: str) -> Response:
    """Return scores as `media`: JSON, arrays, or the maps as one PNG, in which several form a grid."""
    headers = {"X-Job-Id": view.id}
    shape = result.height, result.width
    maps = [None if score.map is None else np.frombuffer(score.map, "<f4").reshape(shape) for score in result.results]
    if media == NPZ:
        return Response(_npz(_score_arrays(result.results, maps)), 200, headers, NPZ)
    if media == PNG:
        drawn = [heat.render_pixel_map(one) for one in maps if one is not None]
        if not drawn:
            raise _no_map(view)
        return Response(to_png(grid(drawn)), 200, headers, PNG)
    scores = [
        Score(
            bpd=score.bpd,
            log_likelihood=score.log_likelihood,
            ood=score.ood,
            statistics=score.statistics or None,
            sanity=None
            if score.flipped_bpd is None
            else Sanity(flipped_bpd=score.flipped_bpd, delta_bpd=score.flipped_bpd - score.bpd),
            map=None if one is None else _rounded(one),
        )
        for score, one in zip(result.results, maps, strict=True)
    ]
    answer = ScoreAnswer(id=view.id, status=view.status, model=result.model, results=scores, timing=result.timing)
    asked = {name for name in ("statistics", "sanity", "map") if any(getattr(score, name) for score in scores)}
    left_out = {"results": {"__all__": {"statistics", "sanity", "map"} - asked}}
    return Response(answer.model_dump_json(exclude=left_out), 200, headers, JSON)


def _score_arrays(results: Sequence[ImageScore], maps: Sequence[NDArray[Any] | None]) -> dict[str, NDArray[Any]]:
    """Return arrays with one row per image: bpd, log_likelihood, and what else was requested."""
    arrays: dict[str, NDArray[Any]] = {
        "bpd": np.array([score.bpd for score in results]),
        "log_likelihood": np.array([score.log_likelihood for score in results]),
    }
    verdicts = [score.ood for score in results if score.ood]
    if verdicts:
        arrays["ood_score"] = np.array([verdict.score for verdict in verdicts])
        arrays["p_value"] = np.array([verdict.p_value for verdict in verdicts])
        arrays["is_ood"] = np.array([verdict.is_ood for verdict in verdicts])
    for name in results[0].statistics:
        arrays[f"statistic_{name}"] = np.array([score.statistics[name] for score in results])
    flipped = [score.flipped_bpd for score in results if score.flipped_bpd is not None]
    if flipped:
        arrays["flipped_bpd"] = np.array(flipped)
    drawn = [one for one in maps if one is not None]
    if drawn:
        arrays["map"] = np.stack(drawn)
    return arrays


def scan_response(view: JobView, result: ScanResult, media: str) -> Response:
    """Return a scan as `media`: JSON, arrays, or the map of the tiles' scores as a PNG of the image's own size.

    Arrays and PNG need the map, which takes about as much time and memory as decoding the image.
    """
    headers = {"X-Job-Id": view.id}
    scan = result.scan
    box = scan.box
    tiles = None if scan.tiles is None else np.frombuffer(scan.tiles, "<f4").reshape(scan.rows, scan.columns)
    if media == JSON:
        answer = ScanAnswer(
            id=view.id,
            status=view.status,
            **scan.model_dump(exclude={"tiles"}),
            model=result.model,
            tile_width=box.width,
            tile_height=box.height,
            tiles=None if tiles is None else _rounded(tiles),
            timing=result.timing,
        )
        return Response(answer.model_dump_json(exclude={"tiles"} if tiles is None else None), 200, headers, JSON)
    map_HW = None if tiles is None else blend(tiles, TileSize(box.height, box.width), scan.height, scan.width)
    if media == PNG:
        if map_HW is None:
            raise _no_map(view)
        return Response(to_png(heat.render(map_HW, *heat.score_range(map_HW, scan.threshold))), 200, headers, PNG)
    told = scan.model_dump(include={"score", "p_value", "threshold", "is_ood"}, exclude_none=True)
    arrays = {name: np.array(value) for name, value in told.items()}
    arrays["box"] = np.array([box.left, box.top, box.width, box.height])
    if tiles is not None and map_HW is not None:
        arrays |= {"tiles": tiles, "map": map_HW}
    return Response(_npz(arrays), 200, headers, NPZ)


def _rounded(map_HW: NDArray[Any]) -> list[list[float]]:
    return map_HW.astype(float).round(4).tolist()


def _no_map(view: JobView) -> Problem:
    detail = f"The job {view.id} has no map; send the image again with map=1, or request another format."
    return Problem(406, detail, kind="media-type", headers={"X-Job-Id": view.id})


def picture_response(view: JobView, result: PictureResult, blob: bytes, media: str) -> Response:
    """Return images as `media`: one PNG (several form a grid), JSON with PNGs in base64, a zip of PNGs, or arrays."""
    size = result.pictures
    pictures = np.frombuffer(blob, np.uint8).reshape(size.n, size.height, size.width, 3)
    headers = {"X-Job-Id": view.id, "X-Seed": str(result.seeds[0])}
    if media == PNG:
        return Response(to_png(grid(pictures)), 200, headers, PNG)
    if media == NPZ:
        return Response(_npz({"images": pictures, "seeds": np.array(result.seeds)}), 200, headers, NPZ)
    files = [to_png(picture) for picture in pictures]
    images = [
        Picture(seed=seed, png=base64.b64encode(file).decode()) for seed, file in zip(result.seeds, files, strict=True)
    ]
    answer = PictureAnswer(id=view.id, status=view.status, model=result.model, images=images, timing=result.timing)
    if media == JSON:
        return Response(answer.model_dump_json(), 200, headers, JSON)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for i, (seed, file) in enumerate(zip(result.seeds, files, strict=True)):
            archive.writestr(f"{i:02d}-seed-{seed}.png", file)
        archive.writestr("job.json", answer.model_dump_json(exclude={"images": {"__all__": {"png"}}}))
    return Response(out.getvalue(), 200, headers, ZIP)


def _npz(arrays: dict[str, NDArray[Any]]) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, allow_pickle=False, **arrays)
    return out.getvalue()
