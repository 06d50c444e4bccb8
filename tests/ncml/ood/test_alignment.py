"""Images of a part are brought to one position."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from ncml.ood.views import alignment, pose_search
from ncml.ood.views.alignment import Pose, Template
from ncml.progress import ignore_progress
from tests.detectors import plate


def part(seed: int, angle: float = 0.0, right: float = 0.0, down: float = 0.0) -> np.ndarray:
    """Return an image, 96 x 128, of an L-shaped part, turned in degrees and shifted in pixels, on a random ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :128].astype(float)
    x, y = x + 0.5 - 64 - right, y + 0.5 - 48 - down
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    u, v = cos * x + sin * y, cos * y - sin * x
    is_part = ((abs(u) < 30) & (abs(v + 15) < 6)) | ((abs(u + 24) < 6) & (abs(v) < 21))
    ground = Image.fromarray(rng.integers(60, 90, (12, 16), np.uint8)).resize((128, 96), Image.Resampling.BICUBIC)
    image = np.asarray(ground, float)[..., None] + 90 * is_part[..., None] + rng.normal(0, 3, (96, 128, 3))
    return image.clip(0, 255).astype(np.uint8)


def cap(seed: int, angle: float) -> np.ndarray:
    """Return an image, 96 x 128, of a fluted cap, turned in degrees; its print alone shows by how much, and the light
    on it does not turn."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :128].astype(float)
    x, y = x + 0.5 - 64, y + 0.5 - 48
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    u, v = cos * x + sin * y, cos * y - sin * x
    image = 40 + rng.normal(0, 3, (96, 128, 3))
    is_cap = np.hypot(u, v) < 38 + 1.5 * np.cos(12 * np.arctan2(v, u))
    image += (is_cap * (60 + 0.5 * (x + y)))[..., None]
    image += 90 * (((abs(u) < 16) & (abs(v + 6) < 4)) | (np.hypot(u - 12, v - 12) < 3))[..., None]
    return image.clip(0, 255).astype(np.uint8)


def grey(images: list[np.ndarray]) -> list[torch.Tensor]:
    size = alignment.template_size(*images[0].shape[:2])
    return [alignment.shrink(image, size) for image in images]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coarser search, for tests that do not ask for the exact pose."""
    monkeypatch.setattr(alignment, "FINE_SIDE", 96)
    monkeypatch.setattr(pose_search, "ANGLE_STEP", 15)


def poses_of(count: int) -> list[tuple[float, float, float]]:
    rng = np.random.default_rng(0)
    return [(rng.uniform(-180, 180), rng.uniform(-12, 12), rng.uniform(-8, 8)) for _ in range(count)]


def test_parts_in_any_direction_are_brought_to_one_position() -> None:
    images = [part(seed, *pose) for seed, pose in enumerate(poses_of(16))]
    template, poses, *_ = alignment.estimate(grey(images), ignore_progress)
    assert template is not None
    assert template.agreement > 0.8
    aligned, shown = [], []
    for image, pose in zip(images, poses, strict=True):
        assert pose is not None
        brought, inside = alignment.align(Image.fromarray(image), pose, (12, 16))
        aligned.append(brought.mean(2))
        shown.append(inside.numpy())
    is_shown = np.all(shown, 0).repeat(8, 0).repeat(8, 1)
    assert is_shown.any()
    spread = np.std(aligned, 0)[is_shown]
    as_they_are = np.std([image.mean(2) for image in images], 0)[is_shown]
    assert spread.mean() < 0.5 * as_they_are.mean()
    other = template.pose(part(100, 77, 5, -6))
    assert other is not None
    assert other.agreement > 0.8
    stored = {name: torch.from_numpy(array) for name, array in template.store().items()}
    again = alignment.Template.load(stored).pose(part(100, 77, 5, -6))
    assert again is not None
    assert torch.equal(again.values_4, other.values_4)
    assert alignment.Template.load(stored).log_scales == pytest.approx(alignment.LOG_SCALES)


def test_a_small_print_shows_the_direction_of_a_part_whose_shading_does_not_turn() -> None:
    angles = np.random.default_rng(1).uniform(-180, 180, 8)
    images = [cap(seed, angle) for seed, angle in enumerate(angles)]
    template, poses, *_ = alignment.estimate(grey(images), ignore_progress)
    assert template is not None
    pose_angles = np.array([pose.values_4[0].item() for pose in poses if pose is not None])
    turns = np.exp(1j * (pose_angles - np.deg2rad(angles)))
    assert abs(np.angle(turns / turns[0])).max() < np.deg2rad(2)


@pytest.mark.parametrize("side", [-1.0, 2.0, 1025.0, 2.0**40])
def test_a_template_with_an_impossible_window_of_detail_is_refused(side: float) -> None:
    template = Template.of(grey([part(0)]), [Pose(torch.zeros(4), 1.0)])
    stored = {name: torch.from_numpy(array) for name, array in template.store().items()}
    with pytest.raises(ValueError, match="the window of its detail"):
        Template.load(stored | {"template_detail": torch.tensor([side])})


def test_images_that_lie_at_one_position_are_left_as_they_are(quick: None) -> None:
    images = [part(seed) for seed in range(12)]
    agreement = alignment.estimate(grey(images), ignore_progress)
    assert agreement.template is None
    assert agreement.poses == [None] * 12
    assert agreement.is_at_one_place


def test_textures_are_left_as_they_are(quick: None) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (96, 128, 3), np.uint8) for _ in range(12)]
    agreement = alignment.estimate(grey(images), ignore_progress)
    assert agreement.template is None
    assert not agreement.is_at_one_place


def test_an_image_without_the_part_is_named_and_judged_as_it_is(quick: None) -> None:
    images = [part(seed, *pose) for seed, pose in enumerate(poses_of(16))]
    empty = np.random.default_rng(5).integers(60, 90, (96, 128, 3), np.uint8)
    agreement = alignment.estimate(grey([*images[:7], empty, *images[7:]]), ignore_progress)
    assert agreement.template is not None
    assert agreement.lost == (7,)
    assert [pose is None for pose in agreement.poses] == [i == 7 for i in range(17)]
    assert agreement.template.pose(empty) is None


def test_parts_of_any_scale_are_brought_to_one_position(quick: None) -> None:
    scales = np.random.default_rng(2).uniform(0.85, 1.15, 16)
    angles = np.random.default_rng(3).uniform(-20, 20, 16)
    images = [plate(seed, angles[seed], scales[seed]) for seed in range(16)]
    template, poses, *_ = alignment.estimate(grey(images), ignore_progress)
    assert template is not None
    log_scales = [pose.values_4[1].item() for pose in poses if pose is not None]
    assert len(log_scales) == 16
    differences = np.log(scales) - log_scales
    assert abs(differences - differences.mean()).max() < 0.03
    assert template.largest_to_smallest == pytest.approx(scales.max() / scales.min(), rel=0.03)
    earlier = dataclasses.replace(template, log_scales=())
    for scale, relative_size in ((0.7, 0.7 / scales.min()), (1.0, 1.0), (1.2, 1.2 / scales.max())):
        pose = template.pose(plate(100, 10, scale))
        assert pose is not None
        assert template.relative_size(pose.values_4).item() == pytest.approx(relative_size, abs=0.03)
        assert pose.values_4[1].item() == pytest.approx(np.log(scale) - differences.mean(), abs=0.03)
        assert (earlier.pose(plate(100, 10, scale)) is None) == (scale != 1)


def test_a_template_with_damaged_scales_is_refused() -> None:
    stored = {
        name: torch.from_numpy(array) for name, array in Template(torch.zeros(9, 9), torch.ones(9, 9)).store().items()
    }
    for scales in (torch.zeros(33), torch.tensor([torch.nan]), torch.tensor([1.5]), torch.zeros(1, 1)):
        with pytest.raises(ValueError, match="the scales at which its part is searched are damaged"):
            Template.load(stored | {"template_log_scales": scales})


def test_a_template_with_a_damaged_range_is_refused() -> None:
    stored = {
        name: torch.from_numpy(array) for name, array in Template(torch.zeros(9, 9), torch.ones(9, 9)).store().items()
    }
    assert Template.load(stored).most_log_scale == np.inf
    for bounds in (torch.zeros(3), torch.tensor([0.1, 0.0]), torch.tensor([torch.nan, 0.0])):
        with pytest.raises(ValueError, match="the range of the scales of its good images is damaged"):
            Template.load(stored | {"template_range": bounds})


@pytest.mark.parametrize("angle", [0.0, 0.4, 2.5])
def test_a_map_returns_to_the_pixels_of_the_image(angle: float) -> None:
    pose = Pose(torch.tensor([angle, 0.02, 0.1, -0.05]), 1.0)
    ramp = np.zeros((96, 128, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.mgrid[:96, :128][0] * 2, np.mgrid[:96, :128][1]
    aligned, _ = alignment.align(Image.fromarray(ramp), pose, (12, 16))
    back = alignment.restore(torch.from_numpy(aligned[..., 0].astype(np.float32)), pose)[40:56, 56:72]
    assert (back - torch.from_numpy(ramp[40:56, 56:72, 0].astype(np.float32))).abs().max() < 3
