"""Count files, lines, import cycles and uninformative names, to compare two states of the code.

python scripts/structure.py                                             # the working tree
python scripts/structure.py --revision 1b85900 --json                   # a commit
python scripts/structure.py --before 1b85900 --write docs/structure.md  # both, as the table of that page

docs/structure.md explains what is counted.
"""

import argparse
import ast
import dataclasses
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ncml", "worker", "service")
SUFFIXES = {".py": "Python", ".js": "JavaScript", ".lua": "Lua"}
MAX_LINES = 400
MIN_LINES = 30

UNINFORMATIVE = {
    *("found", "some", "known", "each", "told", "asked", "wanted", "given"),
    *("begun", "what", "said", "chosen", "seen", "mine", "here", "rest"),
}
"""Names that do not express what a variable holds."""

READING_PATHS = {
    "scoring": (
        "ncml/model.py ncml/network.py ncml/layers.py ncml/likelihood.py ncml/noise.py"
        " ncml/ood.py ncml/calibration.py ncml/conformal.py",
        "ncml/model.py ncml/network/ncpn.py ncml/network/layers.py ncml/network/likelihood.py ncml/network/sde.py"
        " ncml/ood/measurements.py ncml/ood/statistics.py ncml/ood/calibration.py ncml/ood/conformal.py",
    ),
    "sampling": (
        "ncml/model.py ncml/network.py ncml/generate.py ncml/incremental.py ncml/replay.py ncml/refine.py"
        " ncml/noise.py ncml/orientation.py",
        "ncml/model.py ncml/network/ncpn.py ncml/sampling/**/*.py ncml/network/sde.py ncml/network/orientation.py",
    ),
    "training": (
        "ncml/commands/train.py ncml/fit.py ncml/train.py ncml/data.py ncml/parallel.py ncml/track.py"
        " ncml/noise.py ncml/network.py ncml/layers.py ncml/likelihood.py",
        "ncml/cli/train.py ncml/training/run.py ncml/training/report.py ncml/training/card.py ncml/training/loop.py"
        " ncml/training/trainer.py ncml/training/optimizer.py ncml/training/muon.py ncml/training/precision.py"
        " ncml/training/state.py ncml/training/batches.py ncml/training/objective.py ncml/training/dataset.py"
        " ncml/training/distributed.py ncml/training/tracking.py ncml/network/sde.py ncml/network/ncpn.py"
        " ncml/network/layers.py ncml/network/likelihood.py",
    ),
    "the worker": ("worker/**/*.py worker/**/*.lua",),
}
"""The files that explain each subject, as patterns: before and after the division of `ncml` into packages."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """The counts of one state of the code."""

    files: dict[str, int]
    """Python files of each folder."""
    lines: dict[str, int]
    """Lines of each language in the packages, and of the tests."""
    large_files: list[str]
    small_files: list[str]
    """Modules of fewer than MIN_LINES lines, `__init__.py` and `__main__.py` excepted."""
    import_cycles: list[list[str]]
    bindings: int
    uninformative_bindings: dict[str, int]
    uninformative_arguments: int
    reading_paths: dict[str, int]
    """Lines of the files that explain each subject."""


def measure(root: Path) -> Structure:
    """Count the code in the folder `root`."""
    paths = [path for package in PACKAGES for path in source_files(root / package)]
    line_counts = {path.relative_to(root).as_posix(): count_lines(path) for path in paths}
    modules = [path for path in paths if path.suffix == ".py"]
    names = list(bindings(modules))
    lines = Counter[str]()
    for name, count in line_counts.items():
        lines[SUFFIXES[Path(name).suffix]] += count
    lines["tests"] = sum(count_lines(path) for path in source_files(root / "tests"))
    return Structure(
        files=dict(sorted(Counter(path.parent.relative_to(root).as_posix() for path in modules).items())),
        lines=dict(lines),
        large_files=[name for name, count in line_counts.items() if count > MAX_LINES],
        small_files=[
            name
            for name, count in line_counts.items()
            if count < MIN_LINES and name.endswith(".py") and not name.endswith("__.py")
        ],
        import_cycles=import_cycles(import_graph(root, modules)),
        bindings=len(names),
        uninformative_bindings=dict(Counter(name for name, _ in names if name in UNINFORMATIVE).most_common()),
        uninformative_arguments=sum(is_argument for name, is_argument in names if name in UNINFORMATIVE),
        reading_paths={subject: reading_path_lines(root, subject) for subject in READING_PATHS},
    )


def source_files(folder: Path) -> list[Path]:
    """List the source files below a folder in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)


def count_lines(path: Path) -> int:
    """Count the lines of a file."""
    return len(path.read_bytes().splitlines())


def bindings(modules: list[Path]) -> Iterator[tuple[str, bool]]:
    """Yield every bound name and whether it is an argument.

    A name is bound by an assignment, a loop, a `with`, a comprehension, `:=`, or as an argument. Imports, definitions
    and attributes do not count.
    """
    for path in modules:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id, False
            elif isinstance(node, ast.arg):
                yield node.arg, True


def import_graph(root: Path, modules: list[Path]) -> dict[str, set[str]]:
    """Map each module to the modules that it imports, including in functions and under TYPE_CHECKING."""
    paths = {_module_name(root, path): path for path in modules}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        imported = set[str]()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                package = _absolute(node, name, is_package=path.name == "__init__.py")
                submodules = {f"{package}.{alias.name}" for alias in node.names} & paths.keys()
                imported |= submodules
                if len(submodules) < len(node.names):
                    imported.add(package)
        graph[name] = imported & paths.keys() - {name}
    return graph


def _module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _absolute(node: ast.ImportFrom, importer: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    ancestors = importer.split(".")
    package = ancestors[: len(ancestors) - node.level + is_package]
    return ".".join([*package, node.module] if node.module else package)


def import_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """List the groups of modules that import each other, directly or through others."""
    reachable = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted(other for other in reachable[name] if name in reachable[other]))
        for name in graph
        if name in reachable[name]
    }
    return [list(group) for group in sorted(groups)]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    visited = set[str]()
    pending = [start]
    while pending:
        pending += (neighbours := graph[pending.pop()] - visited)
        visited |= neighbours
    return visited


def reading_path_lines(root: Path, subject: str) -> int:
    """Count the lines of the files that explain a subject."""
    for alternative in READING_PATHS[subject]:
        patterns = alternative.split()
        matches = [list(root.glob(pattern)) for pattern in patterns]
        if all(files or "*" in pattern for pattern, files in zip(patterns, matches, strict=True)):
            return sum(count_lines(path) for files in matches for path in files)
    raise SystemExit(f"structure: a file that explains {subject} was moved; name its new place in READING_PATHS")


def measure_revision(revision: str) -> Structure:
    """Count the code of a commit."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", revision, *PACKAGES, "tests"], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        raise SystemExit(f"structure: {archive.stderr.decode().strip()}; fetch the commit or name another")
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
        return measure(Path(folder))


def table(columns: dict[str, Structure]) -> str:
    """Format structures side by side as a Markdown table."""

    def row(title: str, cells: list[int]) -> str:
        return f"| {title} | " + " | ".join(f"{cell:,}" for cell in cells) + " |"

    states = list(columns.values())
    folders = sorted({folder for state in states for folder in state.files})
    rows = [row(f"Python files in `{folder}/`", [state.files.get(folder, 0) for state in states]) for folder in folders]
    rows += [
        row(f"lines of {language}", [state.lines[language] for state in states])
        for language in ("Python", "JavaScript", "Lua", "tests")
    ]
    rows += [
        row(f"files over {MAX_LINES} lines", [len(state.large_files) for state in states]),
        row(f"files under {MIN_LINES} lines", [len(state.small_files) for state in states]),
        row("import cycles, types included", [len(state.import_cycles) for state in states]),
        row("bindings", [state.bindings for state in states]),
        row("uninformative bindings", [sum(state.uninformative_bindings.values()) for state in states]),
        row("arguments among them", [state.uninformative_arguments for state in states]),
    ]
    rows += [
        row(f"lines to read to understand {subject}", [state.reading_paths[subject] for state in states])
        for subject in READING_PATHS
    ]
    return "\n".join([f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns), *rows])


def replace_table(page: str, new_table: str) -> str:
    """Return the page with the table between its two markers replaced."""
    pattern = r"(<!-- structure -->\n).*?(<!-- /structure -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{new_table}\n{match[2]}", page, count=1, flags=re.DOTALL)


def main() -> None:
    """Count the working tree or a commit, alone or beside an earlier commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", help="count this commit instead of the working tree")
    parser.add_argument("--before", help="compare with this commit")
    parser.add_argument("--json", action="store_true", help="print every count and file name as JSON")
    parser.add_argument("--write", type=Path, help="replace the table of this page instead of printing it")
    arguments = parser.parse_args()
    columns = {arguments.before: measure_revision(arguments.before)} if arguments.before else {}
    columns[arguments.revision or "now"] = measure_revision(arguments.revision) if arguments.revision else measure(ROOT)
    if arguments.write:
        arguments.write.write_text(replace_table(arguments.write.read_text(), table(columns)))
    elif arguments.json:
        print(json.dumps({name: dataclasses.asdict(state) for name, state in columns.items()}, indent=2))
    else:
        print(table(columns))


if __name__ == "__main__":
    main()
