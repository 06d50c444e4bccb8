"""Debian packages that some tests need: tests that lack one are skipped, and a run ends with how to install them."""

import shutil
from collections import Counter
from collections.abc import Generator, Iterable

import pytest

REMEDY = "; install it with: apt-get install "


def lacking(problem: str, *packages: str) -> str:
    """Return the reason to skip a test: what is missing, and the packages that provide it."""
    return problem + REMEDY + " ".join(packages)


def require(program: str) -> None:
    """Skip the test if a program is missing, whose package has the same name."""
    if not shutil.which(program):
        pytest.skip(lacking(f"{program} is missing", program))


def summary(reasons: Iterable[str]) -> str | None:
    """Return one line about the skipped tests whose reasons name packages, or None."""
    counts = Counter(reason.partition(REMEDY)[2] for reason in reasons if REMEDY in reason)
    if not counts:
        return None
    causes = ", ".join(f"{count} for {packages.replace(' ', ' and ')}" for packages, count in counts.most_common())
    packages = sorted({package for packages in counts for package in packages.split()})
    return f"Skipped for missing packages: {causes}. To run these tests: apt-get install {' '.join(packages)}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """Print the summary below everything else."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter:
        skipped = [report.longrepr[2] for report in reporter.stats.get("skipped", []) if report.longrepr]
        if line := summary(skipped):
            reporter.write_line(line)
