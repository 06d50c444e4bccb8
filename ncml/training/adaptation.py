"""Calibrate a copy of a model on a small set of good images, at the model's size: `POST /calibrate`.

Each image is used either to estimate or to rank. If time is allowed (`ncml adapt --max-time`), the model is also
fine-tuned on a part of the images for estimation, and kept if it detects more; the rest of them then estimate. Ranking
images are used for nothing else, so p-values stay valid.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ncml import checkpoint
from ncml.calibration import descriptions
from ncml.calibration.descriptions import describe_suspects
from ncml.calibration.estimation import calibrate
from ncml.calibration.held_out_power import generate_foreign
from ncml.data.blocks import one_of_each_block
from ncml.data.dataset import Dataset
from ncml.errors import InputError, TrainingError
from ncml.limits import MIN_ESTIMATION_IMAGES
from ncml.model import Model, load
from ncml.ood.calibration import Calibration
from ncml.ood.conformal import check_total, min_ranks
from ncml.paths import check_space
from ncml.progress import OnProgress, Progress, ignore_progress
from ncml.runtime import reuse_freed_memory
from ncml.training.distributed import ProcessGroup
from ncml.training.precision import without_emulation
from ncml.training.run import MARGIN
from ncml.training.trainer import Trainer
from ncml.training.transfer import start_from

ESTIMATION_SHARE = 2 / 7
"""Share of the images that are used to estimate, but at least `MIN_ESTIMATION_IMAGES` images."""

POWER_IMAGES = 60
"""Number of ranking images on which power is measured; the 100 of `ncml calibrate` would take most of the time."""

CALIBRATION_BYTES = 1000
"""Bytes of a calibration for each image, at least: the bundled model's have about 200."""

TRAINING_SHARE = 0.6
"""Share of the images for estimation on which the model is fine-tuned; the others decide whether it is kept, and then
estimate."""


@dataclass(frozen=True)
class AdaptedModel:
    """A model folder, and its calibration on images like those that it was adapted to."""

    folder: Path
    calibration: Calibration
    fine_tuned: bool


def adapt(
    model: Model,
    data: Dataset,
    out: Path,
    *,
    false_positive_rate: float = 0.05,
    max_seconds: float = 0.0,
    names: Sequence[str] = (),
    device: str = "cpu",
    batch_size: int = 32,
    on_message: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = ignore_progress,
) -> AdaptedModel:
    """Calibrate a copy of a model on good images that it was not trained on; fine-tune it first if that detects more.

    max_seconds: time for fine-tuning; 0: none.
    names: names of the images, for the report on those that are unlike the others.
    batch_size: number of images that the calibration measures at once.
    on_message: called with each decision.
    Raises `InputError` for too few images, for images that are all equal, and for a folder `out` of something else;
    `OSError` for a disk without space for the copy, before anything is computed.
    """
    checkpoint.check_copy(model.folder, out, changing=max_seconds > 0)
    check_space(out, checkpoint.copy_bytes(model.folder) + CALIBRATION_BYTES * len(data))
    estimating, ranking = split(data, false_positive_rate)
    on_message(f"{len(estimating)} images are used to estimate, {len(ranking)} to rank")
    training = selecting = estimating
    if max_seconds:
        training, selecting = _divide(estimating, math.ceil(TRAINING_SHARE * len(estimating)))
        _check_fine_tuning(model, training, selecting, false_positive_rate)
    foreign = generate_foreign(model, on_progress)
    selected, fine_tuned = model, False
    with contextlib.ExitStack() as stack:  # which keeps the files of the candidate until the selected model is copied
        if max_seconds:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            candidate = _fine_tune(model, training, Path(folder) / out.resolve().name, max_seconds, device, on_progress)
            before, after = (
                _detected(m, selecting, false_positive_rate, batch_size, on_progress) for m in (model, candidate)
            )
            fine_tuned = after > before
            on_message(
                f"fine-tuned on {len(training)} images, the model detects {after:.0%} of the standard alterations "
                f"instead of {before:.0%}: {'kept' if fine_tuned else 'not kept'}"
            )
            if fine_tuned:
                selected, estimating = candidate, selecting
        suspects: list[int] = []

        def add_suspects(stage: str, positions: list[int]) -> None:
            part = estimating if stage == "fit" else ranking
            suspects.extend(part.positions_N[positions].tolist())

        calibration = calibrate(
            selected,
            estimating.images_NHWC,
            ranking.images_NHWC,
            false_positive_rate=false_positive_rate,
            power_images=POWER_IMAGES,
            foreign=foreign,
            prior=model.calibration,
            on_suspicious=add_suspects,
            batch_size=batch_size,
            on_progress=on_progress,
        )
        if suspects:
            on_message(describe_suspects([names[i] if names else f"image {i}" for i in sorted(suspects)], len(data)))
        checkpoint.copy(selected.folder, out)
    descriptions.save(calibration, out)
    return AdaptedModel(out, calibration, fine_tuned)


def split(data: Dataset, false_positive_rate: float) -> tuple[Dataset, Dataset]:
    """Return the estimating and the ranking part of good images, each spread over the folder."""
    check_total(len(data), false_positive_rate)
    images_NHWC = data.images_NHWC
    if bool((images_NHWC == images_NHWC[:1]).all()):
        raise InputError("data", "all images are equal: use images that show how good ones differ.")
    min_count = min_ranks(1, false_positive_rate)
    return _divide(data, max(MIN_ESTIMATION_IMAGES, min(len(data) - min_count, round(ESTIMATION_SHARE * len(data)))))


def _divide(data: Dataset, count: int) -> tuple[Dataset, Dataset]:
    """Return `count` images, one of each of as many consecutive blocks, and the others."""
    is_first = torch.zeros(len(data), dtype=torch.bool)
    is_first[torch.from_numpy(one_of_each_block(len(data), count))] = True
    return data.take(is_first.nonzero().flatten()), data.take((~is_first).nonzero().flatten())


def _check_fine_tuning(model: Model, training: Dataset, selecting: Dataset, false_positive_rate: float) -> None:
    """Raise `InputError` for too few images to train a batch, or to decide whether the result is kept."""
    batch_size = model.config.training.batch_size
    for part, min_count, purpose in (
        (training, batch_size, "for a training batch"),
        (selecting, MIN_ESTIMATION_IMAGES + min_ranks(1, false_positive_rate), "to decide whether the result is kept"),
    ):
        if len(part) < min_count:
            raise InputError(
                "max-time",
                f"there are too few images to fine-tune: {len(part)} of the {min_count} {purpose}; omit --max-time.",
            )


def _fine_tune(
    model: Model, data: Dataset, folder: Path, max_seconds: float, device: str, on_progress: OnProgress
) -> Model:
    """Train a copy of the model on images for `max_seconds`, but at least one step, and return it."""
    started = time.monotonic()
    reuse_freed_memory()
    group = ProcessGroup(device=device)
    config = replace(
        model.config, model=replace(model.config.model, classes=data.classes if model.config.generates else ())
    )
    trainer = Trainer(
        without_emulation(config, group),
        data,
        initialize=lambda network: start_from(network, model.network, model.name),
        group=group,
    )
    step_seconds = trainer.measure_step_seconds()
    seconds_left = started + max_seconds - time.monotonic()
    length = config.training.batch_size * max(1, int(MARGIN * seconds_left / step_seconds))
    trainer.set_length(length)
    while not trainer.finished:
        try:
            trainer.train_step()
        except TrainingError as error:
            raise InputError("max-time", "fine-tuning diverged on these images: omit --max-time.") from error
        on_progress(Progress("fine-tune", trainer.images_seen, length))
        if time.monotonic() - started >= max_seconds:
            break
    card = f"# {folder.name}\n\nThe model {model.name} {model.version[:12]}, fine-tuned on {len(data)} images.\n"
    metrics = {checkpoint.FINE_TUNED: len(data)}
    checkpoint.save(folder, trainer.ema, card=card, sampling=model.sampling, metrics=metrics)
    return load(folder, device)


def _detected(
    model: Model, images: Dataset, false_positive_rate: float, batch_size: int, on_progress: OnProgress
) -> float:
    """Return the share of the standard alterations that a calibration on these images detects."""
    estimating, ranking = split(images, false_positive_rate)
    calibration = calibrate(
        model,
        estimating.images_NHWC,
        ranking.images_NHWC,
        false_positive_rate=false_positive_rate,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    assert calibration.power is not None
    return calibration.power.detected
