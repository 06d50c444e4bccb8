"""The inputs of an evaluation: image sets, limits, and measurements that are resumed from disk."""

import os
import struct
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import ncml
from ncml.evaluation import image_sets, published
from ncml.evaluation.cache import MeasurementCache
from ncml.evaluation.inputs import Inputs, parse_limits
from ncml.progress import ignore_progress
from tests.ncml import nets
from tests.ncml.nets import save_images


def test_an_interrupted_measurement_resumes(tmp_path: Path) -> None:
    cache = MeasurementCache(tmp_path / "measured", ignore_progress)
    measured: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> dict[str, np.ndarray]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((start, stop))
        time.sleep(0.01 * (stop - start))
        return {"square": np.arange(start, stop) ** 2}

    def measure(n: int, key: int = 0) -> np.ndarray:
        return cache.rows("squares", {"key": key}, n, rows, chunk=4)["square"]

    with pytest.raises(KeyboardInterrupt):
        measure(12)
    assert measured == [(0, 4), (4, 8)]
    measured.clear()
    cache = MeasurementCache(tmp_path / "measured", ignore_progress)
    np.testing.assert_array_equal(measure(12), np.arange(12) ** 2)
    assert measured == [(8, 12)]
    first_eight = cache.saved_seconds
    assert first_eight >= 0.08
    np.testing.assert_array_equal(measure(5), np.arange(5) ** 2)
    np.testing.assert_array_equal(measure(14), np.arange(14) ** 2)
    assert measured == [(8, 12), (12, 14)]
    assert cache.saved_seconds == first_eight  # neither counted again, nor with rows that this evaluation measured
    for file in (tmp_path / "measured").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:50])
    measured.clear()
    np.testing.assert_array_equal(measure(3), np.arange(3) ** 2)
    assert measured == [(0, 3)]
    (file,) = (tmp_path / "measured").glob("*.npz")
    stored = bytearray(file.read_bytes())
    header = stored.index(b"square.npy") - 30  # of the numbers in the zip archive
    name_bytes, extra_bytes = struct.unpack_from("<HH", stored, header + 26)
    stored[header + 30 + name_bytes + extra_bytes] = 0xFF  # no kind of compressed block
    file.write_bytes(stored)
    measured.clear()
    np.testing.assert_array_equal(measure(3), np.arange(3) ** 2)
    measure(3, key=1)
    assert measured == [(0, 3), (0, 3)]


def test_a_sorted_set_is_shuffled_reproducibly(tmp_path: Path) -> None:
    greys = np.broadcast_to(np.arange(60, dtype=np.uint8)[:, None, None, None], (60, 8, 8, 3))
    folder = str(save_images(tmp_path / "sorted", greys))
    images, again = (image_sets.load(folder, 8, 8) for _ in range(2))
    assert images.first(20).pixels_NHWC[:, 0, 0, 0].mean() == pytest.approx(29.5, abs=12)
    np.testing.assert_array_equal(images.first(20).pixels_NHWC, again.pixels_NHWC[:20])
    assert images.first(20).digest == again.digest
    assert sorted(images.first(100).pixels_NHWC[:, 0, 0, 0]) == list(range(60))


def test_generated_sets_match_their_names() -> None:
    constant, uniform = (image_sets.generate(name, 50, 8, 8) for name in image_sets.GENERATED)
    assert (constant.pixels_NHWC == constant.pixels_NHWC[:, :1, :1]).all()
    assert len(np.unique(constant.pixels_NHWC[:, 0, 0], axis=0)) > 45
    assert uniform.pixels_NHWC.mean() == pytest.approx(127.5, abs=3)
    assert image_sets.generate("uniform", 50, 8, 8).digest == uniform.digest


def test_anomalies_of_a_set_are_noted(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "odd", np.random.default_rng(0).integers(256, size=(6, 12, 10), dtype=np.uint8))
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:60])
    notes = " ".join(image_sets.load(str(folder), 8, 8).notes)
    assert "1 file could not be read and was left out" in notes
    assert "5 of 5 images had another size than 8x8" in notes
    assert "5 of 5 images are grey" in notes
    with pytest.raises(ncml.InputError, match="no readable image"):
        image_sets.load(str(save_images(tmp_path / "empty", np.empty((0, 8, 8, 3), np.uint8))), 8, 8)


def test_only_a_set_without_a_test_split_may_contain_training_images(tmp_path: Path) -> None:
    folder = str(save_images(tmp_path / "photos", np.zeros((2, 8, 8, 3), np.uint8)))
    for source, has_test_split in ((folder, False), ("cifar10", True), ("cifar10:train", False), ("uniform", True)):
        assert image_sets.has_test_split(source) is has_test_split


def test_published_figures_are_those_of_the_same_data_at_the_same_size() -> None:
    for data, size, table in (
        ("data/CIFAR-10", 32, "Table 1"),
        ("cifar10:test", 32, "Table 1"),
        ("cifar100", 32, ""),
        ("data/cifar10/test", 32, "Table 1"),
        ("cifar-10-batches-py", 32, "Table 1"),
        ("cifar10-c", 32, ""),
        ("cifar10.1", 32, ""),
        ("imagenet64", 64, "Table 3"),
        ("imagenet1k_32", 32, ""),
        ("celeba", 64, "Table 3"),
        ("pets", 64, ""),
    ):
        name, rows = published.bits(data, size)
        assert (name, bool(rows)) == (table, bool(table))


def test_a_set_is_named_by_the_shortest_unique_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    for sources, names in (
        (("data/cifar10", "svhn", "uniform"), ["cifar10", "svhn", "uniform"]),
        (("A/good", "/far/B/good", "good"), ["A/good", "B/good", "good"]),
        (("x/cifar10:test", "x/cifar10:extra", "x/cifar10"), ["cifar10:test", "cifar10:extra", "cifar10"]),
        (("x/a:test", "y/a:test"), ["x/a:test", "y/a:test"]),
        (("odd/uniform", "uniform"), ["odd/uniform", "uniform"]),
        (("a", "./a"), ["a", "./a"]),
        ((".", "a:b", os.fsdecode(b"caf\xe9")), [".", "a:b", "caf\\xe9"]),
    ):
        assert list(image_sets.name_sources(sources).values()) == names


def test_a_limit_applies_to_all_evaluations_or_to_one() -> None:
    limits = parse_limits(["ood=9", "700"])
    assert (limits["ood"], limits["likelihood"], limits["robustness"]) == (9, 700, 500)
    for option in ("x", "7", "-3", "kind=5", "ood=", "ood=1.5"):
        with pytest.raises(ncml.InputError, match="--limit"):
            parse_limits([option])


def test_the_floor_uses_the_training_split_even_if_the_source_names_another(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, seed in (("train", 1), ("test", 2)):
        images = [Image.fromarray(image) for image in nets.images(10, seed=seed).numpy()]
        features = datasets.Features({"img": datasets.Image()})
        table = datasets.Dataset.from_dict({"img": images}, features=features)
        (tmp_path / "set").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    source = f"{tmp_path / 'set'}:test"
    cache = MeasurementCache(tmp_path / "measured", ignore_progress)
    model = ncml.load(models / "mine")
    inputs = Inputs({"mine": model}, source, (), cache)
    digests = [inputs.images(source, model, "fid", split=split).digest for split in ("", "test", "train")]
    assert digests[0] == digests[1] != digests[2]
    assert digests[2] == image_sets.load(str(tmp_path / "set"), 8, 8, split="train").digest


def test_a_folder_of_images_is_read_once(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no splits, so that its training images are the same ones."""
    source = str(save_images(tmp_path / "photos", nets.images(8).numpy()))
    cache = MeasurementCache(tmp_path / "measured", ignore_progress)
    model = ncml.load(models / "mine")
    inputs = Inputs({"mine": model}, source, (), cache)
    test = inputs.images(source, model, "fid")
    monkeypatch.setattr(image_sets, "load", None)
    assert inputs.images(source, model, "fid", split="train").digest == test.digest
