"""The graphs of a detector's views compute what the views compute."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ncml
from ncml.calibration.detector import MadeDetector, make_detector
from ncml.data.good_images import open_folder
from ncml.ood.detector_calibration import DetectorCalibration
from ncml.ood.exported import RELATIVE_SIZE
from ncml.ood.judging import Detector
from ncml.ood.onnx_alignment import AlignmentGraph
from ncml.ood.onnx_graphs import halve, make_graph
from ncml.ood.views.alignment import LOG_SCALES, Template, align, detail, grey_resize, shrink
from ncml.ood.views.features import FeaturesView
from ncml.ood.views.likelihood_maps import halved
from ncml.ood.views.patches import CELL
from ncml.ood.views.poses import Pose
from tests.detectors import fixed_image, plate, texture, turned_image, use_small_scale
from tests.ncml.conftest import model

__all__ = ["model"]


@pytest.fixture(scope="module", params=[fixed_image, texture, turned_image])
def detector(
    request: pytest.FixtureRequest, model: ncml.Model, one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> Detector:
    """A detector whose patches are compared by place, one whose patches are compared anywhere, and an aligning one.

    All know defects.
    """
    with pytest.MonkeyPatch.context() as patch:
        use_small_scale(patch)
        made = make(request.param, model, tmp_path_factory.mktemp("detector"))
    calibration = DetectorCalibration.read(made.folder, made.calibration.model_version)
    return Detector.load(made.folder, calibration)


def make(draw: Callable[[int], np.ndarray], model: ncml.Model, folder: Path) -> MadeDetector:
    for name, seeds in (("images", range(36)), ("defective", range(100, 103))):
        (folder / name).mkdir()
        for seed in seeds:
            image = draw(seed)
            if name == "defective":
                image[40:50, 20:30] = 200
            Image.fromarray(image).save(folder / name / f"{seed:03}.png")
    good, defective = (
        open_folder(folder / name, sorted((folder / name).iterdir())) for name in ("images", "defective")
    )
    return make_detector(
        model, good, folder / "d", power_images=0, align=draw is turned_image, defective=defective, group="image"
    )


@pytest.mark.parametrize("height", [72, 150])
def test_graphs_give_the_scores_and_maps_of_the_views(detector: Detector, height: int) -> None:
    width = height * 96 // 72
    draw = turned_image if detector.calibration.aligns else fixed_image
    image = draw(1000, height, width)
    image[10:20, 30:50] = 255
    for view in detector.views.values():
        graph = make_graph(view, height, width)
        inputs: list[torch.Tensor] = []
        for steps in graph.inputs.values():
            resized = image
            for step in steps:
                resized = step(resized)
            inputs.append(torch.from_numpy(resized))
        assert inputs[0].shape[:2] == graph.input_size
        with torch.inference_mode():
            candidates = graph(*inputs)
        expected = view.measure(image)
        relative_size = candidates.pop(RELATIVE_SIZE, None)
        assert (relative_size is not None) == ("grey" in graph.inputs)
        if relative_size is not None:
            measured_size = expected["places"].relative_size
            assert float(relative_size.scores_K) == pytest.approx(measured_size or 0.0, abs=1e-9)
        assert tuple(candidates) == view.names == tuple(expected)
        assert ("known_defects" in candidates) == isinstance(view, FeaturesView)
        for name, (scores_K, maps_K) in candidates.items():
            measurement = expected[name]
            assert float(scores_K.max()) == pytest.approx(measurement.score, rel=1e-5, abs=1e-5)
            if measurement.map_hw is None:
                assert maps_K == ()
            else:
                assert len(maps_K) == len(scores_K)
                np.testing.assert_allclose(maps_K[int(scores_K.argmax())], measurement.map_hw, rtol=1e-4, atol=1e-4)


def test_images_are_halved_as_by_the_view() -> None:
    image = np.random.default_rng(0).integers(0, 256, (21, 30, 3), np.uint8)
    assert np.array_equal(halve(torch.from_numpy(image)).numpy(), halved(image))


@pytest.mark.parametrize("size", [(72, 96), (96, 64)])
def test_a_graph_brings_images_to_the_same_place(size: tuple[int, int]) -> None:
    template = Template.of([detail(shrink(turned_image(0, *size), size), 15)], [Pose(torch.zeros(4), 1.0)])
    template = dataclasses.replace(template, agreement=0.9, detail=15)
    graph = AlignmentGraph(template, *size, CELL)
    images = [turned_image(seed, *size) for seed in range(1, 9)]
    images.append(np.full((*size, 3), 200, np.uint8))
    poses = []
    for image in images:
        pose_or_none = template.pose(image)
        pose = pose_or_none or Pose(torch.zeros(4), 0.0)
        poses.append(pose.values_4)
        expected, expected_inside = align(Image.fromarray(image), pose, (size[0] // CELL, size[1] // CELL))
        with torch.inference_mode():
            aligned, inside, values, relative_size = graph(
                torch.from_numpy(image), torch.from_numpy(grey_resize(size)(image))
            )
        assert float(relative_size) == (pose_or_none is not None)
        torch.testing.assert_close(values, pose.values_4.double(), rtol=0, atol=1e-9)
        assert np.array_equal(aligned.numpy(), expected)
        assert torch.equal(inside, expected_inside)
    assert not poses[-1].any()  # the part is lost
    assert torch.stack(poses[:-1])[:, 0].std() > 0.5


def test_a_graph_finds_a_part_of_another_scale() -> None:
    size = (96, 128)
    template = Template.of([detail(shrink(plate(0, 0, 1), size), 15)], [Pose(torch.zeros(4), 1.0)])
    template = dataclasses.replace(template, agreement=0.9, detail=15)
    scaled = dataclasses.replace(
        template, log_scales=LOG_SCALES, least_log_scale=np.log(0.95), most_log_scale=np.log(1.05)
    )
    graph = AlignmentGraph(scaled, *size, CELL)
    for seed, scale in enumerate((0.7, 1.2, 1.0), 1):
        image = plate(seed, 30, scale)
        assert (template.pose(image) is None) == (scale != 1)
        pose = scaled.pose(image)
        assert pose is not None
        assert pose.values_4[1].item() == pytest.approx(np.log(scale), abs=0.02)
        with torch.inference_mode():
            _, _, values, relative_size = graph(torch.from_numpy(image), torch.from_numpy(grey_resize(size)(image)))
        assert float(relative_size) == pytest.approx(float(scaled.relative_size(pose.values_4)), abs=1e-6)
        assert float(relative_size) == pytest.approx(scale / min(max(scale, 0.95), 1.05), abs=0.03)
        torch.testing.assert_close(values, pose.values_4.double(), rtol=0, atol=1e-9)
