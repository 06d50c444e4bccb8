"""`ncml tune`."""

import math
from typing import Annotated, Any

from tyro.conf import arg

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
    check_source(data, split, is_training=True)
    use_threads(threads)
    loaded = load(description, device)
    from ncml.data import dataset
    from ncml.evaluation.recommendation import recommend

    with progress_bar() as on_progress:
        training_data = dataset.load(data, loaded.height, loaded.width, split=split, on_progress=on_progress)
        tuning = recommend(loaded, training_data, images=images, max_seconds=max_seconds, on_progress=on_progress)
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
