"""The view `likelihood`: one pass over an image of any size, at several scales."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ncml.config import Config
from ncml.errors import InputError, ModelError
from ncml.network.mixture import bits_per_dim, from_uint8, log_mixture
from ncml.network.ncpn import NCPN
from ncml.network.sde import broadcast_to, make_sde
from ncml.ood.views import likelihood
from ncml.ood.views.likelihood import NAMES, LikelihoodView
from ncml.ood.views.likelihood_maps import NOISE, bits_map, context_rows, halved, measure_windows, scales_of
from ncml.ood.views.view import Estimated, Stored
from ncml.progress import ignore_progress
from tests.ncml import nets

LEVELS = {"one block": ((4, 0), (4, 0), (6, 1)), "more blocks": ((4, 1), (6, 2)), "one level": ((4, 1),)}


def config(levels: tuple[tuple[int, int], ...] = LEVELS["one block"]) -> Config:
    return nets.config(levels, height=16, width=16, attention=False, classes=(), orientations=False)


@pytest.fixture(scope="module")
def network() -> NCPN:
    return nets.network(config(), dtype=torch.float32)


def good_image(seed: int, height: int = 50, width: int = 67) -> np.ndarray:
    """Return noise on a slow gradient: every good image has the same texture."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(90, 160, width)[None, :, None] + rng.uniform(-4, 4)
    return np.clip(np.rint(slope + 6 * rng.standard_normal((height, width, 3))), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def estimated(network: NCPN) -> Estimated:
    readers = [lambda seed=seed: good_image(seed) for seed in range(12)]
    return LikelihoodView.estimate(
        readers, np.arange(12) // 2, device="cpu", on_progress=ignore_progress, network=network
    )


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_strips_equal_one_pass(levels: tuple[tuple[int, int], ...]) -> None:
    net = nets.network(config(levels), dtype=torch.float64)
    image = good_image(0, context_rows(net.config.model) + 51, 13)
    whole = bits_map(net, image)
    assert whole.shape == image.shape[:2]
    assert torch.allclose(bits_map(net, image, strip_pixels=16 * 24), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_columns_equal_one_pass(levels: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch) -> None:
    net = nets.network(config(levels), dtype=torch.float64)
    image = good_image(0, 13, 2 * context_rows(net.config.model) + 51)
    whole = bits_map(net, image)
    monkeypatch.setattr("ncml.ood.views.likelihood_maps.STRIP_COLUMNS", 16)
    assert torch.allclose(bits_map(net, image), whole, atol=1e-9, rtol=0)


MEASURE_MEMORY = """
import numpy as np
import ncml
from ncml.ood.views.likelihood_maps import bits_map
from tests.memory import peak
network = ncml.load("detector-base").network
image = np.random.default_rng(0).integers(0, 256, ({shape}, 3), np.uint8)
bits_map(network, image[:64, :64])
before = peak()
bits_map(network, image)
print(peak() - before)
"""


@pytest.mark.parametrize("shape", ["1000, 1000", "80, 12_000"])
def test_a_large_image_takes_less_memory_than_one_pass(shape: str) -> None:
    command, root = [sys.executable, "-c", MEASURE_MEMORY.format(shape=shape)], Path(__file__).parents[3]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 900e6, "one pass takes 1.1 GB"


ESTIMATE = """
import numpy as np
import ncml
from ncml.ood.views.likelihood import LikelihoodView
from ncml.progress import ignore_progress
images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
readers = [lambda image=image: image for image in images]
LikelihoodView.estimate(readers, np.arange(4), device="cpu", on_progress=ignore_progress)
print(ncml.__file__)
"""


def test_without_the_clone_the_base_of_detectors_is_found_by_the_search_path(tmp_path: Path) -> None:
    """In the containers, as after each installation without -e, no models lie beside the package."""
    root = Path(__file__).parents[3]
    shutil.copytree(root / "ncml", tmp_path / "ncml", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "NCML_MODELS": str(root / "models")}
    run = subprocess.run(
        [sys.executable, "-c", ESTIMATE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout == f"{tmp_path / 'ncml' / '__init__.py'}\n", run.stderr


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_no_row_further_above_than_the_context_matters(levels: tuple[tuple[int, int], ...]) -> None:
    net = nets.network(config(levels), dtype=torch.float64)
    context = context_rows(net.config.model)
    x_BCHW = torch.rand(1, 3, context + 24, 8, dtype=torch.float64).requires_grad_()
    output = net(x_BCHW, torch.zeros(1, dtype=torch.float64))[:, :, context + 16 :].sum()
    (grad,) = torch.autograd.grad(output, x_BCHW)
    assert (grad[:, :, :16] == 0).all()
    assert (grad[:, :, 16:] != 0).any()


def test_a_map_of_the_models_size_is_the_density_of_the_library(network: NCPN) -> None:
    image = good_image(0, 16, 16)
    sde = make_sde(network.config.sde)
    t_B = torch.full((1,), sde.time_of(NOISE))
    x_BCHW = from_uint8(torch.from_numpy(image)[None])
    x_BCHW = x_BCHW * broadcast_to(sde.alpha(t_B), x_BCHW)
    expected = bits_per_dim(log_mixture(x_BCHW, network(x_BCHW, t_B), None)[0], 1)
    assert torch.allclose(bits_map(network, image), expected, atol=1e-5)


def test_windows_equal_means_and_deviations_of_slices() -> None:
    bits = torch.from_numpy(np.random.default_rng(0).gamma(2, 2, (21, 30)))
    windows_RC2 = measure_windows(bits, 8, 4)
    assert windows_RC2.shape == (5, 7, 2)
    for row, top in enumerate((0, 3, 6, 9, 13)):
        for column, left in enumerate((0, 3, 7, 11, 14, 18, 22)):
            part = bits[top : top + 8, left : left + 8]
            mean, log_deviation = windows_RC2[row, column].tolist()
            assert mean == pytest.approx(float(part.mean()))
            assert log_deviation == pytest.approx(np.log(part.std(correction=0).item() + 1e-3))


def test_scales_are_halved_down_to_the_models_size() -> None:
    assert [scales_of(side, 900, 32) for side in (31, 32, 63, 64, 600)] == [0, 1, 1, 2, 5]
    image = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    assert halved(image).shape == (1, 2, 3)
    assert halved(image)[0, 1, 2] == np.rint(image[:, 2:4, 2].mean())


def test_scores_of_good_images_are_those_without_their_scene(network: NCPN, estimated: Estimated) -> None:
    """The score of an image alone in its scene is that of a view that was estimated from the others."""
    assert isinstance(estimated.view, LikelihoodView)
    assert tuple(estimated.scores) == estimated.view.names == NAMES
    assert estimated.view.scales == 2
    others = LikelihoodView.estimate(
        [lambda seed=seed: good_image(seed) for seed in range(2, 12)],
        np.arange(2, 12) // 2,
        device="cpu",
        on_progress=ignore_progress,
        network=network,
    )
    for seed in (0, 1):
        measured = others.view.measure(good_image(seed))
        for name in ("likelihood_mean", "likelihood_peak"):
            assert measured[name].score == pytest.approx(estimated.scores[name][seed], rel=1e-4, abs=1e-4)


def test_large_excesses_count_by_their_logarithm() -> None:
    assert likelihood.compressed(np.array([-2.0, 0.0, np.e - 1, np.e**4 - 1])) == pytest.approx([-2, 0, 1, 4])


def surprise(network: NCPN, image_HWC: np.ndarray) -> torch.Tensor:
    """Return a map of bits as a trained network would give it: a pixel is expected to be like its left neighbour."""
    image = torch.from_numpy(image_HWC).double().mean(2)
    return torch.log2(2 + (image - image.roll(1, 1)).abs())


def test_altered_images_have_higher_scores(network: NCPN, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "bits_map", surprise)
    readers = [lambda seed=seed: good_image(seed) for seed in range(12)]
    estimated = LikelihoodView.estimate(
        readers, np.arange(12), device="cpu", on_progress=ignore_progress, network=network
    )
    rng = np.random.default_rng(1)
    noisy = np.clip(good_image(50) + 12 * rng.standard_normal((50, 67, 3)), 0, 255).astype(np.uint8)
    smooth, spotted = good_image(51), good_image(52)
    smooth[10:34, 20:44] = smooth[10:34, 20:44].mean((0, 1)).astype(np.uint8)
    spotted[24:29, 30:35] = 255 * rng.integers(0, 2, (5, 5, 1))
    for name, image in {"mean": noisy, "window": smooth, "peak": spotted}.items():
        measurement = estimated.view.measure(image)[f"likelihood_{name}"]
        assert measurement.score > estimated.scores[f"likelihood_{name}"].max() + 1
    for name, image, middle in (("window", smooth, (22, 32)), ("peak", spotted, (26, 32))):
        map_hw = estimated.view.measure(image)[f"likelihood_{name}"].map_hw
        assert map_hw is not None
        place = np.unravel_index(map_hw.argmax(), map_hw.shape)
        share = (np.array(place) + 0.5) / map_hw.shape
        assert np.abs(share - np.array(middle) / (50, 67)).max() < 0.2


def test_a_stored_view_gives_the_same_scores(estimated: Estimated) -> None:
    stored = estimated.view.store()
    assert all(array.dtype == np.float32 for array in stored.tensors.values())
    view, again = (LikelihoodView.load(stored, device="cpu") for _ in range(2))
    image = good_image(99)
    for name, measurement in view.measure(image).items():
        assert measurement.score == again.measure(image)[name].score
        assert measurement.score == pytest.approx(estimated.view.measure(image)[name].score, rel=1e-3, abs=1e-3)


def test_the_precision_is_stored_and_another_is_refused(estimated: Estimated) -> None:
    stored = estimated.view.store()
    assert stored.values["precision"] == "fp32"
    for change in ({"precision": "bf16"}, {"noise": 5.0}):
        with pytest.raises(ModelError, match="make the detector again"):
            LikelihoodView.load(Stored(stored.tensors, {**stored.values, **change}), device="cpu")


def test_damaged_views_are_refused(estimated: Estimated) -> None:
    stored = estimated.view.store()
    for name in ("network.head.weight", "whole.mean_M", "typical"):
        damaged = {**stored.tensors, name: stored.tensors[name][:1]}
        with pytest.raises(ValueError, match=r"weights|shape"):
            LikelihoodView.load(Stored(damaged, stored.values), device="cpu")


def test_small_images_are_enlarged_but_estimation_needs_one_window(network: NCPN, estimated: Estimated) -> None:
    small = estimated.view.measure(good_image(0, 20, 31))
    assert all(np.isfinite(measurement.score) for measurement in small.values())
    with pytest.raises(InputError, match="at least 16 pixels"):
        LikelihoodView.estimate(
            [lambda: good_image(0, 40, 15)] * 2,
            np.arange(2),
            device="cpu",
            on_progress=ignore_progress,
            network=network,
        )


def test_large_images_are_halved_first(network: NCPN, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that a halving averages away is seen less; the sizes are stated and kept when the view is stored."""
    monkeypatch.setattr(likelihood, "MOST_PIXELS", 50 * 67 // 4)
    readers = [lambda seed=seed: good_image(seed) for seed in range(4)]
    view = LikelihoodView.estimate(
        readers, np.arange(4), device="cpu", on_progress=ignore_progress, network=network
    ).view
    assert isinstance(view, LikelihoodView)
    assert (view.halvings, view.scales) == (1, 1)
    assert view.description == "the likelihood of pixels is compared at 1/2 size"
    twice = np.repeat(np.repeat(halved(good_image(9)), 2, 0), 2, 1)
    for name, measurement in LikelihoodView.load(view.store(), device="cpu").measure(good_image(9)).items():
        assert measurement.score == pytest.approx(view.measure(twice)[name].score, rel=1e-3, abs=1e-3)


def test_an_image_much_larger_than_the_good_ones_is_halved_further(
    estimated: Estimated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size would otherwise decide how long one image occupies a worker."""
    monkeypatch.setattr(likelihood, "MOST_JUDGED_PIXELS", 100 * 134)
    large = good_image(9, 400, 536)
    expected = estimated.view.measure(halved(halved(large)))
    for name, measurement in estimated.view.measure(large).items():
        assert measurement.score == expected[name].score
    # As many halvings as leave room for a window at the smallest size.
    assert likelihood.judged_halvings(32, 6400, 16, 0, 1) == 1


def test_a_network_with_attention_is_refused() -> None:
    with pytest.raises(ModelError, match="has attention"):
        LikelihoodView.estimate(
            [lambda: good_image(0)] * 2,
            np.arange(2),
            device="cpu",
            on_progress=ignore_progress,
            network=nets.network(nets.config(), dtype=torch.float32),
        )
