"""The registry: which models are served, and what happens when their folders change."""

import shutil
from pathlib import Path

import pytest

from ncml.errors import ModelError
from tests.worker import synthetic
from tests.worker.synthetic import SyntheticModel, write_model
from worker.descriptors import Batching
from worker.registry import ModelRegistry


class Loads:
    """Loads synthetic models and counts the loads."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, folder: Path, *, device: str) -> SyntheticModel:
        self.names.append(folder.name)
        return synthetic.load(folder, device=device)


@pytest.fixture
def loads() -> Loads:
    return Loads()


def registry_of(loads: Loads, *directories: Path, keep: int = 2) -> ModelRegistry:
    registry = ModelRegistry(directories, loads, device="cpu", keep=keep)
    registry.scan()
    return registry


def test_the_earlier_directory_takes_precedence_and_other_folders_are_ignored(tmp_path: Path, loads: Loads) -> None:
    write_model(tmp_path / "one", "a", batch_s=1.0)
    write_model(tmp_path / "two", "a", batch_s=2.0)
    write_model(tmp_path / "two", "b")
    (tmp_path / "two" / "notes").mkdir()
    registry = registry_of(loads, tmp_path / "one", tmp_path / "absent", tmp_path / "two")
    assert [model.name for model in registry.descriptors] == ["a", "b"]
    assert registry.get("a").version == synthetic.load(tmp_path / "one" / "a", device="cpu").version


def test_only_a_registry_that_generates_checks_how_batches_are_sampled(tmp_path: Path, loads: Loads) -> None:
    write_model(tmp_path, "a")
    assert registry_of(loads, tmp_path).descriptors[0].batching is None
    registry = ModelRegistry([tmp_path], loads, device="cpu", keep=2, generates=True)
    registry.scan()
    assert registry.descriptors[0].batching == Batching(groups="fixed", check="failed", detail="it is synthetic.")


def test_the_least_recently_used_model_is_evicted(tmp_path: Path, loads: Loads) -> None:
    for name in "abc":
        write_model(tmp_path, name)
    registry = registry_of(loads, tmp_path)
    assert len(registry.descriptors) == 3
    loads.names.clear()
    for name in ("c", "b", "c", "a", "c", "b"):
        registry.get(name)
    assert loads.names == ["a", "b"]


def test_only_a_changed_folder_is_reloaded(tmp_path: Path, loads: Loads) -> None:
    write_model(tmp_path, "a")
    registry = registry_of(loads, tmp_path)
    held = registry.get("a")
    assert not registry.scan()
    write_model(tmp_path, "a", batch_s=9.0)
    assert registry.scan()
    assert registry.get("a").version != held.version
    assert loads.names == ["a", "a"]
    with pytest.raises(ModelError, match="is no longer served; the current one is"):
        registry.get("a", held.version)


def test_files_that_are_being_written_do_not_reload_a_model(tmp_path: Path, loads: Loads) -> None:
    folder = write_model(tmp_path, "a")
    registry = registry_of(loads, tmp_path)
    registry.get("a")
    for size in (1, 2):
        (folder / ".model.safetensors.1234.new").write_bytes(bytes(size))
        assert not registry.scan()
    assert loads.names == ["a"]


def test_a_model_that_another_worker_found_first_is_found_when_a_job_names_it(tmp_path: Path, loads: Loads) -> None:
    changes: list[tuple[str, ...]] = []
    registry = ModelRegistry(
        [tmp_path],
        loads,
        device="cpu",
        keep=2,
        on_change=lambda: changes.append(tuple(model.name for model in registry.descriptors)),
    )
    assert not registry.scan()
    write_model(tmp_path, "a")
    first = registry.get("a").version
    write_model(tmp_path, "a", batch_s=9.0)
    assert registry.get("a").version == first
    second = SyntheticModel(tmp_path / "a").version
    assert registry.get("a", second).version == second
    assert changes == [("a",), ("a",)]
    assert not registry.scan()


def test_the_loaded_model_stays_in_service_when_its_folder_breaks(tmp_path: Path, loads: Loads) -> None:
    folder = write_model(tmp_path, "a")
    registry = registry_of(loads, tmp_path)
    version = registry.get("a").version
    (folder / "config.json").write_text("{")
    assert registry.scan()
    assert registry.get("a").version == version
    assert [model.version for model in registry.descriptors] == [version]
    assert registry.faults == {"a": "a/config.json is not JSON"}
    write_model(tmp_path, "a", batch_s=9.0)
    registry.scan()
    assert registry.faults == {}
    assert registry.get("a").version != version


def test_a_folder_broken_from_the_start_is_reported_with_its_fault(tmp_path: Path, loads: Loads) -> None:
    (write_model(tmp_path, "a") / "config.json").write_text("{")
    registry = registry_of(loads, tmp_path)
    assert registry.descriptors == ()
    with pytest.raises(ModelError, match="'a' cannot be used: a/config"):
        registry.get("a")


def test_a_removed_folder_is_forgotten(tmp_path: Path, loads: Loads) -> None:
    shutil.copytree(write_model(tmp_path, "a"), tmp_path / "b")
    registry = registry_of(loads, tmp_path)
    shutil.rmtree(tmp_path / "a")
    assert registry.scan()
    with pytest.raises(ModelError, match="there is no model 'a' here; the models here are b"):
        registry.get("a")
