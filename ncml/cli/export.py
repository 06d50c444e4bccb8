"""`ncml export`."""

import re
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ncml import images
from ncml.checkpoint import DETECTOR_ARRAYS
from ncml.cli.rows import SkippedFiles
from ncml.cli.terminal import JsonOption, check_output_file, describe, identity, print_json, progress_bar
from ncml.data.inventory import counted
from ncml.errors import InputError, NcmlError
from ncml.images.reading import list_images
from ncml.ood import detector_calibration
from ncml.ood.detector_calibration import DetectorCalibration
from ncml.ood.views.view import Reader
from ncml.paths import check_exists, check_space

NETWORKS_BYTES = 18 * 2**20
"""Space for the networks in an exported file, which also holds the arrays of the detector."""


def export(
    model: Annotated[Positional[str], arg(metavar="NAME|PATH")],
    output: Annotated[Positional[Path], arg(metavar="FILE.onnx")],
    /,
    *,
    size: Annotated[str, arg(metavar="WIDTHxHEIGHT", help_behavior_hint="(default: that of most good images)")] = "",
    check: Annotated[tuple[Path, ...], arg(metavar="FILE|FOLDER", help_behavior_hint="(default: drawn patterns)")] = (),
    as_json: JsonOption = False,
) -> None:
    """Write a detector into one ONNX file, which judges images of one size without PyTorch.

    `python -m ncml.ood.exported FILE.onnx IMAGE...` and `ncml.ood.exported.ExportedDetector` judge by it; they need
    onnxruntime. The verdicts of both are compared first, and a file that judges differently is not kept.

    Args:
        model: Name or folder of a detector.
        output: File to write.
        size: Size of the images in pixels.
        check: Images on which the verdicts are compared, such as good and defective ones that were kept aside.
        as_json: Print JSON.
    """
    if output.suffix != ".onnx":
        raise InputError("output", f"{output} must end in .onnx.")
    check_output_file(output)
    description = describe(model)
    calibration = detector_calibration.read_if_present(description.folder, description.version)
    if calibration is None:
        raise InputError("model", f"{description.name} is not a detector: make one with ncml adapt, or name one.")
    judged = _size(size, calibration)
    check_space(output.parent, (description.folder / DETECTOR_ARRAYS).stat().st_size + NETWORKS_BYTES)
    for path in check:
        check_exists(path)
    skipped = SkippedFiles()
    paths = [Path(str(path)) for path in list_images(check, "check")] if check else []
    readers = _readers(paths, judged, skipped)
    if paths and not readers:
        files, reason = counted(len(paths), "file"), skipped.messages[0].rstrip(".")
        size_of_images = f"{judged[1]}x{judged[0]} pixels"
        raise InputError("check", f"no image of {size_of_images} is among {files} ({reason}): name others.")
    from ncml.ood import onnx_file

    with progress_bar() as on_progress:
        parity = onnx_file.export(
            description.folder, calibration, output, judged, readers or onnx_file.patterns(*judged), on_progress
        )
    skipped.report(skipped.count)
    size_mb = output.stat().st_size / 1e6
    if as_json:
        result = {"file": str(output), "bytes": output.stat().st_size, "height": judged[0], "width": judged[1]}
        compared = {
            "images": parity.images,
            "equal_p_values": parity.equal_p_values,
            "largest_difference": parity.largest_difference,
        }
        print_json({"model": identity(description)} | result | {"compared": compared, "skipped": skipped.count})
        return
    compared = counted(parity.images, "image" if readers else "drawn pattern")
    print(f"{output}  {size_mb:.1f} MB, judges images of {judged[1]}x{judged[0]} pixels")
    larger = parity.images - parity.equal_p_values
    print(f"compared on {compared}: " + (f"{larger} p-values are larger by rounding" if larger else "equal p-values"))
    print(f"scores differ by at most {parity.largest_difference:.1g}, or by this share of a score above 1")


def _size(text: str, calibration: DetectorCalibration) -> tuple[int, int]:
    """Return the height and width of images that the file will judge."""
    if not text:
        if calibration.region is not None:
            return calibration.region.height, calibration.region.width
        if not calibration.sizes:
            raise InputError("size", "the detector does not know the size of its good images: add --size WIDTHxHEIGHT.")
        text = max(calibration.sizes, key=lambda size: (calibration.sizes or {})[size])
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise InputError("size", f"--size {text!r} is not a width and a height in pixels, such as 800x600.")
    return int(match[2]), int(match[1])


def _readers(paths: list[Path], size: tuple[int, int], skipped: SkippedFiles) -> list[Reader]:
    """Return what opens each image of the size; others are counted as skipped."""
    readers: list[Reader] = []
    for path in paths:
        try:
            height, width = images.open_image(path, field=str(path)).shape[:2]
        except NcmlError as error:
            skipped.add(path, str(error))
            continue
        if (height, width) == size:
            readers.append(lambda path=path: images.open_image(path))
        else:
            skipped.add(path, f"{path} has {width}x{height} pixels, not {size[1]}x{size[0]}.")
    return readers
