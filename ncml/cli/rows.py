"""Picture files to rows of results, batch by batch; a file that cannot be read is counted, and the rest goes on.

What `ncml score` and `ncml drift` share. Knows no torch.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ncml import images
from ncml.cli.terminal import progress_bar
from ncml.errors import InputError
from ncml.images import heat
from ncml.paths import printable

if TYPE_CHECKING:
    from ncml.model import Model

BATCH = 64
"""Pictures read and scored in one call of the model."""

TOLD = 5
"""Unreadable files that are named one by one."""

Row = dict[str, Any]
"""What is known of one file, by column; `error` alone where it could not be read."""

Work = Callable[[list[Path]], list[Row]]
"""Scores some files: a row for each, in their order."""


@dataclass
class Skipped:
    """Files that could not be read: counted, the first few told."""

    count: int = 0
    told: list[str] = field(default_factory=list)

    def add(self, path: Path, error: str) -> Row:
        """Remember one; returns its row."""
        self.count += 1
        if self.count <= TOLD:
            self.told.append(error)
        return {"file": printable(path), "error": error}

    def tell(self, count: int) -> None:
        """Say on standard error which files and how many: `count`, where an earlier run has skipped some, too."""
        for said in self.told:
            print(f"ncml: skipped: {said}", file=sys.stderr)
        if count:
            print(f"ncml: {count} {'file was' if count == 1 else 'files were'} skipped", file=sys.stderr)


def batches(paths: Iterable[Path]) -> Iterator[list[Path]]:
    """Files, some at a time."""
    paths = iter(paths)
    while some := list(itertools.islice(paths, BATCH)):
        yield some


def of_pictures(m: "Model", asked: dict[str, Any], maps: Path | None, skipped: Skipped) -> Work:
    """Bring pictures to the model's size and score them together, as `Model.score` is `asked`."""

    def work(paths: list[Path]) -> list[Row]:
        rows: list[Row] = []
        stack: list[NDArray[np.uint8]] = []
        read: list[Row] = []
        for path in paths:
            try:
                stack.append(images.resize_to(images.open_image(path, field=printable(path)), m.height, m.width))
            except InputError as error:
                rows.append(skipped.add(path, str(error)))
            else:
                rows.append({"file": printable(path)})
                read.append(rows[-1])
        scores = m.score(stack, map=maps is not None, **asked) if stack else []
        for row, scored in zip(read, scores, strict=True):
            row |= {"bpd": scored.bpd, "log_likelihood": scored.log_likelihood}
            if scored.ood is not None:
                row |= {
                    "statistic": scored.ood.statistic,
                    "score": scored.ood.score,
                    "p_value": scored.ood.p_value,
                    "is_ood": scored.ood.is_ood,
                }
            row |= scored.statistics
            if maps is not None and scored.map is not None:
                heat.save(maps / _inside(Path(row["file"])), heat.render_pixel_map(scored.map), scored.map)
        return rows

    return work


def of_tiles(m: "Model", side: int | None, maps: Path | None, skipped: Skipped) -> Work:
    """Judge each picture by its worst tile of `side` pixels, as `Model.scan` does."""

    def work(paths: list[Path]) -> list[Row]:
        rows: list[Row] = []
        for path in paths:
            try:
                picture = images.open_image(path, field=printable(path))
                with progress_bar() as on_progress:
                    found = m.scan(picture, side=side, callback=on_progress)
            except InputError as error:
                if error.field in ("tile", "tile_size"):
                    raise
                said = f"{printable(path)}: {error}" if error.field == "image" else str(error)
                rows.append(skipped.add(path, said))
                continue
            row: Row = {"file": printable(path)}
            row |= dict(zip(("left", "top", "width", "height"), found.box, strict=True))
            row |= {"score": found.score, "p_value": found.p_value, "is_ood": found.is_ood, "tiles": found.tiles}
            rows.append(row)
            if maps is not None:
                drawn = heat.overlay(picture, found.map, *heat.score_range(found.map, found.threshold))
                heat.save(maps / _inside(path), heat.frame(drawn, found.box), found.map)
        return rows

    return work


def _inside(path: Path) -> Path:
    """A path that stays below the folder it is joined to."""
    return Path(*(part for part in path.parts if part not in ("..", path.anchor)))
