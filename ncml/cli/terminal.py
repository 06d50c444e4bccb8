"""Shared by the commands: options, progress, JSON, and models by name. Imports torch only to load a model."""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from ncml import checkpoint, runtime
from ncml.checkpoint import Description
from ncml.errors import InputError
from ncml.hub import find_model
from ncml.object_storage import StoragePath, is_address
from ncml.paths import Location
from ncml.progress import OnProgress, Progress

if TYPE_CHECKING:
    from rich import progress as rich

    from ncml.model import Model

PATIENCE_S = 2.0
"""Time after which a progress bar appears."""
QUIET_S = 30.0
"""Interval between lines of progress if stderr is not a terminal."""
MAX_THREADS = 256
"""With far more threads OpenMP aborts the process without an error message."""

DEFAULT_MODEL = "(default: NCML_DEFAULT_MODEL, else the bundled model, else the first by name)"
ModelOption = Annotated[str, arg(aliases=("-m",), metavar="NAME|PATH", help_behavior_hint=DEFAULT_MODEL)]
ClassOption = Annotated[str | None, arg(name="class", metavar="NAME", help_behavior_hint="(default: none)")]
CalibrationOption = Annotated[
    str | None, arg(metavar="NAME", help_behavior_hint="(default: a detector's own, else default)")
]
DeviceOption = Annotated[str, arg(metavar="DEVICE")]
LocationArgument = Annotated[
    Location,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: StoragePath.parse(texts[0]) if is_address(texts[0]) else Path(texts[0]),
        is_instance=lambda value: isinstance(value, Path | StoragePath),
        str_from_instance=lambda path: [str(path)],
    ),
]
"""A path of this machine, or the URL of one in object storage, which `ncml.cli.main` checks."""
JsonOption = Annotated[bool, arg(name="json")]
ThreadsOption = Annotated[
    int, arg(metavar="COUNT", help="CPU threads. Changing the number can change rounding, and therefore the images.")
]


class Identified(Protocol):
    """A model, loaded or not, here or behind a service."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def version(self) -> str:
        """The digest of its configuration and weights."""
        ...


def describe(model: str, device: str = "cpu") -> Description:
    """Return a model without its weights, by name or folder, "" for the default; does not import torch.

    device: where the model will be placed. Raises `InputError` for an invalid device name, and `ModelError`, with the
    nearest name, for an unknown model.
    """
    runtime.check_device_name(device)
    return checkpoint.describe(find_model(model))


def load(description: Description, device: str) -> "Model":
    """Load the weights of a model; imports torch."""
    import ncml

    runtime.wait_without_spinning()
    return ncml.load(description.folder, device=device)


def identity(model: Identified) -> dict[str, Any]:
    """Return the name and version of a model for JSON results."""
    return {"name": model.name, "version": model.version}


def check_output_file(path: Path, field: str = "output", *, inputs: Iterable[Path] = ()) -> None:
    """Refuse a file that cannot be written, or that would replace one of the inputs, before anything is computed."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "it is a folder or read-only, or its folder does not exist or is read-only"
        raise InputError(field, f"{path} cannot be written: {reason}.")
    if path.exists() and any(file.exists() and path.samefile(file) for file in inputs):
        raise InputError(field, f"{path} is read by this command and would be replaced: choose another file.")


def write_file(path: Path, content: bytes) -> None:
    """Write an output file; if that fails, as on a full disk, a former file remains, and the error names the file."""
    target = path.resolve()  # a link continues to point to it
    try:
        if os.access(target.parent, os.W_OK) and (path.is_file() or not path.exists()):
            mode = target.stat().st_mode & 0o777 if target.exists() else None
            checkpoint.replace_file(target, lambda new: new.write_bytes(content), mode)
        else:  # a device or a pipe, such as /dev/stdout, or in a folder that is read-only
            path.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_threads(count: int) -> None:
    """Refuse a number of threads that is out of range."""
    if not 1 <= count <= MAX_THREADS:
        raise InputError("threads", f"--threads must be 1 to {MAX_THREADS}, not {count}.")


def use_threads(count: int) -> None:
    """Use this number of CPU threads."""
    import torch

    torch.set_num_threads(count)


def check_device(device: str) -> None:
    """Refuse a device that is not available, before images are read."""
    if error := runtime.device_error(device):
        raise InputError("device", f"the device {device!r} cannot be used: {runtime.first_line(error)}") from error


def parse_duration(text: str) -> float:
    """Return the seconds of a time such as 90s, 45m, 12h or 2d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]] if match else 0.0
    if not seconds:
        raise InputError("max-time", f"--max-time must be a time such as 90s, 45m, 12h or 2d, not {text!r}.")
    return seconds


def print_status(text: str, *, end: str = "\n") -> None:
    """Print to stderr; what cannot be printed, as on a full disk, is lost, because the work matters more."""
    with contextlib.suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print one JSON document to stdout."""
    print(json.dumps(value, indent=2))


@contextlib.contextmanager
def progress_bar() -> Generator[OnProgress]:
    """Yield an `on_progress` that draws a bar for each stage once `PATIENCE_S` have passed.

    If stderr is not a terminal, it writes a line every `QUIET_S` instead. Both state the time that the stage has left.
    """
    started = last = time.monotonic()
    with contextlib.ExitStack() as stack:
        bar: rich.Progress | None = None
        tasks: dict[str, Any] = {}
        first: dict[str, tuple[float, int]] = {}
        latest: dict[str, tuple[float, int]] = {}

        def show(progress: Progress) -> None:
            nonlocal bar, last
            now, stage = time.monotonic(), progress.stage.replace("_", " ")
            if stage not in first or progress.done < latest[stage][1]:  # a new stage, or the same one once more
                first[stage] = latest[stage] = now, progress.done
            if progress.done > latest[stage][1]:
                latest[stage] = now, progress.done
            (since, done_before), (changed, _) = first[stage], latest[stage]
            if now - started < PATIENCE_S:
                return
            if bar is None and not sys.stderr.isatty():
                if now - last >= QUIET_S:
                    last = now
                    line = f"{stage} {progress.done}" + (f"/{progress.total}" if progress.total else "")
                    if progress.total and progress.done > done_before:
                        left = (changed - since) * (progress.total - progress.done) / (progress.done - done_before)
                        line += f", about {max(0.0, left - (now - changed)):.0f} s left"
                    if progress.note:
                        line += f", {progress.note}"
                    print_status(line)
                return
            if bar is None:
                from rich import progress as rich
                from rich.console import Console

                columns = (
                    rich.TextColumn("{task.description}"),
                    rich.BarColumn(),
                    rich.MofNCompleteColumn(),
                    rich.TimeRemainingColumn(),
                    rich.TextColumn("{task.fields[note]}"),
                )
                console = Console(stderr=True)
                # Lines above the bar are written through the console, so to stderr.
                lines_go_to_terminal = sys.stdout.isatty()
                bar = stack.enter_context(
                    rich.Progress(*columns, console=console, transient=True, redirect_stdout=lines_go_to_terminal)
                )
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=progress.total or None, note=progress.note)
            bar.update(tasks[stage], completed=progress.done, total=progress.total or None, note=progress.note)

        yield show
