"""Variety of generated images against brute force and closed forms, and the classifier of pixels."""

import numpy as np
import pytest

from ncml.evaluation import variety
from ncml.evaluation.distances import kernel_distance, mean_kernel_distance
from ncml.evaluation.pixel_classifier import MAX_IMAGES, PixelClassifier
from ncml.evaluation.quality import QUALITY_COLUMNS, FeaturedImages, SampleQuality
from ncml.progress import Progress, ignore_progress


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def lies_among(x: np.ndarray, others: list[np.ndarray], k: int) -> bool:
    """Equation 1 of the article, one image at a time."""
    for other in others:
        to_others = sorted(np.linalg.norm(other - y) for y in others if y is not other)
        if np.linalg.norm(x - other) <= to_others[k - 1]:
            return True
    return False


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_the_article(
    k: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variety, "BLOCK", 7)
    generated, real = rng.normal(size=(40, 3)), rng.normal(0.7, 1.5, size=(30, 3))
    precision, recall = variety.precision_recall(generated, real, k)
    assert precision.value == np.mean([lies_among(x, list(real), k) for x in generated])
    assert recall.value == np.mean([lies_among(x, list(generated), k) for x in real])
    assert 0 < recall.value < precision.value  # the real images spread more
    assert (precision.n, recall.n) == (40, 30)


def test_copies_of_some_images_are_precise_but_do_not_recall_the_others() -> None:
    """Real images are at 0, 1, 2, ..., and generated ones at the first ten of them: neighbourhoods reach 3 farther."""
    real = np.arange(100.0)[:, None]
    precision, recall = variety.precision_recall(real[:10], real)
    assert (precision.value, recall.value) == (1, 0.13)


def test_the_variance_within_classes_is_relative_to_real_images(rng: np.random.Generator) -> None:
    """Scaling scales it, and the distances of classes do not count."""
    real = rng.normal(size=(200, 5))
    labels = np.arange(200) % 4
    generated = 0.5 * real + 10 * labels[:, None]
    pairs = variety.class_pairs(generated, labels, real, labels)
    assert list(pairs) == [0, 1, 2, 3]
    estimate = variety.relative_variance(list(pairs.values()))
    assert estimate.value == pytest.approx(0.25)
    traces = [np.mean([np.trace(np.cov(x[labels == i].T)) for i in range(4)]) for x in (3 * real[::-1], real)]
    reverse = variety.class_pairs(3 * real[::-1], labels, real, labels)
    assert variety.relative_variance(list(reverse.values())).value == pytest.approx(traces[0] / traces[1])


def test_the_interval_of_the_variance_has_its_coverage(rng: np.random.Generator) -> None:
    """Of 8 images, a bootstrap sample has 7/8 of the variance, which is corrected; of 100 it is almost the same."""
    contained = 0
    for _ in range(60):
        pairs = [(1.2 * rng.normal(size=(8, 20)), rng.normal(size=(100, 20))) for _ in range(5)]
        estimate = variety.relative_variance(pairs)
        contained += estimate.low <= 1.44 <= estimate.high
    assert contained >= 50


def test_classes_with_few_images_are_left_out(rng: np.random.Generator) -> None:
    labels = np.repeat([0, 1, 2], [8, 7, 9])
    x = rng.normal(size=(24, 2))
    pairs = variety.class_pairs(x, labels, x, labels)
    assert {index: len(images) for index, (images, _) in pairs.items()} == {0: 8, 2: 9}
    assert variety.Variety.compare(x, x, []) is None


def test_the_kernel_distance_within_classes_is_their_mean(rng: np.random.Generator) -> None:
    pairs = [(rng.normal(shift, size=(20, 3)), rng.normal(size=(15, 3))) for shift in (0, 1)]
    estimate = mean_kernel_distance(pairs)
    assert estimate.value == pytest.approx(np.mean([kernel_distance(*pair).value for pair in pairs]))
    assert estimate.n == 70
    # The same images, but of the wrong classes: as sets they agree better than within classes.
    dark, light = rng.normal(size=(20, 3)), rng.normal(5, size=(20, 3))
    wrong = mean_kernel_distance([(dark, light), (light, dark)])
    assert wrong.low > kernel_distance(np.concatenate([dark, light]), np.concatenate([light, dark])).high


def test_balanced_sets_have_the_same_number_of_each_class() -> None:
    labels = np.array([2, 0, 0, 2, 2, 1, 0, 1])
    assert variety.balanced(labels, 1).tolist() == [0, 1, 5]
    assert variety.balanced(labels, 3).tolist() == [0, 1, 2, 3, 5, 7]  # class 1 has two


def test_the_quality_of_samples_includes_variety_and_white_noise(rng: np.random.Generator) -> None:
    """Test images of two classes, among which one of 20 generated images is noise."""
    features, labels = rng.normal(size=(40, 6)), np.arange(40) % 2
    smooth = np.full((40, 8, 8, 3), 100, np.uint8)
    test = FeaturedImages(smooth, features, labels)
    images = FeaturedImages(smooth.copy(), 0.5 * features, labels)
    images.pixels_NHWC[7] = 255 * rng.integers(2, size=(8, 8, 3))
    sample = images.take(slice(20))
    quality = SampleQuality.compare(sample, test)
    assert (quality.n, quality.white_noise.value, quality.white_noise.n) == (20, 0.05, 20)
    assert (quality.precision, quality.recall) == variety.precision_recall(sample.features_NF, features)
    pairs = variety.class_pairs(sample.features_NF, labels[:20], features, labels)
    assert quality.variance == variety.relative_variance(list(pairs.values()))
    assert quality.to_json()["white_noise"]["value"] == 0.05
    without_classes = SampleQuality.compare(FeaturedImages(smooth, features, None), test)
    assert without_classes.variance is None
    assert without_classes.to_json()["variance"] is None
    assert len(without_classes.cells()) == len(quality.cells()) == 3 + len(QUALITY_COLUMNS)


def patterns(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Dark images with a bright column (class 0) or row (class 1): of the same colours."""
    pixels, labels = rng.integers(0, 60, (count, 10, 12, 3), dtype=np.uint8), np.arange(count) % 2
    for image, label in zip(pixels, labels, strict=True):
        stripe = rng.integers(3, 7)
        image[(slice(None), stripe) if label == 0 else (stripe, slice(None))] = 220
    return pixels, labels


def test_the_classifier_of_pixels_learns_and_is_deterministic(rng: np.random.Generator) -> None:
    pixels, labels = patterns(120, rng)
    progress: list[Progress] = []
    classifier = PixelClassifier.train(pixels, labels, 2, progress.append)
    test_pixels, test_labels = patterns(100, rng)
    recognised = classifier.recognised(test_pixels, test_labels)
    assert recognised.mean() > 0.9
    assert (recognised != classifier.recognised(test_pixels, 1 - test_labels)).all()
    assert (progress[-1].done, progress[-1].total) == (40 * 120, 40 * 120)
    weights = classifier.weights
    again = PixelClassifier.train(pixels, labels, 2, ignore_progress).weights
    assert all((weights[name] == again[name]).all() for name in weights)
    restored = PixelClassifier.from_weights(weights, 2)
    assert (restored.recognised(test_pixels, test_labels) == recognised).all()


def test_large_images_and_large_sets_are_reduced(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from ncml.evaluation import pixel_classifier

    monkeypatch.setattr(pixel_classifier, "MAX_IMAGES", 40)
    assert MAX_IMAGES == 200_000
    progress: list[Progress] = []
    pixels = rng.integers(256, size=(20, 80, 48, 3), dtype=np.uint8)
    PixelClassifier.train(pixels, np.arange(20) % 2, 2, progress.append)
    assert progress[-1].total == 40
    assert pixel_classifier._prepare(pixels).shape == (20, 3, 32, 19)
