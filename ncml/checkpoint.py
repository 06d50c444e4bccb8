"""A model folder: `model.safetensors`, `config.json`, `calibration.json` and `card.md`. No pickle anywhere.

The version of a model is a SHA-256 over its configuration and weights; results, calibration and metrics quote it.
Whatever a folder contains, it loads or is refused with a `ModelError`: sizes are checked before anything is parsed or
built.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as quote
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

MAX_CONFIG_BYTES = 8 * 2**20
MAX_CARD_BYTES = 256 * 2**10
"""Workers publish the card every two seconds."""
MAX_CALIBRATION_BYTES = 32 * 2**20
"""Some 150,000 ranking images."""
MAX_METRICS = 1000
MAX_PARAMETERS = 2**31
"""Of a network: 8 GiB in fp32."""
MAX_HEADER_BYTES = 4 * 2**20
"""Of the weights: names and shapes of some 30,000 tensors."""


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
    write_json(folder / CONFIG, description)
    if sampling is not None:
        write_sampling(folder, sampling)
    replace_file(folder / CARD, lambda path: path.write_text(card))
    return version


def write_sampling(folder: Path, sampling: SamplingDefaults) -> None:
    """Replace the sampling options that a model folder recommends; its version does not depend on them."""
    values = {name: value for name, value in asdict(sampling).items() if value is not None}
    write_json(folder / CONFIG, read_json(folder / CONFIG) | {"sampling": values})


def add_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """Add metrics to a model folder, in place of earlier ones of the same names; its version does not change."""
    stored = read_json(folder / CONFIG)
    write_json(folder / CONFIG, stored | {"metrics": stored.get("metrics", {}) | metrics})


def write_card_section(folder: Path, title: str, text: str) -> None:
    """Replace a section of the model card, or append it; a section reaches to the next heading of its level."""
    path = folder / CARD
    card = path.read_text() if path.is_file() else f"# {folder.name}\n"
    section = f"## {title}\n\n{text.strip()}\n"
    pattern = rf"^## {re.escape(title)}\n.*?(?=^##? |\Z)"
    if re.search(pattern, card, re.MULTILINE | re.DOTALL):
        card = re.sub(pattern, lambda match: f"{section}\n", card, count=1, flags=re.MULTILINE | re.DOTALL)
    else:
        card = f"{card.rstrip()}\n\n{section}"
    replace_file(path, lambda new: new.write_text(f"{card.rstrip()}\n"))


def check_copy(folder: Path, out: Path) -> None:
    """Raise `InputError` if `out` holds something else than the model in `folder`."""
    if (out / CONFIG).is_file():
        if read_json(out / CONFIG).get("version") != read_json(folder / CONFIG).get("version"):
            raise InputError("out", f"{out} holds another model; choose another folder.")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("out", f"{out} exists and is not a model folder; choose another folder.")


def copy(folder: Path, out: Path) -> None:
    """Copy a model without its calibrations; raise `InputError` if `out` holds something else."""
    check_copy(folder, out)
    if (out / CONFIG).is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CARD, CONFIG):  # the configuration last: without it, a folder is not a model folder
        if (folder / name).is_file():
            replace_file(out / name, lambda new, name=name: shutil.copyfile(folder / name, new))


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
    metrics = _read_metrics(folder / CONFIG, stored.get("metrics", {}))
    sampling = _read_sampling(folder / CONFIG, stored.get("sampling", {}), config)
    state = _read_weights(folder, network.state_dict())
    _check(folder / WEIGHTS, network.state_dict(), state)
    version = digest(config, state)
    if version != stored.get("version"):
        raise ModelError(f"{folder}: the weights do not match the version in {CONFIG}; copy the folder again.")
    # Copies: the file is mapped into memory, and replacing it in place would end a process that reads it.
    network.load_state_dict({name: _upcast(tensor).clone() for name, tensor in state.items()}, assign=True)
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
            raise ModelError(f"has format {quote(other)}, which is not one of 1 and {FORMAT}: copy the folder again.")


def digest(config: Config, state: dict[str, Tensor]) -> str:
    """Return a model's version: SHA-256 over its configuration and stored weights, 64 hexadecimal digits."""
    sha = hashlib.sha256(json.dumps(format1.downgrade(config.to_json()), sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def read_card(folder: Path) -> str:
    """Return the model card in Markdown; empty if the folder has none. Raises ModelError if it is not UTF-8 text."""
    path = folder / CARD
    if not path.is_file():
        return ""
    try:
        return _read_file(path, MAX_CARD_BYTES).decode()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _read_metrics(path: Path, stored: object) -> dict[str, float]:
    if not isinstance(stored, dict) or len(stored) > MAX_METRICS or not all(map(_is_finite, stored.values())):
        raise ModelError(f"{path}: each value of metrics must be a number, at most {MAX_METRICS} of them.")
    if not all(_is_printable(name) for name in stored):
        raise ModelError(f"{path}: each name of metrics must be 1 to 200 printable characters.")
    return stored


def _is_finite(value: object) -> bool:
    """Return whether a value is a number that a float can hold."""
    try:
        return type(value) in (int, float) and math.isfinite(value)  # pyright: ignore[reportArgumentType]
    except OverflowError:
        return False


def _is_printable(name: str) -> bool:
    return 1 <= len(name) <= 200 and name.isprintable()


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


def _read_weights(folder: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the weights if the file is not larger than the network that the configuration describes."""
    path = folder / WEIGHTS
    count = sum(tensor.numel() for tensor in expected.values())
    if count > MAX_PARAMETERS:
        raise ModelError(
            f"{folder / CONFIG} describes a network of {count} weights; at most {MAX_PARAMETERS} are read."
        )
    if not path.is_file():
        pickled = [other.name for other in folder.glob("*") if other.suffix in {".pt", ".pth", ".bin", ".ckpt", ".pkl"}]
        hint = f": {pickled[0]} may be a pickle, which is never opened" if pickled else ""
        raise ModelError(f"{folder} has no {WEIGHTS}{hint}.")
    try:
        with path.open("rb") as file:
            size, header = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        # Eight bytes a weight, of any type: a wrong one is named later.
        if MAX_HEADER_BYTES < header < size or size > MAX_HEADER_BYTES + 8 * count:
            raise ModelError(f"{path} has {size} bytes, more than the {count} weights of its configuration need.")
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


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder; raise ModelError if there is none."""
    try:
        value = json.loads(_read_file(path, max_bytes).decode())
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} is not a model folder: it has no {path.name}.") from error
    except RecursionError as error:
        raise ModelError(f"{path} cannot be read as JSON: it is nested too deeply.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return value


def _read_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file; raise ValueError, without reading on, if it has more than `max_bytes`."""
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return content


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object to a file atomically."""
    replace_file(path, lambda new: new.write_text(json.dumps(value, indent=2) + "\n"))


def replace_file(path: Path, write: Any) -> None:
    """Replace a file atomically: write a new one beside `path`, then move it there."""
    new = path.with_name(f".{path.name}.new")
    write(new)
    new.chmod(0o644)  # safetensors creates private files; a service may run as another user
    new.replace(path)
