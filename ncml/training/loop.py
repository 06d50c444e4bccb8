"""The training loop: steps, measurements and saved states until the run is finished, out of time or stopped."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator
from pathlib import Path

from ncml.data.dataset import Dataset
from ncml.signals import handling
from ncml.training.objective import held_out_bits
from ncml.training.running_loss import MAX_RISE, SMALL_RISE
from ncml.training.trainer import Trainer

SAVE_SECONDS = 600.0
"""The state is saved this often; while the loss is higher than it was then, half as often."""


def train_loop(
    trainer: Trainer,
    path: Path,
    *,
    held_out: Dataset,
    interval: int = 20_000,
    max_seconds: float = math.inf,
    save_seconds: float = SAVE_SECONDS,
    on_step: Callable[[Trainer, float, float], None] = lambda trainer, mean_loss, rate: None,
    on_measurement: Callable[[Trainer], None] = lambda trainer: None,
    on_message: Callable[[str], None] = lambda line: None,
) -> None:
    """Train until the run is finished or the time is up; measure and save every `interval` images.

    SIGINT, SIGTERM and SIGHUP let the current step end, and raise KeyboardInterrupt once the state is saved. Nothing is
    measured then, because the process may soon be killed.

    A run whose loss rises by `MAX_RISE` returns to its saved state (`Trainer.go_back`). While the loss is higher by
    `SMALL_RISE`, a measurement does not save the state, and `save_seconds` are doubled, so that the state to return to
    is one from before the rise. A rise that takes longer, and one during which the run is stopped, is saved.

    path: file of the state, also saved every `save_seconds`, so that a crash loses at most twice this time.
    on_step: called after every step with the trainer, a running mean of the loss in bits per dimension, and images per
        second.
    on_measurement: called when a row has been added to the trainer's history.
    on_message: called with a sentence when the run has returned to its saved state.
    """
    group = trainer.group
    start, seconds_before, images_before = time.monotonic(), trainer.seconds, trainer.images_seen
    saved_at, saved_step = start, trainer.step if trainer.saved else None

    def save() -> None:
        nonlocal saved_at, saved_step
        trainer.seconds = seconds_before + time.monotonic() - start
        trainer.save(path)
        saved_at, saved_step = time.monotonic(), trainer.step

    def is_rising() -> bool:
        return trainer.running_loss.rise > SMALL_RISE

    def measure() -> None:
        trainer.history.append(
            {
                "images": trainer.images_seen,
                "seconds": round(seconds_before + time.monotonic() - start),
                "train_bpd": round(trainer.running_loss.mean, 4),
                "held_out_bpd": round(held_out_bits(trainer.ema, held_out, group=group), 4),
            }
        )
        if not is_rising():
            save()
        on_measurement(trainer)

    with _collecting_signals() as signals:
        while not trainer.finished and not group.any(bool(signals) or time.monotonic() - start >= max_seconds):
            trainer.train_step()
            rate = (trainer.images_seen - images_before) / (time.monotonic() - start)
            on_step(trainer, trainer.running_loss.mean, rate)
            if trainer.running_loss.rise > MAX_RISE:
                on_message(trainer.go_back(path))
                saved_at = time.monotonic()
            if trainer.images_seen % interval < trainer.config.training.batch_size and not group.any(bool(signals)):
                measure()
            elif group.any(group.is_main and time.monotonic() - saved_at >= (2 if is_rising() else 1) * save_seconds):
                save()  # in every process at the same step, because `rise` is counted from here
        stopped = group.any(bool(signals))
        if not stopped and (not trainer.history or trainer.images_seen != trainer.history[-1]["images"]):
            measure()
            stopped = group.any(bool(signals))  # while it measured
        if saved_step != trainer.step:
            save()
    if stopped:
        raise KeyboardInterrupt(
            f"stopped after {trainer.images_seen} images, all saved; add --resume to the command to continue"
        )


@contextlib.contextmanager
def _collecting_signals() -> Generator[list[int]]:
    """Yield a list that collects requests to stop, which have no other effect, so that no step is interrupted."""
    signals: list[int] = []
    with handling(signals.append):
        yield signals
