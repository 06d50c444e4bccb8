"""New model folders that clients request; runs in the engine.

A calibration copies a model and calibrates it on the images of a job, at the model's size. An update makes a new
version of a detector from the images that it keeps and from reviewed ones.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ncml.calibration import descriptions
from ncml.calibration.calibrated_copy import calibrate_copy
from ncml.calibration.updating import update_detector
from ncml.data.dataset import Dataset
from ncml.data.good_images import GoodImages, open_folder
from ncml.errors import InputError
from ncml.ood.power import summary
from ncml.progress import Progress, StopMeasuring
from worker.contract import CalibrateJob, ReviewedImage, UpdateJob
from worker.job_results import Calibrated, ReviewCounts, WorkerFault
from worker.unfinished import folders_of, remove_left

if TYPE_CHECKING:
    from ncml.model import Model
    from ncml.progress import OnProgress

REQUEST = ".request"
"""The file of a new model folder that identifies what was requested, and holds the result for a repeated attempt."""

UPDATE_POWER_IMAGES = 10
"""Number of ranking images on which an update measures power; the 20 of `ncml adapt` would take most of the time."""

POWER_UNTIL = 0.9
"""Share of its time limit after which an update measures no more power, so that the new detector is not lost."""

HOPELESS = 2.0
"""An update is refused if the estimate of its time, which is rough, is this many times the time limit of its job."""

log = logging.getLogger("ncml.engine")


def make_folder(
    model: Model,
    job: CalibrateJob | UpdateJob,
    job_id: str,
    directories: Sequence[Path],
    on_progress: OnProgress,
    *,
    batch_size: int = 32,
    max_models: int = 100,
    seconds_left: Callable[[], float] = lambda: math.inf,
) -> Calibrated:
    """Make a new model folder, and move it into the first writable directory when it is complete.

    If an earlier attempt at the job has done so, return its result.

    seconds_left: returns the time until the job fails, within which an update ends the measurement of its power.

    Raises `InputError` for unsuitable images, for a name that exists, beyond `max_models` in that directory, and for
    an update that would take much longer than its job may; `WorkerFault` if no directory is writable, and if its disk
    is full.
    """
    request = _identify(model, job)
    for existing in (directory / job.name for directory in directories):
        if existing.exists():
            return _read_result(existing, request)
    directory = _writable_directory(directories)
    remove_left(directory, job_id)
    if sum(1 for _ in directory.glob(f"[!.]*/{REQUEST}")) >= max_models:
        detail = (
            f"clients have made {max_models} models, the most that the service holds; ask its operator to remove some."
        )
        raise InputError("name", detail)
    folder = directory / job.name
    unfinished, incoming = folders_of(directory, job.name, job_id)

    def report(progress: Progress) -> None:
        on_progress(progress)
        for hidden in (unfinished, incoming):
            with contextlib.suppress(FileNotFoundError):
                os.utime(hidden)

    try:
        if isinstance(job, CalibrateJob):
            calibrated = _calibrate(model, job, unfinished, batch_size, report)
        else:
            calibrated = _update(model, job, unfinished, incoming, report, seconds_left)
        (unfinished / REQUEST).write_text(f"{request}\n{calibrated.model_dump_json()}\n")
        on_progress(Progress("power", 1, 1))  # the last moment at which a cancellation leaves nothing behind
        unfinished.rename(folder)
    except InputError as error:
        fields = {"data": "image", "out": "name"}
        raise InputError(fields.get(error.field, error.field), error.detail) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            log.error("the new model cannot be written: %s", error, extra={"job": job_id})
            raise WorkerFault("the disk of the new models is full: the operator must free space on it.") from error
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return _read_result(folder, request)
    finally:
        for left in (unfinished, incoming):
            shutil.rmtree(left, ignore_errors=True)
    return calibrated


def _identify(model: Model, job: CalibrateJob | UpdateJob) -> str:
    """Return a digest of what a job requests."""
    if isinstance(job, CalibrateJob):
        described = f"{model.version}|{job.false_positive_rate}|{hashlib.sha256(job.pixels).hexdigest()}"
    else:
        detector = model.detector
        images = [hashlib.sha256(image.file).hexdigest() for image in job.reviewed + job.defective]
        described = f"{model.version}|{detector and detector.version}|{len(job.reviewed)}|{images}"
    return hashlib.sha256(described.encode()).hexdigest()


def _calibrate(model: Model, job: CalibrateJob, folder: Path, batch_size: int, on_progress: OnProgress) -> Calibrated:
    pixels_NHWC = np.frombuffer(job.pixels, np.uint8).reshape(job.images, job.height, job.width, 3)
    calibration = calibrate_copy(
        model,
        Dataset(torch.as_tensor(pixels_NHWC.copy()), torch.zeros(job.images, dtype=torch.int64), ()),
        folder,
        false_positive_rate=job.false_positive_rate,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    assert calibration.power is not None
    return Calibrated.of(calibration, summary=summary(calibration.power, calibration.smallest_p))


def _update(
    model: Model,
    job: UpdateJob,
    folder: Path,
    incoming: Path,
    on_progress: OnProgress,
    seconds_left: Callable[[], float],
) -> Calibrated:
    def report(progress: Progress) -> None:
        on_progress(progress)
        if progress.stage == "power" and seconds_left() < (1 - POWER_UNTIL) * job.timeout_s:
            raise StopMeasuring

    def check_time(seconds: float) -> None:
        if seconds > HOPELESS * job.timeout_s:
            raise InputError(
                "model",
                f"an update of {model.name} takes about {seconds:,.0f} s, and a job ends after {job.timeout_s:,.0f} s: "
                "update it on the command line (ncml adapt --update), or ask the operator to raise NCML_JOB_TIMEOUT_S.",
            )

    updated = update_detector(
        model,
        _open(job.reviewed, incoming / "reviewed", on_progress),
        folder,
        defective=_open(job.defective, incoming / "defective", on_progress),
        power_images=UPDATE_POWER_IMAGES,
        device=str(model.device),
        on_estimate=check_time,
        on_progress=report,
    )
    descriptions.write_detector_card(updated.made)
    calibration, reviews = updated.made.calibration, updated.made.reviews
    power = calibration.power.lines() if calibration.power else ["its power was not measured: the job had no time left"]
    return Calibrated.of(
        calibration,
        summary="; ".join([*updated.comparison, *power]) + ".",
        reviews=ReviewCounts.of(
            reviews,
            good=reviews.images,
            added=updated.added,
            found_added=updated.found_added,
            found_before=updated.found_before,
        ),
    )


def _open(images: Sequence[ReviewedImage], folder: Path, on_progress: OnProgress) -> GoodImages | None:
    """Write images to a folder and open them; None without any.

    Their scenes are stated by the names that the client gave the files.
    """
    if not images:
        return None
    folder.mkdir(parents=True)
    for image in images:
        (folder / image.name).write_bytes(image.file)
    opened = open_folder(folder, sorted(folder.iterdir()), on_progress)
    scene_names = {image.name: image.scene_name or image.name for image in images}
    return replace(opened, images=tuple(i._replace(scene_name=scene_names[i.name]) for i in opened.images))


def _read_result(folder: Path, request: str) -> Calibrated:
    """Return the result of an attempt that made the folder for the same request; raise `InputError` for any other."""
    marker = folder / REQUEST
    stored_request, _, result = marker.read_text().partition("\n") if marker.is_file() else ("", "", "")
    if stored_request != request or not result:
        raise InputError("name", f"a model {folder.name!r} already exists; choose another name.")
    return Calibrated.model_validate_json(result)


def _writable_directory(directories: Sequence[Path]) -> Path:
    """Return the first model directory that is writable; create it if its parent is."""
    for directory in directories:
        existing = directory if directory.exists() else directory.parent
        if existing.is_dir() and os.access(existing, os.W_OK):
            directory.mkdir(exist_ok=True)
            return directory
    log.error("no model directory is writable: %s", ", ".join(map(str, directories)))
    raise WorkerFault("no model directory of the worker is writable: the operator must make one of them writable.")
