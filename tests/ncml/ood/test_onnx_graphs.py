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
from ncml.errors import ModelError
from ncml.ood.detector_calibration import DetectorCalibration
from ncml.ood.judging import Detector
from ncml.ood.onnx_graphs import halve, make_graph
from ncml.ood.views.alignment import Template
from ncml.ood.views.features import FeaturesView
from ncml.ood.views.likelihood_maps import halved
from tests.detectors import fixed_image, texture, use_small_scale


@pytest.fixture(scope="module", params=[fixed_image, texture])
def detector(
    request: pytest.FixtureRequest, model: ncml.Model, one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> Detector:
    """A detector whose patches are compared by place, and one whose patches are compared anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_scale(patch)
        made = make(request.param, model, tmp_path_factory.mktemp("detector"))
    calibration = DetectorCalibration.read(made.folder, made.calibration.model_version)
    return Detector.load(made.folder, calibration)


def make(draw: Callable[[int], np.ndarray], model: ncml.Model, folder: Path) -> MadeDetector:
    (folder / "images").mkdir()
    for seed in range(36):
        Image.fromarray(draw(seed)).save(folder / "images" / f"{seed:03}.png")
    good = open_folder(folder / "images", sorted((folder / "images").iterdir()))
    return make_detector(model, good, folder / "d", power_images=0, align=False)


@pytest.mark.parametrize("height", [72, 150])
def test_graphs_give_the_scores_and_maps_of_the_views(detector: Detector, height: int) -> None:
    width = height * 96 // 72
    image = fixed_image(1000, height, width)
    image[10:20, 30:50] = 255
    for view in detector.views.values():
        graph = make_graph(view, height, width)
        resized = image
        for step in graph.resizes:
            resized = step(resized)
        assert resized.shape[:2] == graph.input_size
        with torch.inference_mode():
            candidates = graph(torch.from_numpy(resized))
        expected = view.measure(image)
        assert tuple(candidates) == view.names == tuple(expected)
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


def test_a_view_that_searches_for_parts_is_refused_by_name(detector: Detector) -> None:
    view = detector.views["features"]
    assert isinstance(view, FeaturesView)
    aligning = dataclasses.replace(view, template=Template(torch.zeros(60, 80), torch.ones(60, 80)))
    with pytest.raises(ModelError, match=r"the view '\w+' of this detector brings parts to one position by a search"):
        make_graph(aligning, 72, 96)
