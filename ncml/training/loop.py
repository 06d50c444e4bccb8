"""The training loop: steps, measurements and saved states until the run is finished, out of time or stopped."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

from ncml.data.dataset import Dataset
from ncml.signals import stop_signals
from ncml.training.objective import held_out_bits
from ncml.training.trainer import Trainer

SAVE_SECONDS = 600.0
"""The state is saved at least this often."""

SMOOTHING = 0.02
"""Weight of a step in the running mean of the loss."""


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
) -> None:
    """Train until the run is finished or the time is up; measure and save every `interval` images.

    SIGINT, SIGTERM and SIGHUP let the current step end, and raise KeyboardInterrupt once the state is saved. Nothing is
    measured then, because the process may soon be killed.

    path: file of the state, also saved every `save_seconds`, so that a crash loses at most this time.
    on_step: called after every step with the trainer, a running mean of the loss in bits per dimension, and images per
        second.
    on_measurement: called when a row has been added to the trainer's history.
    """
    group = trainer.group
    start, seconds_before, images_before = time.monotonic(), trainer.seconds, trainer.images_seen
    saved_at = start

    def save() -> None:
        nonlocal saved_at
        trainer.seconds = seconds_before + time.monotonic() - start
        if group.is_main:
            trainer.save(path)
        trainer.saved, saved_at = True, time.monotonic()  # in every process: rank 0 has written the file

    def measure() -> None:
        trainer.history.append(
            {
                "images": trainer.images_seen,
                "seconds": round(seconds_before + time.monotonic() - start),
                "train_bpd": round(trainer.mean_loss, 4),
                "held_out_bpd": round(held_out_bits(trainer.ema, held_out, group=group), 4),
            }
        )
        save()
        on_measurement(trainer)

    with _collecting_signals() as signals:
        while not trainer.finished and not group.any(bool(signals) or time.monotonic() - start >= max_seconds):
            loss = trainer.train_step()
            if math.isfinite(loss):
                earlier = loss if math.isnan(trainer.mean_loss) else trainer.mean_loss
                trainer.mean_loss = earlier + SMOOTHING * (loss - earlier)
            on_step(trainer, trainer.mean_loss, (trainer.images_seen - images_before) / (time.monotonic() - start))
            if trainer.images_seen % interval < trainer.config.training.batch_size and not group.any(bool(signals)):
                measure()
            elif time.monotonic() - saved_at >= save_seconds:
                save()
        stopped = group.any(bool(signals))
        if stopped:
            save()
        elif not trainer.history or trainer.images_seen != trainer.history[-1]["images"]:
            measure()
            stopped = group.any(bool(signals))  # while it measured
    if stopped:
        raise KeyboardInterrupt(
            f"stopped after {trainer.images_seen} images, all saved; add --resume to the command to continue"
        )


@contextlib.contextmanager
def _collecting_signals() -> Generator[list[int]]:
    """Yield a list that collects requests to stop, which have no other effect, so that no step is interrupted."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # handlers can be set in the main thread only
        yield signals
        return
    handlers = {
        number: signal.signal(number, lambda received, _: signals.append(received)) for number in stop_signals()
    }
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
