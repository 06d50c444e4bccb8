"""Calibration files: JSON bound to one version of a model and of preprocessing, with a digest that detects changes."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ncml import checkpoint, images
from ncml.errors import ModelError

PREPROCESSING = "{name} v{version}".format(**images.PREPROCESSING)
"""What images go through before they are measured."""

FORMAT = 1
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
    stored = checkpoint.read_json(path)
    if stored.get("format") != FORMAT:
        raise ModelError(f"{path} has format {stored.get('format')!r}, not {FORMAT}: {REMEDY}.")
    if stored.get("model_version") != model_version:
        raise ModelError(f"{path} was made for another version of this model: {REMEDY}.")
    if stored.get("preprocessing") != PREPROCESSING:
        raise ModelError(f"{path} was made under the preprocessing {stored.get('preprocessing')!r}: {REMEDY}.")
    if stored.pop("version", None) != digest(stored):
        raise ModelError(f"{path} was changed after it was written: {REMEDY}.")
    return stored
