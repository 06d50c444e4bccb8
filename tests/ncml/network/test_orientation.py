"""Every half comes first in one of the orientations."""

import pytest
import torch

from ncml.limits import KEEPS
from ncml.network import orientation
from ncml.network.orientation import orient, orient_each, restore

HALVES = {
    "top": (slice(0, 4), slice(None)),
    "bottom": (slice(4, 8), slice(None)),
    "left": (slice(None), slice(0, 6)),
    "right": (slice(None), slice(6, 12)),
}


@pytest.mark.parametrize("index", range(4), ids=KEEPS)
def test_the_half_that_is_kept_becomes_the_top_one(index: int) -> None:
    x = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12)
    turned = orient(x, index)
    rows, columns = HALVES[KEEPS[index]]
    assert set(turned[0, 0, : turned.shape[2] // 2].flatten().tolist()) == set(
        x[0, 0, rows, columns].flatten().tolist()
    )
    assert torch.equal(restore(turned, index), x)


def test_the_edge_of_the_image_comes_first() -> None:
    """The known half is scanned from the image's border towards the unknown half."""
    x = torch.arange(8 * 12).view(1, 1, 8, 12)
    first_rows = [orient(x, index)[0, 0, 0].tolist() for index in range(4)]
    assert first_rows == [x[0, 0, 0].tolist(), x[0, 0, -1].tolist(), x[0, 0, :, 0].tolist(), x[0, 0, :, -1].tolist()]


def test_each_image_is_oriented_as_it_would_be_alone() -> None:
    x = torch.rand(8, 3, 6, 6)
    orientation_B = torch.tensor([3, 0, 1, 2, 2, 1, 0, 3])
    turned = orient_each(x, orientation_B)
    for i, index in enumerate(orientation_B.tolist()):
        assert torch.equal(turned[i : i + 1], orient(x[i : i + 1], index))


def test_the_share_of_oriented_images_is_the_stated_one() -> None:
    orientation_B = orientation.draw_orientations(40_000, 0.25, True, torch.Generator().manual_seed(0))
    counts = torch.bincount(orientation_B, minlength=4) / len(orientation_B)
    # Four standard errors of a share of 1/12 of 40,000 are .0055.
    assert torch.allclose(counts, torch.tensor([0.75, 0.25 / 3, 0.25 / 3, 0.25 / 3]), atol=0.009)


def test_images_that_are_not_square_are_oriented_together() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [orientation.draw_orientations(5, 0.5, False, generator) for _ in range(200)]
    assert all(len(batch) == 5 and batch.unique().numel() == 1 for batch in batches)
    assert {int(batch[0]) for batch in batches} == {0, 1, 2, 3}
