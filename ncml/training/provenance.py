"""The provenance of a result: the command, the machine and the time, as model cards and reports quote them."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from ncml.data.inventory import counted
from ncml.paths import printable
from ncml.runtime import CPU_INFO


def command(arguments: Sequence[str]) -> str:
    """Return an `ncml` command line; paths outside the working directory are named without their parents.

    Those folders are private, and model cards are published.
    """
    return printable(" ".join(["ncml", *map(_without_parents, arguments)]))


def _without_parents(argument: str) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    path = Path(value)
    if path.is_absolute() or ".." in path.parts:
        return f"{option}{equals}…/{shlex.quote(path.name)}"
    return shlex.quote(argument)


def machine(device: torch.device | str) -> str:
    """Describe the GPU or processor, the threads of this process, and PyTorch's version."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor()
    return f"{name}, {counted(torch.get_num_threads(), 'thread')}, PyTorch {torch.__version__}"


def duration(seconds: float) -> str:
    """Format a duration: 45 s, 12 min, 3 h 20 min or 5 days 3 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24:,} days {hours % 24} h"


def _processor() -> str:
    """Return the processor's name, or its architecture if the system does not report one."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
