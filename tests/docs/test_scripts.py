"""The scripts that make the figures of the documentation print their help without making anything."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "docs"


@pytest.mark.parametrize("name", ["controls", "samples", "screenshots", "tiles"])
def test_help_is_printed_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    copy = tmp_path / "scripts" / "docs"  # the scripts write below the folder in which they lie
    shutil.copytree(SCRIPTS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = {path.name for path in copy.iterdir()}
    command = [sys.executable, "-B", str(copy / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}.py")
    assert {path.name for path in copy.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]
