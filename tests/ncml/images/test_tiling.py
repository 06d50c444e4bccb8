"""The geometry of tiles, and their blended maps."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ncml.errors import InputError
from ncml.images.tiling import TileSize, blend, smallest_tile_side

IMAGE_SIDE = st.integers(8, 60)
TILE_SIDE = st.integers(4, 8)


@given(IMAGE_SIDE, IMAGE_SIDE, TILE_SIDE, TILE_SIDE)
def test_tiles_cover_every_pixel_and_lie_inside(H: int, W: int, height: int, width: int) -> None:
    tile = TileSize(height, width)
    corners = tile.corners(H, W)
    covered = np.zeros((H, W), int)
    for top, left in corners:
        assert 0 <= top <= H - height
        assert 0 <= left <= W - width
        covered[top : top + height, left : left + width] += 1
    assert covered.min() >= 1
    assert len(set(corners)) == len(corners) == np.prod(tile.grid_shape(H, W))
    assert corners == sorted(corners)


@given(IMAGE_SIDE, TILE_SIDE)
def test_neighbours_overlap_equally_by_half_or_more(length: int, side: int) -> None:
    """No two tiles nearly coincide, neither of an odd size nor at the edges."""
    starts = TileSize(side, side).starts(length, side)
    steps = np.diff(starts)
    assert (starts[0], starts[-1]) == (0, length - side)
    assert steps.max(initial=0) <= (side + 1) // 2
    assert steps.max(initial=0) - steps.min(initial=side) <= 1
    fewer = len(steps) - 1
    assert fewer <= 0 or (length - side) / fewer > (side + 1) // 2  # one tile less would leave a gap


def test_250_pixels_have_three_tiles_of_125() -> None:
    assert TileSize(125, 125).starts(250, 125) == [0, 62, 125]
    assert TileSize(125, 125, is_even=False).starts(250, 125) == [0, 62, 124, 125]


def test_a_tile_has_the_model_s_aspect() -> None:
    assert TileSize.for_model(8, 12) == TileSize(8, 12)
    assert TileSize.for_model(8, 12, 16) == TileSize(16, 24)
    assert TileSize.for_model(12, 8, 16) == TileSize(24, 16)
    with pytest.raises(InputError, match="at least the model's 8 pixels, not 4"):
        TileSize.for_model(8, 12, 4)


def test_calibrated_tiles_have_their_size() -> None:
    assert TileSize.resolve(8, 8, None, None) == TileSize(8, 8)
    assert TileSize.resolve(8, 8, 16, None) == TileSize(16, 16)
    for side in (None, 16):
        assert TileSize.resolve(8, 8, side, TileSize(16, 16)) == TileSize(16, 16)
    with pytest.raises(InputError, match="calibrated at 16 x 16 pixels"):
        TileSize.resolve(8, 8, 8, TileSize(16, 16))


def test_an_image_smaller_than_a_tile_is_refused() -> None:
    assert TileSize(8, 12).grid_shape(8, 12) == (1, 1)
    for H, W in ((7, 12), (8, 11)):
        with pytest.raises(InputError, match=f"an image of {W} x {H} pixels is smaller than a tile of 12 x 8"):
            TileSize(8, 12).grid_shape(H, W)


@example(8, 8, (4, 6), 2)  # the next larger tile is wider than the image
@given(IMAGE_SIDE, IMAGE_SIDE, st.sampled_from([(4, 4), (4, 6), (8, 5)]), st.integers(1, 40))
def test_the_smallest_side_within_the_limit_of_tiles(H: int, W: int, model: tuple[int, int], most: int) -> None:
    def tiles(side: int) -> int | None:
        tile = TileSize.for_model(*model, side)
        try:
            rows, columns = tile.grid_shape(H, W)
        except InputError:
            return None
        return rows * columns

    expected = next((side for side in range(min(model), 61) if (n := tiles(side)) is not None and n <= most), None)
    assert smallest_tile_side(model, (H, W), most) == expected


@given(IMAGE_SIDE, IMAGE_SIDE, TILE_SIDE, TILE_SIDE, st.integers(0, 99))
def test_a_map_is_the_mean_of_the_tiles_over_it_by_their_weights(H: int, W: int, h: int, w: int, seed: int) -> None:
    tile = TileSize(h, w)
    scores = np.random.default_rng(seed).random(tile.grid_shape(H, W), np.float32)

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
    assert blend(np.full((5, 4), 3.5, np.float32), TileSize(8, 8), 24, 20) == pytest.approx(np.full((24, 20), 3.5))


def test_a_map_of_a_long_image_takes_no_more_memory_than_the_map() -> None:
    tile = TileSize(8, 8)
    drawn = blend(np.ones(tile.grid_shape(8, 10**6), np.float32), tile, 8, 10**6)
    assert drawn.shape == (8, 10**6)
