"""The command line: finds the command that is asked for, parses its arguments, runs it, and tells what went wrong.

A mistake of the user's is one line and exit status 2, never a traceback.
"""

import contextlib
import functools
import io
import itertools
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points, version
from typing import Any

import tyro

from ncml import runtime
from ncml.cli.terminal import suggestion
from ncml.errors import InputError, NcmlError

COMMANDS = {
    "train": "ncml.cli.train:train",
    "calibrate": "ncml.cli.calibrate:calibrate",
    "score": "ncml.cli.score:score",
    "drift": "ncml.cli.drift:drift",
    "generate": "ncml.cli.generate:generate",
    "complete": "ncml.cli.complete:complete",
    "evaluate": "ncml.cli.evaluate:evaluate",
    "compress": "ncml.cli.compress:compress",
    "decompress": "ncml.cli.decompress:decompress",
    "models": "ncml.cli.models:models",
}

EXTRAS = {"torch": "worker", "safetensors": "worker"} | dict.fromkeys(
    ("datasets", "pyarrow", "constriction", "sklearn", "scipy", "matplotlib", "efficientnet_lite_pytorch"), "train"
)
"""Which extra of this package brings what may not be installed."""


def commands() -> dict[str, str]:
    """Where each command is, `module:function`. Other rooms lend theirs through the entry points `ncml.commands`."""
    return COMMANDS | {point.name: point.value for point in entry_points(group="ncml.commands")}


def parse(arguments: Sequence[str]) -> Callable[[], int | None]:
    """The command that the arguments ask for, ready to run; raises `InputError` on a mistake, SystemExit for help."""
    if list(arguments) == ["--version"]:
        return functools.partial(print, version("ncml"))
    if any(re.fullmatch(r"(--[\w-]+=)?", argument) for argument in arguments):  # as a shell's unset variable leaves it
        raise InputError("arguments", "an argument is empty: give it a value, or leave it out.")
    known = commands()
    named = next((a for a in arguments if not a.startswith("-")), None)
    if named is not None and named not in known:
        raise InputError("command", f"there is no command {named!r}{suggestion(named, list(known))}")
    app = tyro.extras.SubcommandApp()
    for name, where in known.items():
        if named in (None, name):  # a command is imported only where it is shown or run
            app.command(name=name)(_deferred(pkgutil.resolve_name(where)))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return app.cli(
                prog="ncml",
                description="Exact likelihoods and pictures from a noise conditional pixel network.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError("arguments", one_line(said.getvalue())) from None


def _deferred(command: Callable[..., Any]) -> Callable[..., functools.partial[Any]]:
    """The command with its arguments bound rather than run, so that parsing ends before work begins."""

    @functools.wraps(command)
    def bound(*args: Any, **kwargs: Any) -> functools.partial[Any]:
        return functools.partial(command, *args, **kwargs)

    return bound


def one_line(box: str) -> str:
    """The box that tyro draws for an error as one line: what is wrong, and the nearest spelling where it knows one."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]  # without its title; no │ where output is ASCII
    sections = [list(part) for rule, part in itertools.groupby(lines, lambda line: not line.strip("─-╰╯")) if not rule]
    said = [" ".join(part) for part in sections if "helptext" not in part[0]]
    # Leaving an option out is not one of the values to choose from.
    return re.sub(r" in ncml .*|'None', |, 'None'", "", ". ".join(said)).replace("..", ".")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error does: what it cannot encode stands as an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = parse(sys.argv[1:] if arguments is None else arguments)() or 0
        sys.stdout.flush()
        return status
    except NcmlError as error:
        return _fail(str(error))
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, OSError, ImportError, RuntimeError, UnicodeEncodeError) as error:
        sentence = _told(error)
        if sentence is None:
            raise
        return _fail(sentence)
    except KeyboardInterrupt as stop:
        print(f"ncml: {stop or 'stopped'}", file=sys.stderr)
        return 130


def _told(error: Exception) -> str | None:
    """What is not as it must be around us, in a sentence; None for a mistake of ours, whose traceback tells more."""
    if runtime.is_out_of_memory(error):
        return (
            "there is not enough memory: free some, or ask for less at once (fewer or smaller pictures; of ncml train "
            "a smaller --batch-size, --accumulate or --recompute)."
        )
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"{error.object!r} is not UTF-8, which is needed here: give another name."
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get(error.name or "")):
        return f"{error.name} is not installed: pip install 'ncml[{extra}]'"
    return None


def _fail(sentence: str) -> int:
    print(f"ncml: {' '.join(sentence.split())}", file=sys.stderr)
    return 2
