"""From a recipe and a dataset to a model folder: what `ncml train` does."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch

from ncml import checkpoint, data
from ncml.config import Config
from ncml.errors import InputError, TrainingError
from ncml.memory import reuse_freed_memory
from ncml.model import Model
from ncml.network import NCPN
from ncml.noise import end_time, grey_levels, process
from ncml.train import STATE, Trainer, held_out_bits, run
from ncml.transfer import start_from

MONITORED = 500
"""Held-out pictures that measure a run as it goes."""

Bar = Callable[[str, int, int, str], None]
"""(stage, done, total, note): what a progress bar shows."""


@dataclass(frozen=True)
class Fitted:
    """A finished run."""

    folder: Path
    version: str
    metrics: dict[str, float]


def fit(
    config: Config,
    source: str,
    out: Path,
    *,
    command: str,
    resume: bool = False,
    init_from: Model | None = None,
    device: str = "cpu",
    max_seconds: float = math.inf,
    interval: int = 20_000,
    bar: Bar = lambda stage, done, total, note: None,
) -> Fitted:
    """Train a model on the fit part of a dataset and write its folder, with what was measured in its card.

    The parts calibration-fit and calibration-rank (`ncml.data`) are never trained on. A dataset with a test split is
    measured on it, any other on calibration-fit.

    init_from: the model whose weights a new run begins with (`ncml.transfer`).
    """
    reuse_freed_memory()
    state = out / STATE
    if state.exists() and not resume:
        raise InputError("out", f"{out} holds a training run already; add --resume to go on, or give another folder.")
    if not state.exists() and (out / checkpoint.CONFIG).exists():
        raise InputError("out", f"{out} holds a finished model already; give another folder.")
    if resume and not state.exists():
        raise InputError("resume", f"{out} holds no training run to resume; leave --resume out to start one.")
    height, width = config.model.height, config.model.width
    pictures = data.load(source, height, width, report=lambda done, total: bar("read", done, total, ""))
    config = replace(config, model=replace(config.model, classes=pictures.classes))
    part, held_out = pictures.part("fit"), pictures.part("calibration-fit")
    if not len(part) or not len(held_out):
        raise InputError("data", f"{source} has {len(pictures)} pictures; 8 are the least that can be split.")

    def start(network: NCPN) -> None:
        if init_from is not None and not resume:
            start_from(network, init_from.network, init_from.name)

    trainer = Trainer(config, part, device=device, start=start)
    if resume:
        trainer.resume(state)

    def report(trainer: Trainer, mean: float, rate: float) -> None:
        last = f", held-out {trainer.history[-1]['held_out_bpd']:.3f}" if trainer.history else ""
        note = f"{mean:.3f} bits/dim{last}, {rate:.0f} images/s"
        bar("train", trainer.images, config.training.images, note)

    run(
        trainer,
        state,
        held_out=held_out.first(MONITORED),
        interval=interval,
        max_seconds=max_seconds,
        report=report,
    )
    measured, what = _measured_on(source, height, width, held_out)
    done = 0

    def measuring(count: int) -> None:
        nonlocal done
        done += count
        bar("measure", done, len(measured), "")

    key = "test_bpd" if what == "test" else "held_out_bpd"
    metrics = {key: round(held_out_bits(trainer.ema, measured, report=measuring), 4), "images_seen": trainer.images}
    card = card_of(trainer, command, pictures, metrics, what, len(measured))
    version = checkpoint.save(out, trainer.ema, metrics=metrics, card=card)
    return Fitted(out, version, metrics)


def _measured_on(source: str, height: int, width: int, held_out: data.Dataset) -> tuple[data.Dataset, str]:
    if Path(source).is_dir() and not any(Path(source).rglob("*.parquet")):
        return held_out, "calibration-fit"
    try:
        return data.load(source, height, width, split="test"), "test"
    except InputError:
        return held_out, "calibration-fit"


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def card_of(
    trainer: Trainer, command: str, pictures: data.Dataset, metrics: dict[str, float], what: str, count: int
) -> str:
    """The model card: what was done and measured, and nothing else."""
    config = trainer.config
    noise = grey_levels(process(config.noise), end_time(config.noise))
    parameters = sum(p.numel() for p in trainer.network.parameters())
    bpd = next(value for name, value in metrics.items() if name.endswith("bpd"))
    device = torch.cuda.get_device_name() if trainer.device.type == "cuda" else _processor()
    curve = "\n".join(
        f"| {row['images']:,.0f} | {row['train_bpd']:.3f} | {row['held_out_bpd']:.3f} |" for row in trainer.history
    )
    if not trainer.history:
        raise TrainingError("the run has not been measured; train for at least one step.")
    return f"""# {config.recipe}

NCPN of {parameters:,} parameters, {config.model.height}x{config.model.width}, trained by
{"maximum likelihood" if config.training.clean_mass == 1 else "noise conditional maximum likelihood"}
({config.noise.process.upper()} process, noise up to {noise:.3g} grey levels,
{config.training.clean_mass:.0%} of the batches' mass at t = 0).

- Command: `{command}`
- Trained on: {len(trainer.data):,} of {len(pictures):,} pictures (the fit part), {trainer.images:,} images seen
- Wall time: {trainer.seconds / 3600:.2f} h on {device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}
- Classes: {", ".join(config.model.classes) or "none"}
- Orientations: {"all four: completes every half" if config.model.orientations else "identity: completes the top half"}
- **{bpd:.4f} bits/dim** at t = 0 on {count:,} pictures of {what}, averaged weights, no class given
- Written: {date.today().isoformat()}

Learning curve (training loss over all noise levels; held-out clean pictures, averaged weights, bits/dim):

| images | training | held-out |
|---|---|---|
{curve}
"""
