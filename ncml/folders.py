"""Where model folders are looked for, by the command line and the worker alike. Knows no torch."""

import os
from pathlib import Path


def search_path() -> tuple[Path, ...]:
    """Directories that hold model folders; where a name occurs twice, the earlier directory counts.

    Those that the environment variable NCML_MODELS names, separated like PATH; without it ./models and then the
    models that came with this package.
    """
    named = tuple(Path(part) for part in os.environ.get("NCML_MODELS", "").split(os.pathsep) if part)
    return named or (Path("models"), Path(__file__).resolve().parent.parent / "models")


def model_folders() -> dict[str, Path]:
    """Every model folder on the search path, by name."""
    folders: dict[str, Path] = {}
    for directory in search_path():
        for config in sorted(directory.glob("*/config.json")):
            folders.setdefault(config.parent.name, config.parent)
    return folders
