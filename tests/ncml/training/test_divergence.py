"""A loss that rises, but stays finite: the run returns to its saved state."""

import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ncml.data.dataset import Dataset
from ncml.errors import TrainingError
from ncml.recipes import smoke
from ncml.training import loop
from ncml.training.loop import train_loop
from ncml.training.objective import held_out_bits
from ncml.training.running_loss import MAX_RISE, SMALL_RISE, RunningLoss
from ncml.training.state import TrainingState
from ncml.training.trainer import MAX_RETURNS, Trainer
from tests.ncml import nets

BATCH, SAVED_AT = 32, 50
"""The batch size, and the step of the saved state: as many as `RunningLoss` needs."""


def trainer(steps: int) -> Trainer:
    training = replace(
        smoke().training, batch_size=BATCH, total_images=steps * BATCH, ema_images=320, cooldown_fraction=0.0
    )
    images = nets.images(64)
    labels = (images.float().mean((1, 2, 3)) > 127).long()
    return Trainer(replace(smoke(), training=training), Dataset(images, labels, ("dark", "light")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a run after `SAVED_AT` steps."""
    run, path = trainer(SAVED_AT), tmp_path_factory.mktemp("run") / "state.safetensors"
    for _ in range(SAVED_AT):
        run.train_step()
    run.save(path)
    return path


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved state."""
    return Path(shutil.copy(saved, tmp_path))


def resumed(path: Path, steps: int) -> Trainer:
    run = trainer(steps)
    run.resume(path, total_images=steps * BATCH)
    return run


def spoil(trainer: Trainer) -> None:
    """Make weights so large that the loss rises by bits."""
    with torch.no_grad():
        trainer.network.head.weight.mul_(30)


def test_a_run_whose_loss_rises_returns_to_its_saved_state(path: Path) -> None:
    run, messages = resumed(path, 70), []
    losses: dict[int, float] = {SAVED_AT: run.running_loss.mean}
    before = held_out_bits(run.ema, run.data)

    def on_step(run: Trainer, mean_loss: float, rate: float) -> None:
        losses[run.step] = mean_loss
        if run.step == 55:
            spoil(run)

    train_loop(run, path, held_out=run.data, on_step=on_step, on_message=messages.append)
    (message,) = messages
    left_out = int(message.rpartition(" ")[2].replace(",", "")) // BATCH
    assert 55 < left_out < 65
    assert message == (
        f"the loss rose from {losses[SAVED_AT]:.3f} to {losses[left_out]:.3f} bits/dim: training continues with the "
        f"weights saved after {SAVED_AT * BATCH:,} images, without those up to {left_out * BATCH:,}"
    )
    highest = max(losses[step] for step in range(SAVED_AT, 56))
    assert losses[left_out] > losses[SAVED_AT] + MAX_RISE > highest
    assert losses[left_out + 1] == pytest.approx(losses[SAVED_AT], abs=0.1)
    assert run.finished
    assert run.skipped_steps == left_out - SAVED_AT
    assert held_out_bits(run.ema, run.data) < before
    assert TrainingState.read(path).step == 70


def test_a_return_restores_weights_average_and_moments(path: Path) -> None:
    run = resumed(path, 100)
    parts = (run.network, run.average, run.optimizer)
    earlier = [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in parts]
    spoil(run)
    for _ in range(5):
        run.train_step()
    run.go_back(path)
    assert (run.step, run.skipped_steps, run.running_loss.rise) == (SAVED_AT + 5, 5, 0.0)
    for part, tensors in zip(parts, earlier, strict=True):
        assert part.state_dict().keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in part.state_dict().items())


def test_a_run_that_keeps_diverging_ends_and_leaves_its_last_state(path: Path) -> None:
    run, messages = resumed(path, 400), []
    before = path.read_bytes()

    def on_step(run: Trainer, mean_loss: float, rate: float) -> None:
        if run.step % 5 == 0:
            spoil(run)

    with pytest.raises(
        TrainingError,
        match=rf"diverged at step \d+ \(\d+ images\): the loss rose from .* to .* bits/dim, as it did after each of "
        rf"{MAX_RETURNS} returns to the state of {SAVED_AT * BATCH} images; the last saved state is intact: --resume "
        "with a lower --learning-rate",
    ):
        train_loop(run, path, held_out=run.data, on_step=on_step, on_message=messages.append)
    assert len(messages) == MAX_RETURNS
    assert path.read_bytes() == before


@pytest.mark.parametrize("rise", [0.0, (SMALL_RISE + MAX_RISE) / 2])
def test_a_state_is_saved_later_while_the_loss_is_higher(
    path: Path, monkeypatch: pytest.MonkeyPatch, rise: float
) -> None:
    """Not by a measurement, and by time only after twice as long as usual."""
    run = resumed(path, SAVED_AT + 5)
    run.running_loss.mean += rise
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 10.0 * run.step))
    saved_at: list[int] = []

    def on_step(run: Trainer, mean_loss: float, rate: float) -> None:
        saved_at.append(TrainingState.read(path).step - SAVED_AT)

    train_loop(run, path, held_out=run.data, interval=2 * BATCH, save_seconds=15, on_step=on_step)
    assert [row["images"] / BATCH - SAVED_AT for row in run.history] == [2, 4, 5]
    assert saved_at == ([0, 0, 0, 3, 4] if rise else [0, 0, 2, 2, 4])
    assert TrainingState.read(path).step == SAVED_AT + 5


@pytest.mark.parametrize("batch_size", [1, 4, 32, 64])
def test_the_losses_of_very_different_images_are_no_divergence(batch_size: int) -> None:
    """Images whose bits per dimension vary by 2, more than those of any dataset here."""
    generator = np.random.default_rng(batch_size)
    losses = generator.normal(4, 2 / math.sqrt(batch_size), 100_000).tolist()
    running, rises = RunningLoss(batch_size), []
    for step, loss in enumerate(losses):
        running.include(loss)
        if step % 500 == 3:
            running.note_saved()
        rises.append(running.rise)
    assert max(rise for rise in rises if not math.isnan(rise)) < MAX_RISE / 2


def test_the_running_mean() -> None:
    """A plain mean at first; then later steps weigh more. A loss that is not finite leaves it as it is."""
    running = RunningLoss(batch_size=32)
    assert math.isnan(running.mean)
    running.include(math.inf)
    assert math.isnan(running.mean)
    losses = [float(loss) for loss in np.random.default_rng(0).normal(5, 1, 49)]
    running = RunningLoss(batch_size=32)
    for loss in losses:
        running.include(loss)
    assert running.mean == pytest.approx(statistics.fmean(losses))
    running.note_saved()
    assert math.isnan(running.rise)  # too few steps to compare with
    for _ in range(100):
        running.include(3.0)
    assert running.mean == pytest.approx(3 + (statistics.fmean(losses) - 3) * 0.98**100, abs=1e-9)
    running.note_saved()
    running.include(math.nan)
    assert running.rise == 0
    running.include(running.saved + 5)
    assert running.rise == pytest.approx(0.1)
