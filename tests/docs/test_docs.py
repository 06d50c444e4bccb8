"""README and docs/ are correct: what they link, run or set exists. (test_readme runs the commands of two pages.)"""

import contextlib
import functools
import io
import json
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from ncml.cli import main as cli
from ncml.cli.main import commands
from service.app import create_app
from service.settings import Settings
from worker.messages import EngineSettings
from worker.queue import JobQueue

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CONFIGURATION = (DOCS / "configuration.md").read_text()
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [page for page in PAGES if page.parent == DOCS]
"""The pages that are written by hand; those of docs/report are written by `ncml evaluate`."""
OPERATE = DOCS / "operate.md"
"""It also names the variables of the Compose files, which tests/deploy compares with those files."""
PROGRAMS = ("curl", "make", "ncml", "python", "torchrun")
FOREIGN = {
    "--from-file", "--from-literal", "--index-url", "--logdir", "--nproc-per-node", "--profile", "--replicas", "--rmi",
    "--scale",
}  # fmt: skip
"""Options of other programs that pages name."""

by_page = pytest.mark.parametrize("page", [ROOT / "README.md", *WRITTEN], ids=lambda page: str(page.relative_to(ROOT)))


def lines(page: Path) -> list[list[str]]:
    """Return the commands in the blocks and sentences of a page, split into words, with continued lines joined.

    Every line of a block marked as bash is a command; elsewhere, a command begins with one of PROGRAMS.
    """
    text = page.read_text().replace("\\\n", " ")
    commands: list[list[str]] = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        bare = [re.sub(r"(^|\s)#.*", "", line) for line in block.splitlines()]
        calls = [shlex.split(re.sub(r"^(NCML_\w+=\S+ )+", "", line)) for line in bare if _is_command(line, language)]
        commands += [words for words in calls if words]
    quoted = re.findall(r"`((?:make|ncml|python) [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return commands + [shlex.split(command) for command in quoted]


def _is_command(line: str, language: str) -> bool:
    return language == "bash" or (not language and bool(re.match(rf"(NCML_\w+=\S+ )*({'|'.join(PROGRAMS)}) ", line)))


@functools.cache
def options(command: str) -> set[str]:
    """Return the options of an ncml command, from its help."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert not end.value.code
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", output.getvalue()))


@functools.cache
def operations() -> dict[str, Any]:
    """Return the paths of the service's OpenAPI document."""
    return create_app(Settings(), JobQueue.from_url("redis://localhost")).openapi()["paths"]


def check_curl(words: list[str]) -> None:
    """Check that the operation exists and accepts the parameters."""
    address = urlsplit(next(f"//{word}" for word in words if word.startswith("localhost:8000")))
    named = {name for name, _ in parse_qsl(address.query, strict_parsing=bool(address.query))}
    method = "get"
    for flag, value in pairwise(words):
        if flag == "-F":
            named.add(value.partition("=")[0])
        if flag == "--json":
            named |= json.loads(re.sub(r"\$\(.*\)", "", value)).keys()
        if flag in ("-F", "--json", "--data-binary"):
            method = "post"
    method = next((value.lower() for flag, value in pairwise(words) if flag == "-X"), method)
    matching = [path for path in operations() if re.fullmatch(re.sub(r"{\w+}", r"[^/]+", path), address.path)]
    assert matching, f"no such path: {address.path}"
    assert method in operations()[matching[0]], f"{matching[0]} has no {method}"
    parameters = {parameter["name"] for parameter in operations()[matching[0]][method].get("parameters", [])}
    assert named <= parameters | {"image"}


def check(words: list[str]) -> None:
    """Check that a command exists with its options; fail for unknown programs."""
    match words:
        case ["make", *targets]:
            done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        case ["torchrun", *_] if "ncml.cli" in words:
            check(["ncml", *words[words.index("ncml.cli") + 1 :]])
        case ["ncml", command, *rest]:
            assert command in commands()
            assert {word for word in rest if word.startswith("-")} <= options(command)
        case ["curl", *_]:
            check_curl(words)
        case ["python", "-m", module, *_]:
            assert 'if __name__ == "__main__":' in (ROOT / f"{module.replace('.', '/')}.py").read_text()
        case ["python", script, *rest]:
            text = (ROOT / script).read_text()
            assert [word for word in rest if word.startswith("-") and f'"{word}"' not in text] == []
        case _:
            pytest.fail("an unknown command")


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_linked_file_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_linked_section_exists(page: Path) -> None:
    for target, section in re.findall(r"\]\(([^)\s#:]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target).read_text() if target else page.read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert section in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, section


def test_the_index_links_every_page_of_its_folder() -> None:
    linked = re.findall(r"\]\(([\w/-]+\.md)\)", (DOCS / "README.md").read_text())
    assert {page.name for page in WRITTEN} - {"README.md"} <= set(linked)


def test_readme_links_the_index_of_all_pages() -> None:
    linked = re.findall(r"\]\(([\w/-]+\.md)\)", (ROOT / "README.md").read_text())
    assert {"docs/README.md", "SECURITY.md", "CONTRIBUTING.md"} <= set(linked)


@by_page
def test_every_command_exists(page: Path) -> None:
    called = lines(page)
    assert called or page.name not in ("api.md", "operate.md", "quick-start.md", "training.md", "ood.md")
    for words in called:
        try:
            check(words)
        except AssertionError as error:
            raise AssertionError(f"{shlex.join(words)}: {error}") from None


@by_page
def test_every_option_that_is_named_exists(page: Path) -> None:
    quoted = re.findall(r"`([^`\n]+)`", page.read_text())
    named = {flag for code in quoted for flag in re.findall(r"(?<!\S)--[a-z-]+", code)}
    of_scripts = {word for words in lines(page) if words[0] == "python" for word in words}  # checked with their script
    assert named <= set[str]().union(*map(options, commands())) | of_scripts | FOREIGN


@functools.cache
def settings() -> frozenset[str]:
    """Return the names of the variables that the programs read."""
    sources = [path.read_text() for folder in ("ncml", "worker", "service") for path in (ROOT / folder).rglob("*.py")]
    read = {name for text in sources for name in re.findall(r"\"(NCML_[A-Z_]+)\"", text)}
    return frozenset(read | {f"NCML_{name.upper()}" for name in Settings.model_fields})


@by_page
def test_every_setting_that_is_named_exists(page: Path) -> None:
    exist = set(settings())
    if page == OPERATE:
        compose_files = [ROOT / "docker-compose.yml", *(ROOT / "docker").glob("compose.*.yml")]
        exist |= {name for path in compose_files for name in re.findall(r"\$\{(NCML_[A-Z_]+)", path.read_text())}
    named = set(re.findall(r"\bNCML_[A-Z_]+", page.read_text())) - {"NCML_NAME"}  # any of them
    assert named <= exist


def test_every_setting_is_documented() -> None:
    documented = re.findall(r"^\| `(NCML_[A-Z_]+)` \|", CONFIGURATION, re.MULTILINE)
    assert sorted(documented) == sorted(settings())


def test_the_documented_numbers_are_the_defaults() -> None:
    defaults = {
        f"NCML_{name.upper()}": field.default
        for name, field in Settings.model_fields.items()
        if isinstance(field.default, int | float)
    } | {"NCML_MAX_CALIBRATED_MODELS": EngineSettings.max_calibrated}
    rows = re.findall(r"^\| `(NCML_[A-Z_]+)` \|.*\| ([\d,]+)( MiB)?[^|]*\|$", CONFIGURATION, re.MULTILINE)
    documented = {name: int(number.replace(",", "")) * (2**20 if unit else 1) for name, number, unit in rows}
    assert documented == defaults


def test_the_api_page_documents_every_parameter_of_a_score() -> None:
    table, _ = re.findall(r"^\| Parameter \|.*?\n\n", (DOCS / "api.md").read_text(), re.MULTILINE | re.DOTALL)
    headers = {"Prefer", "Idempotency-Key", "X-Request-Id"}
    taken = {parameter["name"] for parameter in operations()["/score"]["post"]["parameters"]}
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == taken - headers
