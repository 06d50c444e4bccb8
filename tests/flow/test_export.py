"""A detector in one ONNX file: made by `ncml export`, run without PyTorch, with the same verdicts."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import ncml
from ncml.calibration.detector import make_detector
from ncml.cli import main as cli
from ncml.data.good_images import open_folder
from ncml.errors import InputError, ModelError
from ncml.ood import onnx_file
from ncml.ood.exported import METADATA, ExportedDetector
from ncml.ood.exported import main as judge_files
from ncml.ood.judging import Detector
from ncml.paths import find_detector_base
from ncml.progress import ignore_progress
from tests.detectors import fixed_image, turned_image, use_small_scale

JUDGE = "import sys; sys.modules['torch'] = None; from ncml.ood.exported import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module", autouse=True)
def _small_scale() -> Iterator[None]:
    """Judge small images at their size by all networks of a detector, and search for parts at a coarser one."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_scale(patch)
        patch.setattr("ncml.ood.views.likelihood.find_detector_base", find_detector_base)
        patch.setattr("ncml.ood.views.pose_search.ANGLE_STEP", 15)
        yield


@pytest.fixture(scope="module")
def folder(model_folder: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of images of 96x72, which brings the part to one position, and 60 of these."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "images").mkdir()
    for seed in range(60):
        Image.fromarray(turned_image(seed)).save(folder / "images" / f"{seed:03}.png")
    good = open_folder(folder / "images", sorted((folder / "images").iterdir()))
    make_detector(ncml.load(model_folder), good, folder / "part", power_images=0)
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    path = folder / "part.onnx"
    assert cli.main(["export", str(folder / "part"), str(path), "--check", str(folder / "images")]) == 0
    return path


@pytest.fixture(scope="module")
def detector(folder: Path) -> Detector:
    model = ncml.load(folder / "part")
    assert model.detector is not None
    assert model.detector.aligns
    assert any("; the largest part is 1.0" in note for note in model.detector.notes)
    return Detector.load(folder / "part", model.detector)


def marked(seed: int) -> np.ndarray:
    """Return an image with a mark, from a faint small one to a strong large one."""
    image = turned_image(seed)
    side = 2 + seed % 14
    image[50 : 50 + side, 60 : 60 + side] += np.uint8(1 + seed % 90)
    return image


def test_verdicts_on_200_images_are_those_of_the_detector(exported: Path, detector: Detector) -> None:
    by_file = ExportedDetector(exported, threads=1)
    images = [turned_image(seed) for seed in range(1000, 1100)] + [marked(seed) for seed in range(1100, 1200)]
    differences: list[float] = []
    flagged = equal = 0
    for image in images:
        expected, found = detector.judge(image), by_file.judge(image)
        assert expected.p_value <= found.p_value <= expected.p_value + 1.01 / 40  # 39 scenes rank
        equal += found.p_value == expected.p_value
        assert (found.view, found.box, found.is_ood, found.is_weak) == (
            expected.view, expected.box, expected.is_ood, expected.is_weak,
        )  # fmt: skip
        assert found.calibration_version == expected.calibration_version
        np.testing.assert_allclose(found.map, expected.map, rtol=1e-3, atol=1e-3)
        flagged += found.is_ood
        differences += [
            abs(found.views[name].standardised - own.standardised) / max(1, abs(own.standardised))
            for name, own in expected.views.items()
        ]
    print(f"{equal} of {len(images)} p-values are equal, scores differ by at most {max(differences):.1g}")
    assert equal >= 198
    assert max(differences) < 3e-4
    assert 30 < flagged < 170


def test_an_image_without_the_part_is_named_by_the_file_and_the_detector(exported: Path, detector: Detector) -> None:
    by_file = ExportedDetector(exported, threads=1)
    empty = np.random.default_rng(5).integers(60, 90, (72, 96, 3), np.uint8)
    for judge in (detector.judge, by_file.judge):
        assert judge(empty).differences == ("the part was not found in it",)
        assert judge(turned_image(1000)).differences == ()


def test_a_part_of_another_size_is_named_by_the_file_and_the_detector(exported: Path, detector: Detector) -> None:
    by_file = ExportedDetector(exported, threads=1)
    image = Image.fromarray(turned_image(1000))
    for shown, change in ((0.85, "larger"), (1.2, "smaller")):
        matrix = (shown, 0, 48 * (1 - shown), 0, shown, 36 * (1 - shown))
        changed = np.asarray(image.transform((96, 72), Image.Transform.AFFINE, matrix))
        (difference,) = detector.judge(changed).differences
        assert by_file.judge(changed).differences == (difference,)
        named = re.fullmatch(f"the part is ([0-9]+)% {change} than in good images", difference)
        assert named is not None
        assert 10 <= int(named[1]) <= 20


def test_an_image_that_ranked_is_no_more_unusual_than_itself(exported: Path, detector: Detector, folder: Path) -> None:
    by_file = ExportedDetector(exported, threads=1)
    for path in sorted((folder / "images").iterdir()):
        image = np.asarray(Image.open(path))
        assert by_file.judge(path).p_value >= detector.judge(image).p_value


def test_the_file_is_run_without_pytorch(exported: Path, detector: Detector, tmp_path: Path) -> None:
    Image.fromarray(marked(1113)).save(tmp_path / "marked.png")
    done = subprocess.run(
        [sys.executable, "-c", JUDGE, str(exported), str(tmp_path / "marked.png")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = detector.judge(marked(1113))
    line = json.loads(done.stdout)
    names = ("p_value", "is_ood", "is_weak", "view")
    assert {name: line[name] for name in names} == {name: getattr(expected, name) for name in names}
    assert line["score"] == pytest.approx(expected.score, rel=1e-3)
    assert line["threshold"] == pytest.approx(expected.threshold, rel=0.01)  # it is raised by what rounding may add
    assert {name: line[name] for name in ("left", "top", "width", "height")} == expected.box._asdict()
    assert line["rarity"] == expected.rarity
    assert line["differences"] == []


def test_a_file_judges_only_the_light_pixels_of_a_mask(folder: Path, tmp_path: Path) -> None:
    mask = np.ones((72, 96), bool)
    mask[:6] = mask[56:, 70:] = False
    for seed in range(40):
        Image.fromarray(fixed_image(seed)).save(tmp_path / f"{seed:03}.png")
    good = open_folder(tmp_path, sorted(tmp_path.iterdir()))
    options = {"power_images": 0, "align": False, "region": mask}
    made = make_detector(ncml.load(folder / "part"), good, tmp_path / "part", **options)
    beside, inside = fixed_image(1113), fixed_image(1113)
    beside[60:, 75:] = inside[30:40, 70:80] = 255
    images = [lambda image=image: image for image in (fixed_image(1113), beside, inside)]
    parity = onnx_file.export(made.folder, made.calibration, tmp_path / "x.onnx", (72, 96), images, ignore_progress)
    assert (parity.images, parity.equal_p_values) == (3, 3)
    good_one, beside_it, marked_one = (ExportedDetector(tmp_path / "x.onnx", 1).judge(image()) for image in images)
    assert beside_it.score == good_one.score
    assert (good_one.is_ood, marked_one.is_ood, marked_one.covered) == (False, True, (0, 6, 96, 66))


def test_a_file_that_judges_differently_is_refused(exported: Path, detector: Detector) -> None:
    scales = {
        name: dataclasses.replace(scale, deviation=1.01 * scale.deviation)
        for name, scale in detector.calibration.scales.items()
    }
    other = Detector(dataclasses.replace(detector.calibration, scales=scales), detector.views)
    with pytest.raises(ModelError, match=r"differs by .* more than 0.001: the file is not kept"):
        onnx_file.compare(other, ExportedDetector(exported, 1), [lambda: marked(1113)], on_progress=ignore_progress)


def test_files_that_cannot_be_judged_are_skipped_by_name(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = fixed_image(0, 80, 96)
    with pytest.raises(InputError, match=r"image has 96x80 pixels, and the detector was exported for 96x72"):
        ExportedDetector(exported).judge(other)
    Image.fromarray(other).save(tmp_path / "other.png")
    assert judge_files([str(exported), str(tmp_path / "other.png")]) == 2
    assert f"ncml: skipped: {tmp_path / 'other.png'} has 96x80 pixels" in capsys.readouterr().err
    Image.fromarray(fixed_image(1)).save(tmp_path / "good.png")
    (tmp_path / "notes.txt").write_text("no image")
    files = [str(tmp_path / name) for name in ("notes.txt", "good.png", "missing.png")]
    assert judge_files([str(exported), *files]) == 0
    printed, errors = capsys.readouterr()
    assert json.loads(printed)["file"] == files[1]
    first, second, last = errors.splitlines()
    assert first.startswith(f"ncml: skipped: {files[0]} is not an image")
    assert second.startswith(f"ncml: skipped: {files[2]} cannot be read")
    assert last == "ncml: 2 files were skipped"
    assert judge_files([files[0], files[1]]) == 2
    assert "is not an ONNX file" in capsys.readouterr().err


def test_other_files_are_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ModelError, match=r"text.onnx is not an ONNX file that onnxruntime can run"):
        ExportedDetector(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        ExportedDetector(tmp_path / "missing.onnx")
    proto = onnx.load(exported)
    (entry,) = [entry for entry in proto.metadata_props if entry.key == METADATA]
    stored = json.loads(entry.value)
    for change, reason in (
        ({"format": 2}, "has format 2, not 1"),
        ({"detector": stored["detector"] | {"false_positive_rate": 0.5}}, "was changed after it was written"),
        ({"inputs": {}}, "is damaged"),
    ):
        entry.value = json.dumps(stored | change)
        onnx.save(proto, tmp_path / "changed.onnx")
        with pytest.raises(ModelError, match=reason):
            ExportedDetector(tmp_path / "changed.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "plain.onnx")
    with pytest.raises(ModelError, match="was not written by ncml export"):
        ExportedDetector(tmp_path / "plain.onnx")


def test_a_full_disk_is_reported_before_anything_is_exported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = (folder / "part" / "detector.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    monkeypatch.setattr(onnx_file, "export", lambda *_: pytest.fail("it computes"))
    assert cli.main(["export", str(folder / "part"), str(tmp_path / "part.onnx")]) == 2
    assert f"ncml: {tmp_path}: No space left on device (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{folder}/part", "x.bin"], "must end in .onnx"),
        (["{folder}/part", "no/x.onnx"], "cannot be written"),
        (["cifar10", "x.onnx"], "cifar10 is not a detector"),
        (["{folder}/part", "x.onnx", "--size", "96"], "is not a width and a height in pixels"),
        (["{folder}/part", "x.onnx", "--size", "80x60", "--check", "{folder}/images"], "no image of 80x60 pixels"),
        (["{folder}/part", "x.onnx", "--check", "{folder}/part/card.md"], "is among 1 file ({folder}/part/card.md is"),
        (["{folder}/part", "x.onnx", "--check", "nosuch"], "nosuch cannot be read: there is no such file or folder"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(
    arguments: list[str], reason: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *(argument.format(folder=folder) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert reason.format(folder=folder) in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
