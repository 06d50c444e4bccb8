"""`ncml adapt`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ncml.checkpoint import check_copy
from ncml.cli.terminal import (
    DeviceOption,
    JsonOption,
    ModelOption,
    describe,
    load,
    parse_duration,
    print_json,
    progress_bar,
)
from ncml.data.sources import open_source, readable_rows
from ncml.ood.conformal import check_rate


def adapt(
    data: Annotated[Positional[Path], arg(metavar="FOLDER")],
    /,
    *,
    out: Annotated[Path, arg(metavar="FOLDER")],
    model: ModelOption = "",
    max_time: Annotated[str | None, arg(metavar="TIME", help_behavior_hint="(default: no fine-tuning)")] = None,
    false_positive_rate: Annotated[float, arg(metavar="RATE")] = 0.05,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Make a detector from a folder of good images: a copy of a model, calibrated on them, and its measured power.

    Each image is used either to estimate the statistics or to rank. With --max-time, the model is also fine-tuned, and
    the result is kept only if it detects more.

    Args:
        data: Folder of at least 39 good images that the model was not trained on.
        out: Model folder to write; its name becomes the model's name. If it holds the same weights already, its
            default calibration is replaced.
        model: Name or folder of the model to start from.
        max_time: Time for fine-tuning, such as 90s or 10m.
        false_positive_rate: Share of good images that are flagged.
        device: Device to compute on: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    max_seconds = 0.0 if max_time is None else parse_duration(max_time)
    check_rate(false_positive_rate)
    description = describe(model, device)
    check_copy(description.folder, out, changing=max_seconds > 0)
    source = open_source(str(data), "train")
    loaded = load(description, device)
    from ncml.calibration import report
    from ncml.data import dataset
    from ncml.training.adapt import adapt as adapt_model

    def print_message(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with progress_bar() as on_progress:
        images = dataset.load(source, loaded.height, loaded.width, on_progress=on_progress)
        for line in images.inventory.lines(loaded.height, loaded.width):
            print_message(line)
        adapted = adapt_model(
            loaded,
            images,
            out,
            false_positive_rate=false_positive_rate,
            max_seconds=max_seconds,
            names=[row.name for row in readable_rows(source, images.inventory.unreadable_rows)],
            device=device,
            on_message=print_message,
            on_progress=on_progress,
        )
    calibration = adapted.calibration
    if as_json:
        power = None if calibration.power is None else calibration.power.to_json()
        result = {"folder": str(adapted.folder), "fine_tuned": adapted.fine_tuned, "calibration": calibration.version}
        result |= {"n_fit": calibration.n_fit, "n_rank": calibration.n_rank, "smallest_p": calibration.smallest_p}
        print_json(result | {"power": power, "weakness": calibration.weakness})
    else:
        print(f"{adapted.folder}: estimated on {calibration.n_fit} images, ranked by {calibration.n_rank}")
        command = f"ncml calibrate --model {shlex.quote(str(adapted.folder))} --unseen --name tolerant --data"
        remedy = f"add a calibration: {command} {shlex.quote(str(data))}"
        if adapted.fine_tuned:  # on some of these images
            remedy = f"add a calibration on other good images: {command} FOLDER"
        print(*report.describe(calibration, remedy=remedy), sep="\n")
        print(f"try: ncml score IMAGE --model {shlex.quote(str(adapted.folder))}", file=sys.stderr)
