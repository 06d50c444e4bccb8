"""Perturbations: what each preserves, and that it depends only on the seed."""

import numpy as np
import pytest
from PIL import Image

from ncml.errors import InputError
from ncml.images import perturbations
from tests.ncml import nets

IMAGE = nets.images(1, 16, 16, seed=3).numpy()[0]
PERTURBATIONS = {
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


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbation_changes_the_image_and_keeps_its_shape(name: str) -> None:
    changed = PERTURBATIONS[name](IMAGE, np.random.default_rng(0))
    assert changed.shape == IMAGE.shape
    assert changed.dtype == np.uint8
    assert not np.array_equal(changed, IMAGE)


def test_rearrangements_keep_every_value() -> None:
    rng = np.random.default_rng(0)
    for name in ("mirror", "channels", "patches"):
        assert np.array_equal(np.sort(PERTURBATIONS[name](IMAGE, rng), None), np.sort(IMAGE, None))
    blocks = PERTURBATIONS["patches"](IMAGE, rng).reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, -1)
    original = IMAGE.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, -1)
    assert sorted(map(bytes, blocks)) == sorted(map(bytes, original))


def test_perturbations_have_the_amounts_in_their_names() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert perturbations.noise(8)(grey, np.random.default_rng(0)).std() == pytest.approx(8, rel=0.05)
    halved = perturbations.contrast(0.5)(IMAGE, np.random.default_rng(0))
    assert halved.std() == pytest.approx(IMAGE.std() / 2, rel=0.02)
    assert np.abs(perturbations.flip_lowest_bits(IMAGE, np.random.default_rng(0)).astype(int) - IMAGE).max() == 1


def test_about_half_of_the_images_are_perturbed() -> None:
    images = nets.images(200, 16, 16).numpy()
    perturbed = perturbations.apply_tolerances(images, ["jpeg", "resize"], seed=1)
    changed = (perturbed != images).any((1, 2, 3))
    assert 70 < changed.sum() < 130
    assert np.array_equal(perturbed, perturbations.apply_tolerances(images, ["jpeg", "resize"], seed=1))
    assert not np.array_equal(perturbed, perturbations.apply_tolerances(images, ["jpeg", "resize"], seed=2))
    assert np.array_equal(perturbations.apply_tolerances(images, []), images)


def test_an_unknown_tolerance_is_named() -> None:
    with pytest.raises(InputError, match="no change 'blur' to tolerate: choose from jpeg, resize"):
        perturbations.apply_tolerances([IMAGE], ["blur"])  # type: ignore[list-item]
