"""Scenes: near-duplicates are linked, images that are merely alike are not, and names can say otherwise."""

import tracemalloc

import numpy as np
import pytest

from ncml.data import scenes
from ncml.errors import InputError
from ncml.progress import Progress


def landscape(seed: int) -> np.ndarray:
    """Return an image of its own: random colours that vary slowly."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))


def part(seed: int) -> np.ndarray:
    """Return one of many images of the same part: a bright square at about the same place, and noise."""
    rng = np.random.default_rng(seed)
    image = rng.normal(60 + rng.normal(0, 10), 8, (48, 64, 3))
    top, left = rng.integers(8, 16), rng.integers(16, 24)
    image[top : top + 20, left : left + 20] += 100 + rng.normal(0, 10)
    return image.clip(0, 255).astype(np.uint8)


def found(images: list[np.ndarray], original_count: int | None = None) -> np.ndarray:
    thumbnails = np.stack([scenes.thumbnail(image) for image in images])
    return scenes.near_duplicates(thumbnails, [scenes.digest(image) for image in images], original_count)


def test_frames_of_a_burst_are_one_scene() -> None:
    rng = np.random.default_rng(0)
    frames = [
        (landscape(seed) * rng.uniform(0.97, 1.03) + rng.normal(0, 3, (48, 64, 3))).clip(0, 255).astype(np.uint8)
        for seed in range(20)
        for _ in range(5)
    ]
    np.testing.assert_array_equal(found(frames), np.repeat(np.arange(20), 5))


def test_images_of_one_part_are_scenes_of_their_own() -> None:
    assert len(set(found([part(seed) for seed in range(60)]).tolist())) >= 58


def test_two_kinds_of_good_images_are_not_two_scenes() -> None:
    images = [np.roll(part(seed), (seed % 2) * 20, 0) for seed in range(60)]
    assert len(set(found(images).tolist())) >= 57


@pytest.mark.parametrize("copies", [1, 5, 8, 40])
def test_any_number_of_new_photographs_of_a_known_part_are_one_scene_with_it(copies: int) -> None:
    rng = np.random.default_rng(0)
    known = [part(seed) for seed in range(40)]
    photographs = [(known[8] + rng.normal(0, 2, known[8].shape)).clip(0, 255).astype(np.uint8) for _ in range(copies)]
    labels = found([*known, *photographs], original_count=40)
    assert set(labels[40:].tolist()) == {labels[8]}
    assert len(set(labels.tolist())) == 40


def test_new_images_of_a_known_kind_are_not_one_scene_with_it() -> None:
    """A group with many of the known images is a kind of them, which may be reviewed."""
    rng = np.random.default_rng(0)
    other = np.full((48, 64, 3), 200.0)
    kind = [(other + rng.normal(0, 2, other.shape)).clip(0, 255).astype(np.uint8) for _ in range(25)]
    labels = found([*(part(seed) for seed in range(40)), *kind], original_count=60)
    assert len(set(labels[40:].tolist())) == 25


def test_copies_are_one_scene_even_where_all_images_are_alike() -> None:
    images = [part(seed) for seed in range(30)] + [part(3), part(3)]
    labels = found(images)
    assert labels[30] == labels[31] == labels[3]
    assert len(set(labels.tolist())) == 30


def test_scenes_are_named_by_subfolder_or_by_a_pattern() -> None:
    names = ["a/1_x.png", "a/2_x.png", "b/1_x.png"]
    assert scenes.scenes_by_name(names, "folder").tolist() == [0, 0, 1]
    assert scenes.scenes_by_name(names, r"(\d)_x").tolist() == [0, 1, 0]
    assert scenes.scenes_by_name(names, "image").tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"does not match b/1_x.png"):
        scenes.scenes_by_name(names, "(a)/")


@pytest.mark.parametrize("group", ["(", "abc", "(a)(b)"])
def test_a_pattern_needs_one_group(group: str) -> None:
    with pytest.raises(InputError, match="--group"):
        scenes.check_group(group)


def test_finding_scenes_reports_progress_because_it_takes_the_square_of_the_images() -> None:
    steps: list[Progress] = []
    descriptors_NF = np.random.default_rng(0).normal(size=(50, 8))
    scenes.near_duplicates(descriptors_NF, [str(i) for i in range(50)], on_progress=steps.append)
    assert {(step.stage, step.total) for step in steps} == {("find scenes", 50)}
    assert [step.done for step in steps] == list(range(2, 51))


def test_the_distances_of_many_images_are_not_all_in_memory() -> None:
    rng = np.random.default_rng(0)
    descriptors_NF = rng.normal(size=(1500, 32))
    descriptors_NF[1::500] = descriptors_NF[::500] + 1e-6
    tracemalloc.start()
    try:
        labels_N = scenes.near_duplicates(descriptors_NF, [str(i) for i in range(1500)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [labels_N[i + 1] == labels_N[i] for i in range(0, 1500, 500)] == [True] * 3
    assert len(set(labels_N.tolist())) == 1497
    assert peak < 1500**2 * 8  # of a matrix
