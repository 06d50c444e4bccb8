"""The hidden folders in which models are made for clients: their names, and the removal of those left behind."""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

STALE_S = 3600.0
"""Age at which a folder is one that a killed worker has left: a job touches its own with each progress."""

CHECK_S = 600.0
"""How often an engine that may make models removes them: they can contain images of clients."""

_NAME = re.compile(r"\..+\.(?P<job>[0-9a-f]{32}|key-[0-9a-f]{40})\.[0-9]+(\.incoming)?")
"""Their names, which end in the ids of a job and a process."""


def folders_of(directory: Path, name: str, job_id: str) -> tuple[Path, Path]:
    """Return the folders in which a job of this process makes the model `name`, and keeps the images for it."""
    unfinished = directory / f".{name}.{job_id}.{os.getpid()}"  # hidden: not a model
    return unfinished, unfinished.with_name(f"{unfinished.name}.incoming")


def remove_left(directory: Path, job_id: str = "") -> None:
    """Remove what workers that were killed have left of a job, and of others a while ago."""
    for folder in directory.iterdir():
        if match := _NAME.fullmatch(folder.name):
            with contextlib.suppress(FileNotFoundError):  # another worker has finished it
                if match["job"] == job_id or time.time() - folder.stat().st_mtime > STALE_S:
                    shutil.rmtree(folder, ignore_errors=True)
