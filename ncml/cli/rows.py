"""Image files to rows of results, batch by batch; a file that cannot be read is counted and skipped.

Does not import torch.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ncml import images
from ncml.cli.terminal import print_status
from ncml.data.good_images import check_side
from ncml.errors import InputError, ServiceError
from ncml.images import heat
from ncml.limits import MAX_JUDGED_IMAGES
from ncml.object_storage import read_ahead
from ncml.paths import Location, escape_controls, printable
from ncml.progress import OnProgress, Progress, ignore_progress
from ncml.signals import SignalEvent

if TYPE_CHECKING:
    from ncml.cli.local_model import LocalModel
    from ncml.cli.remote_model import RemoteModel
    from ncml.results import Score

BATCH = 64
"""Images that are read and scored in one call of the model."""

REQUEST = 16
"""Images of a batch if several batches are in progress: few, so that the workers of a service share them evenly."""

MAX_KNOWN = 1000
"""Files of a batch, most of which need not be scored."""

TIMEOUT = "job-timeout"
FAILED_COMPUTATIONS = (TIMEOUT, "job-engine")
"""Kinds of a service's errors that an image can cause by its size."""

MAX_TIMEOUTS = 3
"""Jobs with one image alone that may exceed a service's time limit for jobs before the image is skipped."""

STOP_S = 5.0
"""Longest wait for results of a service after a signal: it may be restarting, or have no room for an hour."""

POLL_S = 0.2
"""Interval at which such a signal is noticed."""

MAX_MESSAGES = 5
"""Unreadable files that are reported individually."""

Row = dict[str, Any]
"""The results of one file by column; only `file` and `error` if it could not be read."""


@dataclass
class Scorer:
    """Scores files."""

    score: Callable[[list[Location]], list[Row]]
    """Returns a row for each file, in their order."""
    batch_size: int
    """Files of a call: they are done, and written to a table, together."""
    concurrency: int = 1
    """Calls in progress at once."""
    on_progress: OnProgress = ignore_progress
    """Called with the tiles that are done of a file, if one file is scored at a time; the display of files sets it."""


@dataclass
class SkippedFiles:
    """Files that could not be read: their number, and the first few messages."""

    count: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, path: Location, message: str) -> Row:
        """Count a file and return its row."""
        self.count += 1
        message = escape_controls(message)
        if self.count <= MAX_MESSAGES:
            self.messages.append(message)
        return {"file": printable(path), "error": message}

    def report(self, count: int, where: str = "") -> None:
        """Print the messages to stderr, and `count`, which may include files that an earlier run skipped.

        where: what has all messages, if some are not printed.
        """
        for message in self.messages:
            print_status(f"ncml: skipped: {message}")
        if more := self.count - len(self.messages):
            print_status(f"ncml: skipped: and {more:,} more{where and f'; {where}'}")
        if count:
            print_status(f"ncml: {count} {'file was' if count == 1 else 'files were'} skipped")


def score_batches(
    paths: Iterable[Location],
    scorer: Scorer,
    begin: Callable[[Location], Row] = lambda path: {},
    stopping: SignalEvent | None = None,
) -> Iterator[list[Row]]:
    """Yield the rows of the files, batch by batch in their order.

    begin: returns the cells of a file that are known before it is scored; with "file" among them, it is not scored.
    stopping: once it is set, batches that are scored concurrently, as by a service, are waited for `STOP_S` at most.
    """
    batches = _batches(paths, scorer.batch_size, begin)

    def complete(batch: list[tuple[Location, Row]]) -> list[Row]:
        unscored = [path for path, row in batch if "file" not in row]
        scored = iter(scorer.score(unscored) if unscored else [])
        return [row if "file" in row else next(scored) | row for _, row in batch]

    if scorer.concurrency == 1:
        yield from map(complete, batches)
        return
    # Daemon threads, unlike those of an executor: at an interruption, requests on their way are not waited for.
    pending = deque(_in_thread(partial(complete, batch)) for batch in itertools.islice(batches, scorer.concurrency))
    while pending:
        future = pending.popleft()
        if stopping is not None and not _is_done(future, stopping):
            return
        yield future.result()
        pending.extend(_in_thread(partial(complete, batch)) for batch in itertools.islice(batches, 1))


def _is_done(future: "Future[list[Row]]", stopping: SignalEvent) -> bool:
    """Wait for a result, only for a while once `stopping` is set; return whether it is there."""
    while not stopping.is_set():
        if wait([future], POLL_S).done:
            return True
    return bool(wait([future], STOP_S).done)


def _in_thread(function: Callable[[], list[Row]]) -> "Future[list[Row]]":
    """Call a function in a thread that does not keep the process from ending."""
    future: Future[list[Row]] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _batches(
    paths: Iterable[Location], size: int, begin: Callable[[Location], Row]
) -> Iterator[list[tuple[Location, Row]]]:
    """Yield the files with their rows, in batches of `size` that are not scored yet, or of many that are."""
    batch: list[tuple[Location, Row]] = []
    unscored = 0
    for path in paths:
        batch.append((path, begin(path)))
        unscored += "file" not in batch[-1][1]
        if unscored == size or len(batch) == MAX_KNOWN:
            yield batch
            batch, unscored = [], 0
    if batch:
        yield batch


def image_scorer(
    m: "LocalModel | RemoteModel",
    arguments: dict[str, Any],
    maps: Path | None,
    skipped: SkippedFiles,
    *,
    selected: Any,
    concurrency: int = 1,
    own_size: bool = False,
) -> Scorer:
    """Return a scorer that resizes images to the model's size and scores them with these arguments of `Model.score`.

    maps: folder for heat maps; None writes none.
    selected: the calibration of the verdicts, or None; a verdict of one that has replaced it raises `InputError`.
    own_size: whether a detector judges the images, at their own sizes.
    """

    def score_files(paths: list[Location]) -> list[Row]:
        rows: list[Row] = []
        readable: list[tuple[Row, Location, NDArray[np.uint8]]] = []
        for path, file in zip(paths, read_ahead(paths, images.MAX_BYTES), strict=True):
            try:
                image = images.open_image(file, field=printable(path))
                if own_size:
                    check_side(image, printable(path))
            except InputError as error:
                rows.append(skipped.add(path, str(error)))
            else:
                rows.append({"file": printable(path)})
                if own_size:
                    readable.append((rows[-1], file, image))
                else:  # without the contents of the file
                    readable.append((rows[-1], path, images.resize_to(image, m.height, m.width)))
        for row, score, image in score_readable(readable):
            row |= score.to_dict()
            if (detection := score.detection) is not None:
                row |= {
                    "view": detection.view, "rarity": detection.rarity, "differences": "; ".join(detection.differences),
                }  # fmt: skip
                if maps is not None:
                    heat.save(maps / _relative(Path(row["file"])), detection.draw(image), detection.map)
            elif maps is not None and score.map is not None:
                heat.save(maps / _relative(Path(row["file"])), heat.render_pixel_map(score.map), score.map)
        return rows

    def score_readable(
        readable: list[tuple[Row, Location, NDArray[np.uint8]]],
    ) -> Iterator[tuple[Row, "Score", NDArray[np.uint8]]]:
        """Yield the score of each image, without those that cannot be judged, whose rows get the error."""
        timeouts = 0
        while readable:
            try:  # a service gets files as they are, which are smaller than their pixels
                sources = [path if own_size else image for _, path, image in readable]
                scores = m.score(sources, map=maps is not None, **arguments)
            except (InputError, ServiceError) as error:
                message = str(error)
                refused = [path for _, path, _ in readable if own_size and error.field == printable(path)]
                if isinstance(error, ServiceError) and error.kind in FAILED_COMPUTATIONS:
                    if len(readable) > 1:  # any of them can be the cause, or only all together
                        for entry in readable:
                            yield from score_readable([entry])
                        return
                    refused = [readable[0][1]]
                    message = f"{printable(refused[0])}: {message}"
                    if error.kind == TIMEOUT:
                        timeouts += 1
                        if timeouts < MAX_TIMEOUTS:
                            continue
                        message = (
                            f"{printable(refused[0])} takes the service longer than its time limit for a job "
                            f"({MAX_TIMEOUTS} attempts): raise NCML_JOB_TIMEOUT_S where it runs."
                        )
                if not refused:
                    raise
                for row, path, _ in readable:
                    row |= skipped.add(path, message) if path in refused else {}
                readable = [entry for entry in readable if entry[1] not in refused]
                continue
            if selected is not None:
                _check_calibration(m, selected, scores)
            for (row, _, image), score in zip(readable, scores, strict=True):
                yield row, score, image
            return

    if own_size:
        return Scorer(score_files, MAX_JUDGED_IMAGES, concurrency)
    return Scorer(score_files, BATCH if concurrency == 1 else REQUEST, concurrency)


def _check_calibration(m: "LocalModel | RemoteModel", selected: Any, scores: "list[Score]") -> None:
    """Raise `InputError` without a verdict of the calibration: a model is loaded late, and a service replaces it."""
    if any(score.ood is None or score.ood.calibration_version != selected.version for score in scores):
        raise InputError(
            "model",
            f"the calibration of {m.name} has been replaced or removed since this command started: run it again, with "
            "another --output if it writes a table.",
        )


def tile_scorer(
    m: "LocalModel | RemoteModel",
    tile_size: int | None,
    maps: Path | None,
    skipped: SkippedFiles,
    *,
    concurrency: int = 1,
) -> Scorer:
    """Return a scorer that judges each image by its tiles of `tile_size` pixels with `Model.scan`.

    maps: folder for heat maps; None writes none.
    """

    def report(progress: Progress) -> None:
        scorer.on_progress(progress)

    def score_files(paths: list[Location]) -> list[Row]:
        rows: list[Row] = []
        for path, file in zip(paths, read_ahead(paths, images.MAX_BYTES), strict=True):
            try:
                scan = m.scan(file, tile_size=tile_size, callback=report if concurrency == 1 else ignore_progress)
            except (InputError, ServiceError) as error:
                if not _concerns_image(error, path):
                    raise
                message = str(error) if error.field == printable(path) else f"{printable(path)}: {error}"
                rows.append(skipped.add(path, message))
                continue
            rows.append({"file": printable(path)} | scan.to_dict())
            if maps is not None:
                image = images.open_image(file, field=printable(path))
                overlay = heat.overlay(image, scan.map, *heat.score_range(scan.map, scan.threshold))
                heat.save(maps / _relative(Path(printable(path))), heat.frame(overlay, scan.box), scan.map)
        return rows

    scorer = Scorer(score_files, 1, concurrency)
    return scorer


def _concerns_image(error: InputError | ServiceError, path: Location) -> bool:
    """Return whether an error of a scan is due to this image, so that others can still be scored."""
    if isinstance(error, ServiceError):
        if error.status == 422:
            return error.field in ("image", printable(path))
        return error.status == 413 or error.kind in FAILED_COMPUTATIONS
    return error.field not in ("tile", "tile_size")


def _relative(path: Path) -> Path:
    """Return a path that stays below any folder that it is joined to, another one for every path."""
    names = {"..": "_parent", path.anchor: "_root"}
    return Path(*(names.get(part, f"_{part}" if part.startswith("_") else part) for part in path.parts))
