"""The images in the folder of a detector, from which `ncml adapt --update` makes it again.

`images/good` has copies of the good images under their own names, `images/reviewed` those of images that were flagged
although they are good, `images/defective` those of images that should be flagged, and `images/made.json` says how
scenes were found and what the latter two were called. Publishing a model leaves them out. Does not import torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ncml import checkpoint
from ncml.data.good_images import GoodImages, open_folder
from ncml.data.scenes import IMAGE
from ncml.errors import InputError, ModelError
from ncml.paths import copy_file, list_local_files, printable, size_of
from ncml.progress import OnProgress, ignore_progress

FOLDER, FORMER, NEW, MADE = "images", ".images.former", ".images.new", "made.json"
GOOD, REVIEWED, DEFECTIVE = "good", "reviewed", "defective"
FORMAT = 1


@dataclass(frozen=True)
class KeptImages:
    """What the folder of a detector keeps for its next version."""

    good: GoodImages
    reviewed: GoodImages | None
    """Images that became estimation images; None if there are none."""
    defective: GoodImages | None
    """Images that should be flagged, which teach and test each version; None if there are none."""
    group: str
    """How the scenes of the good images are found."""


def are_kept(folder: Path) -> bool:
    """Return whether a detector can be updated from what its folder keeps."""
    return (folder / FOLDER / MADE).is_file()


def kept_bytes(good: GoodImages, *others: GoodImages | None) -> int:
    """Return the size of the copies that `keep` writes."""
    return sum(size_of(image.path) for part in (good, *others) if part for image in part.images)


def keep(folder: Path, good: GoodImages, reviewed: GoodImages | None, defective: GoodImages | None, group: str) -> None:
    """Copy images into the folder of a detector, in place of those that it keeps, which may be among them.

    Reviewed and defective images are named by their content, because they come from several folders; `made.json` has
    the names that can state their scenes. Whenever this is interrupted, `read` finds the former images or the new ones.
    One process at a time may do this in a folder.
    """
    _recover(folder)
    new = folder / NEW
    shutil.rmtree(new, ignore_errors=True)  # a process that was killed has left it
    try:
        for image in good.images:
            copied = new / GOOD / image.scene_name
            copied.parent.mkdir(parents=True, exist_ok=True)
            copy_file(image.path, copied)
        scene_names: dict[str, str] = {}
        for part, images in ((REVIEWED, reviewed), (DEFECTIVE, defective)):
            if images is None:
                continue
            (new / part).mkdir()
            for image in images.images:
                file = f"{image.digest}{image.path.suffix.lower()}"
                copy_file(image.path, new / part / file)
                scene_names[file] = image.scene_name
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
    group, stored = str(made.get("group")), made.get("scene_names", {})
    compared = group != IMAGE
    good = _open(folder / FOLDER / GOOD, compared, on_progress)
    if good is None:
        raise ModelError(f"{folder / FOLDER} has lost its good images: make the detector again.")
    reviewed = _open(folder / FOLDER / REVIEWED, compared, on_progress, stored)
    defective = _open(folder / FOLDER / DEFECTIVE, compared, on_progress, stored)
    return KeptImages(good, reviewed, defective, group)


def _open(
    folder: Path, seeks_points: bool, on_progress: OnProgress, stored: Mapping[str, object] | None = None
) -> GoodImages | None:
    """Open the images of a folder, if there are any, under the names that are stored for their files."""
    files = sorted(list_local_files(folder)) if folder.is_dir() else []
    if not files:
        return None
    opened = open_folder(folder, files, on_progress, seeks_points=seeks_points)
    if stored is None:
        return opened
    renamed = ((image, str(stored.get(image.name, image.name))) for image in opened.images)
    return replace(opened, images=tuple(i._replace(name=printable(name), scene_name=name) for i, name in renamed))
