"""A model folder is read whole and checked, or refused in one sentence."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ncml
from ncml import checkpoint
from ncml.errors import ModelError
from tests.ncml import nets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model folder."""
    checkpoint.save(tmp_path / "sound", nets.network(nets.config(), dtype=torch.float32), metrics={"test_bpd": 3.5})
    return tmp_path / "sound"


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        checkpoint.load(folder)
    text = str(error.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights, and make the version agree, so that it is not what catches the change."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    description = json.loads((folder / "config.json").read_text())
    description["version"] = checkpoint.digest(checkpoint.Config.from_json(description["config"]), state)
    (folder / "config.json").write_text(json.dumps(description))


def describe(folder: Path, change: Callable[[dict], object]) -> None:
    description = json.loads((folder / "config.json").read_text())
    change(description)
    (folder / "config.json").write_text(json.dumps(description))


def test_a_folder_gives_back_the_network(tmp_path: Path) -> None:
    net = nets.network(nets.config(), dtype=torch.float32)
    version = checkpoint.save(tmp_path / "m", net, metrics={"test_bpd": 3.5}, card="# m\n")
    loaded, description = checkpoint.load(tmp_path / "m")
    assert description["metrics"] == {"test_bpd": 3.5}
    assert description["version"] == version
    assert re.fullmatch("[0-9a-f]{64}", version)
    assert (tmp_path / "m" / "card.md").read_text() == "# m\n"
    assert loaded.config == net.config
    assert not loaded.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(x, torch.zeros(2)), net(x, torch.zeros(2)))


def test_the_version_is_of_weights_and_configuration(tmp_path: Path) -> None:
    net = nets.network(nets.config(), dtype=torch.float32)
    versions = [checkpoint.save(tmp_path / name, net, card=name) for name in ("a", "b")]
    assert versions[0] == versions[1]
    again = checkpoint.save(tmp_path / "c", checkpoint.load(tmp_path / "a")[0])
    assert again == versions[0]
    net.head.bias[0] += 1
    assert checkpoint.save(tmp_path / "d", net) != versions[0]
    renamed = nets.network(nets.config(classes=("a", "c")), dtype=torch.float32)
    assert checkpoint.save(tmp_path / "e", renamed) != versions[0]


def test_a_folder_holds_no_pickle_and_no_leftovers(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "card.md"}


def test_a_missing_folder_is_not_a_model(tmp_path: Path) -> None:
    assert "is not a model folder: it has no config.json" in refused(tmp_path / "nowhere")
    with pytest.raises(ncml.ModelError, match="not a model folder"):
        ncml.load(tmp_path / "nowhere")


def test_pickles_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(folder)
    opened = folder / "opened"

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (opened,))

    for name in ("model.pt", "model.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
        assert ("model.pt may be a pickle, which is never opened" if name == "model.pt" else "whole") in refused(folder)
    assert not opened.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("head.bias"), "lacks the weight head.bias"),
        (lambda state: state.update(spy=torch.zeros(2)), "has a weight spy that its configuration does not know"),
        (lambda state: state.update({"head.bias": torch.zeros(3)}), "weight head.bias has shape (3,) instead of (20,)"),
        (lambda state: state["head.bias"].fill_(torch.nan), "weight head.bias has values that are not finite"),
        (lambda state: state["head.bias"].fill_(torch.inf), "weight head.bias has values that are not finite"),
        (lambda state: state.update({"head.bias": torch.zeros(20, dtype=torch.int64)}), "head.bias is torch.int64"),
        (lambda state: state.update({"head.bias": state["head.bias"].double()}), "head.bias is torch.float64"),
    ],
    ids=["missing", "surplus", "shape", "nan", "inf", "integers", "fp64"],
)
def test_wrong_weights_are_named(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], said: str) -> None:
    rewrite(folder, change)
    assert said in refused(folder)


def test_altered_weights_are_found(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["head.bias"][0] += 1e-3
    save_file(state, folder / "model.safetensors")
    assert "the weights are not those that config.json was written for" in refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_weights_are_refused(folder: Path, keep: int) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    assert "is not a whole safetensors file" in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "\xff\xfe", "[1]", "null", '"x"'])
def test_what_is_not_json_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert re.search("cannot be read as JSON|does not hold a JSON object", refused(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("config"),
        lambda d: d.update(config=3),
        lambda d: d["config"].pop("model"),
        lambda d: d["config"]["model"].update(levels=[]),
        lambda d: d["config"]["model"].update(levels=5),
        lambda d: d["config"]["model"].update(heads=5),
        lambda d: d["config"]["model"].update(heads=0),
        lambda d: d["config"]["model"].update(surprise=1),
        lambda d: d["config"]["model"].update(height="8"),
        lambda d: d["config"]["model"].update(embedding=-1),
        lambda d: d["config"]["model"]["levels"][0].update(width=-4),
        lambda d: d["config"]["noise"].update(process="cosine"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(folder: Path, change: Callable[[dict], object]) -> None:
    describe(folder, change)
    assert "does not describe a model" in refused(folder)


@pytest.mark.parametrize("metrics", [3, None, ["test_bpd"], {"test_bpd": "low"}, {"test_bpd": True}])
def test_metrics_are_numbers(folder: Path, metrics: object) -> None:
    """They are printed and announced as such."""
    describe(folder, lambda d: d.update(metrics=metrics))
    assert "metrics must give each name a number" in refused(folder)


def test_another_format_is_refused(folder: Path) -> None:
    describe(folder, lambda d: d.update(format=2))
    assert "format 2 is not 1" in refused(folder)


def test_a_folder_is_read_from_anywhere(folder: Path, tmp_path: Path) -> None:
    """The version does not depend on the place."""
    moved = Path(shutil.copytree(folder, tmp_path / "other name"))
    assert ncml.load(moved).version == ncml.load(str(folder)).version
    assert ncml.load(moved).name == "other name"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    checkpoint.write_json(path, {"a": 1})

    def fail(new: Path) -> None:
        new.write_text("{")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.replace_file(path, fail)
    assert checkpoint.read_json(path) == {"a": 1}
