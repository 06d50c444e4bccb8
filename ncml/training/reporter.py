"""What a run reports while it trains: its plan, a progress bar, trackers and sample grids."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ncml import checkpoint
from ncml.config import Config
from ncml.data.inventory import counted
from ncml.images import grid, to_png
from ncml.network.ncpn import NCPN
from ncml.network.sde import noise_at_end
from ncml.progress import OnProgress, Progress
from ncml.sampling.cached import sample_cached
from ncml.sampling.defaults import SamplingSettings
from ncml.sampling.sample import Plan, generate_images
from ncml.training.optimizer import learning_rate_share
from ncml.training.provenance import duration
from ncml.training.tracking import TensorBoard, Tracker
from ncml.training.trainer import Trainer

SAMPLES = 16
"""Number of images sampled at every measurement, with the same seeds each time."""

LOG_STEPS = 50
"""Number of steps between records of the training figures."""

YEAR_S = 365 * 86_400


def describe_plan(trainer: Trainer, step_seconds: float, max_seconds: float) -> str:
    """Return a sentence that states what will be computed and how long it will take."""
    training, group = trainer.config.training, trainer.group
    parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
    processors = counted(group.world_size, "process", "processes") if group.world_size > 1 else str(trainer.device)
    plan = f"{trainer.config.recipe}, {parameters:,} parameters, {training.precision} on {processors}: "
    remaining = training.total_images - trainer.images_seen
    if remaining <= 0:
        return plan + f"the run is finished after {trainer.images_seen:,} images; --max-images makes it longer"
    rate = training.batch_size / step_seconds
    seconds = remaining / rate
    plan += f"{remaining:,} images at {rate:,.3g} images/s take about {duration(seconds)}"
    if seconds > max_seconds:
        return plan + f"; it stops after {duration(max_seconds)}, and --resume continues it"
    if seconds > YEAR_S:  # the date below has no year
        return plan
    return plan + time.strftime(", until %H:%M on %d %B", time.localtime(time.time() + seconds))


class Reporter:
    """Updates the progress bar and the trackers of a run, and saves sample grids."""

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
        self.trackers: list[Tracker] = [TensorBoard(folder / "tensorboard", trainer.images_seen)]
        self.trackers += [create(folder, trainer.config) for create in trackers]

    def on_step(self, trainer: Trainer, mean_loss: float, rate: float) -> None:
        """Show the state after a step; record its figures every `LOG_STEPS`."""
        held_out = f", held-out {trainer.history[-1]['held_out_bpd']:.3f}" if trainer.history else ""
        total = trainer.config.training.total_images
        note = f"{mean_loss:.3f} bits/dim{held_out}, {rate:.3g} images/s"
        self.on_progress(Progress("train", min(trainer.images_seen, total), total, note))
        if trainer.step % LOG_STEPS == 0:
            training = trainer.config.training
            figures = {
                "train/bits_per_dim": mean_loss,
                "train/gradient_norm": float(trainer.grad_norm),
                "train/learning_rate": learning_rate_share(training, trainer.images_seen) * training.learning_rate,
                "train/skipped_steps": trainer.skipped_steps,
                "train/images_per_second": rate,
            }
            for tracker in self.trackers:
                tracker.scalars(trainer.images_seen, figures)

    def on_measurement(self, trainer: Trainer) -> None:
        """Record the held-out figure and a grid of samples."""
        images_seen = trainer.images_seen
        samples = grid(sample_images(trainer.ema, SAMPLES))
        checkpoint.replace_file(self.samples / f"{images_seen:010d}.png", lambda new: new.write_bytes(to_png(samples)))
        for tracker in self.trackers:
            tracker.scalars(images_seen, {"held_out/bits_per_dim": trainer.history[-1]["held_out_bpd"]})
            tracker.image(images_seen, "samples", samples)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.close()


def sample_images(network: NCPN, count: int) -> NDArray[np.uint8]:
    """Return images of the seeds 0, 1, ..., cycling through the classes and no class, uint8 [count, H, W, 3].

    They start at the largest noise that the network was trained with and take one Tweedie step; a network trained by
    maximum likelihood is sampled without noise.
    """
    config = network.config
    plan = Plan(
        seeds=list(range(count)),
        class_B=torch.arange(count) % (len(config.model.classes) + 1),
        settings=SamplingSettings(
            noise=noise_at_end(config.sde) if config.is_noise_conditional else 0.0, steps=1, solver="tweedie"
        ),
    )
    return generate_images(network, plan, sample_cached)
