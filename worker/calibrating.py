"""Calibration of a copy of a model on the images of a job, as `ncml adapt` does it; runs in the engine."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ncml.errors import InputError
from ncml.ood.power import summary
from ncml.training.adapt import adapt
from ncml.training.dataset import Dataset
from worker.contract import CalibrateJob
from worker.results import Calibrated

if TYPE_CHECKING:
    from ncml.model import Model
    from ncml.progress import OnProgress


def calibrate_copy(model: Model, job: CalibrateJob, directories: Sequence[Path], on_progress: OnProgress) -> Calibrated:
    """Calibrate a copy of a model, and move it into the first writable directory when it is complete.

    Raises `InputError` for unsuitable images, for a name that exists, and if no directory is writable.
    """
    directory = _writable_directory(directories)
    folder = directory / job.name
    if folder.exists():
        raise InputError("name", f"a folder {job.name!r} already exists; choose another name")
    pixels_NHWC = np.frombuffer(job.pixels, np.uint8).reshape(job.images, job.height, job.width, 3)
    images = Dataset(torch.as_tensor(pixels_NHWC.copy()), torch.zeros(job.images, dtype=torch.int64), ())
    unfinished = directory / f".{job.name}.{os.getpid()}"  # models are not searched for in hidden folders
    try:
        adapted = adapt(model, images, unfinished, false_positive_rate=job.false_positive_rate, on_progress=on_progress)
        _move(unfinished, folder)
    except InputError as error:
        raise InputError("image" if error.field == "data" else error.field, error.detail) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    calibration = adapted.calibration
    assert calibration.power is not None
    return Calibrated(
        n_fit=calibration.n_fit,
        n_rank=calibration.n_rank,
        smallest_p=calibration.smallest_p,
        weakness=calibration.weakness,
        summary=summary(calibration.power, calibration.smallest_p),
    )


def _writable_directory(directories: Sequence[Path]) -> Path:
    """Return the first model directory that is writable; create it if its parent is."""
    for directory in directories:
        existing = directory if directory.exists() else directory.parent
        if existing.is_dir() and os.access(existing, os.W_OK):
            directory.mkdir(exist_ok=True)
            return directory
    names = ", ".join(map(str, directories))
    raise InputError("name", f"no model directory is writable ({names}); make one of them writable")


def _move(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise InputError("name", f"a folder {folder.name!r} already exists; choose another name") from error
