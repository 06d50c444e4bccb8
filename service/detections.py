"""The verdicts of detectors in responses: as JSON, as arrays, and drawn over the images."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncml.images import grid, heat
from ncml.images.tiling import Box, Scores, stretch_bands
from service import answers
from service.arrays import npz_parts, rounded
from worker.job_results import Detection


def detection_answer(detection: Detection) -> answers.Detection:
    """Return the document of a verdict."""
    fields = detection.model_dump(exclude={"rows", "columns", "grid", "backdrop"})
    return answers.Detection(**fields, map=None if detection.grid is None else rounded(_grid(detection)))


def detections_npz_parts(arrays: Mapping[str, NDArray[Any]], detections: Sequence[Detection]) -> Iterator[bytes]:
    """Yield the parts of an npz file of arrays and verdicts: rows of all, and the grid and the map of each image."""
    boxes = {name: [_edges(getattr(detection, name)) for detection in detections] for name in ("box", "covered")}
    rows: dict[str, list[Any]] = {
        "view": [detection.view for detection in detections],
        "at_least_as_unusual": [detection.at_least_as_unusual for detection in detections],
        **boxes,
    }
    mapped = {i: detection for i, detection in enumerate(detections) if detection.grid is not None}
    grids = {f"grid_{i}": _grid(detection) for i, detection in mapped.items()}
    maps = {
        f"detection_map_{i}": ((detection.height, detection.width), _map_bands(detection))
        for i, detection in mapped.items()
    }
    return npz_parts({**arrays, **{name: np.array(values) for name, values in rows.items()}, **grids}, maps)


def draw_detections(detections: Sequence[Detection]) -> NDArray[np.uint8]:
    """Return the images in grey, reduced, with their maps and boxes; several form a grid."""
    drawn = [_draw(detection) for detection in detections if detection.backdrop is not None]
    height, width = (max(image.shape[axis] for image in drawn) for axis in (0, 1))
    cells = np.zeros((len(drawn), height, width, 3), np.uint8)
    for cell, image in zip(cells, drawn, strict=True):
        cell[: image.shape[0], : image.shape[1]] = image
    return grid(cells)


def _draw(detection: Detection) -> NDArray[np.uint8]:
    backdrop_HWC = np.array(Image.open(io.BytesIO(detection.backdrop or b""), formats=["JPEG"]).convert("RGB"))
    H, W = backdrop_HWC.shape[:2]
    scale = W / detection.width, H / detection.height
    grid_hw = _grid(detection)
    map_HW = np.concatenate(list(stretch_bands(grid_hw, _scaled(detection.covered, *scale), H, W)))
    colours = heat.detection_range(grid_hw, detection.score, detection.threshold)
    return heat.render_detection(backdrop_HWC, map_HW, colours, _scaled(detection.box, *scale), detection.is_ood)


def _grid(detection: Detection) -> Scores:
    return np.frombuffer(detection.grid or b"", "<f4").reshape(detection.rows, detection.columns)


def _map_bands(detection: Detection) -> Iterator[Scores]:
    return stretch_bands(_grid(detection), Box(*_edges(detection.covered)), detection.height, detection.width)


def _edges(box: Any) -> tuple[int, int, int, int]:
    return box.left, box.top, box.width, box.height


def _scaled(box: Any, across: float, down: float) -> Box:
    """Return a box in a reduced image, at least a pixel wide and high."""
    left, top = int(box.left * across), int(box.top * down)
    width = max(1, round((box.left + box.width) * across) - left)
    return Box(left, top, width, max(1, round((box.top + box.height) * down) - top))
