"""Images are moved under a name that is not used, each once, also to another file system and after a kill."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from ncml.cli import moves
from ncml.cli.moves import move_unused, unused_path

MEMORY = Path("/dev/shm")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder from which files are moved."""
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    if not MEMORY.is_dir() or MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(params=["here", "elsewhere"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder to which files are moved, on the same file system or on another one."""
    if request.param == "elsewhere":
        return request.getfixturevalue("elsewhere")
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_no_file_is_replaced(source: Path, target: Path) -> None:
    moved_to: list[str] = []
    for content in "abc":
        (source / "1.png").write_text(content)
        moved_to.append(move_unused(source / "1.png", target / "1.png").name)
    assert moved_to == ["1.png", "1-1.png", "1-2.png"]
    assert contents(target) == {"1.png": "a", "1-1.png": "b", "1-2.png": "c"}
    assert not contents(source)


def test_a_relative_link_is_replaced_by_its_file(source: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_text("a")
    (source / "1.png").symlink_to("../1.png")
    (target / "line").mkdir()
    assert move_unused(source / "1.png", target / "line" / "1.png") == target / "line" / "1.png"
    assert contents(target / "line") == {"1.png": "a"}
    assert not list(source.iterdir())
    assert (tmp_path / "1.png").exists()


def test_an_unused_path_is_not_a_reserved_one(target: Path) -> None:
    (target / "1.png").touch()
    reserved = {target / "1-1.png"}
    assert unused_path(target / "1.png", reserved) == target / "1-2.png"
    assert unused_path(target / "1-1.png", reserved) == target / "1-1-1.png"


def test_a_name_beside_thousands_with_numbers_is_found_in_few_steps(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cameras may write every image under one name."""
    for path in (target / "1.png", *(target / f"1-{number}.png" for number in range(1, 1500))):
        path.touch()
    checked: list[Path] = []
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: checked.append(path) or exists(path))
    assert unused_path(target / "1.png", {target / "1-1500.png"}) == target / "1-1501.png"
    assert len(checked) < 50


class Killed(BaseException):
    """The end of a process, after which nothing is cleaned up."""


@pytest.mark.parametrize("place", ["copy2", "sync", "rename", "unlink"])
def test_a_file_is_whole_and_moved_once_after_a_kill(
    source: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (source / "1.png").write_text("image")
    (elsewhere / "1.png").write_text("other")
    rename = Path.rename
    with monkeypatch.context() as patch:

        def kill(*_: object, **__: object) -> NoReturn:
            patch.setattr(Path, "unlink", kill)
            raise Killed

        def kill_in_copy(path: Path, new: Path) -> None:
            new.write_text("ima")
            kill()

        def kill_before_rename(path: Path, new: Path) -> Path:
            return rename(path, new) if path.parent == source else kill()

        match place:
            case "copy2":
                patch.setattr(shutil, "copy2", kill_in_copy)
            case "sync":
                patch.setattr(moves, "sync", kill)
            case "rename":
                patch.setattr(Path, "rename", kill_before_rename)
            case _:
                patch.setattr(Path, "unlink", lambda path, **_: kill() if path.parent == source else None)
        with pytest.raises(Killed):
            move_unused(source / "1.png", elsewhere / "1.png")
    assert contents(source) == {"1.png": "image"}
    assert {name: text for name, text in contents(elsewhere).items() if not name.startswith(".")} == (
        {"1.png": "other"} | ({"1-1.png": "image"} if place == "unlink" else {})
    )
    assert move_unused(source / "1.png", elsewhere / "1.png") == elsewhere / "1-1.png"
    assert not contents(source)
    assert contents(elsewhere) == {"1.png": "other", "1-1.png": "image"}


def test_a_copy_without_space_leaves_nothing(source: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "1.png").write_text("image")

    def fail(path: Path, new: Path) -> NoReturn:
        new.write_text("ima")
        raise OSError("no space")

    monkeypatch.setattr(shutil, "copy2", fail)
    with pytest.raises(OSError, match="no space"):
        move_unused(source / "1.png", elsewhere / "1.png")
    assert contents(source) == {"1.png": "image"}
    assert not contents(elsewhere)
