"""The registry: which models are served, and what happens when their folders change."""

import os
import shutil
import time
from pathlib import Path

import pytest

from ncml.errors import ModelError
from tests.worker import synthetic
from tests.worker.synthetic import SyntheticModel, write_model
from worker.descriptors import Batching
from worker.registry import MAX_RETRY_S, RETRY_S, ModelRegistry


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


@pytest.mark.parametrize("generates", [False, True])
def test_only_an_idle_registry_that_generates_checks_how_batches_are_sampled(
    tmp_path: Path, loads: Loads, generates: bool
) -> None:
    write_model(tmp_path, "a")
    changes: list[None] = []
    registry = ModelRegistry(
        [tmp_path], loads, device="cpu", keep=2, generates=generates, on_change=lambda: changes.append(None)
    )
    registry.scan()
    assert registry.descriptors[0].batching is None, "hundreds of checks would delay the first request by minutes"
    changes.clear()
    registry.check_batching()
    checked = Batching(groups="fixed", check="failed", detail="it is synthetic.")
    assert registry.descriptors[0].batching == (checked if generates else None)
    assert len(changes) == generates


def test_a_scan_of_many_folders_begins_with_the_default_model_and_can_be_interrupted(
    tmp_path: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.registry.PUBLISH_S", 0.0)
    monkeypatch.setenv("NCML_DEFAULT_MODEL", "c")
    for name in "abcd":
        write_model(tmp_path, name)
    published: list[str] = []
    registry = ModelRegistry([tmp_path], loads, device="cpu", keep=2)
    registry._on_change = lambda: published.append("".join(model.name for model in registry.descriptors))
    assert registry.scan(is_interrupted=lambda: True)
    assert (registry.is_behind, published[-1]) == (True, "c")
    assert registry.get("d").name == "d", "a job does not wait until its folder's turn"
    assert registry.is_behind
    assert registry.scan()
    assert (registry.is_behind, published) == (False, ["c", "cd", "acd", "abcd"])
    loads.names.clear()
    registry.get("c")
    assert loads.names == [], "a scan does not evict models"


def test_a_model_that_only_scores_is_described_so_and_is_not_checked_for_sampling(tmp_path: Path, loads: Loads) -> None:
    write_model(tmp_path, "a", generates=False)
    registry = ModelRegistry([tmp_path], loads, device="cpu", keep=2, generates=True)
    registry.scan()
    registry.check_batching()
    assert not registry.descriptors[0].generates
    assert registry.descriptors[0].batching is None


def test_the_least_recently_used_model_is_evicted(tmp_path: Path, loads: Loads) -> None:
    for name in "abc":
        write_model(tmp_path, name)
    registry = registry_of(loads, tmp_path)
    assert len(registry.descriptors) == 3
    loads.names.clear()
    for name in ("a", "b", "a", "c", "a", "b"):
        registry.get(name)
    assert loads.names == ["c", "b"]


def test_only_a_changed_folder_is_reloaded(tmp_path: Path, loads: Loads) -> None:
    write_model(tmp_path, "a")
    registry = registry_of(loads, tmp_path)
    held = registry.get("a")
    assert not registry.scan()
    write_model(tmp_path, "a", batch_s=9.0)
    assert registry.scan()
    assert registry.get("a").version != held.version
    assert loads.names == ["a", "a"]
    with pytest.raises(ModelError, match="is no longer served; request "):
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
    assert changes == [(), ("a",), ("a",)]
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


def test_a_fault_that_may_pass_is_retried_after_growing_pauses(
    tmp_path: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, *, device: str) -> SyntheticModel:
        loads(folder, device=device)
        raise failure

    clock, opened = [1000.0], list[Path]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    write_model(tmp_path, "a")
    failure: Exception = RuntimeError("CUDA out of memory")
    published: list[int] = []
    registry = ModelRegistry(
        [tmp_path],
        fail,
        device="cpu",
        keep=2,
        on_open=lambda folder, _: opened.append(folder),
        on_change=lambda: published.append(len(opened)),
    )
    assert registry.scan()
    pauses = [RETRY_S * 2**n for n in range(5)]
    for count, pause_s in enumerate(pauses, start=1):
        clock[0] += pause_s - 0.1
        assert not registry.scan()
        assert len(loads.names) == count
        clock[0] += 0.1
        assert registry.scan()  # the same fault again
        assert len(loads.names) == count + 1
    assert len(opened) == len(published) == len(loads.names)  # so that a folder that ends the engine is known
    try:  # as `ncml.load` reports it
        raise ModelError("a cannot be placed on 'cuda': out of memory") from failure
    except ModelError as error:
        failure = error
    clock[0] += MAX_RETRY_S
    assert registry.scan()
    monkeypatch.setattr(registry, "_load", loads)
    clock[0] += MAX_RETRY_S
    assert registry.scan()
    assert registry.faults == {}
    assert [model.name for model in registry.descriptors] == ["a"]


def test_a_damaged_folder_is_not_loaded_again(tmp_path: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    (write_model(tmp_path, "a") / "config.json").write_text("{")
    registry = registry_of(loads, tmp_path)
    later = time.monotonic() + 10 * MAX_RETRY_S
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert not registry.scan()
    assert loads.names == ["a"]


def test_a_folder_whose_permissions_are_repaired_is_loaded(tmp_path: Path) -> None:
    is_readable = False

    def load(folder: Path, *, device: str) -> SyntheticModel:
        if not is_readable:
            raise ModelError("config.json cannot be read: Permission denied.")
        return synthetic.load(folder, device=device)

    folder = write_model(tmp_path, "a")
    registry = ModelRegistry([tmp_path], load, device="cpu", keep=2)
    registry.scan()
    assert registry.faults
    is_readable = True
    (folder / "config.json").read_text()
    assert not registry.scan()
    (folder / "config.json").chmod(0o640)
    assert registry.scan()
    assert registry.faults == {}


def test_reading_linking_and_permissions_do_not_reload_a_healthy_model(tmp_path: Path, loads: Loads) -> None:
    folder = write_model(tmp_path / "models", "a")
    registry = registry_of(loads, tmp_path / "models")
    (folder / "config.json").read_text()
    os.link(folder / "config.json", tmp_path / "backup")
    (folder / "config.json").chmod(0o640)
    assert not registry.scan()
    assert loads.names == ["a"]


def test_a_removed_folder_is_forgotten(tmp_path: Path, loads: Loads) -> None:
    shutil.copytree(write_model(tmp_path, "a"), tmp_path / "b")
    registry = registry_of(loads, tmp_path)
    shutil.rmtree(tmp_path / "a")
    assert registry.scan()
    with pytest.raises(ModelError, match="there is no model 'a' here; the models here are b"):
        registry.get("a")
