from pathlib import Path

from scripts.structure import (
    ROOT,
    bindings,
    import_cycles,
    import_graph,
    measure,
    replace_table,
    source_files,
    table,
)


def write(root: Path, sources: dict[str, str]) -> list[Path]:
    for name, text in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return source_files(root)


def test_exactly_the_bindings_of_names_are_counted(tmp_path: Path) -> None:
    text = """
import os as imported
class Defined:
    attribute: int = 0
def defined(argument, /, *args, option=None, **options):
    for (i, j), *others in argument:
        with option as opened:
            opened.field = [item for item in others if (length := len(item))]
    lambda parameter: parameter
"""
    names = list(bindings(write(tmp_path, {"module.py": text})))
    arguments = sorted(name for name, is_argument in names if is_argument)
    variables = sorted(name for name, is_argument in names if not is_argument)
    assert arguments == ["args", "argument", "option", "options", "parameter"]
    assert variables == ["attribute", "i", "item", "j", "length", "opened", "others"]


def test_imports_for_types_and_in_functions_close_cycles(tmp_path: Path) -> None:
    modules = write(
        tmp_path,
        {
            "a/__init__.py": "from a.one import x",
            "a/one.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import two",
            "a/two.py": "def f():\n    from .b.three import g",
            "a/b/__init__.py": "",
            "a/b/three.py": "from ..one import x\nfrom . import four",
            "a/b/four.py": "import json",
        },
    )
    graph = import_graph(tmp_path, modules)
    assert graph["a"] == {"a.one"}
    assert graph["a.b.three"] == {"a.one", "a.b.four"}
    assert import_cycles(graph) == [["a.b.three", "a.one", "a.two"]]


def test_the_table_replaces_the_old_one_only() -> None:
    page = "before\n<!-- structure -->\nold\n<!-- /structure -->\nafter\n"
    assert replace_table(page, "new") == "before\n<!-- structure -->\nnew\n<!-- /structure -->\nafter\n"


def test_this_repository_is_counted() -> None:
    structure = measure(ROOT)
    assert structure.import_cycles == []
    assert structure.bindings > 1000
    assert min(structure.reading_paths.values()) > 100
    assert "| lines to read to understand scoring | " in table({"now": structure})
