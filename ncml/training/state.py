"""The state of a training run: one safetensors file with all that an exact resume needs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ncml import checkpoint
from ncml.config import Config
from ncml.data.inventory import ImageOrder
from ncml.errors import ModelError, TrainingError

KEPT = ("total_images", "cooldown_fraction", "ema_images")
"""Training settings that a resumed run takes from its state rather than from the configuration."""

CHANGEABLE = (*KEPT, "learning_rate", "muon_learning_rate", "precision")
"""Training settings that may differ between a run and the configuration that it is resumed with. That configuration's
learning rates and precision apply."""

OPTIONS = {
    "height": "size",
    "width": "size",
    "classes": "data",
    "kind": "process",
    "grey_levels": "noise",
    "end_time": "noise",
    "clean_probability": "objective",
    "batch_size": "batch-size",
    "crop": "crop",
    "total_images": "max-images",
}
"""The options that determine settings."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A run between two steps."""

    tensors: dict[str, Tensor]
    """The tensors of the network, the moving average and the optimiser; their names begin with network., average. or
    optimizer."""
    config: Config
    step: int
    skipped_steps: int
    seconds: float
    """Training time so far."""
    mean_loss: float
    """A running mean of the loss; NaN before the first step."""
    history: list[dict[str, float]]
    """The learning curve: a row for each measurement."""
    images: ImageOrder | None
    """The images of the run, held-out ones included; None in states of an earlier version."""
    starting_model: str = ""
    """The model whose weights the run began with, as name@version; "" for random ones and in earlier versions."""

    def write(self, path: Path) -> None:
        """Write the state to a file atomically; raise OSError or SafetensorError where that fails."""
        path.parent.mkdir(parents=True, exist_ok=True)
        progress = {
            "format": checkpoint.FORMAT,
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "seconds": self.seconds,
            "mean_loss": None if math.isnan(self.mean_loss) else self.mean_loss,
            "history": self.history,
            "images": self.images and dataclasses.asdict(self.images),
            "starting_model": self.starting_model,
            "config": self.config.to_json(),
        }
        # Contiguous copies: the file format has no strides, and no tensors that share memory.
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}
        metadata = {"progress": json.dumps(progress)}
        checkpoint.replace_file(path, lambda new: save_file(tensors, new, metadata=metadata))

    @classmethod
    def read(cls, path: Path) -> TrainingState:
        """Read a state file of format 1 or 2; raise TrainingError if it is damaged or newer."""
        with _refusing_damage(path), safe_open(path, "pt") as file:
            progress = _progress_of(file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = ("step", "skipped_steps", "seconds", "history")
            values = {name: progress[name] for name in names}
            history = progress["history"]  # states of earlier versions have no mean
            mean_loss = progress.get("mean_loss", history[-1]["train_bpd"] if history else None)
            images = progress.get("images") and ImageOrder(**progress["images"])
        values["starting_model"] = progress.get("starting_model", "")
        values["mean_loss"] = math.nan if mean_loss is None else float(mean_loss)
        return cls(tensors=tensors, config=_config_of(path, progress), images=images, **values)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `prefix` and a dot, which are removed from the names."""
        start = f"{prefix}."
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


def read_config(path: Path) -> Config:
    """Read the configuration of a state file, without its tensors; raise as `TrainingState.read` does."""
    with _refusing_damage(path), safe_open(path, "pt") as file:
        progress = _progress_of(file)
    return _config_of(path, progress)


@contextlib.contextmanager
def _refusing_damage(path: Path) -> Generator[None]:
    try:
        yield
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise TrainingError(f"{path} is not a training state that can be resumed: {error}.") from error


def _progress_of(file: Any) -> dict[str, Any]:
    return {"format": 1, "skipped_steps": 0} | json.loads(file.metadata()["progress"])


def _config_of(path: Path, progress: dict[str, Any]) -> Config:
    try:
        return checkpoint.read_config(progress)
    except ModelError as error:
        raise TrainingError(f"{path} {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise TrainingError(f"{path} has a configuration that this ncml cannot read: {error}.") from error


def check_same_run(path: Path, saved: Config, config: Config) -> None:
    """Raise TrainingError if a saved run differs from `config` in any setting that is not `CHANGEABLE`."""
    for section in ("model", "sde", "training"):
        for name in (field.name for field in dataclasses.fields(getattr(config, section))):
            saved_value, value = (getattr(getattr(run, section), name) for run in (saved, config))
            if name in CHANGEABLE or saved_value == value:
                continue
            option = f"--{OPTIONS[name]}" if name in OPTIONS else section
            difference = f"{name} {saved_value!r}, not {value!r}"
            if saved.recipe != config.recipe:
                option, difference = "recipe", f"{saved.recipe}, not {config.recipe}"
            raise TrainingError(
                f"{path} is a run with another {option} ({difference}): "
                "resume with its original options, or choose another --out."
            )
