"""`ncml train`: make a model folder from a recipe and a dataset."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ncml.config import Config
from ncml.data import dataset
from ncml.data.dataset import Dataset
from ncml.data.inventory import counted
from ncml.data.sources import is_image_folder
from ncml.errors import InputError, TrainingError
from ncml.model import Model
from ncml.network.ncpn import NCPN
from ncml.progress import OnProgress, ignore_progress
from ncml.runtime import reuse_freed_memory, use_full_precision
from ncml.training.distributed import SINGLE_PROCESS, ProcessGroup
from ncml.training.finish import MONITORED, TrainedModel, TrainedRun
from ncml.training.folder import IMAGE_CACHE, STATE, check_folder, exclusive
from ncml.training.loop import train_loop
from ncml.training.reporter import Reporter, describe_plan
from ncml.training.state import OPTIONS, check_same_run, read_config
from ncml.training.tracking import Tracker
from ncml.training.trainer import DEFAULT_EXECUTION, Execution, Trainer
from ncml.training.transfer import check_shape, start_from

MARGIN = 0.9
"""Share of the available time that training is planned to take: machines slow down, and measuring takes time too."""


def train(
    config: Config,
    source: str,
    out: Path,
    *,
    command: str,
    total_images: int | None = None,
    resume: bool = False,
    init_from: Model | None = None,
    cooldown_from: Path | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    execution: Execution = DEFAULT_EXECUTION,
    max_seconds: float = math.inf,
    interval: int = 20_000,
    trackers: Sequence[Callable[[Path, Config], Tracker]] = (),
    on_message: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = ignore_progress,
) -> TrainedModel | None:
    """Train a model on the fit part of a dataset, write its folder and card, and calibrate it.

    The parts calibration-fit and calibration-rank (`ncml.data.dataset`) are never trained on. A dataset with a test
    split is measured on it; any other, and crops, on calibration-fit. Only rank 0 returns the model.

    total_images: the run's length. None: that of the resumed run, or what fits into `max_seconds`, or the recipe's. The
        learning rate falls to 0 by then.
    init_from: the model whose weights a new run starts with (`ncml.training.transfer`); a resumed one ignores it.
    cooldown_from: the folder of a run that this one branches off, with the learning rate falling to 0 by
        `total_images`.
    trackers: factories of further trackers, called with the run's folder and the configuration.
    on_message: called with each line of the report on the dataset and the plan.
    """
    use_full_precision()
    reuse_freed_memory()
    _check(config)
    execution.check(config.training.batch_size, group.world_size)
    state = out / STATE
    check_folder(
        out,
        source,
        resume=resume,
        cooldown_from=cooldown_from,
        total_images=total_images,
        has_initial_model=init_from is not None,
    )
    if init_from is not None and not resume:
        check_shape(config, init_from.config, init_from.name)
    with exclusive(out) if group.is_main else contextlib.nullcontext():
        continued = out if resume else cooldown_from
        split = None if continued is None else _read_split(continued / STATE, config)
        data, config = _load_data(config, source, out, split, group, on_progress)
        for line in data.inventory.lines(config.model.height, config.model.width, data.crops):
            on_message(line)
        training_part, held_out = _parts(data, config.training.split, source)

        def initialize(network: NCPN) -> None:
            if init_from is not None and not resume:
                start_from(network, init_from.network, init_from.name)

        trainer = Trainer(config, training_part, initialize=initialize, group=group, execution=execution)
        if init_from is not None:
            trainer.starting_model = f"{init_from.name}@{init_from.version[:12]}"
        if resume:
            trainer.resume(state, total_images=total_images)
        elif cooldown_from is not None and total_images is not None:
            trainer.resume(cooldown_from / STATE)
            trainer.cool_down(total_images)
        elif total_images is not None:
            trainer.set_length(total_images)
        step_seconds = trainer.measure_step_seconds()
        if total_images is None and not resume and max_seconds < math.inf and config.training.cooldown_fraction:
            _shorten(trainer, step_seconds, max_seconds)
        training_count, count = len(training_part) // data.crops, len(data) // data.crops
        on_message(
            f"{training_count:,} for training, {count - training_count:,} held out for measurement and calibration"
        )
        if count < dataset.MIN_CALIBRATED:
            on_message(
                f"too few images for verdicts, which need {dataset.MIN_CALIBRATED}: the model will only return scores; "
                "`ncml adapt` makes a detector from fewer"
            )
        on_message(describe_plan(trainer, step_seconds, max_seconds))
        monitored = (held_out.spread if is_image_folder(source) else held_out.first)(MONITORED)
        _run_loop(trainer, out, monitored, interval, max_seconds, trackers, on_message, on_progress)
        try:
            return TrainedRun(trainer, source, data, out, command, on_message, on_progress).finish()
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"stopped before the model was measured and calibrated; all {trainer.images_seen} images are saved; "
                "add --resume to the command to continue"
            ) from stop
        except OSError as error:
            raise TrainingError(
                f"the model cannot be written to {out} ({error.strerror or error}); all {trainer.images_seen} images "
                "are saved: free disk space, and add --resume to the command."
            ) from error


def _read_split(state: Path, config: Config) -> int:
    """Return the split of a saved run; raise TrainingError for another one, whose decoded images would be replaced.

    The classes are compared only when the images are read.
    """
    saved = read_config(state)
    model = replace(config.model, classes=saved.model.classes)
    training = replace(config.training, split=saved.training.split)
    check_same_run(state, saved, replace(config, model=model, training=training))
    return saved.training.split


def _load_data(
    config: Config, source: str, out: Path, split: int | None, group: ProcessGroup, on_progress: OnProgress
) -> tuple[Dataset, Config]:
    """Return the dataset, and the configuration with its classes and split; `split` is that of an earlier run.

    A model that only scores has no classes.
    """
    with group.main_first():  # rank 0 decodes the images, the others map the result
        data = dataset.load(
            source,
            config.model.height,
            config.model.width,
            cache_folder=out / IMAGE_CACHE,
            crop=config.training.crop,
            on_progress=on_progress,
        )
    if split is None:
        split = dataset.split_for(len(data) // data.crops)
    model = replace(config.model, classes=data.classes if config.generates else ())
    config = replace(config, model=model, training=replace(config.training, split=split))
    _check(config)  # the names of the classes
    return data, config


def _parts(data: Dataset, split: int, source: str) -> tuple[Dataset, Dataset]:
    """Return the images for training and those to measure on; raise InputError if there are none of either."""
    training_part, held_out = data.part("fit", split), data.part("calibration-fit", split)
    if not len(training_part) or not len(held_out):
        images = counted(len(data) // data.crops, "image")
        raise InputError("data", f"{source} holds {images}; at least 8 are needed to split them.")
    return training_part, held_out


def _shorten(trainer: Trainer, step_seconds: float, max_seconds: float) -> None:
    """Plan no more images than fit into `max_seconds`, so that the learning rate falls to 0 in time."""
    batch_size, group = trainer.config.training.batch_size, trainer.group
    affordable = group.all_reduce(MARGIN * max_seconds / step_seconds if group.is_main else 0.0) * batch_size
    trainer.set_length(max(batch_size, min(int(affordable), trainer.config.training.total_images)))


def _run_loop(
    trainer: Trainer,
    out: Path,
    monitored: Dataset,
    interval: int,
    max_seconds: float,
    trackers: Sequence[Callable[[Path, Config], Tracker]],
    on_message: Callable[[str], None],
    on_progress: OnProgress,
) -> None:
    """Train until the run is finished or the time is up; rank 0 reports."""
    state = out / STATE
    reporter = Reporter(trainer, state.parent, trackers, on_progress) if trainer.group.is_main else None
    try:
        train_loop(
            trainer,
            state,
            held_out=monitored,
            interval=interval,
            max_seconds=max_seconds,
            on_step=reporter.on_step if reporter else lambda trainer, mean_loss, rate: None,
            on_measurement=reporter.on_measurement if reporter else lambda trainer: None,
            on_message=on_message,
        )
    finally:
        if reporter:
            reporter.close()


def _check(config: Config) -> None:
    """Raise InputError for a configuration that no model folder may contain."""
    try:
        Config.from_json(config.to_json())
    except ValueError as error:
        name = str(error).partition(":")[0].split(".")[:2][-1]
        option = OPTIONS.get(name, name.replace("_", "-"))
        remedy = "rename the class folders" if option == "data" else "choose another value"
        raise InputError(option, f"--{option} cannot be used ({error}): {remedy}.") from error
