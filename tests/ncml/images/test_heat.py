"""Maps as images."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from ncml import images
from ncml.errors import InputError
from ncml.images import heat


def test_brightness_increases_with_the_value() -> None:
    ramp = np.linspace(-1, 2, 300)[None]
    brightness = heat.render(ramp, 0, 1).astype(float).sum(2)[0]
    assert (np.diff(brightness) >= -8).all()  # two neighbouring colours may round apart
    assert brightness[0] < 10
    assert brightness[-1] > 600
    assert np.array_equal(brightness[:100], np.full(100, brightness[0]))
    assert heat.render(np.ones((2, 3)), 1, 1).shape == (2, 3, 3)


def test_a_map_taller_than_a_band_is_rendered_completely() -> None:
    tall = np.linspace(0, 1, 2 * heat.BAND + 3)[:, None]
    assert np.array_equal(heat.render(tall, 0, 1)[:, 0], heat.render(tall.T, 0, 1)[0])


def test_a_map_of_pixels_is_enlarged_and_one_of_tiles_bright_where_it_is_flagged() -> None:
    pixels = np.array([[0, heat.BRIGHTEST], [9, 4]])
    drawn = heat.render_pixel_map(pixels)
    assert drawn.shape == (256, 256, 3)
    assert np.array_equal(drawn[:: 256 // 2, :: 256 // 2], heat.render(pixels, 0, heat.BRIGHTEST))
    assert heat.score_range(pixels, 7.5) == (0, 7.5)
    assert heat.score_range(pixels, None) == (0, 9)
    assert heat.score_range(pixels - 1, 0.0) == (-1, 0)
    assert (heat.render(pixels + 8, *heat.score_range(pixels + 8, 7.5)) == heat.render(np.ones((2, 2)), 0, 1)).all()


def test_colours_of_a_detectors_map_mean_the_same_in_all_images() -> None:
    grid = np.array([[1, 2, 3], [0, 2, 10]], np.float32)  # its median is 2
    image = np.full((2, 3, 3), 100, np.uint8)

    def peak(score: float) -> int:
        colours = heat.detection_range(grid, score, threshold=2)
        drawn = heat.render_detection(image, grid, colours, (0, 0, 1, 1), score > 2)
        assert (drawn[0, 0] == (heat.FLAGGED if score > 2 else heat.UNFLAGGED)).all()
        assert (drawn[1, 1] == (50, 50, 52)).all()  # the median is black in all images
        return int(drawn[1, 2].sum())

    black, brightest = peak(0), peak(2.1)
    assert black == 152
    assert black < peak(0.5) < peak(1) < peak(1.9) < brightest
    assert peak(200) == brightest
    assert heat.detection_range(grid, 200, 2) == (2, 6)  # half-way to the maximum, not where noise is as bright
    assert heat.detection_range(grid[:0], 3, 2) == (0, 1)  # of a view without a map


def test_a_frame_is_inside_its_box_and_changes_no_other_pixel() -> None:
    image = np.full((20, 30, 3), 100, np.uint8)
    framed = heat.frame(image, (5, 4, 10, 8))
    changed = (framed != image).any(2)
    assert changed.sum() == 2 * 10 + 2 * 6
    assert changed[4, 5]
    assert changed[11, 14]
    assert not changed[5:11, 6:14].any()
    assert (image == 100).all()


def test_the_frame_of_a_small_tile_leaves_its_interior_visible() -> None:
    framed = heat.frame(np.zeros((4000, 4000, 3), np.uint8), (0, 0, 32, 32))
    assert not framed[4:28, 4:28].any()
    assert framed[:4, :32].all()


def test_a_map_is_saved_as_png_and_npz(tmp_path: Path) -> None:
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    image = heat.overlay(np.full((3, 4, 3), 200, np.uint8), numbers, 0, 11)
    heat.save(tmp_path / "deep" / "a.jpg", image, numbers)
    assert np.array_equal(images.open_image(tmp_path / "deep" / "a.jpg.png"), image)
    assert np.array_equal(np.load(tmp_path / "deep" / "a.jpg.npz")["map"], numbers)
    long = "a" * 251 + ".jpg"
    heat.save(tmp_path / "long" / long, image, numbers)
    digest = hashlib.sha256(long.encode()).hexdigest()
    assert sorted(path.name for path in (tmp_path / "long").iterdir()) == [f"{digest}.npz", f"{digest}.png"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        heat.save(tmp_path / "file" / "a.jpg", image, numbers)
