"""A seed gives the same bytes on machines with other instructions, emulated in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run_cells(instructions: str, threads: str) -> list[dict[str, Any]]:
    """Run the matrix in a fresh process on an emulated machine."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    environment.pop("MKL_CBWR", None)
    if instructions:
        environment["MKL_CBWR"] = instructions
    command = [sys.executable, str(ROOT / "tests/ncml/sampling/emulated.py"), threads, "smallest,bundled"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_seed_gives_the_same_bytes_on_an_emulated_machine() -> None:
    """The short form of the matrix."""
    cells = run_cells("AVX2", "1")
    assert len(cells) == 4
    assert [cell for cell in cells if cell["differing"]] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("instructions", ["", "AVX2", "AVX512", "COMPATIBLE"])
def test_a_seed_gives_the_same_bytes_on_every_emulated_machine(instructions: str) -> None:
    cells = run_cells(instructions, "1,2,3")
    print(*(json.dumps(cell) for cell in cells), sep="\n")
    assert len(cells) == 12
    assert [cell for cell in cells if cell["differing"]] == []
