"""Calibration of a copy of a model on the images of a job, at the model's size; runs in the engine."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ncml import checkpoint
from ncml.data.dataset import Dataset
from ncml.errors import InputError
from ncml.ood import calibrations
from ncml.ood.power import summary
from ncml.progress import Progress
from ncml.training.adaptation import adapt
from worker.contract import CalibrateJob
from worker.results import Calibrated, WorkerFault

if TYPE_CHECKING:
    from ncml.model import Model
    from ncml.ood.calibration import Calibration
    from ncml.progress import OnProgress

REQUEST = ".request"
"""The file of a new model folder that identifies what was requested: a repeated attempt at the job finds its result."""

STALE_S = 3600.0
"""Age of an unfinished folder that no worker writes any more: writing one takes seconds."""

log = logging.getLogger("ncml.engine")


def calibrate_copy(
    model: Model,
    job: CalibrateJob,
    job_id: str,
    directories: Sequence[Path],
    on_progress: OnProgress,
    *,
    batch_size: int = 32,
    max_models: int = 100,
) -> Calibrated:
    """Calibrate a copy of a model, and move it into the first writable directory when it is complete.

    If an earlier attempt at the job has done so, return its result.

    Raises `InputError` for unsuitable images, for a name that exists and beyond `max_models` in that directory,
    `WorkerFault` if no directory is writable, and if its disk is full.
    """
    described = f"{model.version}|{job.false_positive_rate}|{hashlib.sha256(job.pixels).hexdigest()}"
    request = hashlib.sha256(described.encode()).hexdigest()
    for existing in (directory / job.name for directory in directories):
        if existing.exists():
            return _read_result(existing, request)
    directory = _writable_directory(directories)
    _remove_unfinished(directory, job.name, job_id)
    if sum(1 for _ in directory.glob(f"[!.]*/{REQUEST}")) >= max_models:
        detail = (
            f"clients have made {max_models} models, the most that the service holds; ask its operator to remove some."
        )
        raise InputError("name", detail)
    pixels_NHWC = np.frombuffer(job.pixels, np.uint8).reshape(job.images, job.height, job.width, 3)
    images = Dataset(torch.as_tensor(pixels_NHWC.copy()), torch.zeros(job.images, dtype=torch.int64), ())
    folder, unfinished = directory / job.name, directory / f".{job.name}.{job_id}.{os.getpid()}"  # hidden: not a model
    try:
        adapted = adapt(
            model,
            images,
            unfinished,
            false_positive_rate=job.false_positive_rate,
            batch_size=batch_size,
            on_progress=on_progress,
        )
        (unfinished / REQUEST).write_text(request)
        on_progress(Progress("power", 1, 1))  # the last moment at which a cancellation leaves nothing behind
        unfinished.rename(folder)
    except InputError as error:
        raise InputError("image" if error.field == "data" else error.field, error.detail) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            log.error("the new model cannot be written: %s", error, extra={"job": job_id})
            raise WorkerFault("the disk of the new models is full: the operator must free space on it.") from error
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return _read_result(folder, request)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return _describe(adapted.calibration)


def _read_result(folder: Path, request: str) -> Calibrated:
    """Return the calibration of a folder that was made for the same request; raise `InputError` for any other."""
    marker = folder / REQUEST
    if marker.is_file() and marker.read_text() == request:
        description = checkpoint.describe(folder)
        calibration = calibrations.read(folder, description.version, description.config).select(None)
        if calibration is not None and calibration.power is not None:
            return _describe(calibration)
    raise InputError("name", f"a model {folder.name!r} already exists; choose another name.")


def _describe(calibration: Calibration) -> Calibrated:
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
    log.error("no model directory is writable: %s", ", ".join(map(str, directories)))
    raise WorkerFault("no model directory of the worker is writable: the operator must make one of them writable.")


def _remove_unfinished(directory: Path, name: str, job_id: str) -> None:
    """Remove what workers that were killed have left of this job, and of earlier ones for the same name."""
    for folder in directory.glob(f".{name}.*"):
        with contextlib.suppress(FileNotFoundError):  # another worker has finished it
            if folder.name.startswith(f".{name}.{job_id}.") or time.time() - folder.stat().st_mtime > STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
