"""Calibration files: JSON bound to one version of a model and of preprocessing, with a digest that detects changes.

`calibration.json` holds calibrations by name, any other file one.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Generator, Mapping
from pathlib import Path
from reprlib import repr as quote
from typing import Any

import numpy as np

from ncml import checkpoint, images
from ncml.errors import InputError, ModelError
from ncml.limits import DETECTOR
from ncml.ood.conformal import Floats

PREPROCESSING = "{name} v{version}".format(**images.PREPROCESSING)
"""The preprocessing of images before they are measured."""

DEFAULT_NAME = "default"
"""The name of the calibration that gives the verdict unless another is requested."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
NAME_RULE = "a calibration's name must be 1 to 40 letters, digits, hyphens and underscores, the first a letter or digit"

MAX_MAGNITUDE = 1e100
ENTRIES_FORMAT = 2
UNSIGNED = ("power",)
"""Members that do not affect verdicts, and so are not part of the digest."""
REMEDY = "calibrate the model again"


def digest(content: dict[str, Any]) -> str:
    """Return the version of a calibration: SHA-256 of its content, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write(path: Path, content: dict[str, Any], unsigned: Mapping[str, Any] = {}) -> None:
    """Write a calibration with its digest, which does not cover the members that are `UNSIGNED`, atomically."""
    text = json.dumps({"version": digest(content), **content, **unsigned})
    checkpoint.replace_file(path, lambda new: new.write_text(text + "\n"))


def read(path: Path, model_version: str, *, expected_format: int) -> dict[str, Any]:
    """Read what `write` wrote; raises `ModelError` if it belongs to another model or was changed since."""
    stored = checkpoint.read_json(path, checkpoint.MAX_CALIBRATION_BYTES)
    return check(path, stored, model_version, expected_format=expected_format)


def check(path: Path, stored: object, model_version: str, *, expected_format: int) -> dict[str, Any]:
    """Return the content of a calibration in a file; raises `ModelError` if it is not of this model and complete."""
    if not isinstance(stored, dict):
        raise ModelError(f"{path} is damaged (a calibration must be a JSON object): {REMEDY}.")
    content = {key: value for key, value in stored.items() if key not in UNSIGNED}
    if content.get("format") != expected_format:
        raise ModelError(f"{path} has format {quote(content.get('format'))}, not {expected_format}: {REMEDY}.")
    if content.get("model_version") != model_version:
        raise ModelError(f"{path} was made for another version of this model: {REMEDY}.")
    if content.get("preprocessing") != PREPROCESSING:
        raise ModelError(f"{path} was made under the preprocessing {quote(content.get('preprocessing'))}: {REMEDY}.")
    try:
        is_unchanged = content.pop("version", None) == digest(content)
    except RecursionError as error:
        raise ModelError(f"{path} is damaged (it is nested too deeply): {REMEDY}.") from error
    if not is_unchanged:
        raise ModelError(f"{path} was changed after it was written: {REMEDY}.")
    return content


@contextlib.contextmanager
def refusing_damage(path: Path) -> Generator[None]:
    """Raise ModelError, naming the file and the remedy, for the errors that converting its values raises."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(f"{path} is damaged ({reason}): {REMEDY}.") from error


def floats(stored: Any, *shape: int) -> Floats:
    """Return numbers of this shape (-1: any length but 0); raise ArithmeticError, TypeError or ValueError otherwise.

    They must be finite, and so must be the product of any three.
    """
    values = np.array(stored, np.float64)
    is_fitting = values.ndim == len(shape) and all(
        n == size or (n == -1 and size) for n, size in zip(shape, values.shape, strict=True)
    )
    if not is_fitting or not (np.abs(values) <= MAX_MAGNITUDE).all():
        raise ValueError(f"it lacks finite numbers of shape {list(shape)}")
    return values


def ranks(stored: Any) -> Floats:
    """Return the scores of ranking images, which must be finite and ascending; raises as `floats` does."""
    scores = floats(stored, -1)
    if (np.diff(scores) < 0).any():
        raise ValueError("the scores of the ranking images are not ascending")
    return scores


def count(stored: Any, least: int = 1) -> int:
    """Return a number of images; raise ValueError for anything but an integer of at least `least`."""
    if type(stored) is not int or not least <= stored < 2**53:
        raise ValueError(f"a number of images is {str(stored)[:20]!r}")
    return stored


def share(stored: Any) -> float:
    """Return a share; raise TypeError or ValueError for anything but a number from 0 to 1."""
    number = float(stored)
    if not 0 <= number <= 1:
        raise ValueError(f"a share is {number}")
    return number


class NewerFormat(ModelError):
    """A file was written by a newer ncml."""


def read_entries(path: Path) -> dict[str, Any]:
    """Read the calibrations in a file by name, unchecked; raises `ModelError` if the file is damaged."""
    stored = checkpoint.read_json(path, checkpoint.MAX_CALIBRATION_BYTES)
    number = stored.get("format")
    if type(number) is int and number > ENTRIES_FORMAT:
        raise NewerFormat(f"{path} has format {number}, newer than {ENTRIES_FORMAT}: upgrade ncml.")
    if number != ENTRIES_FORMAT:
        raise ModelError(f"{path} has format {quote(number)}, not {ENTRIES_FORMAT}: {REMEDY}.")
    entries = stored.get("calibrations")
    if not isinstance(entries, dict):
        raise ModelError(f"{path} is damaged (calibrations must be a JSON object): {REMEDY}.")
    for name in entries:
        if not NAME.fullmatch(name):
            raise ModelError(f"{path} is damaged ({NAME_RULE}, not {quote(name)}): {REMEDY}.")
    return entries


def read_replaceable(path: Path) -> dict[str, Any]:
    """Read the calibrations in a file that is to be replaced: none if it is missing or damaged.

    Raises `ModelError` for a file that must be kept: one that a newer ncml wrote, or that could not be read.
    """
    try:
        return read_entries(path) if path.is_file() else {}
    except ModelError as error:
        if isinstance(error, NewerFormat) or isinstance(error.__cause__, OSError):
            raise
        return {}


def write_entry(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Write a calibration under its name, atomically, beside the other calibrations of the same model."""
    check_name(name)
    entries = read_replaceable(path)
    kept = {
        other: stored
        for other, stored in entries.items()
        if isinstance(stored, dict) and stored.get("model_version") == entry["model_version"]
    }
    text = json.dumps({"format": ENTRIES_FORMAT, "calibrations": kept | {name: entry}})
    if len(text) >= checkpoint.MAX_CALIBRATION_BYTES:  # with the line's end
        raise InputError(
            "limit",
            f"{path} would have {len(text)} bytes, more than the {checkpoint.MAX_CALIBRATION_BYTES} that can be read: "
            "calibrate on fewer images (--limit), or write this calibration to a copy of the model (--out).",
        )
    checkpoint.replace_file(path, lambda new: new.write_text(text + "\n"))


def check_name(name: str) -> None:
    """Raise `InputError` for a name that a calibration cannot have."""
    if not NAME.fullmatch(name):
        raise InputError("name", f"{NAME_RULE}, not {name!r}.")
    if name == DETECTOR:
        raise InputError(
            "name", f"the name {name} selects the verdict of a detector (ncml adapt): choose another name."
        )
