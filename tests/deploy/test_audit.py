"""CI's use of pip-audit: a vulnerability fails, unreachable advisories do not, and both are reported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOUND = {"name": "sound", "version": "1", "vulns": []}
FAULTY = {"name": "faulty", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.0"]}]}
UNKNOWN = {"name": "unknown", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("reported", "status", "words"),
    [
        ([SOUND, UNKNOWN], 0, "0 of 1 packages are vulnerable (2 are installed)"),
        ([SOUND, FAULTY], 1, "faulty 2: PYSEC-1, fixed in 3.0"),
        ([UNKNOWN], 0, "skipped, none of 1 packages is known"),
        (None, 0, "skipped, the advisories cannot be reached (no route)"),
    ],
)
def test_the_result_of_the_audit(tmp_path: Path, reported: list | None, status: int, words: str) -> None:
    output = "no route" if reported is None else json.dumps({"dependencies": reported})
    (tmp_path / "pip_audit.py").write_text(
        f"import sys; print({output!r}, file=sys.{'stderr' if reported is None else 'stdout'}); sys.exit(1)"
    )
    command = [sys.executable, str(ROOT / ".ci" / "audit.py"), "site-packages"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == status
    assert words in run.stdout
