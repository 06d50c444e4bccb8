"""Judge images by a detector in one ONNX file, as `ncml export` writes it. Needs `ncml[onnx]`; imports no torch.

>>> from ncml.ood.exported import ExportedDetector
>>> detector = ExportedDetector("detector.onnx")
>>> detector.judge("part.png").p_value

`python -m ncml.ood.exported detector.onnx part.png ...` prints a line of JSON for each image, with the names of
`ncml score --json`.

The file's graph has an input `<view>.image` for each view, uint8 [H, W, 3], `features.grey`, uint8 [H, W], if parts are
brought to one position, `features.small`, uint8 [h, w, 3], if areas are compared, and these outputs: for each score its
candidates, fp64 [S], of which the largest is the score, and their maps `<score>.map0`, `<score>.map1`, ..., fp32 [h,
w]; if parts are brought to one position, also `relative_size`, fp64 [1], the size of the part relative to the nearest
one in good images, 0 if it was not found. The metadata `ncml` is JSON: the height and width of images, the steps that
bring an image to each input, and the calibration, as in `detector.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ncml.data.inventory import counted
from ncml.errors import InputError, ModelError, NcmlError
from ncml.images import open_image
from ncml.images.reading import name_image
from ncml.images.resizing import Resize
from ncml.ood import storage
from ncml.ood.detection import detect
from ncml.ood.detector_calibration import DetectorCalibration
from ncml.ood.scene_ranks import SceneRanks
from ncml.ood.views.view import Measurement
from ncml.paths import printable
from ncml.results import Detection

FORMAT = 1
METADATA = "ncml"
RELATIVE_SIZE = "relative_size"
"""Output of a file that brings parts to one position: as `Measurement.relative_size`, but 0 if the part was not
found."""
ROUNDING = 1e-3
"""By this much, or by this share of it, each ranking score is raised: another runtime rounds differently, the scores of
views in fp32 by up to 2e-4, and an image that equals a ranking image must not score above it. Where a score lies
between, the p-value is larger by a rank."""


class ExportedDetector:
    """A detector for images of one size, computed by onnxruntime on the CPU."""

    def __init__(self, path: str | os.PathLike[str], threads: int = 0) -> None:
        """Read a file. threads: of the computation; 0: one for each core.

        Raises `ModelError` for a file that is not an exported detector, or without onnxruntime.
        """
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise ModelError("onnxruntime is not installed: pip install 'ncml[onnx]'.") from error
        file = Path(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            # From bytes, so that a file cannot name other files as its data.
            self._session = onnxruntime.InferenceSession(file.read_bytes(), options, ["CPUExecutionProvider"])
        except OSError as error:
            raise ModelError(f"{file} cannot be read ({error.strerror}).") from error
        except Exception as error:  # onnxruntime raises many kinds
            raise ModelError(
                f"{file} is not an ONNX file that onnxruntime can run: export the detector again."
            ) from error
        text = self._session.get_modelmeta().custom_metadata_map.get(METADATA)
        if text is None:
            raise ModelError(f"{file} was not written by ncml export.")
        with storage.refusing_damage(file):
            stored = json.loads(text)
            if stored["format"] != FORMAT:
                raise ModelError(f"{file} has format {stored['format']}, not {FORMAT}: export it with this ncml.")
            calibration = stored["detector"]
            self.height, self.width = storage.count(stored["height"]), storage.count(stored["width"])
            """The size of images that are judged."""
            self.calibration = DetectorCalibration.from_json(calibration, file, calibration["model_version"])
            scores_N, scenes_N = self.calibration.ranks.scores_N, self.calibration.ranks.scenes_N
            raised = SceneRanks(scores_N + ROUNDING * np.maximum(1, np.abs(scores_N)), scenes_N)
            self._ranking = dataclasses.replace(self.calibration, ranks=raised)
            self._resizes = {
                name: [Resize.from_json(step) for step in stored["inputs"][name]]
                for name in (own.name for own in self._session.get_inputs())
            }

    def judge(self, image: str | os.PathLike[str] | NDArray[np.uint8]) -> Detection:
        """Judge an image, a file or uint8 [H, W, 3]; raise `InputError` for one of another size."""
        image_HWC = image if isinstance(image, np.ndarray) else open_image(image)
        height, width = image_HWC.shape[:2]
        if (height, width) != (self.height, self.width):
            raise InputError(
                "image",
                f"image has {width}x{height} pixels, and the detector was exported for {self.width}x{self.height}: "
                "export it for that size too.",
            )
        region = self.calibration.region
        measurements = self._measure(image_HWC if region is None else region.crop(image_HWC))
        detection = detect(self._ranking, measurements, image_HWC)
        return dataclasses.replace(detection, calibration_version=self.calibration.version)

    def _measure(self, image_HWC: NDArray[np.uint8]) -> dict[str, Measurement]:
        inputs: dict[str, NDArray[np.uint8]] = {}
        for name, steps in self._resizes.items():
            inputs[name] = np.ascontiguousarray(image_HWC)
            for step in steps:
                inputs[name] = step(inputs[name])
        names = [output.name for output in self._session.get_outputs()]
        outputs: dict[str, Any] = dict(zip(names, self._session.run(names, inputs), strict=True))
        relative_size = float(outputs[RELATIVE_SIZE][0]) or None if RELATIVE_SIZE in outputs else 1.0
        measurements: dict[str, Measurement] = {}
        for name in self.calibration.scales:
            index = int(outputs[name].argmax())
            score, map_hw = float(outputs[name][index]), outputs.get(f"{name}.map{index}")
            measurements[name] = Measurement(score, map_hw, relative_size)
        return measurements


def main(arguments: Sequence[str]) -> int:
    """Judge the images that follow the name of the detector; return the exit status, as `ncml score` does.

    A file that cannot be judged is reported and skipped.
    """
    if len(arguments) < 2:
        print("usage: python -m ncml.ood.exported DETECTOR.onnx IMAGE...", file=sys.stderr)
        return 2
    try:
        detector = ExportedDetector(arguments[0])
    except NcmlError as error:
        print(f"ncml: {error}", file=sys.stderr)
        return 2
    names = [printable(Path(name)) for name in arguments[1:]]
    skipped = 0
    for name, path in zip(names, arguments[1:], strict=True):
        try:
            detection = detector.judge(open_image(path, field=name))
        except InputError as error:
            print(f"ncml: skipped: {name_image(error, name)}", file=sys.stderr)
            skipped += 1
            continue
        values = ("score", "threshold", "p_value", "is_ood", "is_weak", "view", "rarity", "differences")
        line = {"file": name} | {value: getattr(detection, value) for value in values}
        print(json.dumps(line | detection.box._asdict()), flush=True)
    if skipped:
        print(f"ncml: {counted(skipped, 'file')} {'was' if skipped == 1 else 'were'} skipped", file=sys.stderr)
    return 2 if skipped == len(names) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
