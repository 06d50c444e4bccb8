"""The view of features: how patches are compared, and spots of another colour."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ncml.images.random_marks import add_marks
from ncml.network import efficientnet
from ncml.ood.views import choice, colour_spots, features
from ncml.ood.views.alignment import Agreement
from ncml.ood.views.areas import Areas
from ncml.ood.views.colour_spots import ColourSpots, measure_contrasts
from ncml.ood.views.features import FeaturesView
from ncml.ood.views.marks import LEAST_SCALE
from ncml.ood.views.patches import AREA_STAGES, area_features, area_size, part_size, texture_size
from ncml.ood.views.poses import Pose
from ncml.ood.views.stains import Averaged
from ncml.ood.views.view import Estimated, Stored
from ncml.progress import Progress, ignore_progress
from tests.detectors import fixed_image, good_image, texture, use_small_scale


def surface(seed: int, stain: float = 0.0, left: int = 60) -> np.ndarray:
    """Return a grained surface, 96 x 128, under light that falls off, with a soft stain of some grey levels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :128].astype(float)
    image = 110 + 0.2 * rng.normal(1, 0.3) * x + rng.normal(0, 12, (96, 128))
    image -= stain * np.exp(-((x - left) ** 2 + (y - 40) ** 2) / (2 * 10**2))
    return image.clip(0, 255).astype(np.uint8)[..., None].repeat(3, 2)


def contrasts(image: np.ndarray, shown: bool = True) -> colour_spots.Contrasts:
    return measure_contrasts(torch.from_numpy(image), torch.full((12, 16), shown))


def score_and_map(spots: ColourSpots, measured: colour_spots.Contrasts) -> tuple[float, torch.Tensor]:
    candidates = spots.candidates(measured)
    best = int(candidates.scores_K.argmax())
    return float(candidates.scores_K[best]), candidates.maps_K[best]


def test_a_soft_stain_on_a_grained_surface_is_found_wherever_it_lies() -> None:
    good = [contrasts(surface(seed)) for seed in range(12)]
    spots, scores_N = ColourSpots.estimate(good, np.arange(12), by_place=False)
    others = [score_and_map(spots, contrasts(surface(seed)))[0] for seed in range(100, 120)]
    for left in (30, 60, 90):
        score, map_hw = score_and_map(spots, contrasts(surface(200, 25, left)))
        assert score > max(*scores_N, *others) + 2
        h, w = map_hw.shape
        row, column = divmod(int(map_hw.argmax()), w)
        assert abs((row + 0.5) * 96 / h - 40) < 14
        assert abs((column + 0.5) * 128 / w - left) < 14


def test_a_spot_that_every_good_image_has_is_unusual_where_it_is_missing() -> None:
    good = [contrasts(surface(seed, 40)) for seed in range(12)]
    spots, _ = ColourSpots.estimate(good, np.arange(12), by_place=True)
    present, missing = (score_and_map(spots, contrasts(surface(100, stain)))[0] for stain in (40, 0))
    assert present < 3
    assert missing > present + 3
    hidden = contrasts(surface(100), shown=False)
    assert not score_and_map(spots, hidden)[1].any()


def test_scores_of_good_images_are_those_without_their_own_scene() -> None:
    """With the other image of its scene, an unusual one would seem usual."""
    images = [surface(seed) for seed in range(10)] + [surface(50, 40), surface(51, 40)]
    measured = [contrasts(image) for image in images]
    together, apart = (
        ColourSpots.estimate(measured, np.array(scenes), by_place=True)[1]
        for scenes in ([*range(12)], [*range(10), 10, 10])
    )
    assert apart[10] > apart[:10].max() + 2
    assert apart[10] > together[10] + 2


def test_an_area_that_is_unusual_at_no_one_place_has_a_score() -> None:
    generator = torch.Generator().manual_seed(0)
    *areas, usual = (torch.randn(12, 12, 8, generator=generator) for _ in range(7))
    unusual = usual.clone()
    unusual[2:6, 2:6] += 1.5
    view, scores_N = Areas.estimate(areas, np.arange(6))
    assert float(view.candidates(usual).scores_K) < 1.1 * scores_N.max()
    assert float(view.candidates(unusual).scores_K) > 1.3 * scores_N.max()
    assert view.candidates(unusual).maps_K[0].argmax() // 12 in range(2, 6)


def test_areas_are_those_of_their_cells() -> None:
    network = efficientnet.load("cpu")
    image_HWC = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    areas_rcG = area_features(network, image_HWC)
    inner, outer = network.activations(torch.from_numpy(image_HWC).permute(2, 0, 1)[None].float(), AREA_STAGES)
    assert areas_rcG.shape == (3, 4, inner.shape[1] + outer.shape[1])
    torch.testing.assert_close(areas_rcG[1, 2], torch.cat([inner[0, :, 2:4, 4:6].mean((1, 2)), outer[0, :, 1, 2]]))


@pytest.mark.parametrize(
    ("size", "expected"), [((480, 640), (192, 256)), ((64, 64), (256, 256)), ((3000, 90), (256, 32))]
)
def test_areas_have_one_size_in_images_of_all_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert area_size(*size) == expected


@pytest.mark.parametrize(
    ("size", "of_part", "of_texture"),
    [
        ((32, 64), (224, 448), (64, 128)),
        ((250, 250), (448, 448), (448, 448)),
        ((480, 600), (480, 608), (480, 608)),
        ((3000, 4000), (480, 640), (480, 640)),
    ],
)
def test_small_images_of_textures_are_enlarged_twofold_at_most(
    size: tuple[int, int], of_part: tuple[int, int], of_texture: tuple[int, int]
) -> None:
    assert part_size(*size) == of_part
    assert texture_size(*size) == of_texture


@pytest.mark.parametrize("draw", [texture, fixed_image])
def test_the_smallest_images_are_judged(draw: Callable[[int, int, int], np.ndarray]) -> None:
    view = estimated([draw(seed, 32, 32) for seed in range(6)]).view
    assert view.size == ((64, 64) if draw is texture else (448, 448))
    marked = draw(7, 32, 32)
    marked[12:16, 12:16] = 0
    good, found = view.measure(draw(8, 32, 32)), view.measure(marked)
    name = view.names[0]
    assert found[name].score > good[name].score


def test_an_image_is_compared_with_areas_of_other_scenes_when_it_estimates() -> None:
    """A bank with its own areas would find all of them again."""
    one, *others = torch.randn(5, 12, 12, 8, generator=torch.Generator().manual_seed(0))
    copies = [one, one, *others]
    together, apart = (Areas.estimate(copies, np.array(scenes))[1] for scenes in ([0, 0, 1, 2, 3, 4], [*range(6)]))
    assert apart[:2].max() < 0.01
    assert together[:2].min() > 0.8 * together[2:].mean()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_scale(monkeypatch)


def estimated(images: list[np.ndarray]) -> Estimated:
    readers = [lambda image=image: image for image in images]
    return FeaturesView.estimate(readers, np.arange(len(images)), device="cpu", on_progress=ignore_progress)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("is_part", [True, False])
def test_where_the_agreement_does_not_tell_altered_good_images_do(
    monkeypatch: pytest.MonkeyPatch, is_part: bool
) -> None:
    monkeypatch.setattr(Agreement, "is_at_one_place", None)
    found = iter([0.9, 0.4] if is_part else [0.4, 0.4])
    asked: list[str] = []

    def share_found(candidate: Estimated, name: str, readers: object) -> float:
        asked.append(name)
        assert name in candidate.scores
        return next(found)

    monkeypatch.setattr("ncml.ood.views.features.share_found", share_found)
    made = estimated([good_image(seed) for seed in range(6)])
    assert asked == ["places", "patches"]
    assert made.view.names == tuple(made.scores)
    assert made.view.names[0] == ("places" if is_part else "patches")


@pytest.mark.usefixtures("small")
def test_the_share_found_is_that_of_marks_above_the_scores_of_good_images() -> None:
    images = [good_image(seed) for seed in range(10)]
    readers = [lambda image=image: image for image in images]
    made = estimated(images)
    assert choice.share_found(made, "places", readers) >= 0.5
    unreachable = {name: own_N + 1e6 for name, own_N in made.scores.items()}
    assert choice.share_found(replace(made, scores=unreachable), "places", readers) == 0


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("by_place", [True, False])
def test_a_stored_view_has_the_same_scores(by_place: bool) -> None:
    images = [good_image(seed) for seed in range(6)]
    if not by_place:  # of several aspect ratios
        images[0] = np.asarray(Image.fromarray(images[0]).resize((128, 64)))
    made = estimated(images)
    view = made.view
    assert made.least_deviations == {"marks": LEAST_SCALE}
    by_mode = ("places", "stains", "patches") if by_place else ("patches", "areas", "marks")
    assert view.names == (*by_mode, "colour_spots")
    stored = view.store()
    image = good_image(100)
    expected = {name: measurement.score for name, measurement in view.measure(image).items()}
    loaded = FeaturesView.load(stored, device="cpu")
    assert loaded.names == view.names
    for name, measurement in loaded.measure(image).items():
        assert measurement.score == pytest.approx(expected[name], rel=1e-2, abs=1e-2)
    if not by_place:
        for name, damaged, reason in (
            ("areas", stored.tensors["areas"][:0], "bank of areas is empty"),
            ("areas.deviation", -stored.tensors["areas.deviation"], "deviations of areas are not positive"),
        ):
            with pytest.raises(ValueError, match=reason):
                FeaturesView.load(Stored({**stored.tensors, name: damaged}, stored.values), device="cpu")
    for missing in ("spots.typical", "stains.mean" if by_place else "areas"):
        tensors = {name: array for name, array in stored.tensors.items() if name != missing}
        with pytest.raises(LookupError, match=missing):
            FeaturesView.load(Stored(tensors, stored.values), device="cpu")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("draw", "change"), [(good_image, 25), (texture, 70)])
def test_known_defects_are_recognised_where_they_are(draw: Callable[[int], np.ndarray], change: int) -> None:
    def defective(seed: int, top: int, left: int) -> np.ndarray:
        image = draw(seed).astype(float)
        image[top : top + 12, left : left + 12, 0] += change
        return image.clip(0, 255).astype(np.uint8)

    good = [draw(seed) for seed in range(20)]
    readers = [lambda image=image: image for image in good]
    known = [lambda i=i: defective(100 + i, 10 * i, 15 * i) for i in range(5)]
    done: list[Progress] = []
    without = FeaturesView.estimate(readers, np.arange(20), device="cpu", on_progress=ignore_progress)
    made = without.knowing(np.arange(20), known, np.arange(5), done.append)
    assert done[-1] == Progress("known defects", 5, 5)
    assert made.view.names == (*without.view.names, "known_defects")
    assert all(np.array_equal(made.scores[name], own_N) for name, own_N in without.scores.items())
    limit = made.scores["known_defects"].max()
    assert (made.defective["known_defects"] > limit).sum() >= 4
    view = FeaturesView.load(made.view.store(), device="cpu")
    assert sum(view.measure(draw(seed))["known_defects"].score > limit for seed in range(200, 220)) <= 4
    for top, left in ((40, 20), (8, 66), (50, 80)):
        found = view.measure(defective(300, top, left))["known_defects"]
        assert found.score > limit
        assert found.map_hw is not None
        h, w = found.map_hw.shape
        row, column = divmod(int(found.map_hw.argmax()), w)
        assert abs((row + 0.5) * 72 / h - top - 6) < 12
        assert abs((column + 0.5) * 96 / w - left - 6) < 12


@pytest.mark.usefixtures("small")
def test_stains_are_put_into_images_before_these_are_aligned_and_cover_what_they_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images are turned by half a turn, so that a stain comes to lie on the other side."""
    monkeypatch.setattr(features, "STAINS", 1)
    before: list[np.ndarray] = []

    def record(image_HWC: np.ndarray, *arguments: Any, kinds: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        before.append(image_HWC)
        return add_marks(image_HWC, *arguments, kinds=kinds)

    monkeypatch.setattr(features, "add_marks", record)
    readers = [lambda seed=seed: good_image(seed, 144, 192) for seed in range(6)]
    pose = Pose(torch.tensor([np.pi, 0, 0, 0], dtype=torch.float64), 1.0)
    agreement = Agreement(None, [pose] * len(readers), 0.9)
    network = efficientnet.load("cpu")
    described = features._describe(network, readers, (144, 192), agreement, ignore_progress)
    stained = features._stain(network, readers, described, None, ignore_progress)
    assert sorted(stained) == list(range(6))
    assert all(np.array_equal(own_HWC, reader()) for own_HWC, reader in zip(before, readers, strict=True))
    changes: list[torch.Tensor] = []
    for i, own in stained.items():
        averaged = Averaged.of(described.features[i].float(), described.inside[i])
        changes.append((own.features_PF - averaged.features_hwF.flatten(0, 1)[own.cells_P]).abs().amax(1))
    assert all(map(len, changes))
    assert float((torch.cat(changes) > 0.2).float().mean()) > 0.95


@pytest.mark.usefixtures("small")
def test_stains_change_only_what_a_mask_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[np.ndarray] = []

    def record(*arguments: Any, kinds: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        masks.append(arguments[3])
        return add_marks(*arguments, kinds=kinds)

    monkeypatch.setattr(features, "add_marks", record)
    judged_HW = np.zeros((72, 96), bool)
    judged_HW[:36] = True
    readers = [lambda seed=seed: good_image(seed) for seed in range(4)]
    made = FeaturesView.estimate(readers, np.arange(4), device="cpu", on_progress=ignore_progress, judged_HW=judged_HW)
    assert "stains" in made.scores
    assert len(masks) == 4
    for mask_HW in masks:
        assert mask_HW.shape == made.view.size
        assert mask_HW[: len(mask_HW) // 2].all()
        assert not mask_HW[len(mask_HW) // 2 :].any()
