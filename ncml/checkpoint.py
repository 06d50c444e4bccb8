"""A model folder: `model.safetensors`, `config.json`, `calibration.json` and `card.md`. No pickle anywhere.

The version of a model is a SHA-256 over its configuration and weights; results, calibration and metrics quote it.
Whatever a folder contains, it loads or is refused with a `ModelError`: sizes are checked before anything is parsed or
built. This module imports torch only to `save` and `load` (`ncml.weights`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as quote
from typing import TYPE_CHECKING, Any

from ncml import format1
from ncml.config import DEFAULT_SOLVER, SOLVERS, Config
from ncml.errors import InputError, ModelError, NcmlError
from ncml.limits import KEEPS, MAX_HEADER_BYTES, Keep
from ncml.network.sde import largest_noise, make_sde, reaches
from ncml.options import SamplingOptions, name_defaults, read_defaults
from ncml.paths import check_output_folder, sync

if TYPE_CHECKING:
    import torch

    from ncml.network.ncpn import NCPN

FORMAT = 2
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "card.md"
CALIBRATION, TILES = "calibration.json", "calibration-tiles.json"
DETECTOR, DETECTOR_ARRAYS, DETECTOR_PICTURES = "detector.json", "detector.safetensors", "detector.jpg"
NEW_DETECTOR_ARRAYS = f".{DETECTOR_ARRAYS}.new"
"""The arrays of a detector that takes the place of another one."""
CALIBRATION_SECTION = "Calibration"
"""First word of the title of a card's section on a calibration; the name of the calibration follows."""

DETECTOR_SECTION = "Detector"
"""Title of a card's section on a detector."""

MAX_CONFIG_BYTES = 8 * 2**20
MAX_CARD_BYTES = 256 * 2**10
"""Workers publish the card every two seconds."""
MAX_CALIBRATION_BYTES = 32 * 2**20
"""Some 150,000 ranking images."""
MAX_METRICS = 1000
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "BOOL": "bool"}
"""PyTorch's names of the types that a file of weights may have."""


@dataclass(frozen=True)
class Description:
    """A model without its weights."""

    folder: Path
    config: Config
    version: str
    """SHA-256 of configuration and weights, 64 hexadecimal digits."""
    metrics: dict[str, float]
    sampling: SamplingOptions
    """The sampling options that the model folder recommends."""

    @property
    def name(self) -> str:
        """The name of the folder; the Hub's cache names it by a commit, and the model two levels above."""
        cached = _cached_model(self.folder)
        return cached.name.rpartition("--")[2] if cached else self.folder.name

    @property
    def height(self) -> int:
        """Rows of an image."""
        return self.config.model.height

    @property
    def width(self) -> int:
        """Columns of an image."""
        return self.config.model.width

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.config.model.classes

    @property
    def noise(self) -> float:
        """The largest noise level, at t = T, in grey levels."""
        return largest_noise(self.config.sde)

    @property
    def keeps(self) -> tuple[Keep, ...]:
        """The known halves that are completed exactly."""
        return KEEPS if self.config.model.orientations else KEEPS[:1]


def _cached_model(folder: Path) -> Path | None:
    """Return the folder of a model in the Hub's cache that contains this one, whose files are links into it."""
    model = folder.parent.parent
    return model if folder.parent.name == "snapshots" and model.name.startswith("models--") else None


def save(
    folder: Path | str,
    network: NCPN,
    *,
    metrics: dict[str, Any] | None = None,
    sampling: SamplingOptions | None = None,
    card: str = "",
    dtype: torch.dtype | None = None,
) -> str:
    """Write a model folder, replacing each file atomically, and return its version; remove earlier calibrations.

    dtype: the type in which parameters are stored, such as torch.float16; None: the network's own.
    """
    from ncml import weights

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, lambda path: weights.write(path, network, dtype))
    for calibration in (CALIBRATION, TILES, DETECTOR, DETECTOR_ARRAYS, NEW_DETECTOR_ARRAYS, DETECTOR_PICTURES):
        (folder / calibration).unlink(missing_ok=True)
    version = digest(network.config, folder / WEIGHTS)
    description: dict[str, Any] = {
        "format": FORMAT,
        "version": version,
        "metrics": metrics or {},
        "config": network.config.to_json(),
    }
    write_json(folder / CONFIG, description)
    if sampling is not None:
        write_sampling(folder, sampling)
    replace_file(folder / CARD, lambda path: path.write_text(card, encoding="utf-8"))
    return version


def write_sampling(folder: Path, sampling: SamplingOptions) -> None:
    """Replace the sampling options that a model folder recommends; its version does not depend on them.

    Guidance is omitted for a model without classes.
    """
    stored = read_json(folder / CONFIG)
    values = {name: value for name, value in name_defaults(sampling).items() if value is not None}
    if not stored["config"]["model"]["classes"]:
        values.pop("guidance", None)
    write_json(folder / CONFIG, stored | {"sampling": values})


def add_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """Add metrics to a model folder, in place of earlier ones of the same names; its version does not change."""
    stored = read_json(folder / CONFIG)
    write_json(folder / CONFIG, stored | {"metrics": stored.get("metrics", {}) | metrics})


def write_card_section(folder: Path, title: str, text: str) -> None:
    """Replace a section of the model card, or append it; a section reaches to the next heading of its level."""
    card = read_file_of_card(folder) or f"# {folder.name}\n"
    section = f"## {title}\n\n{text.strip()}\n"
    pattern = _section_pattern(re.escape(title))
    if re.search(pattern, card):
        card = re.sub(pattern, lambda match: f"{section}\n", card, count=1)
    else:
        card = f"{card.rstrip()}\n\n{section}"
    _write_card(folder, card)


def _section_pattern(title: str) -> str:
    """Return a pattern of a section whose title matches a pattern, up to the next heading of its level."""
    return rf"(?ms)^## {title}\n.*?(?=^##? |\Z)"


def _write_card(folder: Path, card: str) -> None:
    replace_file(folder / CARD, lambda new: new.write_text(f"{card.rstrip()}\n", encoding="utf-8"))


def check_copy(folder: Path, out: Path) -> None:
    """Raise `InputError` if `out` cannot be written, or holds anything but the model in `folder`."""
    if (out / CONFIG).is_file():
        if read_json(out / CONFIG).get("version") != read_json(folder / CONFIG).get("version"):
            raise InputError("out", f"{out} holds another model; choose another folder.")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("out", f"{out} exists and is not a model folder; choose another folder.")
    check_output_folder(out, "out")


def copy(folder: Path, out: Path) -> None:
    """Copy a model without its calibrations; raise `InputError` if `out` holds something else."""
    check_copy(folder, out)
    if (out / CONFIG).is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    if card := read_file_of_card(folder):
        _write_card(out, re.sub(_section_pattern(f"(?:{CALIBRATION_SECTION} [^\\n]*|{DETECTOR_SECTION})"), "", card))
    for name in (WEIGHTS, CONFIG):  # the configuration last: without it, a folder is not a model folder
        if (folder / name).is_file():
            replace_file(out / name, lambda new, name=name: shutil.copyfile(folder / name, new))


def copy_bytes(folder: Path) -> int:
    """Return the size of what `copy` writes, apart from the card."""
    return sum((folder / name).stat().st_size for name in (WEIGHTS, CONFIG) if (folder / name).is_file())


def load(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[NCPN, Description]:
    """Read a model folder of format 1 or 2: the network in evaluation mode, and its description.

    Parameters stored in fp16 or bf16 become fp32. Raises ModelError, in one sentence, for a missing or damaged file,
    pickled weights, missing or unexpected weights, a wrong shape or type, weights that are not finite, or weights that
    do not match the version.
    """
    from ncml import weights

    description = describe(folder)
    network = weights.read(Path(folder) / WEIGHTS, description.config)
    check_version(description)
    return network.to(device).channels_last().eval(), description


def describe(folder: str | os.PathLike[str]) -> Description:
    """Read a model folder without its weights, which are not checked; raise ModelError as `load` does."""
    path = Path(folder) / CONFIG
    stored = read_json(path)
    try:
        config = read_config(stored)
        largest = largest_noise(config.sde)
    except ModelError as error:
        raise ModelError(f"{path} {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError, NcmlError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ModelError(f"{path} does not describe a model: {reason}.") from error
    metrics = _read_metrics(path, stored.get("metrics", {}))
    sampling = _read_sampling(path, stored, config, largest)
    return Description(path.parent.resolve(), config, str(stored.get("version")), metrics, sampling)


def check_version(description: Description) -> None:
    """Raise ModelError if the weights are missing, or not those of the version in `config.json`."""
    folder = description.folder
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} has no {WEIGHTS}.")
    if digest(description.config, folder / WEIGHTS) != description.version:
        raise ModelError(f"{folder}: the weights do not match the version in {CONFIG}; copy the folder again.")


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


def digest(config: Config, weights: Path) -> str:
    """Return a model's version: SHA-256 over its configuration and the tensors in a file, 64 hexadecimal digits."""
    sha = hashlib.sha256(json.dumps(format1.downgrade(config.to_json()), sort_keys=True).encode())
    try:
        with weights.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise ValueError(f"its header has {header_bytes} bytes")
            tensor_bytes = weights.stat().st_size - 8 - header_bytes
            tensors = json.loads(file.read(header_bytes))
            tensors.pop("__metadata__", None)
            for name, tensor in sorted(tensors.items()):
                start, end = tensor["data_offsets"]
                if not 0 <= start <= end <= tensor_bytes:
                    raise ValueError(f"{name} is not within its {tensor_bytes} bytes of tensors")
                sha.update(f"{name} torch.{TYPES[tensor['dtype']]} {tuple(tensor['shape'])}\n".encode())
                file.seek(8 + header_bytes + start)
                sha.update(file.read(end - start))
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ModelError(f"{weights} is not a complete safetensors file: {error}.") from error
    return sha.hexdigest()


def card_metadata(*, license: str | None = None, datasets: Sequence[str] = ()) -> str:
    """Return the front matter of a card, YAML as the Hugging Face Hub reads it; every value is written as JSON."""
    values = {
        "license": license,
        "library_name": "ncml",
        "tags": ["likelihood", "out-of-distribution-detection", "anomaly-detection", "image-generation"],
        "datasets": list(datasets),
        "metrics": ["bits-per-dimension"],
    }
    lines = (f"{name}: {json.dumps(value)}\n" for name, value in values.items() if value)
    return f"---\n{''.join(lines)}---\n\n"


def split_card(card: str) -> tuple[str, str]:
    """Return the front matter of a card, "" if it has none, and its Markdown."""
    match = re.match(r"---\r?\n.*?^---[ \t]*\r?\n\s*", card, re.MULTILINE | re.DOTALL)
    return (match[0], card[match.end() :]) if match else ("", card)


def read_card(folder: Path) -> str:
    """Return the Markdown of the model card without its front matter; empty if the folder has none.

    Raises ModelError if it is not UTF-8 text.
    """
    return split_card(read_file_of_card(folder))[1]


def read_file_of_card(folder: Path) -> str:
    """Return the whole model card; raises as `read_card` does, and for a link to a file that is not the model's.

    A folder of another person could otherwise show its clients any text that its worker can read.
    """
    path = folder / CARD
    if not path.is_file():
        return ""
    owner = _cached_model(folder.resolve()) or folder.resolve()
    if not path.resolve().is_relative_to(owner):
        raise ModelError(f"{path} is a link out of the model folder: copy the card into it.")
    try:
        return _read_file(path, MAX_CARD_BYTES).decode()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _read_metrics(path: Path, stored: object) -> dict[str, float]:
    if not isinstance(stored, dict) or len(stored) > MAX_METRICS or not all(map(_is_finite, stored.values())):
        raise ModelError(f"{path}: each value of metrics must be a number, at most {MAX_METRICS} of them.")
    if not all(1 <= len(name) <= 200 and name.isprintable() for name in stored):
        raise ModelError(f"{path}: each name of metrics must be 1 to 200 printable characters.")
    return stored


def _is_finite(value: object) -> bool:
    """Return whether a value is a number that a float can hold."""
    try:
        return type(value) in (int, float) and math.isfinite(value)  # pyright: ignore[reportArgumentType]
    except OverflowError:
        return False


def _read_sampling(path: Path, stored: dict[str, Any], config: Config, largest: float) -> SamplingOptions:
    try:
        sampling = read_defaults(stored.get("sampling", {}))
    except InputError as error:
        raise ModelError(f"{path}: {error}.") from error
    noise, solver = sampling.get("noise"), sampling.get("solver") or DEFAULT_SOLVER
    if (noise or 0) > largest:
        raise ModelError(
            f"{path}: sampling.start_noise must be at most {largest:g} grey levels, the model's noise at T."
        )
    if not reaches(make_sde(config.sde), noise or 0):
        raise ModelError(f"{path}: sampling.start_noise is less than the smallest noise of the model's SDE.")
    if SOLVERS[solver] == 1 and sampling.get("steps") not in (None, 1):
        raise ModelError(f"{path}: sampling.steps must be 1 for the solver {solver}.")
    if sampling.get("guidance") is not None and not config.model.classes:
        raise ModelError(f"{path}: sampling.guidance needs a model with classes; remove it.")
    if noise is None and not config.is_noise_conditional:
        return {**sampling, "noise": 0.0}
    return sampling


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
    """Return the content of a file; raise ValueError, without reading the remainder, beyond `max_bytes`."""
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return content


def detector_version(folder: Path) -> str | None:
    """Return the version of the detector in a model folder; None for none, or a damaged one."""
    with contextlib.suppress(ModelError):
        return read_json(folder / DETECTOR, MAX_CALIBRATION_BYTES).get("version")
    return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object to a file atomically."""
    replace_file(path, lambda new: new.write_text(json.dumps(value, indent=2) + "\n"))


def replace_file(path: Path, write: Callable[[Path], object], mode: int | None = 0o644) -> None:
    """Replace a file atomically: write a new one with a unique name next to `path`, then rename it.

    A power cut, too, leaves the former file or the new one. mode: permissions of the file; None: those that `write`
    gave it.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        write(new)
        if mode is not None:
            new.chmod(mode)  # safetensors creates private files; a service may run as another user
        sync(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
