"""Changes of pictures: what each leaves alone, and that chance is the seed's."""

import numpy as np
import pytest
from PIL import Image

from ncml.errors import InputError
from ncml.images import perturbations
from tests.ncml import nets

PICTURE = nets.pictures(1, 16, 16, seed=3).numpy()[0]
CHANGES = {
    "jpeg": perturbations.jpeg(75),
    "resample": perturbations.resample(0.5, Image.Resampling.BOX, Image.Resampling.BICUBIC),
    "blur": perturbations.blur(1.0),
    "noise": perturbations.noise(10),
    "contrast": perturbations.contrast(0.5),
    "bits": perturbations.flip_lowest_bits,
    "mirror": perturbations.mirror,
    "channels": perturbations.swap_channels,
    "patches": perturbations.shuffle_patches(4),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_changes_and_keeps_the_shape(name: str) -> None:
    changed = CHANGES[name](PICTURE, np.random.default_rng(0))
    assert changed.shape == PICTURE.shape
    assert changed.dtype == np.uint8
    assert not np.array_equal(changed, PICTURE)


def test_what_is_only_moved_is_all_still_there() -> None:
    rng = np.random.default_rng(0)
    for name in ("mirror", "channels", "patches"):
        assert np.array_equal(np.sort(CHANGES[name](PICTURE, rng), None), np.sort(PICTURE, None))
    blocks = CHANGES["patches"](PICTURE, rng).reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, -1)
    original = PICTURE.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, -1)
    assert sorted(map(bytes, blocks)) == sorted(map(bytes, original))


def test_amounts_are_what_they_are_named() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert perturbations.noise(8)(grey, np.random.default_rng(0)).std() == pytest.approx(8, rel=0.05)
    halved = perturbations.contrast(0.5)(PICTURE, np.random.default_rng(0))
    assert halved.std() == pytest.approx(PICTURE.std() / 2, rel=0.02)
    assert np.abs(perturbations.flip_lowest_bits(PICTURE, np.random.default_rng(0)).astype(int) - PICTURE).max() == 1


def test_about_half_of_the_pictures_go_through_a_tolerated_change() -> None:
    pictures = nets.pictures(200, 16, 16).numpy()
    some = perturbations.tolerated(pictures, ["jpeg", "resize"], seed=1)
    changed = (some != pictures).any((1, 2, 3))
    assert 70 < changed.sum() < 130
    assert np.array_equal(some, perturbations.tolerated(pictures, ["jpeg", "resize"], seed=1))
    assert not np.array_equal(some, perturbations.tolerated(pictures, ["jpeg", "resize"], seed=2))
    assert np.array_equal(perturbations.tolerated(pictures, []), pictures)


def test_an_unknown_tolerance_is_named() -> None:
    with pytest.raises(InputError, match="no change 'blur' to tolerate: choose from jpeg, resize"):
        perturbations.tolerated([PICTURE], ["blur"])  # type: ignore[list-item]
