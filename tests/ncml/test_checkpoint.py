"""A model folder is read completely and checked, or refused in one sentence."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ncml
from ncml import checkpoint, recipes
from ncml.errors import InputError, ModelError
from tests.ncml import nets

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid model folder."""
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
    """Change the weights and update the version, so that the change is not detected by the version."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    description = json.loads((folder / "config.json").read_text())
    description["version"] = checkpoint.digest(checkpoint.read_config(description), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(description))


def describe(folder: Path, change: Callable[[dict], object]) -> None:
    description = json.loads((folder / "config.json").read_text())
    change(description)
    (folder / "config.json").write_text(json.dumps(description))


def test_a_folder_restores_the_network(tmp_path: Path) -> None:
    net = nets.network(nets.config(), dtype=torch.float32)
    version = checkpoint.save(tmp_path / "m", net, metrics={"test_bpd": 3.5}, card="# m\n")
    loaded, description = checkpoint.load(tmp_path / "m")
    assert description.metrics == {"test_bpd": 3.5}
    assert description.version == version
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
        assert ("model.pt may be a pickle, which is never opened" if name == "model.pt" else "complete") in refused(
            folder
        )
    assert not opened.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.bias"), "lacks the weight head.bias"),
        (lambda state: state.update(spy=torch.zeros(2)), "has a weight spy that is not part of its configuration"),
        (lambda state: state.update({"head.bias": torch.zeros(3)}), "weight head.bias has shape (3,) instead of (20,)"),
        (lambda state: state["head.bias"].fill_(torch.nan), "weight head.bias has values that are not finite"),
        (lambda state: state["head.bias"].fill_(torch.inf), "weight head.bias has values that are not finite"),
        (lambda state: state.update({"head.bias": torch.zeros(20, dtype=torch.int64)}), "head.bias is torch.int64"),
        (lambda state: state.update({"head.bias": state["head.bias"].double()}), "head.bias is torch.float64"),
    ],
    ids=["missing", "surplus", "shape", "nan", "inf", "integers", "fp64"],
)
def test_wrong_weights_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    rewrite(folder, change)
    assert message in refused(folder)


def test_altered_weights_are_found(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["head.bias"][0] += 1e-3
    save_file(state, folder / "model.safetensors")
    assert "the weights do not match the version in config.json" in refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    assert "is not a complete safetensors file" in refused(folder)


@pytest.mark.parametrize("offsets", [[0, 10**17], [0, 2**70], [-8, 0], [8, 0]])
def test_weights_outside_of_their_file_are_refused(folder: Path, offsets: list[int]) -> None:
    header = json.dumps({"head.bias": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert "is not a complete safetensors file" in refused(folder)
    with pytest.raises(ModelError, match=r"head\.bias is not within its 8 bytes of tensors"):
        checkpoint.check_version(checkpoint.describe(folder))


@pytest.mark.parametrize("text", ["", "{", "\xff\xfe", "[1]", "null", '"x"'])
def test_a_file_that_is_not_json_is_refused(folder: Path, text: str) -> None:
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
        lambda d: d["config"]["sde"].update(kind="cosine"),
        lambda d: d["config"]["sde"].update(kind="ve", sigma_min=0.01, sigma_max=0.01),
        lambda d: d["config"]["sde"].update(kind="ve", grey_levels=1),
        lambda d: d["config"]["sde"].update(kind="vp", grey_levels=200),
        lambda d: d["config"]["sde"].update(kind="vp", grey_levels=100, beta_min=1, beta_max=1e-6),
    ],
)
def test_an_invalid_configuration_is_refused(folder: Path, change: Callable[[dict], object]) -> None:
    describe(folder, change)
    assert "does not describe a model" in refused(folder)


@pytest.mark.parametrize("metrics", [3, None, ["test_bpd"], {"test_bpd": "low"}, {"test_bpd": True}])
def test_metrics_are_numbers(folder: Path, metrics: object) -> None:
    """Metrics are printed and published as numbers."""
    describe(folder, lambda d: d.update(metrics=metrics))
    assert "each value of metrics must be a number" in refused(folder)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (3, "format 3, newer than 2, .*: upgrade ncml"),
        (0, "format 0, which is not one of"),
        (None, "format None, which"),
    ],
)
def test_another_format_is_refused(folder: Path, number: int | None, reason: str) -> None:
    describe(folder, lambda d: d.update(format=number))
    assert re.search(reason, refused(folder))


def as_format_1(folder: Path) -> None:
    """Rewrite a folder's description in format 1."""

    def rewrite(description: dict) -> None:
        config = description["config"]
        del config["generates"]
        sde, training = config.pop("sde"), config["training"]
        training["ema"] = 0.999
        later = ("muon_learning_rate", "muon_weight_decay", "embedding_lr_multiplier", "split", "crop", "grey_share")
        for name in ("ema_images", *later):
            del training[name]
        for name, earlier in (
            ("clean_probability", "clean_mass"),
            ("class_dropout", "null_class"),
            ("orientation_probability", "turned"),
            ("total_images", "images"),
            ("warmup_images", "warmup"),
            ("cooldown_fraction", "cooldown"),
            ("grad_clip", "clip"),
        ):
            training[earlier] = training.pop(name)
        config["noise"] = {"process": sde.pop("kind"), **sde}
        description["format"] = 1

    describe(folder, rewrite)


def test_a_folder_of_format_1_loads_with_its_version(folder: Path) -> None:
    """Its version is that of format 1: a hash of the configuration as stored, and of the weights."""
    network, description = checkpoint.load(folder)
    as_format_1(folder)
    stored = json.loads((folder / "config.json").read_text())
    sha = hashlib.sha256(json.dumps(stored["config"], sort_keys=True).encode())
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.numpy().tobytes())
    assert sha.hexdigest() == description.version
    earlier, same = checkpoint.load(folder)
    assert same == description
    assert earlier.config == network.config


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["config"].pop("noise"), "it lacks 'noise'"),
        (lambda d: d["config"]["noise"].pop("process"), "it lacks 'process'"),
        (lambda d: d["config"]["training"].update(ema=1), "division by zero"),
        (lambda d: d["config"]["training"].update(ema="high"), "unsupported operand"),
        (lambda d: d["config"].update(training=None), "unsupported operand"),
        (lambda d: d["config"]["training"].update(surprise=1), "surprise"),
    ],
)
def test_a_damaged_folder_of_format_1_is_refused(folder: Path, change: Callable[[dict], object], reason: str) -> None:
    as_format_1(folder)
    describe(folder, change)
    assert re.search(f"does not describe a model: .*{reason}", refused(folder))


def test_a_model_of_clean_images_only_is_sampled_without_noise(tmp_path: Path) -> None:
    config = recipes.maximum_likelihood(nets.config())
    checkpoint.save(tmp_path / "mle", nets.network(config, dtype=torch.float32))
    model = ncml.load(tmp_path / "mle")
    assert (model.sampling_limits.defaults.noise, model.noise) == (0, 10)


def test_sampling_defaults_are_read_and_do_not_change_the_version(folder: Path) -> None:
    assert ncml.load(folder).sampling == {}
    version = ncml.load(folder).version
    describe(folder, lambda d: d.update(sampling={"start_noise": 2.5, "solver": "heun", "steps": 4, "guidance": 2}))
    model = ncml.load(folder)
    assert model.sampling == {"noise": 2.5, "solver": "heun", "steps": 4, "guidance": 2}
    assert model.version == version
    checkpoint.save(folder, model.network, sampling=model.sampling)
    assert ncml.load(folder).sampling == model.sampling


def test_a_model_that_only_scores_refuses_to_generate(folder: Path) -> None:
    model = ncml.load(folder)
    assert model.generate(1).shape == (1, 8, 8, 3)
    version = checkpoint.save(folder, nets.network(replace(model.config, generates=False), dtype=torch.float32))
    scoring = ncml.load(folder)
    assert scoring.version == version == model.version
    assert len(scoring.score(np.zeros((8, 8, 3), np.uint8))) == 1
    for sample in (scoring.generate, lambda: scoring.complete(np.zeros((8, 8, 3), np.uint8), keep="top")):
        with pytest.raises(InputError, match="only scores images") as error:
            sample()
        assert error.value.field == "model"


def test_a_folder_that_does_not_state_whether_it_generates_does(folder: Path) -> None:
    describe(folder, lambda d: d["config"].pop("generates"))
    assert ncml.load(folder).config.generates


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        (3, "sampling must be an object with any of start_noise, steps, solver, guidance, temperature"),
        ({"noise": 1}, "sampling must be an object with any of start_noise"),
        ({"start_noise": -1}, "sampling.start_noise must be a number from 0 to 255, not -1"),
        ({"start_noise": 10.5}, "sampling.start_noise must be at most 10 grey levels"),
        ({"solver": "cosine"}, "sampling.solver must be one of tweedie, "),
        ({"solver": ["heun"]}, "sampling.solver must be one of tweedie, "),
        ({"steps": 1.5}, "sampling.steps must be an integer from 1 to 1000, not 1.5"),
        ({"steps": True}, "sampling.steps must be an integer from 1 to 1000, not True"),
        ({"steps": 5}, "sampling.steps must be 1 for the solver tweedie"),
        ({"guidance": 11}, "sampling.guidance must be a number from 0.5 to 10, not 11"),
        ({"temperature": "warm"}, "sampling.temperature must be a number from 0.5 to 1.5, not 'warm'"),
        ({"temperature": float("nan")}, "sampling.temperature must be a number from 0.5 to 1.5, not nan"),
    ],
)
def test_sampling_defaults_out_of_range_are_refused(folder: Path, sampling: object, reason: str) -> None:
    describe(folder, lambda d: d.update(sampling=sampling))
    assert reason in refused(folder)


def test_a_default_noise_that_the_sde_lacks_is_refused(folder: Path) -> None:
    describe(folder, lambda d: (d["config"]["sde"].update(kind="ve"), d.update(sampling={"start_noise": 0.5})))
    assert "sampling.start_noise is less than the smallest noise of the model's SDE" in refused(folder)


def test_a_copy_has_neither_calibrations_nor_sections_on_them(folder: Path, tmp_path: Path) -> None:
    sections = ("# M", "## Calibration default\n\ntable", "## Use\n\ntext", "## Calibration tolerant\n\ntable\n")
    (folder / "card.md").write_text("\n\n".join(sections))
    checkpoint.copy(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "card.md").read_text() == "# M\n\n## Use\n\ntext\n"


def test_a_card_is_not_a_link_out_of_its_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    card = folder / "card.md"
    card.unlink(missing_ok=True)
    card.symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"card\.md is a link out of the model folder"):
        checkpoint.read_card(folder)
    cached = tmp_path / "models--a--b" / "snapshots" / "c"
    cached.mkdir(parents=True)
    (cached / "card.md").symlink_to(shutil.copy(tmp_path / "secret", tmp_path / "models--a--b" / "blob"))
    assert checkpoint.read_card(cached) == "secret"


def test_a_card_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / "card.md").write_bytes(b"# caf\xe9\n")
    with pytest.raises(ModelError, match=r"card\.md cannot be read as UTF-8 text"):
        checkpoint.write_card_section(folder, "One", "text")


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "file", list[tuple[int, str]]()
    path.write_text("former")
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, path.read_text())))
    checkpoint.replace_file(path, lambda new: new.write_text("new"))
    assert synced == [(path.stat().st_ino, "former")]
    assert path.read_text() == "new"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """Of two that write it at the same time, the later one wins; a failure leaves the earlier file, and no other."""
    path = tmp_path / "file"

    def write_during_another_write(new: Path) -> None:
        new.write_text("outer")
        checkpoint.replace_file(path, lambda new: new.write_text("inner"))
        assert path.read_text() == "inner"

    def fail(new: Path) -> None:
        new.write_text("half")
        raise OSError("the disk is full")

    checkpoint.replace_file(path, write_during_another_write)
    assert path.read_text() == "outer"
    with pytest.raises(OSError, match="full"):
        checkpoint.replace_file(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "outer"


def test_guidance_needs_classes(tmp_path: Path) -> None:
    network = nets.network(nets.config(classes=()), dtype=torch.float32)
    checkpoint.save(tmp_path / "m", network, sampling={"guidance": 2.0, "temperature": 0.9})
    assert ncml.load(tmp_path / "m").sampling == {"temperature": 0.9}
    describe(tmp_path / "m", lambda d: d.update(sampling={"guidance": 2.0}))
    assert "sampling.guidance needs a model with classes" in refused(tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_may_be_stored_in_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """The file has half the size; parameters are read as fp32, and the version hashes the stored ones."""
    network = nets.network(nets.config(), dtype=torch.float32)
    whole = checkpoint.save(tmp_path / "fp32", network)
    version = checkpoint.save(tmp_path / "half", network, dtype=dtype)
    loaded, description = checkpoint.load(tmp_path / "half")
    assert description.version == version != whole
    for name, parameter in network.named_parameters():
        stored = loaded.get_parameter(name)
        assert stored.dtype == torch.float32
        assert torch.equal(stored, parameter.to(dtype).float())
    assert torch.equal(loaded.conditioning.fourier.frequencies, network.conditioning.fourier.frequencies)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "fp32")]
    assert sizes[0] < 0.7 * sizes[1]


def test_a_folder_is_read_from_any_path(folder: Path, tmp_path: Path) -> None:
    """The version does not depend on the path."""
    moved = Path(shutil.copytree(folder, tmp_path / "other name"))
    assert ncml.load(moved).version == ncml.load(str(folder)).version
    assert ncml.load(moved).name == "other name"
    kept = Path(shutil.copytree(folder, tmp_path / "snapshots" / "monday"))  # not a folder of the Hub's cache
    assert checkpoint.describe(kept).name == "monday"


def test_a_full_disk_keeps_the_model_and_its_calibrations(folder: Path) -> None:
    """The maximum size of a file that this process may write simulates a full disk."""
    (folder / checkpoint.CALIBRATION).write_text("{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = f"""
import resource
from ncml import checkpoint
from tests.ncml import nets
network = nets.network(nets.config(), seed=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096,) * 2)
try:
    checkpoint.save({str(folder)!r}, network)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
