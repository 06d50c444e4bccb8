"""A model folder: `model.safetensors`, `config.json`, `calibration.json` and `card.md`. No pickle anywhere.

The version of a model is a SHA-256 over its configuration and weights; results, calibration and metrics quote it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ncml.config import Config
from ncml.errors import ModelError, NcmlError
from ncml.network.ncpn import NCPN

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "card.md"
CALIBRATION, TILES = "calibration.json", "calibration-tiles.json"


def save(folder: Path | str, network: NCPN, *, metrics: dict[str, Any] | None = None, card: str = "") -> str:
    """Write a model folder, each file whole or not at all; returns the version. Other weights' calibration goes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for calibration in (CALIBRATION, TILES):
        (folder / calibration).unlink(missing_ok=True)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    replace_file(folder / WEIGHTS, lambda path: save_file(state, path))
    version = digest(network.config, state)
    description = {
        "format": FORMAT,
        "version": version,
        "metrics": metrics or {},
        "config": network.config.to_json(),
    }
    write_json(folder / CONFIG, description)
    replace_file(folder / CARD, lambda path: path.write_text(card))
    return version


def load(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[NCPN, dict[str, Any]]:
    """Read a model folder: the network in evaluation mode, and `config.json` as it stands.

    Raises ModelError, in one sentence, for a missing or damaged file, pickled weights, missing or surplus weights, a
    wrong shape or type, weights that are not finite, or weights that are not those the version names.
    """
    folder = Path(folder)
    description = read_json(folder / CONFIG)
    if description.get("format") != FORMAT:
        raise ModelError(f"{folder}: format {description.get('format')!r} is not {FORMAT}, which this version reads.")
    try:
        config = Config.from_json(description["config"])
        with torch.device("meta"):
            network = NCPN(config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, NcmlError) as error:
        raise ModelError(f"{folder / CONFIG} does not describe a model: {str(error).rstrip('.')}.") from error
    metrics = description.setdefault("metrics", {})
    if not isinstance(metrics, dict) or not all(type(value) in (int, float) for value in metrics.values()):
        raise ModelError(f"{folder / CONFIG}: metrics must give each name a number.")
    state = _read_weights(folder)
    _check(folder / WEIGHTS, network.state_dict(), state)
    if digest(config, state) != description.get("version"):
        raise ModelError(f"{folder}: the weights are not those that config.json was written for; copy the folder anew.")
    network.load_state_dict(state, assign=True)
    return network.to(device).channels_last().eval(), description


def digest(config: Config, state: dict[str, Tensor]) -> str:
    """The version of a model: SHA-256 over its configuration and its weights, 64 hexadecimal digits."""
    sha = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = [other.name for other in folder.glob("*") if other.suffix in {".pt", ".pth", ".bin", ".ckpt", ".pkl"}]
        hint = f": {pickled[0]} may be a pickle, which is never opened" if pickled else ""
        raise ModelError(f"{folder} has no {WEIGHTS}{hint}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}.") from error


def _check(path: Path, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    for name in expected.keys() - state.keys():
        raise ModelError(f"{path} lacks the weight {name}.")
    for name in state.keys() - expected.keys():
        raise ModelError(f"{path} has a weight {name} that its configuration does not know.")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            raise ModelError(f"{path}: the weight {name} has shape {shape} instead of {wanted}.")
        if tensor.dtype != expected[name].dtype:
            raise ModelError(f"{path}: the weight {name} is {tensor.dtype} instead of {expected[name].dtype}.")
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{path}: the weight {name} has values that are not finite.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder; ModelError where there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} is not a model folder: it has no {path.name}.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object whole or not at all."""
    replace_file(path, lambda new: new.write_text(json.dumps(value, indent=2) + "\n"))


def replace_file(path: Path, write: Any) -> None:
    """Write a file beside `path`, then move it there, so that a reader or a crash never sees half of it."""
    new = path.with_name(f".{path.name}.new")
    write(new)
    new.chmod(0o644)  # safetensors makes its files private; a service may run as another user
    new.replace(path)
