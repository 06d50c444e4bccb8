"""Results in the media types that clients accept: JSON, PNG, zip and npz. Decodes and renders: call it in a thread.

The maps of scans, which can be thousands of times as large as their results, are rendered part by part.
"""

import base64
import io
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import Response
from numpy.typing import NDArray

from ncml.images import grid, heat, png_parts, to_png
from ncml.images.tiling import Tiling, blend_bands
from service.answers import CalibrateAnswer, GeneratedImage, ImagesAnswer, Sanity, ScanAnswer, Score, ScoreAnswer
from service.arrays import npz, npz_parts, rounded
from service.detections import detection_answer, detections_npz_parts, draw_detections
from service.http.negotiation import JSON, NPZ, PNG, ZIP
from service.http.problems import Problem
from worker.job_results import CalibrateResult, ImagesResult, JobView, ScanResult, ScoreResult
from worker.job_results import Score as ImageScore

SCORE_OFFERS = (JSON, NPZ, PNG)
IMAGE_OFFERS = (PNG, JSON, ZIP, NPZ)
CALIBRATE_OFFERS = (JSON,)
"""The media types of results, the default first."""


@dataclass(frozen=True)
class PartedResult:
    """A result that is rendered while it is sent: its headers, its media type, and its parts, some of them empty."""

    headers: dict[str, str]
    media: str
    parts: Iterator[bytes]


def score_response(view: JobView, result: ScoreResult, media: str) -> Response | PartedResult:
    """Return scores as `media`: JSON, arrays, or the maps as one PNG, in which several form a grid.

    Arrays with the maps of a detector, which have the size of its images, are rendered in parts.
    """
    headers = {"X-Job-Id": view.id}
    shape = result.height, result.width
    maps = [None if score.map is None else np.frombuffer(score.map, "<f4").reshape(shape) for score in result.results]
    detections = [score.detection for score in result.results if score.detection]
    if media == NPZ:
        files = {"files": np.array(view.files)} if view.files else {}
        arrays = _score_arrays(result.results, maps) | files
        if detections:
            return PartedResult(headers, NPZ, detections_npz_parts(arrays, detections))
        return Response(npz(arrays), 200, headers, NPZ)
    if media == PNG:
        rendered = [heat.render_pixel_map(map_HW) for map_HW in maps if map_HW is not None]
        if not rendered:
            raise _no_map(view)
        return Response(to_png(draw_detections(detections) if detections else grid(rendered)), 200, headers, PNG)
    files = view.files or [None] * len(maps)
    scores = [
        Score(
            file=file,
            bpd=score.bpd,
            log_likelihood=score.log_likelihood,
            ood=score.ood,
            statistics=score.statistics or None,
            sanity=None
            if score.flipped_bpd is None
            else Sanity(flipped_bpd=score.flipped_bpd, delta_bpd=score.flipped_bpd - score.bpd),
            map=None if map_HW is None else rounded(map_HW),
            detection=score.detection and detection_answer(score.detection),
        )
        for file, score, map_HW in zip(files, result.results, maps, strict=True)
    ]
    document = ScoreAnswer(id=view.id, status=view.status, model=result.model, results=scores, timing=result.timing)
    optional = ("file", "statistics", "sanity", "map", "detection")
    omitted: dict[str, Any] = {name: True for name in optional if not any(getattr(score, name) for score in scores)}
    if "map" in omitted:
        omitted.setdefault("detection", {"map"})
    return Response(document.model_dump_json(exclude={"results": {"__all__": omitted}}), 200, headers, JSON)


def calibration_response(view: JobView, result: CalibrateResult) -> Response:
    """Return what a calibration can and cannot detect, as JSON."""
    document = CalibrateAnswer(
        id=view.id,
        status=view.status,
        model=result.model,
        calibration=result.calibration,
        skipped=list(result.skipped),
        timing=result.timing,
    )
    return Response(document.model_dump_json(), 200, {"X-Job-Id": view.id}, JSON)


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
    flipped_bpd = [score.flipped_bpd for score in results if score.flipped_bpd is not None]
    if flipped_bpd:
        arrays["flipped_bpd"] = np.array(flipped_bpd)
    maps_NHW = [map_HW for map_HW in maps if map_HW is not None]
    if maps_NHW:
        arrays["map"] = np.stack(maps_NHW)
    return arrays


def scan_response(view: JobView, result: ScanResult, media: str) -> Response | PartedResult:
    """Return a scan as `media`: JSON, arrays, or the map of the tiles' scores as a PNG of the image's own size.

    Arrays and PNG, which contain the map, are rendered in parts.
    """
    headers = {"X-Job-Id": view.id}
    scan = result.scan
    box, tile = scan.box, Tiling(scan.tile_height, scan.tile_width, scan.tile_overlap)
    tiles = None if scan.tiles is None else np.frombuffer(scan.tiles, "<f4").reshape(scan.rows, scan.columns)
    if media == JSON:
        document = ScanAnswer(
            id=view.id,
            status=view.status,
            **scan.model_dump(exclude={"tiles"}),
            model=result.model,
            tiles=None if tiles is None else rounded(tiles),
            timing=result.timing,
        )
        return Response(document.model_dump_json(exclude={"tiles"} if tiles is None else None), 200, headers, JSON)
    size = scan.height, scan.width
    if media == PNG:
        if tiles is None:
            raise _no_map(view)
        return PartedResult(headers, PNG, _map_png(lambda: blend_bands(tiles, tile, *size), size, scan.threshold))
    verdict = scan.model_dump(include={"view", "score", "p_value", "threshold", "is_ood"}, exclude_none=True)
    arrays = {name: np.array(value) for name, value in verdict.items()}
    arrays["box"] = np.array([box.left, box.top, box.width, box.height])
    if tiles is None:
        return Response(npz(arrays), 200, headers, NPZ)
    parts = npz_parts(arrays | {"tiles": tiles}, {"map": (size, blend_bands(tiles, tile, *size))})
    return PartedResult(headers, NPZ, parts)


def _map_png(
    bands: Callable[[], Iterable[NDArray[np.float32]]], size: tuple[int, int], threshold: float | None
) -> Iterator[bytes]:
    """Yield the parts of the PNG of a map; its range is known only once all bands have been computed."""
    extremes: list[np.float32] = []
    for band_HW in bands():
        extremes += [band_HW.min(), band_HW.max()]
        yield b""
    low, high = heat.score_range(np.array(extremes), threshold)
    yield from png_parts(*size, (heat.render(band_HW, low, high) for band_HW in bands()))


def _no_map(view: JobView) -> Problem:
    detail = f"The job {view.id} has no map; send the image again with map=1, or request another format."
    return Problem(406, detail, kind="media-type", headers={"X-Job-Id": view.id})


def images_response(view: JobView, result: ImagesResult, blob: bytes, media: str) -> Response:
    """Return images as `media`: one PNG (several form a grid), JSON with PNGs in base64, a zip of PNGs, or arrays."""
    shape = result.images
    images_NHWC = np.frombuffer(blob, np.uint8).reshape(shape.n, shape.height, shape.width, 3)
    headers = {"X-Job-Id": view.id, "X-Seed": str(result.seeds[0])}
    if media == PNG:
        return Response(to_png(grid(images_NHWC)), 200, headers, PNG)
    if media == NPZ:
        return Response(npz({"images": images_NHWC, "seeds": np.array(result.seeds)}), 200, headers, NPZ)
    files = [to_png(image) for image in images_NHWC]
    images = [
        GeneratedImage(seed=seed, png=base64.b64encode(file).decode())
        for seed, file in zip(result.seeds, files, strict=True)
    ]
    document = ImagesAnswer(id=view.id, status=view.status, model=result.model, images=images, timing=result.timing)
    if media == JSON:
        return Response(document.model_dump_json(), 200, headers, JSON)
    members = {f"{i:02d}-seed-{seed}.png": file for i, (seed, file) in enumerate(zip(result.seeds, files, strict=True))}
    members["job.json"] = document.model_dump_json(exclude={"images": {"__all__": {"png"}}}).encode()
    return Response(_archive(members, view.ended_at), 200, headers, ZIP)


def _archive(members: dict[str, bytes], ended_at: float | None) -> bytes:
    """Return a zip whose files have the time at which their job ended, so that its bytes are always the same."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            member = zipfile.ZipInfo(name, time.gmtime(ended_at)[:6])
            member.external_attr = 0o600 << 16  # the permissions of the file
            archive.writestr(member, data)
    return buffer.getvalue()
