"""The loop of `ncml watch`: images are judged as they arrive, recorded, moved and reported."""

import contextlib
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import watchfiles

from ncml.cli.arrivals import Arrival, Arrivals, Stamp, state_of
from ncml.cli.earlier_rows import STAMP_COLUMNS
from ncml.cli.moves import move_unused, unused_path
from ncml.cli.notices import Notices
from ncml.cli.rows import Row, Scorer, score_batches
from ncml.cli.score_output import to_cells
from ncml.cli.table import Table
from ncml.cli.terminal import QUIET_S, print_status
from ncml.data.inventory import counted
from ncml.errors import InputError, ServiceError, StorageError
from ncml.object_storage import StoragePath
from ncml.object_storage.filesystems import open_filesystem
from ncml.ood.alarm import ALPHA, FlaggedRateAlarm
from ncml.paths import Location, escape_controls, printable, printed_path, relative_to
from ncml.signals import SignalEvent, handling

RETRY_S = 5.0
"""Pause before a folder, a table or a service that cannot be used is tried again."""

MAX_RETRY_S = 600.0
"""The longest such pause, even if a service asks for a longer one: it may be restarted with another quota."""

OUTAGES = (0, 429, 502, 503, 504)
"""Statuses of a service that may answer later; 0: it cannot be reached."""

BUSY_SHARE, MIN_PAUSE_S = 0.2, 0.05
"""Share of the time that may be spent on listing the folder, and the shortest pause between two listings."""

MOVED_TO = "moved_to"
"""The column with the path of a flagged image after its move; empty if it is not moved."""

CLEAR = "\r\033[K"
"""Removes the line of progress from a terminal."""


class Watch:
    """The loop of `ncml watch`. The table is the record: a file with a row of its present state is not judged again."""

    def __init__(
        self,
        folder: Location,
        table: Table,
        scorer: Scorer,
        alarm: FlaggedRateAlarm | None,
        move_flagged: Path | None,
        show: Callable[[Row], None],
        notices: Notices | None = None,
        *,
        judge: str,
    ) -> None:
        """Read the rows of earlier runs.

        alarm: None for no alarm; show: prints the row of an image that has been judged; notices: sends flagged images
        and alarms; judge: what judges the images, in words.
        """
        self._folder, self._table, self._scorer, self._alarm = folder, table, scorer, alarm
        self._move_flagged, self._show, self._notices, self._judge_name = move_flagged, show, notices, judge
        self._states: dict[str, Stamp] = {}
        self._to_move: dict[Path, tuple[Path, Stamp]] = {}
        """Files of this machine, where their rows say that they are moved, and the state that was flagged."""
        self._judged = self._flagged = self._skipped = self._judged_before = 0
        self._is_alarmed = self._is_introduced = False
        self._arrivals = Arrivals(folder, lambda path, state: self._states.get(printable(path)) == state)
        self._stopping, self._changed = SignalEvent(), SignalEvent()
        self._began = self._reported_at = time.monotonic()
        self._problem, alarmed_at = "", 0
        reserved: set[Path] = set()
        for row in table.rows():
            alarmed_at = self._note(row) or alarmed_at
            if move_flagged is None:
                continue
            path = printed_path(row["file"])
            assert isinstance(folder, Path)
            if row["is_ood"] == "1" and path.is_relative_to(folder) and state_of(path) == self._states[row["file"]]:
                # this process was killed before it could move the image, or did not move images
                target = self._recorded_target(row) or self._choose_target(path, reserved)
                reserved.add(target)
                self._to_move[path] = target, self._states[row["file"]]
                if printable(target) != row[MOVED_TO]:
                    self._print(f"{path}, which an earlier run flagged, is moved to {target}")
        self._judged_before = self._judged
        if self._is_alarmed:
            self._print(f"the alarm of image {alarmed_at} continues")

    def run(self, poll_s: float) -> None:
        """Judge images until SIGINT, SIGTERM or SIGHUP."""
        sending = self._notices.sending(self._print) if self._notices else nullcontext()
        with self._stopped_by_signals(), sending, self._woken_by_changes():
            while not self._stopping.is_set():
                listed_at = time.monotonic()
                try:
                    complete = self._arrivals.complete()
                except OSError as error:
                    self._pause_after(f"{self._folder} cannot be read: {error.strerror or error}")
                    continue
                except (InputError, StorageError) as error:
                    self._pause_after(str(error).rstrip("."))
                    continue
                self._introduce()
                pause_s = max(MIN_PAUSE_S, (time.monotonic() - listed_at) / BUSY_SHARE)
                try:
                    self._judge(complete)
                except ServiceError as error:
                    if error.status not in OUTAGES and not error.is_lost_job:
                        raise
                    self._pause_after(str(error).rstrip("."), error.retry_after_s)
                    continue
                except StorageError as error:
                    problem = str(error).rstrip(".")
                    self._pause_after(problem if self._arrivals.postpone(error.url, problem) else "")
                    continue
                self._move()
                self._report_progress()
                self._stopping.wait(max(0, listed_at + pause_s - time.monotonic()))
                self._changed.wait(min(poll_s, self._arrivals.next_check_s()))
                self._changed.clear()
        self._report_progress(is_last=True)

    def _introduce(self) -> None:
        """Report once, after the first listing, what is watched, where results go, and when an alarm is raised."""
        if self._is_introduced:
            return
        self._is_introduced = True
        present = ""
        if count := len(self._arrivals):
            present = f"; {counted(count, 'image')} {'is' if count == 1 else 'are'} there already and judged first"
        self._print(f"watching {self._folder} with {self._judge_name}{present}")
        targets = [f"rows go to {self._table.path}"]
        if self._move_flagged is not None:
            targets.append(f"flagged images are moved to {self._move_flagged}")
        if self._notices:
            targets.append(f"messages are sent to {self._notices.host}")
        self._print(", ".join(targets))
        if self._alarm is None:
            self._print("no alarm will be raised, because it assumes that each ranking image shows its own scene")
        elif run := self._alarm.shortest_run:
            self._print(
                f"an alarm is raised if more images are flagged than the calibration expects: after {run} in a row at "
                f"the earliest, and by chance with a probability of at most {100 * ALPHA:g}%"
            )

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Generator[None]:
        """Finish the images in progress at the first signal; the second one interrupts."""

        def stop(signum: int) -> None:
            self._stopping.set()
            self._changed.set()
            signal.signal(signum, earlier[signum])

        with handling(stop) as earlier:
            yield

    @contextlib.contextmanager
    def _woken_by_changes(self) -> Generator[None]:
        """Notice files earlier than by listing the folder regularly, where the system reports changes."""
        if isinstance(self._folder, StoragePath):
            yield
            return
        folder = self._folder

        def listen() -> None:
            while not self._stopping.is_set():
                try:
                    for changes in watchfiles.watch(
                        folder, watch_filter=None, debounce=50, step=20, rust_timeout=500,
                        stop_event=self._stopping, yield_on_timeout=True, raise_interrupt=False,
                    ):  # fmt: skip
                        if changes:
                            self._changed.set()
                        if self._problem:
                            break  # the folder has vanished, and its successor needs a new watch
                except (OSError, RuntimeError):
                    pass  # the folder has vanished, or the system has no more watches: it is listed regularly
                self._stopping.wait(RETRY_S)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            yield
        finally:
            self._stopping.set()
            listener.join()

    def _judge(self, complete: list[Arrival]) -> None:
        """Judge files in order, until a signal."""
        arrivals = {arrival.path: arrival for arrival in complete}

        def begin(path: Location) -> Row:
            return dict(zip(STAMP_COLUMNS, arrivals[path].stamp, strict=True))

        in_order = iter(complete)
        for rows in score_batches(arrivals, self._scorer, begin, self._stopping):
            self._record([(next(in_order), row) for row in rows])
            if self._stopping.is_set():
                return

    def _record(self, judged: list[tuple[Arrival, Row]]) -> None:
        """Write the rows of files that have not changed since they were listed, and show them."""
        recorded = [
            (arrival, row)
            for arrival, row in judged
            if not self._arrivals.has_changed(arrival)
            and not ("error" in row and self._arrivals.may_be_incomplete(arrival))
        ]
        targets: dict[Path, Path] = {}
        reserved = {target for target, _ in self._to_move.values()}
        for arrival, row in recorded:
            if row.get("is_ood") and self._move_flagged is not None and isinstance(arrival.path, Path):
                targets[arrival.path] = self._choose_target(arrival.path, reserved)
                reserved.add(targets[arrival.path])
            row[MOVED_TO] = printable(targets[arrival.path]) if arrival.path in targets else ""
        if not self._write([to_cells(row) for _, row in recorded]):
            return
        self._to_move |= {a.path: (targets[a.path], a.stamp) for a, _ in recorded if a.path in targets}
        self._move()  # before the rows are printed, so that their readers find the images
        for arrival, row in recorded:
            self._arrivals.judged(arrival)
            if alarmed_at := self._note(to_cells(row)):
                self._print(f"ALARM at image {alarmed_at}: more images are flagged than the calibration expects")
            if "error" in row:
                self._print(f"skipped: {row['error']}")
                continue
            # After a failure, the buffer has kept the row.
            self._insist("standard output", functools.partial(self._show, row), sys.stdout.flush)

    def _write(self, rows: list[Row]) -> bool:
        """Append rows to the table, and wait while that fails; return False after a signal."""
        if not self._insist(self._table.path, functools.partial(self._table.add, rows)):
            return False
        if not self._to_move:  # else a move fails, which was reported
            self._problem = ""
        return True

    def _insist(self, target: object, write: Callable[[], object], again: Callable[[], object] | None = None) -> bool:
        """Call `write`, and after a failure `again` (or `write`), until it succeeds; return False after a signal."""
        while True:
            try:
                write()
            except BrokenPipeError:  # no one reads on
                raise
            except OSError as error:
                self._report_problem(f"{target} cannot be written: {error.strerror}")
                write = again or write
                if self._stopping.wait(RETRY_S):
                    return False
            else:
                return True

    def _note(self, row: Mapping[str, Any]) -> int:
        """Count a row, of this run or of an earlier one; return the number of its image if it raises an alarm, or 0."""
        self._states[row["file"]] = tuple(str(row[name]) for name in STAMP_COLUMNS)
        if row.get("error"):
            self._skipped += 1
            return 0
        is_flagged = str(row["is_ood"]) == "1"
        self._judged += 1
        self._flagged += is_flagged
        if is_flagged and self._notices:
            self._notices.add("image.flagged", row["modified"], dict(row) | self._table.constants)
        if self._alarm is None:
            return 0
        was_alarmed, self._is_alarmed = self._is_alarmed, float(self._alarm.update(is_flagged)) >= self._alarm.limit
        if was_alarmed or not self._is_alarmed:
            return 0
        if self._notices:
            counts = {"images": self._judged, "flagged": self._flagged}
            self._notices.add("stream.alarm", row["modified"], self._table.constants | counts)
        return self._judged

    def _choose_target(self, path: Path, reserved: set[Path]) -> Path:
        """Return where to move an image: to a name that neither a file nor another image that is moved has.

        reserved: where those images are moved; a list would take minutes if thousands wait, as after the first start
        with `--move-flagged`.
        """
        assert self._move_flagged is not None
        target = self._move_flagged / relative_to(path, self._folder)
        try:
            return unused_path(target, reserved)
        except OSError:
            return target  # the move reports why the folder cannot be read, and is tried again

    def _recorded_target(self, row: Mapping[str, str]) -> Path | None:
        """Return where the row of an earlier run says that its image is moved, if that is still the folder for it."""
        target = Path(row[MOVED_TO])
        return target if row[MOVED_TO] and self._move_flagged in target.parents else None

    def _move(self) -> None:
        """Move flagged images that no other has replaced; those that cannot be moved are tried again."""
        problems: list[str] = []
        for path, (target, flagged) in list(self._to_move.items()):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if state_of(path) == flagged and (moved_to := move_unused(path, target)) != target:
                    self._print(f"{path} was moved to {moved_to}, because another file has taken the name of {target}")
            except OSError as error:
                problems.append(f"{path} cannot be moved to {target}: {error.strerror}")
            else:
                del self._to_move[path]
        if problems:
            others = f", and {len(problems) - 1} more cannot be moved" if len(problems) > 1 else ""
            self._report_problem(problems[0] + others)

    def _pause_after(self, problem: str, pause_s: float = 0.0) -> None:
        """Report a problem, unless it is empty, and pause, for about `pause_s` if they are more than usual."""
        if problem:
            self._report_problem(problem)
        if isinstance(self._folder, StoragePath):
            open_filesystem.cache_clear()  # the next one reads the credentials again: these may have expired
        self._stopping.wait(max(RETRY_S, min(pause_s, MAX_RETRY_S)))

    def _report_problem(self, problem: str) -> None:
        """Print a problem once; work continues when it has passed."""
        if problem != self._problem:
            self._problem = problem
            self._print(f"{problem}; trying again until that succeeds")

    def _report_progress(self, *, is_last: bool = False) -> None:
        """Show the state in one line: on a terminal always the current one, elsewhere from time to time."""
        now, is_terminal = time.monotonic(), sys.stderr.isatty()
        if not (is_last or is_terminal or now - self._reported_at >= QUIET_S):
            return
        self._reported_at = now
        rate = (self._judged - self._judged_before) / (now - self._began)
        share = f" ({self._flagged / self._judged:.1%})" if self._judged else ""
        state = "" if self._alarm is None else ", ALARM" if self._is_alarmed else ", no alarm"
        line = (
            f"{self._judged} judged, {len(self._arrivals)} waiting, {self._flagged} flagged{share}, "
            f"{self._skipped} skipped, {rate:.2g} images/s{state}"
        )
        print_status(f"{CLEAR}{line}" if is_terminal else line, end="" if is_terminal and not is_last else "\n")

    def _print(self, message: str) -> None:
        print_status(f"{CLEAR if sys.stderr.isatty() else ''}ncml: {escape_controls(message)}")
