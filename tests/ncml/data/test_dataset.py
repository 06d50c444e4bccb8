"""Datasets of users: parquet files from the Hub, folders of images, and folders with other files in them."""

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ncml import images
from ncml.data import dataset, sources
from ncml.data.dataset import Dataset
from ncml.data.inventory import Inventory
from ncml.data.sources import is_image_folder
from ncml.errors import InputError
from ncml.paths import Location
from tests.ncml import nets


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Place the library's cache in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_images(count: int, size: int = 8, *, seed: int = 0) -> list[Image.Image]:
    return [Image.fromarray(image) for image in nets.images(count, size, size, seed=seed).numpy()]


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def parquet(
    folder: Path, labels: list[object], label: object | None, *, column: str = "img", split: str = "train"
) -> str:
    folder.mkdir(exist_ok=True)
    features = {column: datasets.Image()} | ({"label": label} if label else {})
    rows = {column: make_images(len(labels))} | ({"label": labels} if label else {})
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_parquet_files_can_have_named_classes(tmp_path: Path) -> None:
    source = parquet(tmp_path / "set", [1, 0, 1], datasets.ClassLabel(names=["cat", "dog"]))
    loaded = dataset.load(source, 8, 8)
    assert loaded.classes == ("cat", "dog")
    assert loaded.labels_N.tolist() == [1, 0, 1]
    assert loaded.labels_N.dtype == torch.int64
    assert torch.equal(loaded.images_NHWC, nets.images(3))


def test_parquet_files_can_have_no_classes(tmp_path: Path) -> None:
    loaded = dataset.load(parquet(tmp_path / "set", [None] * 3, None, column="image"), 8, 8)
    assert loaded.classes == ()
    assert loaded.labels_N.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("labels", "kind", "classes", "indices"),
    [
        ([2, 0, 1], "int64", ("0", "1", "2"), [2, 0, 1]),
        ([10, 30, 10], "int64", ("10", "30"), [0, 1, 0]),
        (["dog", "cat", "dog"], "string", ("cat", "dog"), [1, 0, 1]),
    ],
    ids=["numbers", "numbers with gaps", "words"],
)
def test_labels_without_names_are_named_by_their_numbers(
    tmp_path: Path, labels: list[object], kind: str, classes: tuple[str, ...], indices: list[int]
) -> None:
    loaded = dataset.load(parquet(tmp_path / "set", labels, datasets.Value(kind)), 8, 8)
    assert loaded.classes == classes
    assert loaded.labels_N.tolist() == indices


def test_images_without_a_label_are_refused(tmp_path: Path) -> None:
    """-1 marks a withheld label on the Hub."""
    source = parquet(tmp_path / "set", [0, -1], datasets.ClassLabel(names=["cat", "dog"]))
    with pytest.raises(InputError, match="label") as refused:
        dataset.load(source, 8, 8)
    assert refused.value.field == "data"


def test_images_with_several_labels_are_refused(tmp_path: Path) -> None:
    source = parquet(tmp_path / "set", [[0, 1], [1]], datasets.Sequence(datasets.Value("int64")))
    with pytest.raises(InputError, match="several values in a label; keep one for each image") as refused:
        dataset.load(source, 8, 8)
    assert refused.value.field == "data"


def test_a_row_without_an_image_is_skipped_and_counted(tmp_path: Path) -> None:
    rows = {"img": [None, *make_images(2), {"bytes": b"", "path": None}], "label": [0, 1, 0, 1]}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    loaded = dataset.load(str(tmp_path), 8, 8)
    assert loaded.labels_N.tolist() == [1, 0]
    assert loaded.inventory.unreadable == ["row 0", "row 3"]


def test_an_unreadable_row_does_not_remove_others_of_its_name(tmp_path: Path) -> None:
    """In a dataset, the name is that of a file, which may occur once in each class."""
    (tmp_path / "set").mkdir()
    cells = [{"bytes": png(image), "path": "1.png"} for image in make_images(3)]
    rows = {"img": [{"bytes": b"damaged", "path": "1.png"}, *cells], "label": [0, 1, 0, 1]}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    source = str(tmp_path / "set")
    loaded = dataset.load(source, 8, 8)
    readable = sources.readable_rows(sources.open_source(source, "train"), loaded.inventory.unreadable_rows)
    assert [row.label for row in readable] == loaded.labels_N.tolist() == [1, 0, 1]


def test_a_split_is_named(tmp_path: Path) -> None:
    source = parquet(tmp_path / "set", [0], datasets.ClassLabel(names=["cat"]))
    parquet(tmp_path / "set", [0, 0], datasets.ClassLabel(names=["cat"]), split="test")
    assert len(dataset.load(source, 8, 8)) == 1
    assert len(dataset.load(source, 8, 8, split="test")) == 2
    with pytest.raises(InputError, match="has no split 'valid', only train, test"):
        dataset.load(source, 8, 8, split="valid")


def test_a_table_without_images_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match="no column of images, only text"):
        dataset.load(str(tmp_path), 8, 8)


def test_a_broken_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be loaded") as refused:
        dataset.load(str(tmp_path), 8, 8)
    assert refused.value.field == "data"


def test_class_folders(tmp_path: Path) -> None:
    """Classes are in alphabetical order; other sizes are resized to the model's as in serving."""
    for name, size in (("dog", 8), ("cat", 20)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(make_images(2, size)):
            image.save(tmp_path / name / f"{i}.png")
    loaded = dataset.load(str(tmp_path), 8, 8)
    assert loaded.classes == ("cat", "dog")
    assert loaded.labels_N.tolist() == [0, 0, 1, 1]
    assert torch.equal(loaded.images_NHWC[2:], nets.images(2))
    served = images.resize_to(images.open_image(png(make_images(2, 20)[0])), 8, 8)
    assert np.array_equal(loaded.images_NHWC[0].numpy(), served)


def test_images_without_class_folders(tmp_path: Path) -> None:
    for i, image in enumerate(make_images(3)):
        image.save(tmp_path / f"{i}.png")
    (tmp_path / ".hidden").write_text("not an image, and never read")
    loaded = dataset.load(str(tmp_path), 8, 8)
    assert loaded.classes == ()
    assert loaded.inventory.unreadable == []
    assert len(loaded) == 3


@pytest.mark.parametrize("classes", [(), ("cat", "dog")], ids=["no classes", "classes"])
def test_hidden_folders_are_not_read(tmp_path: Path, classes: tuple[str, ...]) -> None:
    """Notebooks leave copies of images in hidden folders, and caches leave tables."""
    for folder in (*classes, ".ipynb_checkpoints", *(f"{name}/.hidden" for name in classes)):
        (tmp_path / folder).mkdir()
    for i, folder in enumerate(classes or ("", "")):
        make_images(2)[i].save(tmp_path / folder / f"{i}.png")
    make_images(1)[0].save(tmp_path / ".ipynb_checkpoints" / "1-checkpoint.png")
    loaded = dataset.load(str(tmp_path), 8, 8)
    assert loaded.classes == classes
    assert torch.equal(loaded.images_NHWC, nets.images(2))
    (tmp_path / ".ipynb_checkpoints" / "t.parquet").touch()
    assert is_image_folder(str(tmp_path))


def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    """Other systems and old archives create such names."""
    for name in (b"caf\xe9", b"tea"):
        folder = tmp_path / os.fsdecode(name)
        folder.mkdir()
        make_images(1)[0].save(folder / os.fsdecode(b"\xe9.png"))
        (folder / os.fsdecode(b"\xe9.txt")).write_text("notes")
    loaded = dataset.load(str(tmp_path), 8, 8, cache_folder=tmp_path.with_name("kept"))
    assert loaded.classes == ("caf\\xe9", "tea")
    assert loaded.inventory.unreadable == [f"{name}/\\xe9.txt" for name in loaded.classes]
    assert len(loaded) == 2


@pytest.mark.parametrize("parts", [("test", "train"), ("Train", "Val", "test")])
def test_the_parts_of_a_data_set_are_not_trained_on_as_its_classes(tmp_path: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        (tmp_path / "photos" / part / "good").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / part / "good" / "1.png")
    with pytest.raises(InputError, match=rf"photos has the folders .* and {parts[-1]}, .*: name the one to") as refused:
        sources.check_source(str(tmp_path / "photos"), is_training=True)
    assert refused.value.field == "data"
    sources.check_source(str(tmp_path / "photos"))  # they may all be scored, or be foreign images
    sources.check_source(str(tmp_path / "photos" / parts[0]), is_training=True)
    (tmp_path / "photos" / "tram").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "tram" / "1.png")
    sources.check_source(str(tmp_path / "photos"), is_training=True)  # vehicles


def test_a_folder_with_images_inside_and_outside_class_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    make_images(1)[0].save(tmp_path / "cat" / "1.png")
    make_images(1)[0].save(tmp_path / "2.png")
    with pytest.raises(InputError, match="both in class folders and outside them") as refused:
        dataset.load(str(tmp_path), 8, 8)
    assert refused.value.field == "data"


def test_files_that_cannot_be_read_are_skipped_and_counted(tmp_path: Path) -> None:
    whole = png(make_images(1)[0])
    (tmp_path / "0.png").write_bytes(whole)
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "9.png").write_bytes(whole)
    loaded = dataset.load(str(tmp_path), 8, 8)
    assert len(loaded) == 2
    assert loaded.inventory.unreadable == ["1.png", "2.png", "notes.txt"]
    assert loaded.inventory.copies == 1
    assert torch.equal(loaded.images_NHWC[0], loaded.images_NHWC[1])


@pytest.mark.parametrize(("files", "count"), [([], "0 files"), (["notes.txt"], "1 file"), (["a", "b"], "2 files")])
def test_a_folder_without_images_is_refused(tmp_path: Path, files: list[str], count: str) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("x")
    with pytest.raises(InputError, match=rf"no readable image \({count} could not be read\)") as refused:
        dataset.load(str(folder), 8, 8)
    assert refused.value.field == "data"


def test_progress_is_reported_for_every_image(tmp_path: Path) -> None:
    """A photograph takes a fraction of a second, so that a hundred of them take long without a sign."""
    image = make_images(1)[0]
    for i in range(3):
        image.save(tmp_path / f"{i}.bmp")
    reported: list[tuple[int, int]] = []
    dataset.load(str(tmp_path), 8, 8, on_progress=lambda progress: reported.append((progress.done, progress.total)))
    assert reported == [(1, 3), (2, 3), (3, 3)]


def test_the_three_parts_are_disjoint_and_have_the_stated_sizes() -> None:
    """Of CIFAR-10's 50,000 images, 43,000 are for training, 2,000 and 5,000 for calibration."""
    whole = Dataset(torch.zeros(50_000, 1, 1, 3, dtype=torch.uint8), torch.arange(50_000), ("a",))
    parts = {name: whole.part(name) for name in ("fit", "calibration-fit", "calibration-rank")}
    assert {name: len(part) for name, part in parts.items()} == {
        "fit": 43_000, "calibration-fit": 2_000, "calibration-rank": 5_000,
    }  # fmt: skip
    together = torch.cat([part.labels_N for part in parts.values()])
    assert torch.equal(together.sort().values, whole.labels_N)
    assert parts["calibration-fit"].labels_N[:4].tolist() == [0, 1, 50, 51]
    assert parts["calibration-rank"].labels_N[:6].tolist() == [2, 3, 4, 5, 6, 52]


@pytest.mark.parametrize(
    ("count", "split", "estimating", "ranking"),
    [(100, 50, 4, 10), (140, 14, 20, 50), (350, 14, 50, 125), (646, 26, 50, 125), (1_203, 50, 50, 121)],
)
def test_a_small_dataset_holds_out_enough_to_calibrate(count: int, split: int, estimating: int, ranking: int) -> None:
    assert dataset.split_for(count) == split
    whole = Dataset(torch.zeros(count, 1, 1, 3, dtype=torch.uint8), torch.arange(count), ())
    assert len(whole.part("calibration-fit", split)) == estimating
    assert len(whole.part("calibration-rank", split)) == ranking
    assert len(whole.part("fit", split)) == count - estimating - ranking


def test_crops_are_cut_from_large_images_and_stay_in_the_part_of_their_image(tmp_path: Path) -> None:
    """Image i has the grey level i, and positions in its red channel, which show where a crop was cut."""
    folder, kept = tmp_path / "photos", tmp_path / "kept"
    folder.mkdir()
    for i in range(9):
        image = np.full((24, 40, 3), i, np.uint8)
        image[..., 0] = np.arange(40)
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "3.png").write_text("junk")
    first, again = (dataset.load(str(folder), 8, 8, crop=16, cache_folder=kept) for _ in range(2))
    assert first.crops == 64
    assert len(first) == 8 * 64
    assert torch.equal(first.images_NHWC, again.images_NHWC)
    assert (first.inventory.images, first.inventory.sizes) == (8, {"40x24": 8})
    assert first.images_NHWC.shape[1:] == (8, 8, 3)
    lefts = first.images_NHWC[:, 0, 0, 0]
    assert len(lefts.unique()) > 10  # positions vary
    grey = first.images_NHWC[:, 0, 0, 1].reshape(8, 64)
    assert (grey == grey[:, :1]).all()
    assert grey[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert set(first.part("calibration-fit").images_NHWC[:, 0, 0, 1].tolist()) == {0, 1}
    assert set(first.part("calibration-rank").images_NHWC[:, 0, 0, 1].tolist()) == {2, 4, 5, 6, 7}
    with pytest.raises(InputError, match=r"0.png has 40 x 24 pixels, less than a crop of 32 x 32: use a smaller"):
        dataset.load(str(folder), 8, 8, crop=32)


def test_images_of_one_name_are_cropped_at_different_positions(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    cells = [{"bytes": png(image), "path": "image.png"}] * 8
    table = datasets.Dataset.from_dict({"image": cells}, datasets.Features(image=datasets.Image()))
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    loaded = dataset.load(str(tmp_path / "set"), 8, 8, crop=16)
    first_crops_NHWC = loaded.images_NHWC[:: loaded.crops]
    assert len({crop.numpy().tobytes() for crop in first_crops_NHWC}) == 8


def test_crops_depend_on_the_image_and_not_on_other_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nets.save_images(tmp_path / "photos", rng.integers(256, size=(5, 24, 40, 3), dtype=np.uint8))
    before = dataset.load(str(tmp_path / "photos"), 8, 8, crop=16)
    (tmp_path / "photos" / "0 notes.txt").write_text("not an image")
    after = dataset.load(str(tmp_path / "photos"), 8, 8, crop=16)
    assert torch.equal(before.images_NHWC, after.images_NHWC)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets.save_images(tmp_path / "photos" / "a", nets.images(2).numpy())
    nets.save_images(tmp_path / "photos" / "b", nets.images(2).numpy())
    scandir = os.scandir

    def refuse_b(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_b)
    with pytest.raises(InputError, match=r"photos/b cannot be read: Permission denied\."):
        dataset.load(str(tmp_path / "photos"), 8, 8)


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    nets.save_images(tmp_path / "elsewhere", nets.images(3).numpy())
    nets.save_images(tmp_path / "photos" / "b", nets.images(2).numpy())
    (tmp_path / "photos" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "b" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "photos" / "b")
    (tmp_path / "photos" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    nets.save_images(tmp_path / ".thumbs", nets.images(2).numpy())
    (tmp_path / "photos" / "c").symlink_to(tmp_path / ".thumbs")
    read = dataset.load(str(tmp_path / "photos"), 8, 8)
    assert (read.classes, read.labels_N.tolist()) == (("a", "b"), [0, 0, 0, 1, 1])


def test_the_first_images() -> None:
    whole = Dataset(nets.images(4), torch.arange(4), ("a", "b", "c", "d"), Inventory(files=4))
    part = whole.first(3)
    assert len(part) == 3
    assert (part.classes, part.inventory) == (whole.classes, whole.inventory)


def test_evenly_spaced_images() -> None:
    whole = Dataset(nets.images(7), torch.arange(7), ("a",) * 7)
    assert whole.spread(3).labels_N.tolist() == [0, 2, 4]
    assert whole.part("fit").spread(9).labels_N.tolist() == []
    assert whole.spread(9).labels_N.tolist() == list(range(7))


def test_a_folder_is_listed_once_and_its_rows_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets.save_images(tmp_path, nets.images(3).numpy())
    (tmp_path / "notes.txt").write_text("not an image")
    listed: list[Path] = []

    def sorted_files(folder: Path) -> Sequence[Location]:
        listed.append(folder)
        return files_of(folder)

    files_of = sources.sorted_files
    monkeypatch.setattr(sources, "sorted_files", sorted_files)
    source = sources.open_source(str(tmp_path), "train")
    loaded = dataset.load(source, 8, 8)
    names = [row.name for row in sources.readable_rows(source, loaded.inventory.unreadable_rows)]
    assert names == ["000.png", "001.png", "002.png"]
    assert listed == [tmp_path]


def test_the_rows_of_a_parquet_folder_are_read_again(tmp_path: Path) -> None:
    source = sources.open_source(parquet(tmp_path / "set", [0, 1, 0], datasets.Value("int64")), "train")
    loaded = dataset.load(source, 8, 8)
    assert [row.label for row in source.rows()] == loaded.labels_N.tolist() == [0, 1, 0]
