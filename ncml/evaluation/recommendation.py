"""The sampling options that a model folder recommends: tuned, and written to the folder and its card."""

from __future__ import annotations

import math
from datetime import date

from ncml import checkpoint
from ncml.data.dataset import Dataset
from ncml.errors import InputError
from ncml.evaluation.tuning import IMAGES, Tuning, tune
from ncml.model import Model, load
from ncml.progress import OnProgress, ignore_progress
from ncml.training.finish import TrainedModel
from ncml.training.provenance import machine

SECTION = "Default sampling options"
"""The section of the model card."""

TIME_SHARE, MIN_SECONDS = 0.1, 60.0
"""Tuning a new model takes this share of the training time, and is skipped if that is less than a minute."""


def recommend(
    model: Model,
    data: Dataset,
    *,
    images: int = IMAGES,
    max_seconds: float = math.inf,
    on_progress: OnProgress = ignore_progress,
) -> Tuning:
    """Tune a model, and write the chosen options and the measurements to its folder.

    data: the images of the training run, held-out ones included. images: generated with each candidate.
    """
    tuning = tune(model, data, images=images, max_seconds=max_seconds, on_progress=on_progress)
    checkpoint.write_sampling(model.folder, tuning.best.options)
    checkpoint.add_metrics(model.folder, tuning.metrics())
    provenance = f"Measured on {machine(model.device)}, {date.today().isoformat()} (`ncml tune`)."
    checkpoint.write_card_section(model.folder, SECTION, f"{tuning.card_section()}\n{provenance}")
    return tuning


def recommend_after(trained: TrainedModel, *, device: str = "cpu", on_progress: OnProgress = ignore_progress) -> str:
    """Tune the model of a finished run if its training took long enough, and return the outcome in one line.

    Returns "" if there is nothing to tune: for a model that only scores, one of crops, and one that was tuned before.
    """
    description = checkpoint.describe(trained.folder)
    config, max_seconds = description.config, TIME_SHARE * trained.seconds
    is_tuned = "sampling" in checkpoint.read_json(trained.folder / checkpoint.CONFIG)
    if not config.generates or config.training.crop is not None or is_tuned or max_seconds < MIN_SECONDS:
        return ""
    try:
        model = load(description.folder, device)
        tuning = recommend(model, trained.data, images=IMAGES, max_seconds=max_seconds, on_progress=on_progress)
    except InputError as error:
        return f"sampling options are not tuned: {error}"
    return f"sampling options: {tuning.summary()}"
