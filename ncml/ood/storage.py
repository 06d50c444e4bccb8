"""Calibration files: JSON bound to one version of a model and of preprocessing, with a digest that detects changes."""

import contextlib
import hashlib
import json
from collections.abc import Generator
from pathlib import Path
from reprlib import repr as quote
from typing import Any

import numpy as np

from ncml import checkpoint, images
from ncml.errors import ModelError
from ncml.ood.conformal import Floats

PREPROCESSING = "{name} v{version}".format(**images.PREPROCESSING)
"""What images go through before they are measured."""

FORMAT = 1
MAX_MAGNITUDE = 1e100
REMEDY = "calibrate the model again"


def digest(content: dict[str, Any]) -> str:
    """Return the version of a calibration: SHA-256 of its content, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a calibration with its digest, atomically."""
    text = json.dumps({"version": digest(content)} | content)
    checkpoint.replace_file(path, lambda new: new.write_text(text + "\n"))


def read(path: Path, model_version: str) -> dict[str, Any]:
    """Read what `write` wrote; raises `ModelError` if it belongs to another model or was changed since."""
    stored = checkpoint.read_json(path, checkpoint.MAX_CALIBRATION_BYTES)
    if stored.get("format") != FORMAT:
        raise ModelError(f"{path} has format {quote(stored.get('format'))}, not {FORMAT}: {REMEDY}.")
    if stored.get("model_version") != model_version:
        raise ModelError(f"{path} was made for another version of this model: {REMEDY}.")
    if stored.get("preprocessing") != PREPROCESSING:
        raise ModelError(f"{path} was made under the preprocessing {quote(stored.get('preprocessing'))}: {REMEDY}.")
    try:
        is_unchanged = stored.pop("version", None) == digest(stored)
    except RecursionError as error:
        raise ModelError(f"{path} is damaged (it is nested too deeply): {REMEDY}.") from error
    if not is_unchanged:
        raise ModelError(f"{path} was changed after it was written: {REMEDY}.")
    return stored


@contextlib.contextmanager
def refusing_damage(path: Path) -> Generator[None]:
    """Raise ModelError, naming the file and the remedy, for whatever its values cause while they are converted."""
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
        raise ValueError(f"it has no finite numbers of shape {list(shape)} where they belong")
    return values


def ranks(stored: Any) -> Floats:
    """Return the scores of ranking images, which must be finite and ascending; raises as `floats` does."""
    scores = floats(stored, -1)
    if (np.diff(scores) < 0).any():
        raise ValueError("the scores of the ranking images are not ascending")
    return scores


def count(stored: Any) -> int:
    """Return a number of images; raise ValueError for anything but a positive integer."""
    if type(stored) is not int or not 1 <= stored < 2**53:
        raise ValueError(f"a number of images is {str(stored)[:20]!r}")
    return stored
