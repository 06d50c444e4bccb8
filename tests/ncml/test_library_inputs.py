"""The library accepts names, paths, images of any size and folders, and its results display themselves."""

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import ncml
from ncml import images
from ncml.errors import InputError, ModelError
from tests.ncml import nets

PIXELS = nets.images(3, 20, 30).numpy()
"""Larger than the model, and of another aspect."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three images, one of them in a subfolder, and a file that is not an image."""
    nets.save_images(tmp_path / "photos", PIXELS[:2])
    nets.save_images(tmp_path / "photos" / "more", PIXELS[2:])
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def test_a_model_is_loaded_by_name_by_path_and_by_default(
    model: ncml.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NCML_MODELS", str(model.folder.parent))
    monkeypatch.chdir(tmp_path)
    for name in ("loud", str(model.folder), model.folder, ""):
        assert ncml.load(name).version == model.version
    with pytest.raises(ModelError, match="there is no model 'load': did you mean loud\\?"):
        ncml.load("load")


def test_every_source_of_an_image_has_the_same_score(model: ncml.Model, folder: Path) -> None:
    path = folder / "000.png"
    expected = model.score(images.resize_to(PIXELS[0], 8, 8))[0].bpd
    exact = (path, str(path), path.read_bytes(), Image.open(path), PIXELS[0], torch.from_numpy(PIXELS[0]))
    opaque = np.dstack([PIXELS[0], np.full((20, 30), 255, np.uint8)])
    for image in (*exact, opaque, [path], (PIXELS[0],), iter([path]), PIXELS[:1], np.array([str(path)])):
        assert [score.bpd for score in model.score(image)] == [expected]
    grey = PIXELS[0, :, :, 0]
    assert model.score(grey) == model.score(np.stack([grey] * 3, 2))
    mixed = model.score([path, Image.open(path), PIXELS[0]])
    assert [score.bpd for score in mixed] == pytest.approx([expected] * 3, rel=1e-5)
    assert [score.file for score in mixed] == [str(path), None, None]


def test_a_folder_is_scored_in_the_order_of_its_names(model: ncml.Model, folder: Path) -> None:
    scores = model.score(folder)
    assert [score.file for score in scores] == [str(folder / name) for name in ("000.png", "001.png", "more/000.png")]
    assert [score.bpd for score in scores] == pytest.approx([s.bpd for s in model.score(PIXELS)], rel=1e-5)
    (folder / "broken.png").write_text("hello")
    with pytest.raises(InputError, match=r"broken\.png is not an image"):
        model.score(folder)


def test_images_of_the_model_s_size_are_untouched(model: ncml.Model) -> None:
    exact = nets.images(2).numpy()
    assert [s.bpd for s in model.score(exact)] == [s.bpd for s in model.score(exact, preprocess=False)]


def test_a_pil_image_is_rotated_like_its_file(model: ncml.Model, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS[0]).save(tmp_path / "turned.png", exif=exif)
    path = tmp_path / "turned.png"
    from_file, from_image = model.score(path)[0].bpd, model.score(Image.open(path))[0].bpd
    assert from_file == from_image != model.score(PIXELS[0])[0].bpd


def test_errors_about_images_name_the_remedy(model: ncml.Model, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"there is no image in .*empty: name a folder of png, jpg"):
        model.score(tmp_path / "empty")
    for array, remedy in (
        (np.zeros((8, 8, 3)), r"not float64 \[8, 8, 3\]: convert values from 0 to 1 with \(255 \* image\)"),
        (PIXELS[0].transpose(2, 0, 1), r"move the channels to the end with numpy\.moveaxis\(image, 0, 2\), or pass a "),
        (np.zeros((3, 8, 8)), "move the channels .* and convert values"),
        (PIXELS[0].astype(int), "convert it, or pass a PIL image or a path"),
    ):
        with pytest.raises(InputError, match=remedy):
            model.score(array)
    for invalid in (PIXELS[0].astype(int), b"hello"):
        with pytest.raises(InputError, match=r"^images\[1\] (must be uint8|is not an image)"):
            model.score([PIXELS[0], invalid])
    for invalid in (5, None, [None], [PIXELS[0], 5.0], {"a": PIXELS[0]}):
        with pytest.raises(InputError, match="an image must be a path, bytes, a PIL image or a uint8 array, not"):
            model.score(invalid)  # type: ignore[arg-type]
    for invalid in (io.BytesIO(b"a line"), bytearray(b"bytes")):  # which can be iterated, but not over images
        with pytest.raises(InputError, match=rf"a uint8 array, not <?[a-z_.]*{type(invalid).__name__}"):
            model.score(invalid)  # type: ignore[arg-type]
    for path, reason in (("", "is empty"), ("x" * 5000, "File name too long"), ("a\0b", "null")):
        with pytest.raises(InputError, match=reason):
            model.score([PIXELS[0], path])
    with pytest.raises(InputError, match="has no pixels"):
        model.score(Image.new("RGB", (0, 4)))
    cut = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(cut, "PNG")
    lazy = Image.open(io.BytesIO(cut.getvalue()[:200]))
    with pytest.raises(InputError, match="a PIL image cannot be converted to RGB"):
        model.score(lazy)


def test_halves_of_any_size_are_completed(model: ncml.Model, tmp_path: Path) -> None:
    half = PIXELS[0, :10, :20]  # half of a square
    Image.fromarray(half).save(tmp_path / "half.png")
    arguments = {"seeds": 1, "noise": 0.0}
    expected = model.complete(tmp_path / "half.png", **arguments)
    for image in (half, Image.fromarray(half), [half]):
        assert np.array_equal(model.complete(image, **arguments), expected)
    see_through = np.dstack([PIXELS[0, :20, :20], np.full((20, 20), 255, np.uint8)])
    see_through[:, 10:, 3] = 0
    left = model.complete(Image.fromarray(see_through), **arguments)
    assert np.array_equal(left, model.complete(Image.fromarray(see_through), keep="left", **arguments))
    with pytest.raises(InputError, match=r"known halves of the images differ \(left and top\)"):
        model.complete([half, Image.fromarray(see_through)], **arguments)
    exact = see_through[20 - model.height :, : model.width].copy()
    exact[..., 3] = 255
    exact[: model.height // 2, :, 3] = 0
    bottom = model.complete(Image.fromarray(exact), keep="bottom", **arguments)
    for image in (exact, Image.fromarray(exact)):
        assert np.array_equal(model.complete(image, preprocess=False, **arguments), bottom)
    assert np.array_equal(bottom[0][model.height // 2 :], exact[model.height // 2 :, :, :3])


def test_large_images_are_scanned_from_paths_and_pil_images(calibrated: ncml.Model, folder: Path) -> None:
    path = folder / "000.png"
    scores = [calibrated.scan(image).score for image in (path, str(path), Image.open(path), PIXELS[0])]
    assert scores == [scores[0]] * 4
    scan = calibrated.scan(path)
    assert json.loads(json.dumps(scan.to_dict()))["score"] == scan.score
    assert {"view", "p_value", "is_ood", "left", "top", "width", "height", "tiles"} < scan.to_dict().keys()
    assert repr(scan).startswith(f"Scan(view={scan.view!r}, score={scan.score:.6g}, p_value=None")
    assert '<img src="data:image/png;base64,' in scan._repr_html_()


def test_scores_display_well_and_convert_to_a_table(calibrated: ncml.Model, folder: Path) -> None:
    scores = calibrated.score(folder, statistics=["typicality"])
    row = scores[0].to_dict()
    assert list(row) == [
        "file", "bpd", "log_likelihood", "statistic", "score", "p_value", "is_ood", "typicality",
    ]  # fmt: skip
    assert json.loads(json.dumps(row)) == row
    assert scores[0].ood is not None
    assert (row["p_value"], row["is_ood"]) == (scores[0].ood.p_value, scores[0].ood.is_ood)
    assert repr(scores[0]).startswith(f"Score(file='{folder / '000.png'}', bpd={scores[0].bpd:.6g}, log_likelihood=")
    table = pd.DataFrame(scores)
    assert set(table.columns) == set(row)
    assert table["bpd"].tolist() == [score.bpd for score in scores]
    assert not dataclasses.is_dataclass(scores[0])  # whose fields would be the columns before pandas 3
    assert list(calibrated.score(PIXELS[0], ood=False)[0].to_dict()) == ["bpd", "log_likelihood"]
    assert "flipped_bpd" in calibrated.score(PIXELS[0], sanity=True)[0].to_dict()


def test_a_notebook_shows_scores_with_their_maps(model: ncml.Model) -> None:
    without, with_map = model.score(PIXELS[0])[0], model.score(PIXELS[0], map=True)[0]
    assert "<th>bpd</th>" in without._repr_html_()
    assert "<img" not in without._repr_html_()
    assert '<img src="data:image/png;base64,' in with_map._repr_html_()
    named = ncml.Score(1.0, -math.pi, file="<b>.png")
    assert "&lt;b&gt;.png" in named._repr_html_()


def test_a_notebook_shows_generated_images_as_a_grid(model: ncml.Model) -> None:
    generated = model.generate(3, noise=0)
    png = generated._repr_png_()
    assert png is not None
    shown = np.asarray(Image.open(io.BytesIO(png)))
    assert np.array_equal(shown[::16, ::16], images.grid(np.asarray(generated)))
    single = generated[0]._repr_png_()
    assert single is not None
    assert Image.open(io.BytesIO(single)).size == (256, 256)
    assert (generated / 2)._repr_png_() is None
    assert type(generated.mean()) is np.float64
    assert generated.mean(0)._repr_png_() is None
