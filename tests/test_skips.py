"""Tests that are skipped for missing packages are summarised in the last line of a run."""

import os
import subprocess
import sys
from pathlib import Path

from tests.packages import lacking, summary

ROOT = Path(__file__).resolve().parent.parent


def test_a_run_ends_with_the_command_that_installs_missing_packages(tmp_path: Path) -> None:
    """Run real tests where no program is found."""
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"PATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/browser", "tests/deploy/test_operate.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = done.stdout.splitlines()[-1]
    assert line.startswith("Skipped for missing packages: ")
    assert " for chromium, 1 for docker-cli and docker-compose, 1 for openssl." in line
    assert line.endswith(" To run these tests: apt-get install chromium docker-cli docker-compose openssl")


def test_equal_packages_are_counted_together() -> None:
    reasons = [lacking("no browser is installed", "chromium"), lacking("no ip", "iproute2", "curl"), "there is no GPU"]
    assert summary([*reasons, lacking("no ip", "iproute2", "curl")]) == (
        "Skipped for missing packages: 2 for iproute2 and curl, 1 for chromium. "
        "To run these tests: apt-get install chromium curl iproute2"
    )


def test_a_run_without_missing_packages_ends_as_usual() -> None:
    assert summary(["there is no GPU"]) is None
