"""The shelf: which models are served, and what happens when their folders change."""

import shutil
from pathlib import Path

import pytest

from ncml.errors import ModelError
from tests.worker import synthetic
from tests.worker.synthetic import SyntheticModel, write_model
from worker.contract import Batching
from worker.models import Shelf


class Loads:
    """Loads synthetic models and keeps count."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, folder: Path, *, device: str) -> SyntheticModel:
        self.names.append(folder.name)
        return synthetic.load(folder, device=device)


@pytest.fixture
def loads() -> Loads:
    return Loads()


def shelf_of(loads: Loads, *directories: Path, keep: int = 2) -> Shelf:
    shelf = Shelf(directories, loads, device="cpu", keep=keep)
    shelf.scan()
    return shelf


def test_the_earlier_directory_counts_and_other_folders_are_passed_over(tmp_path: Path, loads: Loads) -> None:
    write_model(tmp_path / "one", "a", batch_s=1.0)
    write_model(tmp_path / "two", "a", batch_s=2.0)
    write_model(tmp_path / "two", "b")
    (tmp_path / "two" / "notes").mkdir()
    shelf = shelf_of(loads, tmp_path / "one", tmp_path / "absent", tmp_path / "two")
    assert [model.name for model in shelf.descriptors] == ["a", "b"]
    assert shelf.get("a").version == synthetic.load(tmp_path / "one" / "a", device="cpu").version


def test_only_a_shelf_that_generates_asks_how_batches_are_sampled(tmp_path: Path, loads: Loads) -> None:
    write_model(tmp_path, "a")
    assert shelf_of(loads, tmp_path).descriptors[0].batching is None
    shelf = Shelf([tmp_path], loads, device="cpu", keep=2, generates=True)
    shelf.scan()
    assert shelf.descriptors[0].batching == Batching(groups="fixed", check="failed", detail="it is synthetic.")


def test_the_least_recently_used_model_makes_room(tmp_path: Path, loads: Loads) -> None:
    for name in "abc":
        write_model(tmp_path, name)
    shelf = shelf_of(loads, tmp_path)
    assert len(shelf.descriptors) == 3
    loads.names.clear()
    for name in ("c", "b", "c", "a", "c", "b"):
        shelf.get(name)
    assert loads.names == ["a", "b"]


def test_a_changed_folder_is_loaded_anew_and_an_unchanged_one_is_not(tmp_path: Path, loads: Loads) -> None:
    write_model(tmp_path, "a")
    shelf = shelf_of(loads, tmp_path)
    held = shelf.get("a")
    assert not shelf.scan()
    write_model(tmp_path, "a", batch_s=9.0)
    assert shelf.scan()
    assert shelf.get("a").version != held.version
    assert loads.names == ["a", "a"]
    with pytest.raises(ModelError, match="is gone; the current one is"):
        shelf.get("a", held.version)


def test_a_folder_that_breaks_leaves_what_was_loaded_in_service(tmp_path: Path, loads: Loads) -> None:
    folder = write_model(tmp_path, "a")
    shelf = shelf_of(loads, tmp_path)
    version = shelf.get("a").version
    (folder / "config.json").write_text("{")
    assert shelf.scan()
    assert shelf.get("a").version == version
    assert [model.version for model in shelf.descriptors] == [version]
    assert shelf.faults == {"a": "a/config.json is not JSON"}
    write_model(tmp_path, "a", batch_s=9.0)
    shelf.scan()
    assert shelf.faults == {}
    assert shelf.get("a").version != version


def test_a_folder_broken_from_the_start_is_named_with_its_fault(tmp_path: Path, loads: Loads) -> None:
    (write_model(tmp_path, "a") / "config.json").write_text("{")
    shelf = shelf_of(loads, tmp_path)
    assert shelf.descriptors == ()
    with pytest.raises(ModelError, match="'a' cannot be used: a/config"):
        shelf.get("a")


def test_a_removed_folder_is_forgotten(tmp_path: Path, loads: Loads) -> None:
    shutil.copytree(write_model(tmp_path, "a"), tmp_path / "b")
    shelf = shelf_of(loads, tmp_path)
    shutil.rmtree(tmp_path / "a")
    assert shelf.scan()
    with pytest.raises(ModelError, match="there is no model 'a' here; there are b"):
        shelf.get("a")
