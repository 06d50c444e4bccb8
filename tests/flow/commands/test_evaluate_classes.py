"""Class knowledge: the gain, the posterior, the probe, and what cannot be measured."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import ncml
from ncml import checkpoint
from ncml.errors import InputError
from ncml.evaluation import classes as evaluated
from ncml.evaluation import quality
from ncml.evaluation.cache import MeasurementCache
from ncml.evaluation.class_samples import sampling_methods
from ncml.evaluation.distances import FeatureExtractor
from ncml.evaluation.inputs import LIMITS, Inputs
from ncml.evaluation.probe import Probe
from ncml.network.sde import make_sde
from ncml.progress import ignore_progress
from tests.ncml import nets


def mean_colours(pixels_NHWC: np.ndarray) -> np.ndarray:
    return pixels_NHWC.mean((1, 2), np.float32)


@pytest.fixture
def colour_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features without a network: the mean colour of an image."""
    extractor = FeatureExtractor("mean colours", mean_colours)
    monkeypatch.setattr(quality, "load_extractor", lambda: extractor)
    monkeypatch.setattr(evaluated, "load_extractor", lambda: extractor)


def make_dataset(folder: Path, names: list[str]) -> str:
    """A dark class and a light one, with a train and a test split."""
    folder.mkdir()
    for split, count, seed in (("train", 40, 1), ("test", 24, 2)):
        rng = np.random.default_rng(seed)
        labels = [i % 2 for i in range(count)]
        pixels = [np.uint8(rng.integers(0, 90, (8, 8, 3)) + 150 * label) for label in labels]
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"img": [Image.fromarray(image) for image in pixels], "label": labels}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def inputs_of(source: str, model: ncml.Model, folder: Path) -> Inputs:
    limits = LIMITS | {"fidelity": 16, "classes": 20}
    return Inputs({"mine": model}, source, (), MeasurementCache(folder, ignore_progress), limits)


def test_log_probabilities_are_those_of_scores(models: Path) -> None:
    model = ncml.load(models / "mine")
    pixels = nets.images(3, seed=7).numpy()
    log_prob_NC = evaluated.class_log_probs(model, pixels, 0.0)
    assert log_prob_NC.shape == (3, 3)
    for column, name in enumerate(["a", "b", None]):
        scores = model.score(pixels, classes=name, ood=False)
        np.testing.assert_allclose(log_prob_NC[:, column], [score.log_likelihood for score in scores], rtol=1e-6)


def test_images_are_noised_by_their_position(models: Path) -> None:
    """The result is the same in parts as at once, and the noise has the standard deviation of its level."""
    model = ncml.load(models / "mine")
    pixels = nets.images(4, seed=7).numpy()
    whole = evaluated.class_log_probs(model, pixels, 5.0)
    parts = [evaluated.class_log_probs(model, pixels[2 * i : 2 * i + 2], 5.0, 2 * i) for i in range(2)]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-6)
    assert not np.allclose(whole, evaluated.class_log_probs(model, pixels, 5.0, 1))
    sde = make_sde(model.config.sde)
    assert float(sde.sigma(torch.tensor(sde.time_of(5.0)))) * 127.5 == pytest.approx(5.0)


@pytest.mark.usefixtures("colour_features")
def test_the_section_reports_class_gain_and_fidelity(models: Path, tmp_path: Path) -> None:
    model = ncml.load(models / "mine")
    inputs = inputs_of(make_dataset(tmp_path / "set", ["a", "b"]), model, tmp_path / "measured")
    section = evaluated.classes(inputs)
    result = section.results["mine"]
    assert list(result["likelihood"]) == ["0", "2.5", "10"]
    images = inputs.test_images(model, "classes")
    labels_N = evaluated.class_labels(model, images)
    log_prob_NC = evaluated.class_log_probs(model, images.pixels_NHWC, 0.0)
    knowledge = result["likelihood"]["0"]
    gain = (log_prob_NC[np.arange(len(images)), labels_N] - log_prob_NC[:, -1]).mean()
    assert knowledge["gain"]["value"] == pytest.approx(gain, rel=1e-5)
    assert knowledge["posterior"]["value"] == (log_prob_NC[:, :2].argmax(1) == labels_N).mean()
    assert result["fidelity"]["real"]["value"] == 1.0  # dark and light are told apart by their colours
    assert list(result["fidelity"])[1:] == [f"noise {noise}, as trained" for noise in ("0", "2.5", "10")]
    generated = model.generate(16, classes=["a", "b"] * 8, noise=0.0)
    train = inputs.images(inputs.data, model, "probe", split="train")
    probe = Probe.train(mean_colours(train.pixels_NHWC), train.labels_N)
    recognised = probe.recognised(mean_colours(generated), np.arange(16) % 2).mean()
    assert result["fidelity"]["noise 0, as trained"]["value"] == pytest.approx(recognised)


@pytest.mark.usefixtures("colour_features")
def test_the_section_reports_variety_beside_a_classifier_that_chose_nothing(models: Path, tmp_path: Path) -> None:
    """The references have the same number of images of each class, and a second run trains nothing."""
    model = ncml.load(models / "mine")
    source = make_dataset(tmp_path / "set", ["a", "b"])
    inputs = inputs_of(source, model, tmp_path / "measured")
    result = evaluated.classes(inputs).results["mine"]
    assert result["fidelity_pixels"]["real"] == {
        "value": 1.0,
        "interval": [pytest.approx(24 / 27.84, abs=1e-3), 1.0],
        "n": 24,
    }
    assert list(result["variety"]) == list(result["fidelity"])
    test, train = inputs.test_images(model, "probe"), inputs.images(source, model, "probe", split="train")
    labels = np.arange(16) % 2
    by_class = result["by_class"]["noise 0, as trained"]
    generated = mean_colours(model.generate(16, classes=["a", "b"] * 8, noise=0.0))
    traces: dict[str, list[float]] = {"generated": [], "real": [], "train": []}
    for index, name in enumerate("ab"):
        sets = {
            "generated": generated[labels == index],
            "real": mean_colours(test.pixels_NHWC[test.labels_N == index][:8]),
            "train": mean_colours(train.pixels_NHWC[train.labels_N == index][:8]),
        }
        for which, features in sets.items():
            traces[which].append(float(np.trace(np.cov(features.T))))
        assert by_class[name]["variance"]["value"] == pytest.approx(
            traces["generated"][-1] / traces["real"][-1], rel=1e-4
        )
        assert by_class[name]["recognised_pixels"]["n"] == 8
    for method, which in (("noise 0, as trained", "generated"), ("real", "train")):
        expected = np.sum(traces[which]) / np.sum(traces["real"])
        assert result["variety"][method]["variance"]["value"] == pytest.approx(expected, rel=1e-4)
    assert result["by_class"]["real"]["a"]["recognised"]["n"] == 12  # of the test images, not of the training images

    again = inputs_of(source, model, tmp_path / "measured")
    stages: list[str] = []
    again.cache.on_progress = lambda progress: stages.append(progress.stage)
    assert evaluated.classes(again).results["mine"] == result
    assert not any("classifier" in stage for stage in stages)


@pytest.mark.usefixtures("colour_features")
def test_variety_needs_several_images_of_each_class(models: Path, tmp_path: Path) -> None:
    model = ncml.load(models / "mine")
    inputs = inputs_of(make_dataset(tmp_path / "set", ["a", "b"]), model, tmp_path / "measured")
    inputs.limits["fidelity"] = 10
    section = evaluated.classes(inputs)
    assert section.results["mine"]["variety"] == {}
    assert "Variety is not measured on 10 images of 2 classes: use --limit fidelity=16 or more." in section.notes
    assert section.results["mine"]["fidelity"]["real"]["value"] == 1.0


def test_guidance_is_compared_on_images_of_the_same_classes(models: Path, tmp_path: Path) -> None:
    """Nowhere are images without a class compared with images of all classes."""
    checkpoint.save(tmp_path / "mine", ncml.load(models / "mine").network)
    checkpoint.write_sampling(tmp_path / "mine", {"noise": 5.0, "guidance": 3.0})
    model = ncml.load(tmp_path / "mine")
    methods = sampling_methods(model)
    assert [(arguments["noise"], arguments["guidance"]) for arguments in methods.values()][-2:] == [(5, 1), (5, 3)]
    in_turn = [arguments for arguments in quality.headline_methods(model).values() if "classes" in arguments]
    assert [arguments["guidance"] for arguments in in_turn] == [1, 3]
    assert all(a["guidance"] == 1 for a in quality.headline_methods(model).values() if "classes" not in a)


@pytest.mark.usefixtures("colour_features")
def test_labels_are_those_of_the_model_by_name(models: Path, tmp_path: Path) -> None:
    model = ncml.load(models / "mine")
    swapped = inputs_of(make_dataset(tmp_path / "swapped", ["b", "a"]), model, tmp_path / "measured")
    images = swapped.test_images(model, "classes")
    assert (evaluated.class_labels(model, images) == 1 - images.labels_N).all()
    foreign = inputs_of(make_dataset(tmp_path / "foreign", ["cat", "dog"]), model, tmp_path / "measured")
    with pytest.raises(InputError, match=r"^the classes of foreign \(cat, dog\) are not those of mine\.$"):
        evaluated.classes(foreign)
    nets.save_images(tmp_path / "flat", nets.images(12).numpy())
    with pytest.raises(InputError, match=r"^the classes of flat \(none\) are not those of mine\.$"):
        evaluated.classes(inputs_of(str(tmp_path / "flat"), model, tmp_path / "measured"))


@pytest.mark.usefixtures("colour_features")
def test_a_folder_without_splits_has_no_probe(models: Path, tmp_path: Path) -> None:
    """The probe would be measured on the images that it was trained on."""
    model = ncml.load(models / "mine")
    for seed, name in enumerate("ab"):
        nets.save_images(tmp_path / "pets" / name, nets.images(10, seed=seed).numpy())
    section = evaluated.classes(inputs_of(str(tmp_path / "pets"), model, tmp_path / "measured"))
    assert section.results["mine"]["fidelity"] == {}
    assert "no training split" in " ".join(section.notes)


@pytest.mark.usefixtures("colour_features")
def test_without_a_training_split_or_a_second_class_the_rest_is_measured(models: Path, tmp_path: Path) -> None:
    model = ncml.load(models / "mine")
    source = Path(make_dataset(tmp_path / "pets", ["a", "b"]))
    for path in source.glob("train*"):
        path.unlink()
    section = evaluated.classes(inputs_of(str(source), model, tmp_path / "measured"))
    assert section.results["mine"]["fidelity"] == {}
    assert "has no split 'train', only test" in " ".join(section.notes)
    one_class = replace(nets.config(), model=replace(nets.config().model, classes=("a",)))
    checkpoint.save(tmp_path / "one", nets.network(one_class, dtype=torch.float32))
    nets.save_images(tmp_path / "good" / "a", nets.images(10).numpy())
    inputs = inputs_of(str(tmp_path / "good"), ncml.load(tmp_path / "one"), tmp_path / "measured")
    section = evaluated.classes(inputs)
    assert section.results["mine"]["fidelity"] == {}
    assert "one has only one class" in " ".join(section.notes)


@pytest.mark.usefixtures("colour_features")
def test_a_model_without_the_classes_of_the_images_is_left_out(models: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "plain", nets.network(nets.config(classes=()), dtype=torch.float32))
    plain = ncml.load(tmp_path / "plain")
    inputs = inputs_of(make_dataset(tmp_path / "pets", ["a", "b"]), plain, tmp_path / "measured")
    with pytest.raises(InputError, match="plain has no classes"):
        evaluated.classes(inputs)
    inputs.models = {"plain": plain, "mine": ncml.load(models / "mine")}
    section = evaluated.classes(inputs)
    assert list(section.results) == ["mine"]
    assert "plain was left out: plain has no classes: choose a model of a data set with classes." in section.notes
