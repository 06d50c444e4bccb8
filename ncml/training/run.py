"""From a recipe and a dataset to a model folder: what `ncml train` does."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ncml import checkpoint
from ncml.calibration.estimation import calibrate
from ncml.config import Config
from ncml.errors import InputError, TrainingError
from ncml.images import grid, to_png
from ncml.model import Model
from ncml.model import load as load_model
from ncml.network.ncpn import NCPN
from ncml.network.sde import end_time, grey_levels, process
from ncml.paths import printable
from ncml.progress import OnProgress, Progress, ignore_progress
from ncml.runtime import reuse_freed_memory, use_full_precision
from ncml.sampling.cached import incremental
from ncml.sampling.options import SamplingSettings
from ncml.sampling.sample import Plan, draw
from ncml.training import dataset
from ncml.training.distributed import Team
from ncml.training.inventory import counted
from ncml.training.provenance import duration, machine
from ncml.training.tracking import TensorBoard, Tracker
from ncml.training.trainer import ALONE, PLAIN, STATE, Execution, Trainer, held_out_bits, run, schedule
from ncml.training.transfer import start_from

MONITORED = 500
"""Held-out pictures that measure a run as it goes."""

CALIBRATED = (2_000, 5_000)
"""Pictures that fit the statistics, and that rank, at most: as many as CIFAR-10 has."""

DRAWN = 16
"""Pictures drawn at every interval, from the same seeds each time."""

LOGGED = 50
"""Steps from one line of figures to the next."""

YEAR = 365 * 86_400
"""Seconds."""

MARGIN = 0.9
"""Share of the time given that training is planned to take; machines slow down, and measuring takes time too."""


@dataclass(frozen=True)
class Fitted:
    """A finished run."""

    folder: Path
    version: str
    metrics: dict[str, float]
    calibrated: bool


def fit(
    config: Config,
    source: str,
    out: Path,
    *,
    command: str,
    images: int | None = None,
    resume: bool = False,
    init_from: Model | None = None,
    cooldown_from: Path | None = None,
    team: Team = ALONE,
    execution: Execution = PLAIN,
    max_seconds: float = math.inf,
    interval: int = 20_000,
    trackers: Sequence[Callable[[Path, Config], Tracker]] = (),
    say: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = ignore_progress,
) -> Fitted | None:
    """Train a model on the fit part of a dataset, write its folder with what was measured in its card, calibrate it.

    The parts calibration-fit and calibration-rank (`ncml.training.dataset`) are never trained on. A dataset with a test
    split is measured on it, any other on calibration-fit. Only the first process of a team returns what came of it.

    images: how many the run sees in all. None is what it was begun with, or what fits into `max_seconds`, or the
        recipe's. The learning rate falls to 0 by then.
    init_from: the model whose weights a new run begins with (`ncml.training.transfer`).
    cooldown_from: the folder of a run that this one branches off, with the learning rate falling to 0 by `images`.
    trackers: makers of further trackers, called with the run's folder and the configuration.
    say: is told a line at a time what was found and what is going to happen.
    """
    use_full_precision()
    reuse_freed_memory()
    state, run_folder = out / STATE, (out / STATE).parent
    _check_folder(out, resume)
    if cooldown_from is not None and not (cooldown_from / STATE).exists():
        raise InputError("cooldown-from", f"{cooldown_from} holds no training run; name the folder of one.")
    height, width = config.model.height, config.model.width
    if not team.first:
        team.wait()  # until the first has decoded the pictures
    pictures = dataset.load(source, height, width, keep=run_folder / "pictures", on_progress=on_progress)
    if team.first:
        team.wait()
    config = replace(config, model=replace(config.model, classes=pictures.classes))
    part, held_out = pictures.part("fit"), pictures.part("calibration-fit")
    for line in pictures.inventory.lines(height, width):
        say(line)
    if not len(part) or not len(held_out):
        raise InputError("data", f"{source} holds {counted(len(pictures), 'picture')}; 8 are the least to split.")

    def start(network: NCPN) -> None:
        if init_from is not None and not resume:
            start_from(network, init_from.network, init_from.name)

    trainer = Trainer(config, part, start=start, team=team, execution=execution)
    if resume:
        trainer.resume(state, images=images)
    elif cooldown_from is not None and images is not None:
        trainer.resume(cooldown_from / STATE)
        trainer.cool_down(images)
    elif images is not None:
        trainer.set_images(images)
    seconds = trainer.rehearse() / config.training.batch_size
    if images is None and not resume and max_seconds < math.inf and config.training.cooldown_fraction:
        fitting = int(team.total(MARGIN * max_seconds / seconds if team.first else 0.0))
        trainer.set_images(max(config.training.batch_size, min(fitting, trainer.config.training.total_images)))
    say(f"{len(part):,} to fit, {len(pictures) - len(part):,} held out for measuring and calibrating")
    say(_plan(trainer, seconds, max_seconds))
    watch = _Watch(trainer, run_folder, trackers, on_progress) if team.first else None
    try:
        run(
            trainer,
            state,
            held_out=(held_out.spread if dataset.of_pictures(source) else held_out.first)(MONITORED),
            interval=interval,
            max_seconds=max_seconds,
            report=watch.step if watch else lambda trainer, mean, rate: None,
            measured=watch.interval if watch else lambda trainer: None,
        )
    finally:
        if watch:
            watch.close()
    try:
        return _finish(trainer, source, pictures, out, command, say, on_progress)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"stopped before the model was measured; all {trainer.images} images are saved, and the same command with "
            "--resume goes on"
        ) from stop


def _finish(
    trainer: Trainer,
    source: str,
    pictures: dataset.Dataset,
    out: Path,
    command: str,
    say: Callable[[str], None],
    on_progress: OnProgress,
) -> Fitted | None:
    """Measure a trained network, write its folder, calibrate it."""
    team = trainer.team
    measured, what = _measured_on(source, pictures, out, team)
    key = "test_bpd" if what == "test" else "held_out_bpd"
    bits = held_out_bits(trainer.ema, measured, team=team, on_progress=on_progress)
    if not team.first:
        return None
    metrics = {key: round(bits, 4), "images_seen": trainer.images}
    card = card_of(trainer, command, pictures, metrics, what, len(measured))
    version = checkpoint.save(out, trainer.ema, metrics=metrics, card=card)
    return Fitted(out, version, metrics, _calibrate(out, pictures, team.device, say, on_progress))


def _check_folder(out: Path, resume: bool) -> None:
    """Refuse a folder that holds something else, before anything is read."""
    if printable(out) != str(out):
        raise InputError(
            "out", f"{printable(out)} is not UTF-8, which names of files for TensorBoard are: give another."
        )
    state = out / STATE
    if state.exists() and not resume:
        raise InputError("out", f"{out} holds a training run already; add --resume to go on, or give another folder.")
    if not state.exists() and (out / checkpoint.CONFIG).exists():
        raise InputError("out", f"{out} holds a finished model already; give another folder.")
    if resume and not state.exists():
        raise InputError("resume", f"{out} holds no training run to resume; leave --resume out to start one.")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError("out", f"{out} cannot be written: {nearest} is no folder, or not yours to write to.")


def _plan(trainer: Trainer, seconds: float, max_seconds: float) -> str:
    """What is going to be computed, and how long that takes."""
    training = trainer.config.training
    left = training.total_images - trainer.images
    parameters = sum(p.numel() for p in trainer.network.parameters())
    where = counted(trainer.team.size, "process", "processes") if trainer.team.size > 1 else str(trainer.device)
    told = f"{trainer.config.recipe}, {parameters:,} parameters, {training.precision} on {where}: "
    if left <= 0:
        return told + f"the run is finished after {trainer.images:,} images; --max-images makes it longer"
    needed = left * seconds
    told += f"{left:,} images at {1 / seconds:,.3g} a second take about {duration(needed)}"
    if needed > max_seconds:
        return told + f"; it stops after {duration(max_seconds)}, and --resume goes on"
    if needed > YEAR:  # the date is told without its year
        return told
    return told + time.strftime(", until %H:%M on %d %B", time.localtime(time.time() + needed))


class _Watch:
    """Tells the progress bar and the trackers of a run, and draws pictures with it."""

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        trackers: Sequence[Callable[[Path, Config], Tracker]],
        on_progress: OnProgress,
    ) -> None:
        self.on_progress = on_progress
        self.samples = folder / "samples"
        self.samples.mkdir(exist_ok=True)
        self.trackers: list[Tracker] = [TensorBoard(folder / "tensorboard", trainer.images)]
        self.trackers += [make(folder, trainer.config) for make in trackers]

    def step(self, trainer: Trainer, mean: float, rate: float) -> None:
        last = f", held-out {trainer.history[-1]['held_out_bpd']:.3f}" if trainer.history else ""
        total = trainer.config.training.total_images
        note = f"{mean:.3f} bits/dim{last}, {rate:.3g} images/s"
        self.on_progress(Progress("train", min(trainer.images, total), total, note))
        if trainer.step % LOGGED == 0:
            values = {
                "train/bits_per_dim": mean,
                "train/gradient_norm": float(trainer.norm),
                "train/learning_rate": schedule(trainer.config.training, trainer.images)
                * trainer.config.training.learning_rate,
                "train/skipped_steps": trainer.skipped_steps,
                "train/images_per_second": rate,
            }
            for tracker in self.trackers:
                tracker.scalars(trainer.images, values)

    def interval(self, trainer: Trainer) -> None:
        picture = grid(sample(trainer.ema, DRAWN))
        checkpoint.replace_file(
            self.samples / f"{trainer.images:010d}.png", lambda new: new.write_bytes(to_png(picture))
        )
        for tracker in self.trackers:
            tracker.scalars(trainer.images, {"held_out/bits_per_dim": trainer.history[-1]["held_out_bpd"]})
            tracker.picture(trainer.images, "samples", picture)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def sample(network: NCPN, count: int) -> NDArray[np.uint8]:
    """Pictures with the seeds 0, 1, ..., of each class in turn and of none, uint8 [count, H, W, 3].

    They begin at the most noise that the network was trained with and take one Tweedie step; at none, for one that was
    trained by maximum likelihood.
    """
    config = network.config
    most = grey_levels(process(config.sde), end_time(config.sde))
    plan = Plan(
        seeds=list(range(count)),
        class_B=torch.arange(count) % (len(config.model.classes) + 1),
        settings=SamplingSettings(
            noise=0.0 if config.training.clean_probability == 1 else most, steps=1, solver="tweedie"
        ),
    )
    return draw(network, plan, incremental)


def _calibrate(
    out: Path, pictures: dataset.Dataset, device: str, say: Callable[[str], None], on_progress: OnProgress
) -> bool:
    """Calibrate the model that was written, where there are pictures enough."""
    held_out = pictures.part("calibration-fit").spread(CALIBRATED[0])
    ranked = pictures.part("calibration-rank").spread(CALIBRATED[1])
    model = load_model(out, device)
    try:
        made = calibrate(model, held_out.images_NHWC, ranked.images_NHWC, on_progress=on_progress)
    except InputError as error:
        say(f"not calibrated, so `ncml score` gives no p-values: {error}")
        return False
    made.save(out)
    say(f"calibrated by {made.n_fit} and {made.n_rank} held-out pictures: the smallest p is {made.smallest_p:.2g}")
    return True


def _measured_on(source: str, pictures: dataset.Dataset, out: Path, team: Team) -> tuple[dataset.Dataset, str]:
    held_out = pictures.part("calibration-fit")
    if dataset.of_pictures(source):
        return held_out, "calibration-fit"
    height, width = pictures.store_NHWC.shape[1:3]
    if not team.first:
        team.wait()
    try:
        return dataset.load(source, height, width, split="test", keep=(out / STATE).with_name("test")), "test"
    except InputError:
        return held_out, "calibration-fit"
    finally:
        if team.first:
            team.wait()


def card_of(
    trainer: Trainer, command: str, pictures: dataset.Dataset, metrics: dict[str, float], what: str, count: int
) -> str:
    """The model card: what was done and measured, and nothing else."""
    config = trainer.config
    noise = grey_levels(process(config.sde), end_time(config.sde))
    parameters = sum(p.numel() for p in trainer.network.parameters())
    bpd = next(value for name, value in metrics.items() if name.endswith("bpd"))
    curve = "\n".join(
        f"| {row['images']:,.0f} | {row['train_bpd']:.3f} | {row['held_out_bpd']:.3f} |" for row in trainer.history
    )
    if not trainer.history:
        raise TrainingError("the run has not been measured; train for at least one step.")
    return f"""# {config.recipe}

NCPN of {parameters:,} parameters, {config.model.height}x{config.model.width}, trained by
{"maximum likelihood" if config.training.clean_probability == 1 else "noise conditional maximum likelihood"}
({config.sde.kind.upper()} process, noise up to {noise:.3g} grey levels,
{config.training.clean_probability:.0%} of the batches' mass at t = 0).

- Command: `{command}`
- Trained on: {len(trainer.data):,} of {len(pictures):,} pictures (the fit part), {trainer.images:,} images seen
- Wall time: {duration(trainer.seconds)} on {machine(trainer.device)}
- Classes: {", ".join(config.model.classes) or "none"}
- Orientations: {"all four: completes every half" if config.model.orientations else "identity: completes the top half"}
- **{bpd:.4f} bits/dim** at t = 0 on {count:,} pictures of {what}, averaged weights, no class given
- Written: {date.today().isoformat()}

Learning curve (training loss over all noise levels; held-out clean pictures, averaged weights, bits/dim):

| images | training | held-out |
|---|---|---|
{curve}
"""
