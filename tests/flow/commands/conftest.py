"""Small models, one thread, and calibrations that are made quickly."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ncml
from tests.ncml.conftest import calibrated, calibration, few_power_images, model, plain_model, s3, threads
from tests.ncml.evaluation.conftest import models

__all__ = ["calibrated", "calibration", "few_power_images", "model", "models", "plain_model", "s3", "threads"]


def rows(tmp_path: Path) -> list[dict[str, str]]:
    """Return the whole rows of the table of `ncml watch`."""
    path = tmp_path / "verdicts.csv"
    if not path.exists():
        return []
    with path.open(newline="") as table:
        return [row for row in csv.DictReader(table) if None not in row.values()]


@pytest.fixture
def start_watch(tmp_path: Path, calibrated: ncml.Model) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `ncml watch` of a source, until the test ends; what it prints goes to `out`, its errors to `log`."""
    processes: list[subprocess.Popen[str]] = []

    def start(source: str, *options: str, out: str = "out", **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ncml.cli", "watch", source, "--model", str(calibrated.folder), *options]
        with (tmp_path / out).open("a") as stdout, (tmp_path / "log").open("a") as stderr:
            process = subprocess.Popen(
                command,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                cwd=tmp_path,
                stdout=stdout,
                stderr=stderr,
                text=True,
            )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
