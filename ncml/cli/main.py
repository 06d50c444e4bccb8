"""The command line's entry point: find the command, parse its arguments, run it, and report errors.

A user's mistake is reported in one line with exit status 2, never as a traceback.
"""

import ast
import contextlib
import functools
import importlib.util
import inspect
import io
import itertools
import os
import pkgutil
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import tyro

from ncml import runtime
from ncml.errors import InputError, NcmlError, suggestion
from ncml.object_storage import StoragePath
from ncml.paths import escape_controls

COMMANDS = {
    "train": "ncml.cli.train:train",
    "adapt": "ncml.cli.adapt:adapt",
    "calibrate": "ncml.cli.calibrate:calibrate",
    "score": "ncml.cli.score:score",
    "watch": "ncml.cli.watch:watch",
    "review": "ncml.cli.review:review",
    "drift": "ncml.cli.drift:drift",
    "generate": "ncml.cli.generate:generate",
    "complete": "ncml.cli.generate:complete",
    "tune": "ncml.cli.tune:tune",
    "evaluate": "ncml.cli.evaluate:evaluate",
    "compress": "ncml.cli.compress:compress",
    "decompress": "ncml.cli.decompress:decompress",
    "export": "ncml.cli.export:export",
    "models": "ncml.cli.models:models",
    "push": "ncml.cli.share:push",
    "pull": "ncml.cli.share:pull",
}

DESCRIPTION = """Exact likelihoods, OOD verdicts and images from noise conditional pixel networks.

ncml COMMAND --help describes a command, ncml --version prints the version.

Exit status: 0: done, 1: ncml drift found drift (or a bug, with its traceback), 2: a mistake or a failure, which stderr
describes, 130: stopped by Ctrl-C, 141: the reader of the output closed it."""

MIN_COLUMNS = 20
"""The smallest width for which help is laid out: tyro never ends at 5 columns or fewer."""

TRAINING = ("constriction", "datasets", "efficientnet_lite_pytorch", "matplotlib", "scipy", "sklearn")
EXTRAS = dict.fromkeys((*TRAINING, "tensorboard"), "train") | {
    "torch": "worker",
    "safetensors": "worker",
    "httpx2": "client",
    "watchfiles": "client",
    "huggingface_hub": "hub",
    "pyarrow": "parquet",
    **dict.fromkeys(("aiohttp", "fsspec", "gcsfs", "s3fs"), "storage"),
}
"""The extra of this package that installs a module."""


def commands() -> dict[str, str]:
    """Return the `module:function` of each command; other packages add theirs as entry points `ncml.commands`."""
    return COMMANDS | {point.name: point.value for point in entry_points(group="ncml.commands")}


def parse(arguments: Sequence[str]) -> Callable[[], int | None]:
    """Return the command with its arguments, ready to run; raises `InputError` on a mistake, SystemExit for help."""
    if list(arguments) == ["--version"]:
        return functools.partial(print, version("ncml"))
    if any(re.fullmatch(r"(--[\w-]+=)?", argument) for argument in arguments):  # such as an unset shell variable
        raise InputError("arguments", "an argument is empty: give it a value, or omit it.")
    locations = commands()
    if not arguments:
        raise InputError("command", "a command is missing; see ncml --help.")
    requested = next((a for a in arguments if not a.startswith("-")), None)
    if requested is not None and requested not in locations:
        raise InputError("command", f"there is no command {requested!r}{suggestion(requested, list(locations))}")
    app = tyro.extras.SubcommandApp()
    if requested is None:
        for name, location in locations.items():
            app.command(name=name)(_listed(location))
    else:
        app.command(name=requested)(_deferred(pkgutil.resolve_name(locations[requested])))
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return app.cli(
                prog="ncml",
                description=DESCRIPTION,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError("arguments", to_one_line(output.getvalue())) from None


def _listed(location: str) -> Callable[[], None]:
    """Return a function with the first paragraph of a command's description, read from its source.

    So the list of commands imports none of them.
    """
    module, _, function = location.partition(":")
    spec = None
    with contextlib.suppress(ModuleNotFoundError):  # the user's own worker.py hides the package worker, for example
        spec = importlib.util.find_spec(module)
    tree = ast.parse(Path(spec.origin).read_bytes()) if spec and spec.origin else ast.Module([], [])
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    doc = ast.get_docstring(definitions[0]) if definitions else ""

    def listed() -> None: ...

    listed.__doc__ = (doc or "").partition("\n\n")[0]
    return listed


def _deferred(command: Callable[..., Any]) -> Callable[..., functools.partial[Any]]:
    """Return the command with its arguments bound instead of run, so that parsing ends before work begins."""

    @functools.wraps(command)
    def bound(*args: Any, **kwargs: Any) -> functools.partial[Any]:
        _check_paths(inspect.signature(command).bind(*args, **kwargs).arguments)
        return functools.partial(command, *args, **kwargs)

    return bound


def _check_paths(arguments: Mapping[str, Any]) -> None:
    """Raise `InputError` for an unsupported URL, and for any URL where only a path of this machine can be used."""
    for name, value in arguments.items():
        for path in value if isinstance(value, tuple) else [value]:
            if isinstance(path, StoragePath):
                path.check(name)
            elif isinstance(path, Path) and re.match(r"[A-Za-z][\w+.-]+:/", str(path)):  # Path has made :/ of ://
                field = name.rstrip("_").replace("_", "-")
                raise InputError(field, f"{field} must be on this machine, not in object storage: name another path.")


def to_one_line(box: str) -> str:
    """Convert the error box that tyro draws to one line: the error, and the nearest spelling if it suggests one."""
    if missing := re.search(r"Missing from (ncml \w+):[ │]*\n(.*?)\n[ │]*[─-]{4}", box, re.DOTALL):
        body = textwrap.dedent(missing[2].replace("│", " "))  # the help of an argument is indented below its name
        names = [line.strip().rpartition(", ")[2] for line in body.splitlines() if line[:1].strip()]
        return f"{missing[1]} needs {' and '.join(names)}; see {missing[1]} --help."
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]  # without its title; no │ where output is ASCII
    sections = [list(part) for rule, part in itertools.groupby(lines, lambda line: not line.strip("─-╰╯")) if not rule]
    sentences = [" ".join(part) for part in sections if "helptext" not in part[0]]
    if parsing := re.match(r"Error parsing (\S+): .*?\b(int|float)\b[^']*: '([^']*)'", ". ".join(sentences)):
        kind = "an integer" if parsing[2] == "int" else "a number"
        return f"{parsing[1]} must be {kind}, not {parsing[3]!r}."
    # None stands for an omitted option; it is not one of the values to choose from.
    return re.sub(r" in ncml .*|'None', |, 'None'", "", ". ".join(sentences)).replace("..", ".")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status, of which `DESCRIPTION` has a list."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller closed it, as >&- does
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 it is open until the end
    if isinstance(sys.stdout, io.TextIOWrapper):  # like stderr: escape what it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = parse(sys.argv[1:] if arguments is None else arguments)() or 0
        sys.stdout.flush()
        return status
    except NcmlError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of the output closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # as if the signal had ended the process; 1 means drift
    except (MemoryError, OSError, ImportError, RuntimeError, UnicodeEncodeError) as error:
        sentence = _describe(error)
        if sentence is None:
            raise
        return _fail(sentence)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "stopped", 128 + signal.SIGINT)


def _describe(error: Exception) -> str | None:
    """Describe an error of the environment in a sentence; None for a bug, which needs its traceback."""
    if runtime.is_out_of_memory(error):
        return (
            "there is not enough memory: free some, or reduce the work (fewer or smaller images; for ncml train "
            "a smaller --batch-size, --grad-accum-steps or --activation-checkpointing)."
        )
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"{error.object!r} is not UTF-8, which is required here: choose another name."
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get(error.name or "")):
        return f"{error.name} is not installed: run pip install -e '.[{extra}]' in the clone of ncml."
    return None


def _fail(sentence: str, status: int = 2) -> int:
    with contextlib.suppress(OSError):  # such as a full disk: the status reports the failure as well
        print(f"ncml: {escape_controls(' '.join(sentence.split()))}", file=sys.stderr)
    return status
