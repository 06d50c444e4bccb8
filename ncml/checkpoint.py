"""A model folder: `model.safetensors`, `config.json`, `calibration.json` and `card.md`. No pickle anywhere.

The version of a model is a SHA-256 over its configuration and weights; results, calibration and metrics quote it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ncml import format1
from ncml.config import Config, SamplingDefaults
from ncml.errors import InputError, ModelError, NcmlError
from ncml.network.ncpn import NCPN
from ncml.network.sde import end_time, grey_levels_at, make_sde

FORMAT = 2
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "card.md"
CALIBRATION, TILES = "calibration.json", "calibration-tiles.json"


@dataclass(frozen=True)
class Description:
    """What `config.json` says of a model beside its configuration."""

    version: str
    metrics: dict[str, float]
    sampling: SamplingDefaults


def save(
    folder: Path | str,
    network: NCPN,
    *,
    metrics: dict[str, Any] | None = None,
    sampling: SamplingDefaults | None = None,
    card: str = "",
    dtype: torch.dtype | None = None,
) -> str:
    """Write a model folder, replacing each file atomically, and return its version; remove other weights' calibration.

    dtype: that the parameters are stored in, torch.bfloat16 or the network's own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for calibration in (CALIBRATION, TILES):
        (folder / calibration).unlink(missing_ok=True)
    parameters = {name: parameter.detach().to(dtype) for name, parameter in network.named_parameters()}
    state = {name: tensor.contiguous() for name, tensor in (network.state_dict() | parameters).items()}
    replace_file(folder / WEIGHTS, lambda path: save_file(state, path))
    version = digest(network.config, state)
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": version,
        "metrics": metrics or {},
        "config": network.config.to_json(),
    }
    if sampling is not None:
        description["sampling"] = {name: value for name, value in asdict(sampling).items() if value is not None}
    write_json(folder / CONFIG, description)
    replace_file(folder / CARD, lambda path: path.write_text(card))
    return version


def load(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[NCPN, Description]:
    """Read a model folder of format 1 or 2: the network in evaluation mode, and its description.

    Parameters stored in bf16 become fp32. Raises ModelError, in one sentence, for a missing or damaged file, pickled
    weights, missing or surplus weights, a wrong shape or type, weights that are not finite, or weights that do not
    match the version.
    """
    folder = Path(folder)
    stored = read_json(folder / CONFIG)
    try:
        config = read_config(stored)
        with torch.device("meta"):
            network = NCPN(config)
    except ModelError as error:
        raise ModelError(f"{folder / CONFIG} {error}") from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, NcmlError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ModelError(f"{folder / CONFIG} does not describe a model: {reason}.") from error
    metrics = stored.get("metrics", {})
    if not isinstance(metrics, dict) or not all(type(value) in (int, float) for value in metrics.values()):
        raise ModelError(f"{folder / CONFIG}: each value of metrics must be a number.")
    sampling = _read_sampling(folder / CONFIG, stored.get("sampling", {}), config)
    state = _read_weights(folder)
    _check(folder / WEIGHTS, network.state_dict(), state)
    version = digest(config, state)
    if version != stored.get("version"):
        raise ModelError(f"{folder}: the weights do not match the version in {CONFIG}; copy the folder again.")
    network.load_state_dict({name: _upcast(tensor) for name, tensor in state.items()}, assign=True)
    return network.to(device).channels_last().eval(), Description(version, metrics, sampling)


def read_config(stored: dict[str, Any]) -> Config:
    """Read the configuration of a model folder or training state of format 1 or 2.

    Raises ModelError on another format; ArithmeticError, LookupError, TypeError or ValueError on a damaged one.
    """
    match stored.get("format"):
        case 1:
            return Config.from_json(format1.upgrade(stored["config"]))
        case 2:
            return Config.from_json(stored["config"])
        case int(number) if number > FORMAT:
            raise ModelError(
                f"has format {number}, newer than {FORMAT}, the newest that this ncml reads: upgrade ncml."
            )
        case other:
            raise ModelError(f"has format {other!r}, which is not one of 1 and {FORMAT}: copy the folder again.")


def digest(config: Config, state: dict[str, Tensor]) -> str:
    """Return a model's version: SHA-256 over its configuration and stored weights, 64 hexadecimal digits."""
    sha = hashlib.sha256(json.dumps(format1.downgrade(config.to_json()), sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _read_sampling(path: Path, stored: object, config: Config) -> SamplingDefaults:
    try:
        sampling = SamplingDefaults.from_json(stored)
    except InputError as error:
        raise ModelError(f"{path}: {error}.") from error
    largest = round(grey_levels_at(make_sde(config.sde), end_time(config.sde)), 6)
    if (sampling.start_noise or 0) > largest:
        raise ModelError(
            f"{path}: sampling.start_noise must be at most {largest:g} grey levels, the model's noise at T."
        )
    if sampling.guidance is not None and not config.model.classes:
        raise ModelError(f"{path}: sampling.guidance needs a model with classes; remove it.")
    return sampling


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = [other.name for other in folder.glob("*") if other.suffix in {".pt", ".pth", ".bin", ".ckpt", ".pkl"}]
        hint = f": {pickled[0]} may be a pickle, which is never opened" if pickled else ""
        raise ModelError(f"{folder} has no {WEIGHTS}{hint}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a complete safetensors file: {error}.") from error


def _check(path: Path, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    for name in expected.keys() - state.keys():
        raise ModelError(f"{path} lacks the weight {name}.")
    for name in state.keys() - expected.keys():
        raise ModelError(f"{path} has a weight {name} that is not part of its configuration.")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            raise ModelError(f"{path}: the weight {name} has shape {shapes}.")
        if _upcast(tensor).dtype != expected[name].dtype:
            raise ModelError(f"{path}: the weight {name} is {tensor.dtype} instead of {expected[name].dtype}.")
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{path}: the weight {name} has values that are not finite.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder; raise ModelError if there is none."""
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
    """Write a JSON object to a file atomically."""
    replace_file(path, lambda new: new.write_text(json.dumps(value, indent=2) + "\n"))


def replace_file(path: Path, write: Any) -> None:
    """Replace a file atomically: write a new one beside `path`, then move it there."""
    new = path.with_name(f".{path.name}.new")
    write(new)
    new.chmod(0o644)  # safetensors creates private files; a service may run as another user
    new.replace(path)
