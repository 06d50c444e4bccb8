"""The geometry of tiles, and their blended maps."""

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ncml.errors import InputError
from ncml.images.tiling import Tiling, blend, smallest_tile_side, starts

IMAGE_SIDE = st.integers(8, 60)
TILE_SIDE = st.integers(4, 8)
OVERLAP = st.sampled_from([0, 0.1, 0.25, 0.5, 0.7])


@given(IMAGE_SIDE, IMAGE_SIDE, TILE_SIDE, TILE_SIDE, OVERLAP)
def test_tiles_cover_every_pixel_and_lie_inside(H: int, W: int, height: int, width: int, overlap: float) -> None:
    tile = Tiling(height, width, overlap)
    corners = tile.corners(H, W)
    covered = np.zeros((H, W), int)
    for top, left in corners:
        assert 0 <= top <= H - height
        assert 0 <= left <= W - width
        covered[top : top + height, left : left + width] += 1
    assert covered.min() >= 1
    assert len(set(corners)) == len(corners) == np.prod(tile.grid_shape(H, W))
    assert corners == sorted(corners)


@given(IMAGE_SIDE, TILE_SIDE, OVERLAP)
def test_neighbours_overlap_equally_and_enough(length: int, side: int, overlap: float) -> None:
    """No two tiles nearly coincide, neither of an odd size nor at the edges."""
    count, _ = Tiling(side, side, overlap).grid_shape(length, side)
    first = starts(length, side, count)
    steps = np.diff(first)
    max_step = math.ceil(side * (1 - Fraction(str(overlap))))
    assert (first[0], first[-1]) == (0, length - side)
    assert steps.max(initial=0) <= max_step
    assert steps.max(initial=0) - steps.min(initial=side) <= 1
    assert count < 3 or (length - side) / (count - 2) > max_step  # one tile less would leave a gap


@pytest.mark.parametrize(("overlap", "count"), [(0.75, 5), (0.5, 3), (0.25, 3), (0, 2)])
def test_250_pixels_have_this_many_tiles_of_125(overlap: float, count: int) -> None:
    assert Tiling(125, 125, overlap).count_along(250, 125) == count


@pytest.mark.parametrize("overlap", [-0.1, 0.8, float("nan")])
def test_an_impossible_overlap_is_refused(overlap: float) -> None:
    with pytest.raises(InputError, match=r"overlap of tiles must be from 0 to 0\.75, not"):
        Tiling.for_model(8, 8, overlap=overlap)


def test_a_tile_has_the_model_s_aspect() -> None:
    assert Tiling.for_model(8, 12) == Tiling(8, 12)
    assert Tiling.for_model(8, 12, 16) == Tiling(16, 24)
    assert Tiling.for_model(12, 8, 16) == Tiling(24, 16)
    with pytest.raises(InputError, match="at least the model's 8 pixels, not 4"):
        Tiling.for_model(8, 12, 4)


def test_calibrated_tiles_have_their_size() -> None:
    assert Tiling.resolve(8, 8, None, None) == Tiling(8, 8)
    assert Tiling.resolve(8, 8, 16, None) == Tiling(16, 16)
    for side in (None, 16):
        assert Tiling.resolve(8, 8, side, Tiling(16, 16)) == Tiling(16, 16)
    with pytest.raises(InputError, match="calibrated at 16 x 16 pixels"):
        Tiling.resolve(8, 8, 8, Tiling(16, 16))


def test_an_image_smaller_than_a_tile_is_refused() -> None:
    assert Tiling(8, 12).grid_shape(8, 12) == (1, 1)
    for H, W in ((7, 12), (8, 11)):
        with pytest.raises(InputError, match=f"an image of {W} x {H} pixels is smaller than a tile of 12 x 8"):
            Tiling(8, 12).grid_shape(H, W)


@example(8, 8, (4, 6), 2)  # the next larger tile is wider than the image
@given(IMAGE_SIDE, IMAGE_SIDE, st.sampled_from([(4, 4), (4, 6), (8, 5)]), st.integers(1, 40))
def test_the_smallest_side_within_the_limit_of_tiles(H: int, W: int, model: tuple[int, int], most: int) -> None:
    def tiles(side: int) -> int | None:
        tile = Tiling.for_model(*model, side)
        try:
            rows, columns = tile.grid_shape(H, W)
        except InputError:
            return None
        return rows * columns

    expected = next((side for side in range(min(model), 61) if (n := tiles(side)) is not None and n <= most), None)
    assert smallest_tile_side(model, (H, W), most) == expected


@given(IMAGE_SIDE, IMAGE_SIDE, TILE_SIDE, TILE_SIDE, OVERLAP)
def test_a_map_is_the_mean_of_tiles_by_their_weights(H: int, W: int, h: int, w: int, overlap: float) -> None:
    tile = Tiling(h, w, overlap)
    scores = np.random.default_rng(H).random(tile.grid_shape(H, W), np.float32)

    def ramp(side: int) -> np.ndarray:
        return 1 - np.abs(np.arange(side) + 0.5 - side / 2) / (side / 2) * (1 - 1 / side)

    total, weight = np.zeros((H, W)), np.zeros((H, W))
    for (top, left), score in zip(tile.corners(H, W), scores.ravel(), strict=True):
        over = np.s_[top : top + h, left : left + w]
        total[over] += score * np.outer(ramp(h), ramp(w))
        weight[over] += np.outer(ramp(h), ramp(w))
    drawn = blend(scores, tile, H, W)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn, total / weight, rtol=1e-4)


def test_a_map_of_equal_tiles_is_constant() -> None:
    assert blend(np.full((5, 4), 3.5, np.float32), Tiling(8, 8), 24, 20) == pytest.approx(np.full((24, 20), 3.5))


def test_a_map_of_a_long_image_takes_little_more_memory_than_the_map() -> None:
    tile = Tiling(8, 8)
    scores = np.ones(tile.grid_shape(8, 10**5), np.float32)
    tracemalloc.start()
    try:
        drawn = blend(scores, tile, 8, 10**5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert drawn.shape == (8, 10**5)
    assert peak < 4 * drawn.nbytes
