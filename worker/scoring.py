"""Scores in the engine: the arguments of `Model.score` for a job, and what it returns as what crosses the queue."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ncml.errors import InputError, ModelError
from ncml.images import open_image, reduced_jpeg
from ncml.ood.storage import DEFAULT_NAME
from ncml.options import leaves_verdict_to_detector
from worker.contract import Original, ScoreJob
from worker.job_results import Detection, Scan, Score

if TYPE_CHECKING:
    from ncml import results
    from ncml.model import Model

BACKDROP_SIDE = 1024
"""Pixels of the longer side to which an image is reduced on which a map is drawn."""


def read_original(image: Original) -> NDArray[np.uint8]:
    """Return an image at its own size; raise `InputError` for a file that is not the image that it was sent as."""
    if image.file is None:
        return np.frombuffer(image.pixels or b"", np.uint8).reshape(image.height, image.width, 3)
    pixels_HWC = open_image(image.file, max_bytes=len(image.file), max_pixels=image.height * image.width)
    if pixels_HWC.shape[:2] != (image.height, image.width):
        H, W = pixels_HWC.shape[:2]
        raise InputError("image", f"image is {W} x {H} pixels, not {image.width} x {image.height}; send it again.")
    return pixels_HWC


def scoring_options(model: Model, job: ScoreJob) -> dict[str, Any]:
    """Return the options of a job as arguments of `Model.score`.

    A detector judges originals only: a job without them is that of a service that has not seen the detector yet.
    Raises `ModelError` for a job with originals if the model is no detector.
    """
    options = job.scoring
    if job.originals and model.detector is None:
        raise ModelError("the model is no detector any more; send the request again")
    is_left = job.ood and leaves_verdict_to_detector(job.calibration, job.statistic)
    if is_left and not job.originals and model.detector is not None:
        options |= {"ood": False} if model.calibration is None else {"calibration": DEFAULT_NAME}
    return options


def name_in_job(error: InputError, first: int, images: int) -> InputError:
    """Return an error that names an image of a batch by its position in the job.

    first: position in the job of the batch's first image. images: number of images of the job.
    """
    match = re.fullmatch(r"image(?:\[(\d+)\])?", error.field)
    if match is None:
        return error
    name = "image" if images == 1 else f"image[{first + int(match[1] or 0)}]"
    return InputError(name, name + error.detail.removeprefix(match[0]))


def wire_score(score: results.Score, original_HWC: NDArray[np.uint8] | None) -> Score:
    """Return the score of an image; one that a detector has judged has its map if the image is given."""
    detection = score.detection and _wire_detection(score.detection, original_HWC)
    return Score.of(score, detection=detection)


def _wire_detection(detection: results.Detection, original_HWC: NDArray[np.uint8] | None) -> Detection:
    """Return a detection with its map and the image on which it is drawn; for None without either."""
    rows, columns = detection.grid.shape
    if original_HWC is None:
        return Detection.of(detection, rows=rows, columns=columns, grid=None)
    return Detection.of(detection, rows=rows, columns=columns, backdrop=reduced_jpeg(original_HWC, BACKDROP_SIDE, "L"))


def wire_scan(scan: results.Scan, *, with_tiles: bool) -> Scan:
    """Return a scan, with the scores of its tiles if requested."""
    rows, columns = scan.grid.shape
    tile = {f"tile_{name}": getattr(scan.tile, name) for name in ("height", "width", "overlap")}
    tiles = scan.grid if with_tiles else None  # instead of their number
    return Scan.of(scan, rows=rows, columns=columns, tiles=tiles, **tile)
