"""Calibrate a copy of a model on a small set of good images, at the model's size: `POST /calibrate`.

Each image is used either to estimate or to rank, so p-values are valid.
"""

from __future__ import annotations

from pathlib import Path

from ncml import checkpoint
from ncml.calibration import descriptions
from ncml.calibration.estimation import calibrate, divide
from ncml.calibration.held_out_power import generate_foreign
from ncml.data.dataset import Dataset
from ncml.errors import InputError
from ncml.model import Model
from ncml.ood.calibration import Calibration
from ncml.paths import check_space
from ncml.progress import OnProgress, ignore_progress

POWER_IMAGES = 60
"""Number of ranking images on which power is measured; the 100 of `ncml calibrate` would take most of the time."""

CALIBRATION_BYTES = 1000
"""Bytes of a calibration for each image, at least: the bundled model's have about 200."""


def calibrate_copy(
    model: Model,
    data: Dataset,
    out: Path,
    *,
    false_positive_rate: float = 0.05,
    batch_size: int = 32,
    on_progress: OnProgress = ignore_progress,
) -> Calibration:
    """Copy a model to the folder `out`, and calibrate the copy on good images.

    batch_size: number of images that are measured at once.
    Raises `InputError` for too few images, for images that are all equal, and for a folder `out` of something else;
    `OSError` for a disk without space for the copy, before anything is computed.
    """
    checkpoint.check_copy(model.folder, out)
    check_space(out, checkpoint.copy_bytes(model.folder) + CALIBRATION_BYTES * len(data))
    estimating, ranking = divide(len(data), false_positive_rate)
    images_NHWC = data.images_NHWC
    if bool((images_NHWC == images_NHWC[:1]).all()):
        raise InputError("data", "all images are equal: use images that show how good ones differ.")
    calibration = calibrate(
        model,
        images_NHWC[estimating],
        images_NHWC[ranking],
        false_positive_rate=false_positive_rate,
        power_images=POWER_IMAGES,
        foreign=generate_foreign(model, on_progress),
        prior=model.calibration,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    checkpoint.copy(model.folder, out)
    descriptions.save(calibration, out)
    return calibration
