"""docs/ tells the truth: what it links, runs or sets exists. (README's commands are run by test_readme.)"""

import functools
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

from service.params import CompleteParams, GenerateParams, ScoreParams
from service.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PARAMS = {"/score": ScoreParams, "/generate": GenerateParams, "/complete": CompleteParams}
GUIDE = ROOT / "docs" / "quick-start.md"


def commands(page: Path) -> list[str]:
    """The lines of the page's bash blocks, joined where they go on, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


@functools.cache
def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ncml.cli", *command, "--help"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_the_index_links_every_page_of_its_folder() -> None:
    linked = re.findall(r"\]\(([\w/-]+\.md)\)", (ROOT / "docs" / "README.md").read_text())
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(linked)


def test_every_command_of_the_quick_start_exists() -> None:
    lines = commands(GUIDE)
    assert len(lines) >= 10
    for line in lines:
        words = shlex.split(line)
        match words[0]:
            case "make":
                assert (
                    subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, check=False).returncode
                    == 0
                ), line
            case "ncml":
                shown = help_of(words[1])
                for flag in [word for word in words[2:] if word.startswith("-")]:
                    assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", shown), line
            case "curl":
                address = urlsplit(next(f"//{word}" for word in words if word.startswith("localhost:8000")))
                given = {name for name, _ in parse_qsl(address.query, strict_parsing=bool(address.query))}
                given |= {pair.split("=")[0] for flag, pair in pairwise(words) if flag == "-F"}
                fields = PARAMS[address.path].model_fields
                known = {field.alias or name for name, field in fields.items()} | {"image"}
                assert given <= known, line
            case other:
                pytest.fail(f"unknown command: {other}")


def test_every_setting_that_is_named_exists() -> None:
    sources = [path.read_text() for room in ("ncml", "worker", "service") for path in (ROOT / room).rglob("*.py")]
    exist = {f"NCML_{name.upper()}" for name in Settings.model_fields}
    exist |= {name for text in sources for name in re.findall(r"\"(NCML_[A-Z_]+)\"", text)}
    named = set(re.findall(r"`(NCML_[A-Z_]+)`", GUIDE.read_text() + (ROOT / "docs" / "README.md").read_text()))
    assert named <= exist
