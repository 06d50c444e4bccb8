"""Any model folder is served or refused with a reason, and the other folders are served."""

import contextlib
import copy
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ncml
from ncml import checkpoint
from ncml.calibration import tile_estimation
from ncml.calibration.estimation import calibrate
from ncml.ood import storage
from tests.ncml import nets
from worker.descriptors import ModelDescriptor
from worker.main import load
from worker.registry import ModelRegistry

JSON_FILES = ("config.json", "calibration.json", "calibration-tiles.json")
FILES = (*JSON_FILES, "card.md", "model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def threads(one_thread: None) -> None:
    """Compute on one thread."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid model folder with a card and both calibrations, alone in its directory."""
    folder = tmp_path_factory.mktemp("models") / "sound"
    network = nets.network(nets.config(((4, 1),)), dtype=torch.float32, spread=0.08)
    checkpoint.save(folder, network, metrics={"test_bpd": 5.0}, card="# sound\n")
    model = ncml.load(folder)
    calibrate(model, nets.FIT, nets.RANK, power_images=10).save(folder)
    images = [nets.images(1, 16, 16, seed=seed).numpy()[0] for seed in range(28)]
    tile_estimation.calibrate(model, [lambda i=i: i for i in images[:8]], [lambda i=i: i for i in images[8:]]).save(
        folder
    )
    return folder


@pytest.fixture
def beside(sound: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the valid folder in another directory, to be damaged."""
    yield Path(shutil.copytree(sound, tmp_path / "models" / "bad"))
    shutil.rmtree(tmp_path / "models")


def served(*directories: Path) -> tuple[dict[str, ModelDescriptor], dict[str, str]]:
    """Return the descriptors that a registry publishes, and its faults."""
    registry = ModelRegistry(directories, load, device="cpu", keep=2)
    registry.scan()
    published = [ModelDescriptor.model_validate_json(model.model_dump_json()) for model in registry.descriptors]
    for model in published:
        if model.name != "sound":
            (score,) = registry.get(model.name).score(np.zeros((1, model.height, model.width, 3), np.uint8))
            assert np.isfinite(score.bpd)
    return {model.name: model for model in published}, registry.faults


def test_a_folder_whose_name_is_not_utf8_is_reported_with_its_name_escaped(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    _, faults = served(tmp_path)
    ((name, fault),) = faults.items()
    assert name.startswith("caf\\udce9")
    assert (name + fault).encode()  # so that /models and the metrics can contain them


def sign(folder: Path) -> None:
    """Update the versions to match the contents, as far as they can be computed, so that they reveal no change."""
    try:
        description = json.loads((folder / "config.json").read_text())
        version = checkpoint.digest(checkpoint.read_config(description), folder / "model.safetensors")
    except Exception:
        return  # the damage lies deeper than the versions
    (folder / "config.json").write_text(json.dumps(description | {"version": version}))
    for name in JSON_FILES[1:]:
        stored = json.loads((folder / name).read_text())
        for calibration in stored["calibrations"].values() if "calibrations" in stored else [stored]:
            calibration["model_version"] = version
            signed = {key: value for key, value in calibration.items() if key not in ("version", *storage.UNSIGNED)}
            calibration["version"] = storage.digest(signed)
        (folder / name).write_text(json.dumps(stored))


def change(folder: Path, name: str, edit: Callable[[Any], object]) -> None:
    stored = json.loads((folder / name).read_text())
    edit(stored["calibrations"]["default"] if "calibrations" in stored else stored)
    (folder / name).write_text(json.dumps(stored))


NESTED = b'{"a":' * 50_000


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "card.md").write_bytes("# Bären".encode("latin-1")), "card.md cannot be read as UTF-8 text"),
        (lambda f: (f / "card.md").write_bytes(b"a" * 2**20), "card.md cannot be .* it has more than 262144 bytes"),
        (lambda f: change(f, "config.json", lambda c: c["metrics"].update(bpd=10**400)), "metrics must be a number"),
        (lambda f: change(f, "config.json", lambda c: c["metrics"].update(bpd=float("nan"))), "metrics must be a num"),
        (lambda f: change(f, "config.json", lambda c: c["metrics"].update({"\ud800": 1})), "name of metrics must"),
        (lambda f: (f / "config.json").write_bytes(NESTED), "config.json cannot be read as JSON: it is nested too"),
        (lambda f: (f / "config.json").write_bytes(b"1" * 5000), "config.json cannot be read as JSON"),
        (lambda f: (f / "config.json").write_bytes(b" " * 2**24), "config.json cannot be .* more than 8388608 bytes"),
        (
            lambda f: change(f, "config.json", lambda c: c["config"]["model"]["levels"][0].update(blocks=10**7)),
            "does not describe a model: model.levels.0.blocks: input should be less than or equal to 512",
        ),
        (
            lambda f: change(f, "config.json", lambda c: c["config"]["model"]["levels"][0].update(width=10**9)),
            "model.levels.0.width: input should be less than or equal to 4096",
        ),
        (
            lambda f: change(f, "config.json", lambda c: c["config"]["training"].update(ema_images=0)),
            "training.ema_images: input should be greater than 0",
        ),
        (
            lambda f: change(f, "config.json", lambda c: c["config"]["model"].update(classes=["a" * 201, "b"])),
            "model.classes.0: string should have at most 200 characters",
        ),
        (
            lambda f: os.truncate(f / "model.safetensors", 2**40),
            "has 1099511627776 bytes, more than the ",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: f.rename(f.with_name("a@b")), "cannot be served: a model's name has at most 200 printable"),
        (lambda f: f.rename(f.with_name("\udcff")), "cannot be served: a model's name has at most 200 printable"),
    ],
    ids=lambda value: None if callable(value) else value[:24],
)
def test_an_invalid_folder_is_refused_with_a_reason(
    sound: Path, beside: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(beside)
    started = time.process_time()
    models, faults = served(beside.parent, sound.parent)
    assert time.process_time() - started < 30
    assert list(models) == ["sound"]
    (fault,) = faults.values()
    assert "\n" not in fault
    assert re.search(reason, fault), fault


@pytest.mark.parametrize("name", JSON_FILES[1:])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: f.write_bytes(NESTED), "nested too deeply"),
        (lambda f: f.write_bytes(b"[" * 2**26), "more than 33554432 bytes"),
        (lambda f: f.write_bytes("ä".encode("latin-1")), "cannot be read as JSON"),
        (lambda f: change(f.parent, f.name, lambda c: c.update(ranked=[])), "is damaged"),
        (lambda f: change(f.parent, f.name, lambda c: c.update(n_fit=10**400)), "is damaged"),
        (lambda f: change(f.parent, f.name, lambda c: c.update(false_positive_rate="x")), "is damaged"),
        (lambda f: change(f.parent, f.name, lambda c: c.update(false_positive_rate=1e-6)), "is damaged"),
        (lambda f: change(f.parent, f.name, lambda c: gaussian(c).update(mean=[1])), "is damaged"),
        (lambda f: change(f.parent, f.name, lambda c: gaussian(c)["mean"].__setitem__(0, 10**400)), "is damaged"),
        (lambda f: change(f.parent, f.name, lambda c: gaussian(c)["columns"].__setitem__(0, "x")), "is damaged"),
    ],
)
def test_an_invalid_calibration_is_refused_and_its_model_is_served(
    beside: Path, name: str, damage: Callable[[Path], object], reason: str
) -> None:
    damage(beside / name)
    if (beside / name).stat().st_size < 2**20 and reason == "is damaged":
        sign(beside)
    models, faults = served(beside.parent)
    assert faults == {}
    model = ncml.load(beside)
    if name == "calibration.json":
        assert models["bad"].default_calibration is None
        assert reason in model.missing_reason
    else:
        assert models["bad"].tiles is None
        with pytest.raises(ncml.ModelError, match=reason):
            _ = model.tiles


@pytest.mark.parametrize(
    "power",
    [None, 3, {}, {"altered": {}}, {"images": 10**400}, {"good": 2}, {"good": "x"}, {"foreign": {"x": float("nan")}}],
)
def test_a_calibration_with_an_invalid_power_is_refused(beside: Path, power: Any) -> None:
    """The power is not part of the digest, so a change must be caught by its values."""

    def edit(calibration: dict[str, Any]) -> None:
        calibration["power"] = calibration["power"] | power if isinstance(power, dict) and power else power

    change(beside, "calibration.json", edit)
    model = ncml.load(beside)
    assert (model.calibration is None) == (power is not None)
    assert power is None or "is damaged" in model.missing_reason


def test_a_calibration_with_an_invalid_name_is_refused(beside: Path) -> None:
    path = beside / "calibration.json"
    stored = json.loads(path.read_text())
    stored["calibrations"]["\ud800"] = stored["calibrations"]["default"]
    path.write_text(json.dumps(stored))
    assert "a calibration's name must be" in ncml.load(beside).missing_reason


def gaussian(stored: dict[str, Any]) -> dict[str, Any]:
    return stored["fit"]["gaussians"]["multiscale_corr"] if "fit" in stored else stored["gaussians"]["worst_tile"]


HOSTILE = st.sampled_from([
    None, True, -1, 0, 1, 10**7, 2**63, 10**400, -0.5, 0.0, 1e308, float("nan"), float("inf"), "", "x", "1", "\ud800",
    "a" * 10_000, [], {}, [[]], [1, 2], {"a": 1}, [None] * 1000, [[[[[[[[[[1]]]]]]]]]],
])  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON document, but of a list only those of its ends."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in {0, len(value) - 1} if value else ():
            yield from places(value[index], (*path, index))


def damage_json(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(JSON_FILES))
    stored = json.loads((folder / name).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = data.draw(st.sampled_from(list(places(stored)) or [("a",)]))
        place = stored
        for key in parents:
            place = place[key]
        if data.draw(st.booleans()):
            place[last] = copy.deepcopy(data.draw(HOSTILE))
        else:
            del place[last]
    (folder / name).write_text(json.dumps(stored))
    if data.draw(st.booleans()):
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
            sign(folder)


def damage_file(folder: Path, data: st.DataObject) -> None:
    path = folder / data.draw(st.sampled_from(FILES))
    content = path.read_bytes()
    match data.draw(st.sampled_from(["cut", "bits", "bytes", "missing", "folder", "loop", "fifo", "device", "mode"])):
        case "cut":
            path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        case "bits":
            changed = bytearray(content)
            for _ in range(data.draw(st.integers(1, 8))):
                changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
            path.write_bytes(changed)
        case "bytes":
            path.write_bytes(data.draw(st.sampled_from([NESTED, b"[" * 10**6, b"\0" * 100, b"\xff\xfe", b"9" * 10**5])))
        case "mode":
            path.chmod(0)
        case kind:
            path.unlink()
            if kind == "folder":
                path.mkdir()
            elif kind == "loop":
                path.symlink_to(path.name)
            elif kind == "fifo":
                os.mkfifo(path)
            elif kind == "device":
                path.symlink_to("/dev/zero")


def fuzz(examples: int) -> Callable[..., None]:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(data=st.data())
    def test(sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        directory = tmp_path_factory.mktemp("fuzz")
        folder = Path(shutil.copytree(sound, directory / "bad"))
        data.draw(st.sampled_from([damage_json, damage_file]))(folder, data)
        models, faults = served(directory, sound.parent)
        assert "sound" in models
        assert ("bad" in models) + ("bad" in faults) == (folder / "config.json").is_file()
        assert all("\n" not in fault and 0 < len(fault) < 1000 for fault in faults.values())
        shutil.rmtree(directory)

    return test


test_any_folder_is_served_or_refused = fuzz(25)
test_any_folder_is_served_or_refused_in_long_form = pytest.mark.slow(pytest.mark.timeout(900)(fuzz(300)))
