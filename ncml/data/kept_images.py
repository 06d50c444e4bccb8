"""The good images in the folder of a detector, from which `ncml adapt --update` makes it again.

`images/good` has copies of the good images under their own names, `images/reviewed` those of images that were flagged
although they are good, and `images/made.json` says how scenes were found and what the latter were called. Publishing a
model leaves them out. Does not import torch.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ncml import checkpoint
from ncml.data.good_images import GoodImages, open_folder
from ncml.data.scenes import IMAGE
from ncml.errors import InputError, ModelError
from ncml.paths import copy_file, list_local_files, printable, size_of
from ncml.progress import OnProgress, ignore_progress

FOLDER, FORMER, NEW, MADE = "images", ".images.former", ".images.new", "made.json"
GOOD, REVIEWED = "good", "reviewed"
FORMAT = 1


@dataclass(frozen=True)
class KeptImages:
    """What the folder of a detector keeps for its next version."""

    good: GoodImages
    reviewed: GoodImages | None
    """Images that joined those that estimate; None if there are none."""
    group: str
    """How the scenes of the good images are found."""


def are_kept(folder: Path) -> bool:
    """Return whether a detector can be updated from what its folder keeps."""
    return (folder / FOLDER / MADE).is_file()


def kept_bytes(good: GoodImages, reviewed: GoodImages | None) -> int:
    """Return the size of the copies that `keep` writes."""
    return sum(size_of(path) for images in (good, reviewed) if images for path in images.paths)


def keep(folder: Path, good: GoodImages, reviewed: GoodImages | None, group: str) -> None:
    """Copy images into the folder of a detector, in place of those that it keeps, which may be among them.

    Reviewed images are named by their content, because they come from several folders; `made.json` has the names that
    can state their scenes. Whenever this is interrupted, `read` finds the former images or the new ones. One process at
    a time may do this in a folder.
    """
    _recover(folder)
    new = folder / NEW
    shutil.rmtree(new, ignore_errors=True)  # a process that was killed has left it
    try:
        for path, name in zip(good.paths, good.scene_names, strict=True):
            (new / GOOD / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(path, new / GOOD / name)
        scene_names: dict[str, str] = {}
        if reviewed:
            (new / REVIEWED).mkdir()
            for path, digest, name in zip(reviewed.paths, reviewed.digests, reviewed.scene_names, strict=True):
                file = f"{digest}{path.suffix.lower()}"
                copy_file(path, new / REVIEWED / file)
                scene_names[file] = name
        checkpoint.write_json(new / MADE, {"format": FORMAT, "group": group, "scene_names": scene_names})
        if (folder / FOLDER).exists():
            (folder / FOLDER).rename(folder / FORMER)
        new.rename(folder / FOLDER)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        _recover(folder)


def _recover(folder: Path) -> None:
    """Put the former images back unless new ones have taken their place.

    New ones that are being copied stay, because `read` may be called while another process copies them; the next `keep`
    removes those of a process that was killed. Only between the two renames of `keep` does this disturb it: its second
    one then fails, and the former images stay.
    """
    if (folder / FOLDER).exists():
        shutil.rmtree(folder / FORMER, ignore_errors=True)
    elif (folder / FORMER).exists():
        (folder / FORMER).rename(folder / FOLDER)


def discard(folder: Path) -> None:
    """Remove what the folder of a detector keeps, which belongs to an earlier one."""
    for name in (FOLDER, FORMER, NEW):
        shutil.rmtree(folder / name, ignore_errors=True)


def read(folder: Path, on_progress: OnProgress = ignore_progress) -> KeptImages:
    """Open what the folder of a detector keeps.

    Raises `InputError` if that is nothing, `ModelError` if it has another format or is incomplete.
    """
    _recover(folder)
    if not are_kept(folder):
        raise InputError(
            "update",
            f"{folder.name} keeps no good images, so it cannot be updated: make it again with --keep-images.",
        )
    made = checkpoint.read_json(folder / FOLDER / MADE)
    if made.get("format") != FORMAT:
        raise ModelError(f"{folder / FOLDER / MADE} is not of format {FORMAT}: upgrade ncml.")
    group = str(made.get("group"))
    good, reviewed = (_open(folder / FOLDER / name, group != IMAGE, on_progress) for name in (GOOD, REVIEWED))
    if good is None:
        raise ModelError(f"{folder / FOLDER} has lost its good images: make the detector again.")
    if reviewed is not None:
        stored = made.get("scene_names", {})
        scene_names = tuple(str(stored.get(name, name)) for name in reviewed.names)
        reviewed = replace(reviewed, names=tuple(map(printable, scene_names)), scene_names=scene_names)
    return KeptImages(good, reviewed, group)


def _open(folder: Path, seeks_points: bool, on_progress: OnProgress) -> GoodImages | None:
    files = sorted(list_local_files(folder)) if folder.is_dir() else []
    return open_folder(folder, files, on_progress, seeks_points=seeks_points) if files else None
