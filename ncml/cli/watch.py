"""`ncml watch`: its options and output; `ncml.cli.watch_loop` has the loop."""

import contextlib
import json
import sys
from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ncml import locks
from ncml.cli.earlier_rows import STAMP_COLUMNS
from ncml.cli.local_model import LocalModel
from ncml.cli.notices import Notices, make_signer
from ncml.cli.remote_model import RemoteModel, check_options, connect
from ncml.cli.rows import Row, SkippedFiles
from ncml.cli.score import plan_images
from ncml.cli.score_output import TEXT_COLUMNS, print_row
from ncml.cli.table import Table
from ncml.cli.terminal import (
    CalibrationOption,
    DeviceOption,
    JsonOption,
    LocationArgument,
    ModelOption,
    describe,
    print_status,
)
from ncml.cli.watch_loop import CLEAR, MOVED_TO, Watch
from ncml.errors import InputError
from ncml.images import SUFFIXES
from ncml.object_storage import StoragePath
from ncml.ood.alarm import alarm_of
from ncml.paths import Location, check_exists, check_output_folder

POLL_S, BUCKET_POLL_S = 1.0, 30.0
"""Interval at which a folder is listed by default; in object storage, where each listing is paid for, it is longer."""


def watch(
    folder: Annotated[Positional[LocationArgument], arg(metavar="FOLDER")],
    /,
    *,
    model: ModelOption = "",
    output: Annotated[Path, arg(aliases=("-o",), metavar="FILE")] = Path("verdicts.csv"),
    calibration: CalibrationOption = None,
    move_flagged: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None,
    poll: Annotated[
        float | None, arg(metavar="SECONDS", help_behavior_hint="(default: 1, in object storage 30)")
    ] = None,
    webhook: Annotated[str, arg(metavar="URL", help_behavior_hint="(default: none)")] = "",
    webhook_secret_file: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: NCML_WEBHOOK_SECRET_FILE)")
    ] = None,
    device: DeviceOption = "cpu",
    server: Annotated[str, arg(metavar="URL", help_behavior_hint="(default: none)")] = "",
    api_key: Annotated[str, arg(metavar="KEY", help_behavior_hint="(default: NCML_API_KEY)")] = "",
    as_json: JsonOption = False,
) -> None:
    """Judge the images of a folder as they arrive, each once, until Ctrl-C.

    An image is judged once it is completely written. Flagged images are printed, and an alarm if more of them are
    flagged than the calibration expects. Subfolders are watched, too; hidden files and other formats are ignored.

    Args:
        folder: Folder in which images arrive: PNG, JPEG, WebP, BMP, TIFF or GIF; here or at s3://, gs:// or hf://.
        model: Name or folder of the model; it must be a detector or calibrated.
        output: Table to append to, .csv: the record of what has been judged. The same command continues it.
        calibration: Name of the calibration that decides the verdict.
        move_flagged: Move flagged images to this folder. Without it, no image is changed or moved.
        poll: Interval at which the folder is listed if nothing reports a change, as on network folders.
        webhook: Address to which flagged images and alarms are sent, signed, each at least once.
        webhook_secret_file: File with the secret that signs them, whsec_...
        device: Device to compute on: cpu, cuda or cuda:N.
        server: Address of a service that judges the images with all of its workers, in place of this machine.
        api_key: API key for that service.
        as_json: Print a JSON object for each judged image, one per line.
    """
    poll_s = poll if poll is not None else BUCKET_POLL_S if isinstance(folder, StoragePath) else POLL_S
    _check(folder, output, move_flagged, poll_s)
    signer = make_signer(webhook, webhook_secret_file) if webhook else None
    check_options(server, api_key, device)
    local = None if server else LocalModel(describe(model, device), device)
    with nullcontext(local) if local else connect(server, api_key, model) as m:
        plan = plan_images(m, {"classes": None, "noise": 0.0}, calibration, None, "", False, None, SkippedFiles())
        selected = plan.calibration
        if selected is None:
            raise InputError("model", f"watching needs verdicts, but {plan.missing_reason}")
        columns = (*plan.columns, *STAMP_COLUMNS, MOVED_TO)
        constants = {"model": m.version[:12], "calibration": selected.version[:12], "statistic": plan.deciding}
        with _locked(output):
            table = Table(output, (*columns, *constants, "error"), texts=TEXT_COLUMNS, constants=constants,
                          is_endless=True)  # fmt: skip
            cutoff = getattr(selected, "cutoff", selected.false_positive_rate)  # of detectors
            alarm = alarm_of(selected.n_rank, selected.smallest_p, cutoff)
            if selected.weakness:
                print_status(f"ncml: the calibration is weak: {selected.weakness}.")
            show = _print_object if as_json else _print_flagged
            notices = None
            if signer:
                notices = Notices(webhook, signer, output.with_name(f"{output.name}.webhook"))
            judge = _describe(m, selected)
            Watch(folder, table, plan.scorer, alarm, move_flagged, show, notices, judge=judge).run(poll_s)


def _check(folder: Location, output: Path, move_flagged: Path | None, poll: float) -> None:
    if isinstance(folder, StoragePath):
        if move_flagged is not None:
            remedy = "omit it, or watch a folder of this machine."
            raise InputError("move_flagged", f"--move-flagged does not move objects in storage: {remedy}")
        is_folder = folder.suffix.lower() not in SUFFIXES
        if is_folder:
            next(folder.list_files(), None)  # raises if it cannot be listed; without objects, it does not exist yet
    else:
        check_exists(folder)
        is_folder = folder.is_dir()
    if not is_folder:
        raise InputError("folder", f"{folder} is not a folder: name the one in which images arrive.")
    if output.suffix != ".csv":
        raise InputError("output", f"{output} must end in .csv: rows are appended as images arrive.")
    if not 0.05 <= poll <= 3600:
        raise InputError("poll", f"--poll must be 0.05 to 3600 seconds, not {poll:g}.")
    if move_flagged is not None and isinstance(folder, Path):
        target, source = move_flagged.resolve(), folder.resolve()
        if target.is_relative_to(source) or source.is_relative_to(target):
            raise InputError(
                "move_flagged",
                f"--move-flagged {move_flagged} and {folder} must not contain each other: name a folder elsewhere.",
            )
        check_output_folder(move_flagged, "move_flagged")


def _describe(m: LocalModel | RemoteModel, selected: Any) -> str:
    """Return what judges the images, where, and what it flags."""
    where = f" at {m.url}" if isinstance(m, RemoteModel) else ""
    confidence = getattr(selected, "confidence", None)  # of detectors
    share = f"{100 * selected.false_positive_rate:g}% of good images"
    share = f"{share} on average" if confidence is None else f"at most {share} with {100 * confidence:g}% confidence"
    if selected is not m.detector:
        return f"the calibration {selected.name} of {m.name}{where}, which flags {share}"
    scores = f"scores above {selected.threshold:.2f}"
    return f"the detector {m.name}{where}, which flags {scores} ({share})"


def _print_object(row: Row) -> None:
    print(json.dumps(row), flush=True)


def _print_flagged(row: Row) -> None:
    if row["is_ood"]:
        if sys.stderr.isatty():
            print_status(CLEAR, end="")
        print_row(row, statistics=())
        sys.stdout.flush()


@contextlib.contextmanager
def _locked(output: Path) -> Generator[None]:
    """Refuse a table to which another process appends."""
    refusal = InputError("output", f"another ncml watch appends to {output}: stop it, or choose another --output.")
    try:
        file, _ = locks.acquire(output, refusal)
    except OSError as error:
        raise InputError("output", f"{output} cannot be written: {error.strerror}.") from error
    with file:
        yield
