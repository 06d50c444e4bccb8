"""The commands in the bash blocks of README and of the quick start run unchanged, with the same service.

Service and commands share one core, and the CPU time of each request is limited to what half a core gives it.
Commands that take minutes are in blocks without a language; test_docs checks their options.
"""

import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.conftest import alive, free_port

ROOT = Path(__file__).resolve().parents[2]
MAX_CPU_S = 15.0
"""CPU time of a request that finishes within the default wait of 30 s on half a core."""
README = (ROOT / "README.md").read_text()
BUNDLED = ROOT / "models" / "cifar10"
GUIDE = (ROOT / "docs" / "quick-start.md").read_text()


def blocks(page: str) -> list[tuple[str, str]]:
    """Return (language, text) of each block of code, in order; the first one starts the service."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def bash_lines(page: str) -> list[str]:
    """Return every shell command after the first block, without its comment."""
    lines = [line for language, text in blocks(page)[1:] if language == "bash" for line in text.splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def test_readme_starts_with_the_two_commands() -> None:
    before_first_block, _, _ = README.partition("```")
    language, text = blocks(README)[0]
    assert before_first_block == "# ncml\n\n"
    assert language == "bash"
    assert [re.sub(r"\s+#.*", "", line) for line in text.splitlines()] == ["make serve", "make test"]


def test_commands_that_save_a_response_print_its_type() -> None:
    """A service that is too busy answers with JSON and the status 202, which curl saves as if it were the image."""
    commands = [command for command in bash_lines(README) + bash_lines(GUIDE) if re.match("curl .* -o ", command)]
    assert len(commands) >= 4
    for command in commands:
        assert command.endswith("-w '%{content_type}\\n'"), command


def test_no_two_commands_write_the_same_model() -> None:
    commands: dict[str, str] = {}
    for command, folder in re.findall(r"^(ncml .*--out (\S+).*)$", f"{README}\n{GUIDE}", re.MULTILINE):
        assert commands.setdefault(folder, command) == command
    assert commands


needs_model = pytest.mark.skipif(
    not (BUNDLED / "config.json").is_file(), reason="models/cifar10 is not in this checkout"
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone, with the user's own images, in which the commands run."""
    workspace = tmp_path_factory.mktemp("workspace")
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (workspace / "images" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(workspace / "images" / name / f"{i}.png")
    (workspace / "docs").symlink_to(ROOT / "docs")
    (workspace / "models").mkdir()
    (workspace / "models" / "cifar10").symlink_to(BUNDLED)
    (workspace / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\nmax-time = 600\n")
    return workspace


class Served(NamedTuple):
    port: int
    core: int
    process: psutil.Process

    def cpu_s(self) -> float:
        """Return the CPU time of the service, its workers and its queue so far."""
        times = [process.cpu_times() for process in self.process.children(recursive=True)]
        return sum(time.user + time.system for time in times)


@pytest.fixture(scope="module")
def served(workspace: Path) -> Iterator[Served]:
    """README's first command, on one core; Ctrl-C ends it and must leave nothing behind.

    Requests wait longer than by default, so that the time that other programs of this machine take decides nothing.
    """
    port, core = free_port(), min(os.sched_getaffinity(0))
    environment = os.environ | {"PORT": str(port), "NCML_DATA_DIR": str(workspace / "state"), "NCML_WAIT_S": "600"}
    with (workspace / "serve.log").open("w") as log:
        make = subprocess.Popen(
            ["taskset", "-c", str(core), "make", "serve"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert make.stdout is not None
    family: list[psutil.Process] = []
    try:
        line = next((line for line in make.stdout if line.startswith("ncml is ready on")), "")
        assert f"http://localhost:{port} " in line, (workspace / "serve.log").read_text()
        family = psutil.Process(make.pid).children(recursive=True)
        yield Served(port, core, psutil.Process(make.pid))
        os.killpg(make.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
        make.wait(60)
        assert alive(family) == []
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        make.stdout.close()
        make.wait(10)


HAVE_RUN: set[str] = set()


def run(page: str, workspace: Path, served: Served) -> list[str]:
    """Run each command of a page, but those of an earlier page.

    Fail if one fails, does not write its file, or is a request that would not finish within the default wait.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "CURL_HOME": str(workspace), "OMP_NUM_THREADS": "1"}
    commands = bash_lines(page)
    for command in commands:
        if command in HAVE_RUN:
            continue
        HAVE_RUN.add(command)
        start, cpu_s = time.monotonic(), served.cpu_s()
        written = workspace / match[1] if (match := re.search(r"-o (\S+)", command)) else None
        before = written.stat().st_mtime_ns if written and written.exists() else 0
        done = subprocess.run(
            [
                "taskset",
                "-c",
                str(served.core),
                "bash",
                "-euo",
                "pipefail",
                "-c",
                command.replace("localhost:8000", f"localhost:{served.port}"),
            ],
            cwd=workspace,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        cpu_s = served.cpu_s() - cpu_s
        print(f"{time.monotonic() - start:6.1f} s, {cpu_s:6.1f} s of the service's CPU time  {command}")
        assert cpu_s < MAX_CPU_S or not command.startswith("curl "), command
        if written:
            assert written.stat().st_mtime_ns > before, command
            if written.suffix == ".png":
                with Image.open(written) as image:
                    assert image.format == "PNG", command
            if command.startswith("curl "):
                assert done.stdout.endswith("image/png\n"), command
        if match := re.search(r"--out (\S+)", command):
            assert (workspace / match[1] / "config.json").exists(), command
    return commands


@needs_model
@pytest.mark.timeout(1800)
def test_every_command_runs(workspace: Path, served: Served) -> None:
    commands = run(README, workspace, served)
    assert sum("curl" in command for command in commands) == 3
    assert sum("ncml " in command for command in commands) >= 4
    assert any("--out models/" in command for command in commands)
    full, half = (np.asarray(Image.open(workspace / name).convert("RGB")) for name in ("full.png", "docs/half.png"))
    assert full.shape == (32, 32, 3)
    assert np.array_equal(full[:16], half)


@needs_model
@pytest.mark.timeout(1800)
def test_every_command_of_the_quick_start_runs(workspace: Path, served: Served) -> None:
    commands = run(GUIDE, workspace, served)
    assert blocks(GUIDE)[0] == ("bash", "make serve\n")  # which `served` has done
    assert {command.split()[0] for command in commands} == {"curl", "ncml"}
    assert any("--out models/" in command for command in commands)
    with (workspace / "scores.csv").open(newline="") as table:
        assert len(list(csv.DictReader(table))) == 40


@needs_model
@pytest.mark.timeout(900)
def test_the_tour_runs_against_a_running_service(served: Served) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/docs/tour.py", f"http://localhost:{served.port}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "422: class: cifar10 has no class 'unicorn'" in done.stdout
    assert "2 images, " in done.stdout


def test_the_package_is_imported_from_the_folder_above_a_clone(tmp_path: Path) -> None:
    """There, a clone named ncml is itself importable, as a namespace package."""
    (tmp_path / "ncml").symlink_to(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", "import ncml; ncml.load"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr


@needs_model
@pytest.mark.timeout(900)
def test_the_python_example_runs() -> None:
    example = next(text for language, text in blocks(README) if language == "python")
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\[Score\(file='docs/cat.jpg', bpd=\d+\.\d+, .*is_ood=False\)\]\n", done.stdout)
