"""Updates of a detector: its own images and options, reviewed images, and defective images."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

import ncml
from ncml import checkpoint, hub
from ncml.calibration import descriptions, detector, division
from ncml.calibration.altered_originals import measure_power
from ncml.calibration.detector import MadeDetector, count_flagged, make_detector
from ncml.calibration.division import GoodScenes, divide, find_common_scenes
from ncml.calibration.updating import update_detector
from ncml.data import kept_images
from ncml.data.good_images import GoodImages, open_folder
from ncml.errors import InputError, ModelError
from ncml.images.tiling import Box
from ncml.ood.detector_calibration import DetectorCalibration, Scale
from ncml.ood.judging import Detector
from ncml.ood.scene_ranks import share_interval
from ncml.ood.views.likelihood import LikelihoodView
from ncml.ood.views.view import Estimated, Measurement, Reader, Stored
from ncml.paths import sorted_files
from tests.detectors import good_image, use_small_scale

OPTIONS: dict[str, Any] = {
    "false_positive_rate": 0.06, "region": Box(0, 0, 96, 70), "group": "([0-9]+)", "power_images": 0,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _small_scale() -> object:
    """Judge without features, which take most of the time: nothing here depends on the views."""
    patch = pytest.MonkeyPatch()
    use_small_scale(patch)
    patch.setattr("ncml.network.efficientnet.is_available", lambda: False)
    yield
    patch.undo()


def brighter(seed: int) -> np.ndarray:
    """Return a good image under another light."""
    return (good_image(seed) * 0.8 + 45).astype(np.uint8)


def write(folder: Path, **images: object) -> GoodImages:
    """Write images as PNG files by their names, and open them."""
    for name, image in images.items():
        path = folder / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)  # pyright: ignore[reportArgumentType]
    return open_folder(folder, sorted(folder.rglob("*.png")))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> GoodImages:
    """32 good images in two subfolders."""
    images = {f"{'ab'[seed % 2]}__{seed:03}": good_image(seed) for seed in range(32)}
    return write(tmp_path_factory.mktemp("good"), **images)


@pytest.fixture(scope="module")
def kept(model: ncml.Model, good: GoodImages, tmp_path_factory: pytest.TempPathFactory) -> MadeDetector:
    folder = tmp_path_factory.mktemp("models") / "part"
    return make_detector(model, good, folder, keep_images=True, **OPTIONS | {"power_images": 2})


def test_an_update_is_the_detector_that_the_same_images_make(
    model: ncml.Model, good: GoodImages, kept: MadeDetector, tmp_path: Path
) -> None:
    flagged = write(tmp_path / "flagged", **{f"{seed}": brighter(seed) for seed in range(300, 310)})
    defective = write(tmp_path / "bad", black=good_image(1) * 0, fine=good_image(500))
    plain, bright = {str(seed): good_image(seed) for seed in range(600, 603)}, range(700, 704)
    aside = write(tmp_path / "aside", **plain | {str(seed): brighter(seed) for seed in bright})
    updated = update_detector(
        ncml.load(kept.folder), flagged, tmp_path / "part-2", defective=defective, check=aside, power_images=2
    )
    made = updated.made
    expected = make_detector(model, good, tmp_path / "same", reviewed=flagged, defective=defective, **OPTIONS)
    assert made.calibration.version == expected.calibration.version
    assert made.calibration.version != kept.calibration.version
    assert (made.calibration.n_fit, made.calibration.n_rank) == (kept.calibration.n_fit + 10, kept.calibration.n_rank)
    assert (made.reviews.images, made.reviews.defective, made.reviews.found, updated.found_before) == (10, 2, 1, 1)
    lines = descriptions.describe_detector(made)
    assert "1 of 2 defective images are flagged, each by what was learned without it" in lines
    assert updated.comparison[0] == "of 2 added defective images, the former version finds 1 and this one 1"
    flagged_aside = [
        sum(
            score.ood is not None and score.ood.is_ood
            for score in ncml.load(folder).score([image.path for image in aside.images])
        )
        for folder in (kept.folder, made.folder)
    ]
    assert flagged_aside[1] < flagged_aside[0] < 7
    low, high = share_interval(flagged_aside[1], 7, 0.95)
    assert (
        f"{flagged_aside[1]} of 7 good images that took no part are flagged ({flagged_aside[1] / 7:.1%}; with 95% "
        f"confidence {low:.1%} to {high:.1%} of further ones like them)"
    ) in lines
    assert updated.comparison[1] == (
        f"the former version flags {flagged_aside[0]} of the 7 good images that took no part"
    )
    assert kept.calibration.power is not None
    assert updated.comparison[2].endswith(f"are flagged, formerly {kept.calibration.power.mean_share:.0%}")
    fresh = [brighter(seed) for seed in range(400, 410)]
    flagged_by = [
        sum(score.ood is not None and score.ood.is_ood for score in ncml.load(folder).score(fresh))
        for folder in (kept.folder, made.folder)
    ]
    assert flagged_by[0] >= 8
    assert flagged_by[1] <= flagged_by[0] / 2


def test_weights_are_learned_from_defective_images(
    model: ncml.Model, good: GoodImages, kept: MadeDetector, tmp_path: Path
) -> None:
    defective = write(tmp_path / "bad", **{f"{seed}": brighter(seed) for seed in range(300, 306)})
    made = make_detector(model, good, tmp_path / "taught", defective=defective, **OPTIONS)
    assert (made.reviews.images, made.reviews.defective, made.reviews.learned) == (0, 6, 6)
    weight, former = (own.calibration.scales["appearance"].weight for own in (made, kept))
    assert weight > former
    scales, others = (
        {name: (own.median, own.deviation) for name, own in made_.calibration.scales.items()} for made_ in (made, kept)
    )
    assert scales == others
    loaded = ncml.load(made.folder).detector
    assert loaded is not None
    assert loaded.learned_defective == 6
    assert not kept_images.are_kept(made.folder)


def test_nothing_is_learned_from_a_defective_image_of_a_scene_that_ranks(
    model: ncml.Model, good: GoodImages, kept: MadeDetector, tmp_path: Path
) -> None:
    divided = GoodScenes.find(good, None, OPTIONS["group"]).divide(OPTIONS["false_positive_rate"], None)
    scenes = [
        Path(good.names[own[0]]).stem for own in (divided.estimating, divided.ranking)
    ]  # as the pattern finds them
    both = write(tmp_path / "bad", **{f"{scene}-marked": brighter(300 + i) for i, scene in enumerate(scenes)})
    is_ranking = [name.startswith(scenes[1]) for name in both.names]
    made = make_detector(model, good, tmp_path / "taught", defective=both, **OPTIONS)
    assert (made.reviews.defective, made.reviews.learned) == (2, 1)
    alone = make_detector(model, good, tmp_path / "alone", defective=both.take([is_ranking.index(False)]), **OPTIONS)
    assert alone.calibration.version == made.calibration.version
    line = "1 defective image shows a scene of ranking images, so nothing was learned from it"
    assert line in descriptions.describe_detector(made)
    assert not any("nothing was learned" in line for line in descriptions.describe_detector(alone))


def test_an_update_needs_no_reviewed_image(kept: MadeDetector, tmp_path: Path) -> None:
    missed = write(tmp_path / "missed", **{f"{seed}": brighter(seed) for seed in range(300, 303)})
    updated = update_detector(ncml.load(kept.folder), None, tmp_path / "part-2", defective=missed, power_images=0)
    assert (updated.made.reviews.images, updated.made.reviews.learned) == (0, 3)
    again = update_detector(ncml.load(updated.made.folder), None, tmp_path / "part-3", defective=missed, power_images=0)
    assert again.made.calibration.version == updated.made.calibration.version
    assert (updated.added, updated.found_added) == (3, updated.made.reviews.found)
    before = f"the former version finds {updated.found_before} and this one {updated.found_added}"
    assert updated.comparison == [f"of 3 added defective images, {before}"]
    assert (again.added, again.comparison) == (0, [])  # the former version has learned from all of them


def test_reviewed_images_scale_a_score_only_if_it_learns_by_nothing_else(
    model: ncml.Model, good: GoodImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[Estimated] = []
    estimate = LikelihoodView.estimate

    def keep(*arguments: Any, **options: Any) -> Estimated:
        results.append(estimate(*arguments, **options))
        return results[-1]

    monkeypatch.setattr(LikelihoodView, "estimate", keep)
    reviewed = write(tmp_path / "flagged", **{f"{seed}": brighter(seed) for seed in range(300, 304)})
    calibration = make_detector(model, good, tmp_path / "part", reviewed=reviewed, **OPTIONS).calibration
    [estimated] = results
    for name, scores in estimated.scores.items():
        scaling = scores if name == "likelihood_peak" else scores[:-4]
        scale = Scale.estimate(scaling)
        assert (calibration.scales[name].median, calibration.scales[name].deviation) == (scale.median, scale.deviation)


class TwoLevels:
    """A view of fixed functions, the levels of the halves of an image; reviewed images scale only the second."""

    kind, names, description = "halves", ("left", "right"), "the levels of both halves are compared"

    def measure(self, image_HWC: np.ndarray) -> dict[str, Measurement]:
        halves = np.split(image_HWC.astype(float), 2, axis=1)
        return {name: Measurement(float(half.mean())) for name, half in zip(self.names, halves, strict=True)}

    def store(self) -> Stored:
        return Stored({"none": np.zeros(1, np.float32)}, {})

    @classmethod
    def load(cls, stored: Stored, *, device: str) -> "TwoLevels":
        return cls()

    @classmethod
    def estimate(cls, readers: Sequence[Reader], scenes_N: np.ndarray, **_options: object) -> Estimated:
        rows = [cls().measure(reader()) for reader in readers]
        scores = {name: np.array([row[name].score for row in rows]) for name in cls.names}
        return Estimated(cls(), scores, only_scaled=("right",))


def levels(left: float, right: float, seed: int) -> np.ndarray:
    """Return an image whose halves have about these levels."""
    means = np.repeat([[left, right]], 20, 0).T.reshape(1, 40, 1)
    return np.random.default_rng(seed).normal(means, 2, (40, 40, 3)).clip(0, 255).astype(np.uint8)


def flagged_without_own_scene(
    model: ncml.Model, good: GoodImages, folder: Path, role: str, images: GoodImages, options: dict[str, Any]
) -> int:
    """Return how many images are flagged by the detector that learns from all of them but their equals."""
    flagged = 0
    for digest in sorted(set(images.digests)):
        is_own = np.array([other == digest for other in images.digests])
        others = images.take(np.flatnonzero(~is_own))
        without = make_detector(model, good, folder / digest, **{role: others}, **options)
        detector = Detector(without.calibration, {"halves": TwoLevels()})
        flagged += count_flagged(detector, images.take(np.flatnonzero(is_own)))[1]
    return flagged


def test_a_reviewed_image_is_flagged_again_if_the_detector_without_its_scene_flags_it(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncml.calibration.view_estimation.VIEWS", {"halves": TwoLevels})
    rng = np.random.default_rng(0)
    images = {f"{seed:02}": levels(*rng.normal(100, 8, 2), seed) for seed in range(40)}
    good = write(tmp_path / "good", **images)
    burst = {f"burst{copy}": levels(100, 250, 50) for copy in range(6)}
    others = {f"other{seed}": levels(100, 110 + 10 * seed, 60 + seed) for seed in range(4)}
    reviewed = write(tmp_path / "flagged", **burst, **others)
    options: dict[str, Any] = {"group": "image", "power_images": 0}
    made = make_detector(model, good, tmp_path / "all", reviewed=reviewed, **options)
    expected = flagged_without_own_scene(model, good, tmp_path, "reviewed", reviewed, options)
    with_all = count_flagged(Detector(made.calibration, {"halves": TwoLevels()}), reviewed)[1]
    assert (made.reviews.images, made.reviews.still_flagged) == (10, expected)
    assert with_all < expected < 10


def test_a_defective_image_is_found_if_the_detector_without_its_scene_flags_it(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncml.calibration.view_estimation.VIEWS", {"halves": TwoLevels})
    rng = np.random.default_rng(0)
    good = write(tmp_path / "good", **{f"{seed:02}": levels(*rng.normal(100, 8, 2), seed) for seed in range(40)})
    copies = {f"burst{copy}": levels(116, 118, 50) for copy in range(3)}
    others = {f"other{seed}": levels(100 + 3 * seed, 108 + 4 * seed, 60 + seed) for seed in range(6)}
    defective = write(tmp_path / "bad", **copies, **others)
    options: dict[str, Any] = {"group": "image", "power_images": 0}
    made = make_detector(model, good, tmp_path / "all", defective=defective, **options)
    expected = flagged_without_own_scene(model, good, tmp_path, "defective", defective, options)
    assert (made.reviews.defective, made.reviews.learned, made.reviews.found) == (9, 9, expected)
    assert 0 < expected < 9


class Equal(TwoLevels):
    """A view of which a score is equal for all good images."""

    @classmethod
    def estimate(cls, readers: Sequence[Reader], scenes_N: np.ndarray, **_options: object) -> Estimated:
        scores = {name: np.zeros(len(readers)) for name in cls.names}
        return Estimated(cls(), scores, least_deviations={"left": 4.0})


def test_a_score_is_standardised_by_its_least_deviation_at_least(
    model: ncml.Model, good: GoodImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncml.calibration.view_estimation.VIEWS", {"halves": Equal})
    scales = make_detector(model, good, tmp_path / "part", **OPTIONS).calibration.scales
    assert scales["left"].deviation == 4
    assert 0 < scales["right"].deviation < 1e-3


class Overflowing(TwoLevels):
    """A view of which a score of light images is not finite."""

    def measure(self, image_HWC: np.ndarray) -> dict[str, Measurement]:
        measured = super().measure(image_HWC)
        return measured | {"left": Measurement(np.inf)} if image_HWC.mean() > 180 else measured


@pytest.mark.parametrize("part", ["estimating", "ranking"])
def test_images_whose_score_is_not_finite_are_named(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr("ncml.calibration.view_estimation.VIEWS", {"halves": Overflowing})
    estimating, ranking = divide(np.arange(40), 0.05)
    faulty = (estimating if part == "estimating" else ranking)[:2].tolist()
    good = write(tmp_path, **{f"{i:02}": levels(*((200, 220) if i in faulty else (100, 110)), i) for i in range(40)})
    names = f"{faulty[0]:02}.png, {faulty[1]:02}.png"
    with pytest.raises(InputError) as caught:
        make_detector(model, good, tmp_path / "part", group="image", power_images=0)
    expected = f"the score left of 2 images is not finite: leave out {names}, or save them again as PNG, or "
    assert caught.value.detail == f"{expected}compute on another device."


@pytest.mark.parametrize("role", ["defective", "check"])
def test_a_tested_image_whose_score_is_not_finite_is_named_before_the_power_is_measured(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.setattr("ncml.calibration.view_estimation.VIEWS", {"halves": Overflowing})

    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("the power was measured")

    monkeypatch.setattr("ncml.calibration.detector.measure_power", refuse)
    good = write(tmp_path / "good", **{f"{i:02}": levels(100, 110, i) for i in range(40)})
    tested = write(tmp_path / role, dark=levels(60, 60, 50), light=levels(200, 220, 51))
    expected = {
        "defective": r"^the score left of 1 image is not finite: leave out light\.png, or save them again",
        "check": r"^light\.png has a score left that is not finite: save it again",
    }
    with pytest.raises(InputError, match=expected[role]):
        make_detector(model, good, tmp_path / "part", group="image", power_images=1, **{role: tested})


def test_an_altered_image_whose_score_is_not_finite_is_named(
    model: ncml.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncml.calibration.view_estimation.VIEWS", {"halves": Overflowing})
    good = write(tmp_path / "good", **{f"{i:02}": levels(100, 110, i) for i in range(40)})
    colours = {"one colour": np.full((40, 40, 3), 200, np.uint8)}
    monkeypatch.setattr("ncml.calibration.altered_originals._foreign", lambda like_HWC, seed: colours)
    with pytest.raises(InputError, match=r"^\d\d\.png \(one colour\) has a score left that is not finite: save"):
        make_detector(model, good, tmp_path / "part", group="image", power_images=1)


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_an_image_whose_score_is_not_finite_never_passes_for_a_good_one(kept: MadeDetector, score: float) -> None:
    detector = Detector.load(kept.folder, kept.calibration)
    view = next(iter(detector.views.values()))
    measured = view.measure(good_image(0))
    name = next(iter(measured))
    overflowing = SimpleNamespace(measure=lambda image_HWC: measured | {name: Measurement(score)})
    broken = Detector(kept.calibration, detector.views | {next(iter(detector.views)): overflowing})
    for judge in (broken.judge, broken.flags):
        with pytest.raises(InputError, match=f"^image has a score {name} that is not finite: save it again"):
            judge(good_image(0))


def test_images_that_have_a_part_in_the_detector_cannot_check_it(
    model: ncml.Model, good: GoodImages, kept: MadeDetector, tmp_path: Path
) -> None:
    reviewed = write(tmp_path / "flagged", a=brighter(300), b=brighter(301))
    copies = write(tmp_path / "aside", x=good_image(600), y=brighter(301), z=good_image(5))
    with pytest.raises(
        InputError, match=r"2 images of 3 .*: remove y.png, z.png from the folder, or, .* make a new .* --group image"
    ) as caught:
        update_detector(ncml.load(kept.folder), reviewed, tmp_path / "part", check=copies, power_images=0)
    assert caught.value.field == "check"
    smaller = write(tmp_path / "small", a=good_image(600)[:60])
    with pytest.raises(InputError, match="a region needs images of one size"):
        make_detector(model, good, tmp_path / "part", check=smaller, **OPTIONS)
    assert not (tmp_path / "part").exists()


def test_an_image_that_is_good_and_defective_is_refused_by_name(
    model: ncml.Model, good: GoodImages, kept: MadeDetector, tmp_path: Path
) -> None:
    defective = write(tmp_path / "bad", a=good_image(601), b=brighter(300), c=good_image(5), d=brighter(301))
    message = r"^1 image of 4 defective ones is among the good ones as well: remove {}\.png from the folder, or from"
    folder = tmp_path / "part"
    with pytest.raises(InputError, match=message.format("c")) as caught:
        make_detector(model, good, folder, defective=defective, **OPTIONS)
    assert caught.value.field == "defective"
    reviewed, other = write(tmp_path / "flagged", x=brighter(300)), defective.take([0, 1, 3])
    with pytest.raises(InputError, match=message.format("b").replace("4", "3")):
        update_detector(ncml.load(kept.folder), reviewed, folder, defective=other, power_images=0)
    with pytest.raises(InputError, match=message.format("a").replace("4", "3")):
        make_detector(
            model, good, folder, defective=other, check=write(tmp_path / "aside", y=good_image(601)), **OPTIONS
        )
    assert not folder.exists()


def test_a_power_of_fewer_images_is_compared_by_name(kept: MadeDetector, tmp_path: Path) -> None:
    reviewed = write(tmp_path / "flagged", a=brighter(300))
    updated = update_detector(ncml.load(kept.folder), reviewed, tmp_path / "part", power_images=1)
    assert updated.comparison[-1].endswith("% (measured on 2 images instead of 1)")


def test_updates_in_place_add_up_and_repetitions_count_once(kept: MadeDetector, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(kept.folder, folder)
    first = write(tmp_path / "one", a=brighter(300), b=brighter(301))
    update_detector(ncml.load(folder), first, folder, power_images=0)
    second = write(tmp_path / "two", a=brighter(302), c=brighter(301))
    updated = update_detector(ncml.load(folder), second, folder, power_images=0)
    assert updated.made.reviews.images == 3
    assert updated.made.calibration.n_fit == kept.calibration.n_fit + 3
    stored = kept_images.read(folder)
    assert stored.reviewed is not None
    assert set(stored.reviewed.digests) == {*first.digests, *second.digests}
    assert (stored.group, stored.good.names) == ("([0-9]+)", kept_images.read(kept.folder).good.names)
    assert sorted(path.name for path in folder.iterdir() if "images" in path.name) == ["images"]
    assert ncml.load(folder).score([good_image(900)])[0].ood is not None


def test_later_versions_learn_from_defective_images_too(model: ncml.Model, good: GoodImages, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    bad = write(tmp_path / "bad", black=good_image(1) * 0, dark=brighter(302))
    make_detector(model, good, folder, defective=bad, keep_images=True, **OPTIONS)
    stored = kept_images.read(folder).defective
    assert stored is not None
    assert (set(stored.scene_names), set(stored.digests)) == ({"black.png", "dark.png"}, set(bad.digests))
    white = write(tmp_path / "white", white=good_image(1) * 0 + 255, again=good_image(1) * 0)
    updated = update_detector(
        ncml.load(folder), write(tmp_path / "one", a=brighter(300)), folder, defective=white, power_images=0
    )
    reviews = updated.made.reviews
    assert (reviews.defective, updated.added, updated.found_before) == (3, 1, 1)
    assert updated.found_added == reviews.are_found[2]
    updated = update_detector(ncml.load(folder), write(tmp_path / "two", a=brighter(301)), folder, power_images=0)
    assert (updated.made.reviews.images, updated.made.reviews.defective, updated.made.reviews.learned) == (2, 3, 3)


def test_of_an_image_with_both_verdicts_the_later_one_counts(kept: MadeDetector, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(kept.folder, folder)
    one, two = write(tmp_path / "one", a=brighter(300)), write(tmp_path / "two", b=brighter(301))
    for reviewed, defective in ((one, two), (two, one)):
        update_detector(ncml.load(folder), reviewed, folder, defective=defective, power_images=0)
        stored = kept_images.read(folder)
        assert stored.reviewed is not None
        assert stored.defective is not None
        assert (stored.reviewed.digests, stored.defective.digests) == (reviewed.digests, defective.digests)


def test_a_later_update_takes_the_scenes_of_earlier_reviewed_images_from_their_own_names(
    kept: MadeDetector, tmp_path: Path
) -> None:
    folder = tmp_path / "part"
    shutil.copytree(kept.folder, folder)
    update_detector(ncml.load(folder), write(tmp_path / "one", line__900=brighter(300)), folder, power_images=0)
    stored = kept_images.read(folder).reviewed
    assert stored is not None
    assert stored.scene_names == ("line/900.png",)
    second, aside = write(tmp_path / "two", b=brighter(302)), write(tmp_path / "aside", **{"900-b": brighter(310)})
    with pytest.raises(InputError, match=r"1 image of 1 cannot check the detector, .* remove 900-b.png"):
        update_detector(ncml.load(folder), second, folder, check=aside, power_images=0)


def test_kept_images_outlive_an_interruption_while_others_take_their_place(
    good: GoodImages, kept: MadeDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, images = tmp_path / "part", tmp_path / "part" / "images"
    shutil.copytree(kept.folder, folder)
    names = kept_images.read(folder).good.names
    images.rename(folder / ".images.former")  # where a process is killed between the two renames
    assert kept_images.read(folder).good.names == names
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if target == images and not path.name.endswith("former"):
            raise OSError("no space")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        kept_images.keep(folder, good.take(range(5)), None, None, "image")
    stored = kept_images.read(folder)
    assert (stored.good.names, stored.group) == (names, "([0-9]+)")
    assert [path.name for path in folder.iterdir() if "images" in path.name] == ["images"]


class Killed(BaseException):
    """The end of a process, after which nothing is cleaned up."""


@pytest.mark.parametrize("place", ["copy", "rename"])
def test_an_update_in_place_is_repeated_after_a_kill_while_its_images_are_copied(
    kept: MadeDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder, images = tmp_path / "part", tmp_path / "part" / "images"
    shutil.copytree(kept.folder, folder)
    reviewed = write(tmp_path / "flagged", a=brighter(300))
    copy, rename = kept_images.copy_file, Path.rename
    with monkeypatch.context() as patch:

        def kill(*arguments: object, **options: object) -> NoReturn:
            patch.setattr(shutil, "rmtree", kill)
            raise Killed

        def kill_at_last(source: Path, target: Path) -> None:
            copy(source, target) if "reviewed" not in target.parts else kill()

        def kill_between(path: Path, target: Path) -> Path:
            return rename(path, target) if target != images else kill()

        if place == "copy":
            patch.setattr(kept_images, "copy_file", kill_at_last)
        else:
            patch.setattr(Path, "rename", kill_between)
        with pytest.raises(Killed):
            update_detector(ncml.load(folder), reviewed, folder, power_images=0)
    assert images.exists() == (place == "copy")
    former = ncml.load(folder).detector
    assert former is not None
    assert former.version == kept.calibration.version
    updated = update_detector(ncml.load(folder), reviewed, folder, power_images=0)
    assert updated.made.calibration.n_fit == kept.calibration.n_fit + 1
    assert [path.name for path in folder.iterdir() if "images" in path.name] == ["images"]


@pytest.mark.parametrize("places", [("calibration",), ("arrays",), ("arrays", "calibration"), ("arrays", "arrays")])
def test_a_detector_that_is_replaced_is_whole_after_kills(
    kept: MadeDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: tuple[str, ...]
) -> None:
    folder = tmp_path / "part"
    shutil.copytree(kept.folder, folder)

    def kill(*arguments: object) -> NoReturn:
        raise Killed

    for number, place in enumerate(places):
        reviewed = write(tmp_path / f"flagged-{number}", **{f"{number}": brighter(300 + number)})
        with monkeypatch.context() as patch:
            if place == "calibration":
                patch.setattr(DetectorCalibration, "save", kill)
            else:
                patch.setattr("ncml.calibration.detector.adopt_arrays", kill)
            with pytest.raises(Killed):
                update_detector(ncml.load(folder), reviewed, folder, power_images=0)
        left = ncml.load(folder)
        assert left.detector is not None
        assert left.score([good_image(900)])[0].ood is not None
    assert (left.detector.version == kept.calibration.version) == (places == ("calibration",))
    assert update_detector(
        left, reviewed, folder, power_images=0
    ).made.calibration.n_fit == kept.calibration.n_fit + len(places)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_detector_that_a_kill_has_left_is_published_whole(
    kept: MadeDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "part"
    shutil.copytree(kept.folder, folder)
    (folder / checkpoint.DETECTOR_ARRAYS).rename(folder / checkpoint.NEW_DETECTOR_ARRAYS)
    (folder / checkpoint.DETECTOR_ARRAYS).write_bytes(b"those of an earlier detector")
    published: dict[str, bytes] = {}

    class Hub:
        def create_repo(self, *arguments: object, **options: object) -> None: ...

        def list_repo_files(self, *arguments: object, **options: object) -> list[str]:
            return []

        def create_commit(self, repository: str, operations: list[Any], **options: object) -> SimpleNamespace:
            for operation in operations:
                with operation.as_file() as file:
                    published[operation.path_in_repo] = file.read()
            return SimpleNamespace(commit_url="", oid="1")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    hub.push(folder, "someone/part")
    named = json.loads(published[checkpoint.DETECTOR])["tensors"]
    assert hashlib.sha256(published[checkpoint.DETECTOR_ARRAYS]).hexdigest() == named


@pytest.fixture(scope="module")
def published(kept: MadeDetector, tmp_path_factory: pytest.TempPathFactory) -> MadeDetector:
    """Another detector of the same model."""
    reviewed, folder = (
        write(tmp_path_factory.mktemp("flagged"), a=brighter(300)),
        tmp_path_factory.mktemp("hub") / "part",
    )
    return update_detector(ncml.load(kept.folder), reviewed, folder, power_images=0).made


@pytest.mark.parametrize("is_another", [True, False])
def test_a_pulled_detector_has_the_images_of_no_other(
    kept: MadeDetector, published: MadeDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_another: bool
) -> None:
    folder, source = tmp_path / "part", published if is_another else kept
    shutil.copytree(kept.folder, folder)
    monkeypatch.setattr(hub, "fetch", lambda reference: checkpoint.describe(source.folder))
    hub.pull("someone/part", folder)
    pulled = ncml.load(folder).detector
    assert pulled is not None
    assert pulled.version == source.calibration.version
    assert kept_images.are_kept(folder) == (folder / checkpoint.DETECTOR_PICTURES).exists() == (not is_another)


@pytest.mark.parametrize("written", range(5))
def test_a_detector_is_whole_after_a_pull_was_killed(
    kept: MadeDetector, published: MadeDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    folder, replace, names = tmp_path / "part", checkpoint.replace_file, list[str]()
    shutil.copytree(kept.folder, folder)
    monkeypatch.setattr(hub, "fetch", lambda reference: checkpoint.describe(published.folder))
    with monkeypatch.context() as patch:

        def kill_at(path: Path, write: Any) -> None:
            if len(names) == written:
                raise Killed
            replace(path, write)
            names.append(path.name)

        patch.setattr(checkpoint, "replace_file", kill_at)
        with pytest.raises(Killed):
            hub.pull("someone/part", folder)
    left = ncml.load(folder)
    assert left.detector is not None
    former, new = kept.calibration.version, published.calibration.version
    assert left.detector.version == (new if checkpoint.DETECTOR in names else former)
    assert left.score([good_image(900)])[0].ood is not None
    hub.pull("someone/part", folder)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_folder_that_appears_meanwhile_is_left_alone(
    model: ncml.Model, good: GoodImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = DetectorCalibration.save

    def save_beside_others(calibration: DetectorCalibration, folder: Path) -> None:
        save(calibration, folder)
        (tmp_path / "part").mkdir()
        (tmp_path / "part" / "mine").touch()

    monkeypatch.setattr(DetectorCalibration, "save", save_beside_others)
    with pytest.raises(InputError, match="part was written while the detector was made: name another folder") as error:
        make_detector(model, good, tmp_path / "part", **OPTIONS)
    assert error.value.field == "out"
    assert [path.name for path in tmp_path.rglob("*")] == ["part", "mine"]


def test_a_detector_that_was_made_meanwhile_is_left_alone(
    model: ncml.Model, good: GoodImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "part"
    others: list[MadeDetector] = []
    measured: dict[str, Any] = OPTIONS | {"power_images": 1}
    whole: dict[str, Any] = OPTIONS | {"region": None}

    def measure_beside_another(*arguments: Any, **options: Any) -> object:
        others.append(make_detector(model, good, folder, **whole))
        return measure_power(*arguments, **options)

    monkeypatch.setattr("ncml.calibration.detector.measure_power", measure_beside_another)
    with pytest.raises(InputError, match="part holds another detector, made while the power"):
        make_detector(model, good, folder, **measured)
    loaded = ncml.load(folder).detector
    assert loaded is not None
    assert loaded.version == others[0].calibration.version
    assert not (folder / checkpoint.DETECTOR_PICTURES).exists()


def test_an_update_leaves_one_that_was_made_meanwhile_with_its_images(
    kept: MadeDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "part"
    shutil.copytree(kept.folder, folder)
    first, second = (write(tmp_path / name, a=brighter(seed)) for name, seed in (("one", 300), ("two", 301)))
    measure = detector.measure_images

    def measure_beside_another(*arguments: Any, **options: Any) -> object:
        monkeypatch.setattr(detector, "measure_images", measure)
        update_detector(ncml.load(folder), second, folder, power_images=0)
        return measure(*arguments, **options)

    monkeypatch.setattr(detector, "measure_images", measure_beside_another)
    with pytest.raises(InputError, match="part holds another detector, made while this one was measured") as error:
        update_detector(ncml.load(folder), first, folder, power_images=0)
    assert error.value.field == "out"
    stored = kept_images.read(folder).reviewed
    assert stored is not None
    assert stored.digests == second.digests
    assert ncml.load(folder).score([good_image(900)])[0].ood is not None


def test_a_new_folder_appears_with_its_detector(
    model: ncml.Model, good: GoodImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def kill(*arguments: object) -> NoReturn:
            patch.setattr(shutil, "rmtree", lambda *others, **options: None)  # what a killed process does not clean up
            raise Killed

        patch.setattr(DetectorCalibration, "save", kill)
        with pytest.raises(Killed):
            make_detector(model, good, tmp_path / "part", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == [".part.new"]
    make_detector(model, good, tmp_path / "part", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_reading_kept_images_leaves_those_that_another_process_copies(kept: MadeDetector, tmp_path: Path) -> None:
    shutil.copytree(kept.folder, tmp_path / "part")
    (copied := tmp_path / "part" / ".images.new" / "good").mkdir(parents=True)
    kept_images.read(tmp_path / "part")
    assert copied.is_dir()


def test_names_of_files_that_are_not_utf_8_are_reported_with_escapes_and_kept_as_they_are(
    model: ncml.Model, good: GoodImages, tmp_path: Path
) -> None:
    for image in good.images:
        shutil.copy(str(image.path), tmp_path)
    shutil.copy(tmp_path / "005.png", os.fsencode(tmp_path) + b"/Pr\xfcfling.png")
    images = open_folder(tmp_path, sorted_files(tmp_path))
    made = make_detector(model, images, tmp_path / "part", keep_images=True, power_images=0)
    descriptions.write_detector_card(made)
    assert r"one scene: 005.png, Pr\xfcfling.png" in descriptions.describe_detector(made)
    stored = kept_images.read(made.folder).good
    assert (stored.names, stored.scene_names) == (images.names, images.scene_names)


def test_a_detector_that_keeps_no_images_cannot_be_updated(
    model: ncml.Model, kept: MadeDetector, tmp_path: Path
) -> None:
    reviewed = write(tmp_path / "flagged", a=brighter(300))
    shutil.copytree(kept.folder, tmp_path / "part", ignore=shutil.ignore_patterns("images"))
    with pytest.raises(
        InputError, match="part keeps no good images, so it cannot be updated: make it again with --keep"
    ):
        update_detector(ncml.load(tmp_path / "part"), reviewed, tmp_path / "next")
    with pytest.raises(InputError, match="is not a detector: make one with ncml adapt"):
        update_detector(model, reviewed, tmp_path / "next")
    assert not (tmp_path / "next").exists()
    made = kept_images.FOLDER + "/" + kept_images.MADE
    (tmp_path / "part" / "images").mkdir()
    (tmp_path / "part" / made).write_text('{"format": 2}')
    with pytest.raises(ModelError, match="is not of format 1: upgrade ncml"):
        kept_images.read(tmp_path / "part")


def test_a_detector_made_again_without_its_images_forgets_them(
    model: ncml.Model, good: GoodImages, kept: MadeDetector, tmp_path: Path
) -> None:
    shutil.copytree(kept.folder, tmp_path / "part")
    (tmp_path / "part" / ".images.new").mkdir()
    make_detector(model, good, tmp_path / "part", power_images=0)
    assert not [path.name for path in (tmp_path / "part").iterdir() if "images" in path.name]


def test_names_state_the_scenes_of_reviewed_images_too(good: GoodImages, tmp_path: Path) -> None:
    reviewed = write(tmp_path, a__007=brighter(300), plain=brighter(301), b__500=brighter(302))
    alike = write(tmp_path / "alike", **{"003": good_image(3), "other": brighter(310)})
    by_pattern = find_common_scenes(good, reviewed, "([0-9]+)").tolist()
    new = [max(by_pattern) - 1, max(by_pattern)]
    assert by_pattern[32:] == [by_pattern[good.names.index("b/007.png")], *new]
    by_folder = find_common_scenes(good, reviewed, "folder").tolist()
    assert [by_folder[32], by_folder[33]] == [by_folder[0], by_folder[31]]
    assert by_folder[34] not in by_folder[:34]
    alone = find_common_scenes(good, alike, "image").tolist()
    assert alone[:32] == list(range(32))
    assert alone[32:] == [good.names.index("b/003.png"), 32]


def test_a_reviewed_image_whose_name_states_a_ranking_scene_is_refused(
    model: ncml.Model, good: GoodImages, tmp_path: Path
) -> None:
    _, ranking = divide(division.find_scenes(good, "([0-9]+)"), 0.05)
    name = Path(good.names[ranking[0]]).stem
    reviewed = write(tmp_path / "flagged", **{name: brighter(300)})
    with pytest.raises(InputError, match=rf"1 reviewed image shows scenes of ranking images.* {name}.png"):
        make_detector(model, good, tmp_path / "part", reviewed=reviewed, **OPTIONS)


def test_scenes_are_searched_once_if_suspects_are_left_out(
    model: ncml.Model, good: GoodImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = write(tmp_path / "odd", black=good_image(1) * 0)
    reviewed = write(tmp_path / "flagged", **{f"{seed}": brighter(seed) for seed in range(300, 303)})
    searched: list[int] = []
    search = division.overlapping
    monkeypatch.setattr(division, "overlapping", lambda points: searched.append(len(points)) or search(points))
    made = make_detector(
        model, good.join(odd), tmp_path / "part", leave_out=True, reviewed=reviewed, keep_images=True, power_images=0
    )
    assert made.left_out == ("black.png",)
    assert searched == [33, 36]
    assert kept_images.read(made.folder).good.names == good.names
