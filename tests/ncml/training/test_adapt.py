"""One command from a folder of good images to a calibrated detector."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ncml
from ncml import checkpoint, runtime
from ncml.calibration import detector
from ncml.cli import main as cli
from ncml.data.blocks import one_of_each_block
from ncml.data.dataset import Dataset
from ncml.errors import InputError
from ncml.training import adaptation as adapting
from tests.detectors import save_good_images, use_small_scale
from tests.ncml import nets


@pytest.fixture(autouse=True)
def _small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_scale(monkeypatch)


def good(count: int, seed: int = 0) -> Dataset:
    return Dataset(nets.images(count, seed=seed), torch.zeros(count, dtype=torch.int64), ())


@pytest.mark.parametrize(("count", "estimating"), [(39, 20), (60, 20), (70, 20), (100, 29), (600, 171)])
def test_every_image_is_used_either_to_estimate_or_to_rank(count: int, estimating: int) -> None:
    images = Dataset(torch.arange(count, dtype=torch.uint8)[:, None, None, None], torch.arange(count), ())
    parts = adapting.split(images, 0.05)
    assert [len(part) for part in parts] == [estimating, count - estimating]
    assert sorted(torch.cat([part.labels_N for part in parts]).tolist()) == list(range(count))
    assert parts[0].labels_N.tolist() == one_of_each_block(count, estimating).tolist()


def test_too_few_or_equal_images_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"10 images are too few: use at least 39 good images, 20 to estimate and 19 to rank.$"
    ):
        adapting.split(good(10), 0.05)
    remedy = (
        r"use at least 119 good images, 20 to estimate and 99 to rank, or raise the false-positive rate \(0.01\)\.$"
    )
    with pytest.raises(InputError, match=remedy):
        adapting.split(good(100), 0.01)
    same = Dataset(torch.full((50, 8, 8, 3), 7, dtype=torch.uint8), torch.zeros(50, dtype=torch.int64), ())
    with pytest.raises(InputError, match="all images are equal"):
        adapting.split(same, 0.05)


def test_a_full_disk_is_reported_before_anything_is_computed(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_good_images(tmp_path / "good")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(detector, "find_scenes", lambda *_, **__: pytest.fail("it computes"))
    out = tmp_path / "mine"
    assert cli.main(["adapt", str(tmp_path / "good"), "--model", str(model.folder), "--out", str(out)]) == 2
    assert f"ncml: {out}: No space left on device (" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("is_stronger", [True, False])
def test_a_fine_tuned_model_is_kept_only_if_it_detects_more(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stronger: bool
) -> None:
    image_sets: list[set[bytes]] = []
    monkeypatch.setattr(adapting, "_detected", _detection(model.version, is_stronger, image_sets))
    monkeypatch.setattr(adapting, "calibrate", _recorded(image_sets))
    guided = {"noise": 2.5, "guidance": 2.0}  # for its classes, which the images do not have
    monkeypatch.setattr(model, "sampling", guided)
    images = Dataset(nets.images(400), torch.arange(400), ())
    messages: list[str] = []
    adapted = adapting.adapt(model, images, tmp_path / "mine", max_seconds=0.5, on_message=messages.append)
    assert adapted.fine_tuned == is_stronger
    assert (ncml.load(tmp_path / "mine").version != model.version) == is_stronger
    if is_stronger:
        assert ncml.load(tmp_path / "mine").sampling == {"noise": 2.5}
        with pytest.raises(InputError, match="mine was fine-tuned on images that its parts do not exclude: add --un"):
            cli.parse(["calibrate", "--model", str(tmp_path / "mine"), "--data", "good"])()
    assert any(message.endswith(": kept" if is_stronger else ": not kept") for message in messages)
    _, ranking = adapting.split(images, 0.05)
    ranks = {pixels.numpy().tobytes() for pixels in ranking.images_NHWC}
    assert image_sets[0].isdisjoint(ranks)  # neither selection nor estimation saw a ranking image
    assert image_sets[-2].isdisjoint(ranks)
    assert image_sets[-1] == ranks


@pytest.mark.parametrize(("count", "words"), [(100, "for a training batch"), (300, "to decide whether the result")])
def test_too_few_images_to_fine_tune_are_refused_before_training(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, words: str
) -> None:
    monkeypatch.setattr(adapting, "_fine_tune", None)
    monkeypatch.setattr(adapting, "generate_foreign", lambda *_: {})
    larger = replace(model.config, training=replace(model.config.training, batch_size=20))
    monkeypatch.setattr(model, "config", larger)
    images = Dataset(nets.images(count), torch.arange(count), ())
    with pytest.raises(InputError, match=f"too few images to fine-tune: .* {words}.*; omit --max-time"):
        adapting.adapt(model, images, tmp_path / "mine", max_seconds=1.0)


def test_fine_tuning_into_a_folder_with_a_model_is_refused_before_training(
    model: ncml.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even with the model itself, which a calibration alone would accept."""
    checkpoint.copy(model.folder, tmp_path / "mine")
    nets.save_images(tmp_path / "good", nets.images(8).numpy())
    arguments = ["adapt", str(tmp_path / "good"), "--model", str(model.folder), "--out", str(tmp_path / "mine")]
    assert cli.main([*arguments, "--max-time", "1s"]) == 2
    assert "mine already contains a model; choose another folder" in capsys.readouterr().err
    with pytest.raises(InputError, match="already contains a model") as refused:
        adapting.adapt(model, good(400), tmp_path / "mine", max_seconds=1.0)
    assert refused.value.field == "out"


def test_fine_tuning_computes_on_the_chosen_device_without_emulating_bf16(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the shortest time, a single step, on every machine."""
    steps: list[tuple[torch.device, str]] = []

    class Recorder(adapting.Trainer):
        def train_step(self) -> float:
            steps.append((self.device, self.config.training.precision))
            return super().train_step()

    monkeypatch.setattr(adapting, "Trainer", Recorder)
    monkeypatch.setattr(adapting, "_detected", lambda *_: 0.5)
    monkeypatch.setattr(runtime, "CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags : fma avx2")
    in_bf16 = replace(model.config, training=replace(model.config.training, precision="bf16"))
    monkeypatch.setattr(model, "config", in_bf16)
    adapting.adapt(model, good(400), tmp_path / "mine", max_seconds=1e-9, device="cpu:0")
    assert steps == [(torch.device("cpu:0"), "fp32")]


def _detection(base: str, is_stronger: bool, image_sets: list[set[bytes]]):
    def detected(model: ncml.Model, images: Dataset, *_: object) -> float:
        image_sets.append({pixels.numpy().tobytes() for pixels in images.images_NHWC})
        return 0.5 if model.version == base else 0.6 if is_stronger else 0.4

    return detected


def _recorded(image_sets: list[set[bytes]]):
    original = adapting.calibrate

    def calibrate(model: ncml.Model, fit: torch.Tensor, rank: torch.Tensor, **options: object):
        image_sets.extend({pixels.numpy().tobytes() for pixels in part} for part in (fit, rank))
        return original(model, fit, rank, **(options | {"power_images": 2}))

    return calibrate
