"""The options that a model folder recommends, and their reasons in the card."""

import shutil
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ncml
from ncml import checkpoint
from ncml.cli import main as cli
from ncml.data import dataset
from ncml.errors import InputError
from ncml.evaluation import recommendation, tuning
from ncml.evaluation.bootstrap import Estimate
from ncml.evaluation.distances import FeatureExtractor, mean_kernel_distance
from ncml.evaluation.variety import precision_recall
from tests.ncml import nets


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "mine", tmp_path / "mine"))


@pytest.fixture(autouse=True)
def colour_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features without a network: the mean colour of an image, and its variation."""

    def extract(pixels_NHWC: np.ndarray) -> np.ndarray:
        x = pixels_NHWC.astype(np.float32) / 255
        return np.concatenate([x.mean((1, 2)), x.std((1, 2))], 1)

    monkeypatch.setattr(tuning, "load_extractor", lambda: FeatureExtractor("mean colours", extract))


def pets(folder: Path, count: int = 100) -> str:
    """Make a data set with the model's classes."""
    for seed, name in enumerate("ab"):
        nets.save_images(folder / name, np.uint8(nets.images(count, seed=seed).numpy() // 2 + 100 * seed))
    return str(folder)


def test_the_best_candidate_becomes_the_default(folder: Path, tmp_path: Path) -> None:
    source = pets(tmp_path / "pets")
    before, today = ncml.load(folder), date.today().isoformat()
    assert cli.main(["tune", "--data", source, "--model", str(folder), "--images", "16"]) == 0
    tuned = ncml.load(folder)
    assert tuned.version == before.version
    assert tuned.calibration is not None  # still that of these weights
    options = tuned.sampling
    assert asdict(tuned.sampling_limits.defaults).items() >= options.items()
    assert tuned.metrics.keys() - before.metrics.keys() == {"class_fidelity", "class_fidelity_real"}
    again = next(line for line in tuned.card.splitlines() if line.startswith("The chosen options, measured again"))
    assert f"fidelity {tuned.metrics['class_fidelity']:.3f} [" in again
    section = tuned.card.partition("## Default sampling options\n\n")[2]
    assert f"| **{options['noise']:g}** | **{options['temperature']:g}** | **{options['guidance']:g}** |" in section
    assert "features of mean colours" in section
    assert any(f"{day} (`ncml tune`)." in section for day in (today, date.today().isoformat()))
    assert section.count("\n| ") == 2 + 4 + 4 + 2  # header and rule; start noises, guidances, temperatures
    assert cli.main(["tune", "--data", source, "--model", str(folder), "--images", "16"]) == 0
    assert ncml.load(folder).card == tuned.card


def test_a_tuned_model_without_classes_loads(plain_model: ncml.Model, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain_model.folder, tmp_path / "plain"))
    source = nets.save_images(tmp_path / "photos", nets.images(200, 8, 12).numpy())
    assert cli.main(["tune", "--data", str(source), "--model", str(folder), "--images", "16"]) == 0
    sampling = ncml.load(folder).sampling
    assert "noise" in sampling
    assert "guidance" not in sampling


def test_candidates_vary_noise_then_guidance_then_temperature(folder: Path, tmp_path: Path) -> None:
    model = ncml.load(folder)
    data = dataset.load(pets(tmp_path / "pets"), 8, 8)
    result = tuning.tune(model, data, images=16)
    noises = [candidate.options["noise"] for candidate in result.candidates[:4]]
    assert noises == [2.5, 0.0, 5.0, 10.0]
    unguided = min(result.candidates[:4], key=lambda candidate: candidate.distance.value)
    guided, tempered = result.candidates[4:8], result.candidates[8:]
    assert {candidate.options["noise"] for candidate in [*guided, *tempered]} == {unguided.options["noise"]}
    assert [candidate.options["guidance"] for candidate in guided] == [2.0, 3.0, 5.0, 8.0]
    assert [candidate.options["temperature"] for candidate in tempered] == [0.95, 0.9]
    at_one = next(c for c in result.candidates if c.options == tempered[0].options | {"temperature": 1.0})
    nearest = min([unguided, *guided], key=lambda candidate: candidate.distance.value)
    assert at_one.distance.value <= nearest.distance.high
    assert result.best is min([at_one, *tempered], key=lambda candidate: candidate.distance.value)
    extract = tuning.load_extractor().extract
    held_out = data.part("calibration-rank")
    reference_NF, labels_N = extract(held_out.images_NHWC.numpy()), held_out.labels_N.numpy()
    for candidate, seed in [(result.candidates[0], 1_000_000), (result.confirmation, 1_000_016)]:
        drawn = model.generate(
            16,
            classes=["a", "b"] * 8,
            seeds=seed,
            **candidate.options,
        )
        drawn_NF = extract(drawn)
        pairs = [(drawn_NF[index::2], reference_NF[labels_N == index]) for index in range(2)]
        assert candidate.distance == mean_kernel_distance(pairs)
        assert candidate.recall == precision_recall(drawn_NF, reference_NF)[1]
    assert result.confirmation.options == result.best.options
    assert result.real is not None
    assert result.real.value > 0.9


class Recorded:
    """Candidates with given measurements instead of measured ones."""

    def __init__(self, measured: dict[float, tuple[float, float]]) -> None:
        self.measured = measured
        self.real, self.candidates = Estimate(0.8, 0.7, 0.9, 10), []
        self.extractor, self.is_within_classes = tuning.load_extractor(), True

    def measure_candidate(self, options: Any) -> tuning.Candidate:
        self.candidates.append(self.measure(options))
        return self.candidates[-1]

    def measure(self, options: Any, *_: Any) -> tuning.Candidate:
        distance, share = self.measured[options["guidance"]] if options["temperature"] == 1 else (9.0, 0.0)
        distance += 0 if options["noise"] == 2.5 else 1
        return tuning.Candidate(
            options,
            Estimate(distance, distance - 0.1, distance + 0.1, 10),
            Estimate(0.1, 0.0, 0.2, 10),
            Estimate(share, share - 0.05, share + 0.05, 10),
        )


@pytest.mark.parametrize(
    ("measured", "guidance"),
    [
        # 5 is clearer, but its images vary less than real ones of a class.
        ({1.0: (0.5, 0.2), 2.0: (0.45, 0.3), 3.0: (0.53, 0.4), 5.0: (0.9, 0.8), 8.0: (0.5, 0.3)}, 3.0),
        # Of equally clear ones the nearest.
        ({1.0: (0.41, 0.2), 2.0: (0.45, 0.2), 3.0: (0.44, 0.1), 5.0: (0.4, 0.2), 8.0: (0.38, 0.1)}, 5.0),
        # None is clearer than the nearest, which is without guidance.
        ({1.0: (0.3, 0.3), 2.0: (0.39, 0.3), 3.0: (0.45, 0.5), 5.0: (0.6, 0.6), 8.0: (0.7, 0.6)}, 1.0),
    ],
)
def test_guidance_is_the_clearest_of_those_that_are_not_measurably_farther_from_real_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch, measured: dict[float, tuple[float, float]], guidance: float
) -> None:
    monkeypatch.setattr(tuning, "Tuner", lambda *_: Recorded(measured))
    result = tuning.tune(ncml.load(folder), None)  # type: ignore[arg-type]
    assert (result.best.options["noise"], result.best.options["temperature"]) == (2.5, 1.0)
    assert result.best.options["guidance"] == guidance


def test_no_candidate_is_measured_after_the_time_limit(folder: Path, tmp_path: Path) -> None:
    data = dataset.load(pets(tmp_path / "pets"), 8, 8)
    result = tuning.tune(ncml.load(folder), data, images=16, max_seconds=0)
    assert [candidate.options["noise"] for candidate in result.candidates] == [2.5]
    assert result.best is result.candidates[0]
    assert result.confirmation.options == result.best.options


def test_without_the_classes_of_the_model_there_is_no_probe(folder: Path, tmp_path: Path) -> None:
    nets.save_images(tmp_path / "flat", nets.images(200).numpy())
    result = tuning.tune(ncml.load(folder), dataset.load(str(tmp_path / "flat"), 8, 8), images=16)
    assert result.real is None
    assert {candidate.options["guidance"] for candidate in result.candidates} == {1.0}
    assert "probe" not in result.card_section()


def test_one_class_has_no_probe(tmp_path: Path) -> None:
    config = replace(nets.config(), model=replace(nets.config().model, classes=("good",)))
    checkpoint.save(tmp_path / "one", nets.network(config, dtype=torch.float32))
    nets.save_images(tmp_path / "data" / "good", nets.images(200).numpy())
    result = tuning.tune(ncml.load(tmp_path / "one"), dataset.load(str(tmp_path / "data"), 8, 8), images=16)
    assert result.real is None


def test_training_images_of_one_class_train_no_probe(folder: Path, tmp_path: Path) -> None:
    """The first of each 50 images are held out: here all of the class a."""
    nets.save_images(tmp_path / "pets" / "a", nets.images(5).numpy())
    nets.save_images(tmp_path / "pets" / "b", nets.images(900, seed=1).numpy())
    result = tuning.tune(ncml.load(folder), dataset.load(str(tmp_path / "pets"), 8, 8), images=16)
    assert result.real is None


def test_a_folder_of_images_has_no_splits(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["tune", "--images", "16"], ["calibrate"]):
        arguments = [*command, "--data", pets(tmp_path / "pets", 20), "--model", str(folder), "--split", "test"]
        assert cli.main(arguments) == 2
        assert "is a folder of images, which has no split 'test': omit the split." in capsys.readouterr().err


def test_too_few_images_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pets(tmp_path / "pets", 20)
    assert cli.main(["tune", "--data", source, "--model", str(folder)]) == 2
    assert "images are held out; tuning compares with at least 16: add images." in capsys.readouterr().err
    assert cli.main(["tune", "--data", source, "--model", str(folder), "--images", "8"]) == 2
    assert "--images must be at least 16, not 8." in capsys.readouterr().err
    with pytest.raises(InputError):
        tuning.tune(ncml.load(folder), dataset.load(source, 8, 8))


def test_training_ends_with_tuning_if_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "smoke", "--data", pets(tmp_path / "pets"), "--size", "8", "--max-images", "64"]
    assert cli.main([*arguments, "--out", str(tmp_path / "short")]) == 0
    assert ncml.load(tmp_path / "short").sampling == {}
    monkeypatch.setattr(recommendation, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(recommendation, "IMAGES", 16)
    monkeypatch.setattr(tuning, "GUIDANCES", (2.0,))
    monkeypatch.setattr(dataset, "decode", None)  # into memory: tuning reads the images that the run has decoded
    assert cli.main([*arguments, "--out", str(tmp_path / "long")]) == 0
    model = ncml.load(tmp_path / "long")
    assert "sampling options: start noise" in capsys.readouterr().err
    assert "noise" in model.sampling
    assert model.card.index("Learning curve") < model.card.index("## Default sampling options")
    monkeypatch.setattr(tuning, "MIN_TUNING_IMAGES", 1000)
    load = recommendation.load
    # The folder may have changed since the run began: with other images, those held out would be others.
    monkeypatch.setattr(recommendation, "load", lambda *args: shutil.rmtree(tmp_path / "pets") or load(*args))
    assert cli.main([*arguments, "--out", str(tmp_path / "few")]) == 0
    assert "sampling options are not tuned: 72 images are held out" in capsys.readouterr().err


def test_a_section_of_the_card_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Mine\n\nText.\n\n## One\n\nold\n\n### Part\n\n## Two\n\nkept\n")
    checkpoint.write_card_section(tmp_path, "One", "new\n")
    assert (tmp_path / "card.md").read_text() == "# Mine\n\nText.\n\n## One\n\nnew\n\n## Two\n\nkept\n"
    checkpoint.write_card_section(tmp_path, "Three", "added")
    assert (tmp_path / "card.md").read_text().endswith("## Two\n\nkept\n\n## Three\n\nadded\n")
