"""`ncml tune`."""

import math
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from ncml import checkpoint
from ncml.cli.terminal import (
    DeviceOption,
    JsonOption,
    ModelOption,
    ThreadsOption,
    check_threads,
    describe,
    identity,
    load,
    parse_duration,
    print_json,
    progress_bar,
    use_threads,
)
from ncml.data.sources import DEFAULT_SPLIT, check_source
from ncml.errors import InputError
from ncml.limits import MIN_TUNING_IMAGES
from ncml.options import name_defaults
from ncml.paths import check_output_folder
from ncml.progress import OnProgress

if TYPE_CHECKING:
    from ncml.evaluation.tuning import Tuning
    from ncml.model import Model

SECTION = "Default sampling options"
"""The section of the model card."""


def tune(
    *,
    data: Annotated[str, arg(metavar="FOLDER|NAME")],
    model: ModelOption = "",
    images: Annotated[int, arg(metavar="COUNT")] = 256,
    max_time: Annotated[str | None, arg(metavar="TIME", help_behavior_hint="(default: no limit)")] = None,
    split: Annotated[str, arg(metavar="NAME")] = DEFAULT_SPLIT,
    threads: ThreadsOption = 1,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Choose a model's default start noise, temperature and guidance by measuring images generated with each.

    The options are written to the model folder, with the measurements in its card. The model's version, weights and
    scores do not change.

    Args:
        data: The model's training data: folder of images, folder of parquet files, or Hub name.
        model: Name or folder of the model.
        images: Images generated with each candidate.
        max_time: Time after which no further candidate is measured, such as 90s, 45m or 12h.
        split: Split of a parquet folder or Hub dataset.
        device: Device to compute on: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    max_seconds = math.inf if max_time is None else parse_duration(max_time)
    check_threads(threads)
    if images < MIN_TUNING_IMAGES:
        raise InputError("images", f"--images must be at least {MIN_TUNING_IMAGES}, not {images}.")
    description = describe(model, device)
    check_output_folder(description.folder, "model")
    check_source(data, split)
    if checkpoint.FINE_TUNED in description.metrics:
        detail = f"{description.name} was fine-tuned by ncml adapt on images that its parts do not exclude"
        raise InputError("model", f"{detail}: tune the model that it was fine-tuned from.")
    use_threads(threads)
    loaded = load(description, device)
    with progress_bar() as on_progress:
        tuning = tune_folder(loaded, data, split, images, max_seconds, on_progress)
    if as_json:
        result: dict[str, Any] = {
            "sampling": name_defaults(tuning.best.options),
            "features": tuning.features,
            "candidates": [candidate.to_json() for candidate in tuning.candidates],
            "confirmation": tuning.confirmation.to_json(),
        }
        print_json({"model": identity(loaded)} | result)
        return
    from ncml.evaluation.report import Table

    caption = f"{loaded.name}: {images} images for each candidate, features of {tuning.features}"
    Table("tuning", caption, tuning.header, [candidate.cells() for candidate in tuning.candidates]).show()
    print(tuning.confirmation_text())
    print(f"{loaded.folder}: {tuning.summary()}")


def tune_folder(
    model: "Model",
    data: str,
    split: str,
    images: int,
    max_seconds: float,
    on_progress: OnProgress,
    cache_folder: Path | None = None,
) -> "Tuning":
    """Tune a model, and write the chosen options and the measurements to its folder.

    cache_folder: folder with the decoded images of the training run.
    """
    from ncml.data import dataset
    from ncml.evaluation.tuning import tune
    from ncml.training.provenance import machine

    images_of_data = dataset.load(
        data, model.height, model.width, split=split, cache_folder=cache_folder, on_progress=on_progress
    )
    tuning = tune(model, images_of_data, images=images, max_seconds=max_seconds, on_progress=on_progress)
    checkpoint.write_sampling(model.folder, tuning.best.options)
    checkpoint.add_metrics(model.folder, tuning.metrics())
    provenance = f"Measured on {machine(model.device)}, {date.today().isoformat()} (`ncml tune`)."
    checkpoint.write_card_section(model.folder, SECTION, f"{tuning.card_section()}\n{provenance}")
    return tuning
