"""The statistics against their equations."""

import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import ncml
from ncml import checkpoint
from ncml.calibration.estimation import calibrate
from ncml.config import SDEConfig
from ncml.errors import InputError
from ncml.evaluation import quality
from ncml.network.mixture import from_uint8, log_mixture, log_prob
from ncml.network.sde import largest_noise, make_sde
from ncml.ood import measurements, statistics
from ncml.ood.calibration import Calibration
from ncml.ood.columns import CHANNELS, CORRELATION_KINDS, NEIGHBOURS, column_name, noise_levels
from ncml.ood.statistics import MULTISCALE_KINDS
from ncml.recipes import maximum_likelihood, paper_literal
from tests.ncml import nets
from tests.ncml.nets import FIT, NEW, RANK

D = 8 * 8 * 3
ROOT = Path(__file__).resolve().parents[3]


def by_hand(model: ncml.Model, level: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute nats [B] and grad log p [B, 3, H, W] of NEW at a noise level in the most direct way."""
    t = make_sde(model.config.sde).time_of(level)
    t_B = torch.full((len(NEW),), t)
    x = from_uint8(torch.from_numpy(NEW)) * make_sde(model.config.sde).alpha(t_B)[:, None, None, None]
    x.requires_grad_()
    density = log_mixture(x, model.network(x, t_B), torch.zeros(len(NEW), dtype=torch.bool)).sum()
    (s,) = torch.autograd.grad(density, x)
    with torch.no_grad():
        nats = log_prob(x, model.network(x, t_B), t_B == 0).sum((1, 2))
    return nats, s


def test_statistics_equal_their_equations(calibrated: ncml.Model, calibration: Calibration) -> None:
    scores = calibrated.score(NEW, statistics="all")
    values = {name: np.array([s.statistics[name] for s in scores]) for name in scores[0].statistics}
    levels = noise_levels(calibrated.config)
    assert levels == (0.0, 2.5, 10.0)
    assert list(values) == [
        "bpd", "typicality", "complexity", "llr", "score_norm_0", "score_norm_2.5", "score_norm_10", "ncml_grad",
        "multiscale", "multiscale_corr", "fast",
    ]  # fmt: skip
    nats, norms = {}, {}
    for level in levels:
        nats_B, s_BCHW = by_hand(calibrated, level)
        nats[level], norms[level] = nats_B.numpy(), s_BCHW.flatten(1).norm(dim=1).numpy()
    bits = {level: -value / math.log(2) / D for level, value in nats.items()}
    assert values["bpd"] == pytest.approx(bits[0.0], rel=1e-5)
    mean = np.mean([s.bpd for s in calibrated.score(FIT)])
    assert values["typicality"] == pytest.approx(abs(bits[0.0] - mean), rel=1e-4, abs=1e-5)
    assert values["complexity"] == pytest.approx(
        bits[0.0] - [measurements.webp_bits(p) for p in NEW], rel=1e-5, abs=1e-5
    )
    assert values["llr"] == pytest.approx(bits[0.0] - bits[10.0], rel=1e-4, abs=1e-5)
    for level in levels:
        assert values[f"score_norm_{level:g}"] == pytest.approx(np.log(norms[level]), rel=1e-4)
    assert values["ncml_grad"] == pytest.approx(-(nats[0.0] + np.log(norms[0.0])), rel=1e-5)
    for name in ("multiscale", "multiscale_corr", "fast"):
        columns, _ = measurements.measure(calibrated.network, NEW, calibrated.statistics[name].needs)
        gaussian = calibration.estimates.gaussians[name]
        for i in range(len(NEW)):
            v = np.array([columns[column][i] for column in gaussian.columns]) - gaussian.mean
            assert values[name][i] == pytest.approx(math.sqrt(v @ np.array(gaussian.precision) @ v), rel=1e-6)


def test_statistics_of_an_image_have_the_documented_measurements(model: ncml.Model) -> None:
    multiscale = [f"{kind}_{level}" for level in ("0", "2.5", "10") for kind in MULTISCALE_KINDS]
    corr_0 = [f"{kind}_0" for kind in CORRELATION_KINDS]
    assert len(corr_0) == 15
    needs = {name: list(statistic.needs) for name, statistic in model.statistics.items()}
    assert needs["multiscale"] == multiscale
    assert needs["multiscale_corr"] == multiscale + corr_0
    assert needs["fast"] == [*multiscale[:4], *corr_0, "codec"]


def test_fast_takes_one_pass_without_the_network_s_gradient(
    calibrated: ncml.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[float] = []
    forward = calibrated.network.forward

    def counted(x: torch.Tensor, t: torch.Tensor, *conditions: torch.Tensor | None) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        passes.append(float(t[0]))
        return forward(x, t, *conditions)

    monkeypatch.setattr(calibrated.network, "forward", counted)
    (score,) = calibrated.score(NEW[0], statistic="fast")
    assert passes == [0.0]
    assert score.ood is not None
    assert score.ood.statistic == "fast"


def test_correlations_are_mean_products_of_neighbours() -> None:
    z = np.random.default_rng(0).normal(size=(2, 3, 5, 7))
    values = {name: column.numpy() for name, column in measurements.correlations(torch.from_numpy(z)).items()}
    assert tuple(values) == CORRELATION_KINDS
    for name, (down, right) in NEIGHBOURS.items():
        for channel, colour in enumerate(CHANNELS):
            products = [
                z[:, channel, i, j] * z[:, channel, i + down, j + right]
                for i in range(5)
                for j in range(7)
                if 0 <= i + down < 5 and j + right < 7
            ]
            assert values[f"corr_{name}_{colour}"] == pytest.approx(np.mean(products, 0))
    assert values["corr_green_blue"] == pytest.approx((z[:, 1] * z[:, 2]).mean((1, 2)))
    assert values["corr_red_blue"] == pytest.approx((z[:, 0] * z[:, 2]).mean((1, 2)))


def test_complexity_subtracts_the_size_of_a_lossless_file() -> None:
    for pixels in NEW:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "WEBP", lossless=True)
        assert np.array_equal(np.asarray(Image.open(file)), pixels)
        assert measurements.webp_bits(pixels) == 8 * len(file.getvalue()) / D


def test_the_direct_gradient_excludes_the_context(model: ncml.Model) -> None:
    """Compare with finite differences: change one value, and keep the parameters of the others."""
    measurement = measurements.measure_level(model.network, NEW[:1], 0.0, ["direct"])
    x = from_uint8(torch.from_numpy(NEW[:1]))
    zero = torch.zeros(1, dtype=torch.bool)
    with torch.no_grad():
        parameters = model.network(x, torch.zeros(1)).double()
    total, step = 0.0, 1e-6
    for channel in range(3):
        moved = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
        moved[:, channel] = step
        up, down = (log_mixture(x.double() + sign * moved, parameters, zero) for sign in (1, -1))
        total += float((((up - down) / (2 * step)) ** 2).sum())
    assert float(measurement.values["direct"][0]) == pytest.approx(math.log(math.sqrt(total)), rel=1e-4)


def test_spreads_are_those_of_the_pixels_surprise(model: ncml.Model) -> None:
    measurement = measurements.measure_level(model.network, NEW, 0.0, ["fine", "coarse"])
    nats = measurement.log_mixture_BHW.double().numpy()
    assert np.exp(measurement.values["fine"].numpy()) - 1e-3 == pytest.approx(nats.std((1, 2)), rel=1e-6)
    blocks = nats.reshape(-1, 2, 4, 2, 4).mean((2, 4))
    assert np.exp(measurement.values["coarse"].numpy()) - 1e-3 == pytest.approx(blocks.std((1, 2)), rel=1e-5)


def test_distances_of_a_gaussian_follow_a_chi_distribution() -> None:
    """Distances of data that is Gaussian with known mean and covariance: chi of as many degrees as columns."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(5, 5))

    def drawn(n: int) -> dict[str, np.ndarray]:
        return dict(zip("abcde", (rng.normal(size=(n, 5)) @ mix + 3).T, strict=True))

    gaussian = statistics.Gaussian.estimate(drawn(20_000))
    distance = gaussian.distance(drawn(5_000))
    assert stats.kstest(distance, stats.chi(5).cdf).pvalue > 0.001
    at_mean = gaussian.distance({name: np.array([mean]) for name, mean in zip("abcde", gaussian.mean, strict=True)})
    assert at_mean.tolist() == [0]


def test_constant_columns_keep_distances_finite() -> None:
    gaussian = statistics.Gaussian.estimate({"a": np.arange(30.0), "b": np.full(30, 2.0)})
    assert np.isfinite(gaussian.distance({"a": np.array([3.0]), "b": np.array([2.0])})).all()


def test_a_score_does_not_depend_on_its_batch(calibrated: ncml.Model) -> None:
    together = calibrated.score(NEW, statistics="all")
    alone = calibrated.score(NEW, statistics="all", batch_size=1)
    for a, b in zip(together, alone, strict=True):
        assert a.statistics == pytest.approx(b.statistics, rel=1e-4, abs=1e-5)
        assert a.ood is not None
        assert b.ood is not None
        assert a.ood.p_value == b.ood.p_value


def test_an_unknown_statistic_is_named(calibrated: ncml.Model) -> None:
    for arguments, name in (
        ({"statistic": "odd"}, "odd"),
        ({"statistics": ["odd"]}, "odd"),
        ({"statistic": "all"}, "all"),
        ({"statistics": ["all"]}, "all"),
    ):
        with pytest.raises(InputError, match=f"no statistic '{name}': choose from bpd, typicality"):
            calibrated.score(NEW, **arguments)


def test_a_maximum_likelihood_model_is_measured_at_t_0_only(tmp_path: Path) -> None:
    network = nets.network(maximum_likelihood(nets.config()), dtype=torch.float32)
    checkpoint.save(tmp_path / "mle", network)
    model = ncml.load(tmp_path / "mle")
    assert "llr" not in model.statistics
    assert model.statistics["multiscale"].needs == ("bits_0", "direct_0", "fine_0", "coarse_0")
    calibration = calibrate(model, FIT, RANK, power_images=0)
    assert calibration.thresholds.keys() == model.statistics.keys()
    assert len(model.statistics["multiscale_corr"].needs) == 4 + 15


@pytest.mark.parametrize("kind", ["vp", "sub-vp"])
def test_no_level_exceeds_the_noise_that_may_be_requested(kind: Literal["vp", "sub-vp"]) -> None:
    """The noise at T of the paper's SDEs has more digits than the names of columns."""
    for config in (
        paper_literal(nets.config(), kind),
        replace(nets.config(), sde=SDEConfig(kind=kind, grey_levels=12.34567)),
    ):
        *_, level = noise_levels(config)
        assert level == largest_noise(config.sde)
        assert column_name("bits", level) == f"bits_{level:.6g}"


def test_levels_below_the_smallest_noise_of_an_sde_are_left_out(tmp_path: Path) -> None:
    """VE has no time with less than 1.275 grey levels, except 0."""
    config = nets.config(sde="ve")
    config = replace(config, sde=replace(config.sde, grey_levels=4.0))
    checkpoint.save(tmp_path / "quiet", nets.network(config, dtype=torch.float32))
    model = ncml.load(tmp_path / "quiet")
    assert model.statistics["multiscale"].needs == tuple(f"{kind}_{t}" for t in (0, 4) for kind in MULTISCALE_KINDS)
    assert calibrate(model, FIT, RANK, power_images=0).thresholds.keys() == model.statistics.keys()
    assert [arguments["noise"] for arguments in quality.headline_methods(model).values()] == [0.0, 4.0, 4.0]
    assert [level for level, _ in quality.sweep_points(model)["start noise"]] == [0.0, 2.0, 4.0]


def test_the_largest_noise_is_measured_although_its_name_is_rounded_up() -> None:
    config = nets.config()
    config = replace(config, sde=replace(config.sde, grey_levels=127.4999))  # VP ends before 127.5
    network = nets.network(config, dtype=torch.float32)
    columns, _ = measurements.measure(network, NEW, ["bits_127.5"])
    assert np.isfinite(columns["bits_127.5"]).all()


def test_the_tuned_defaults_of_a_model_without_noise_are_compared_too(tmp_path: Path) -> None:
    network = nets.network(maximum_likelihood(nets.config()), dtype=torch.float32)
    checkpoint.save(tmp_path / "mle", network, sampling={"noise": 0.0, "temperature": 0.9, "guidance": 3.0})
    methods = quality.headline_methods(ncml.load(tmp_path / "mle"))
    assert [*methods] == [
        "direct (t = 0)",
        "defaults: noise 0, temperature 0.9",
        "defaults, of all classes in turn: guidance 1",
        "defaults, of all classes in turn: guidance 3",
    ]


def test_the_page_lists_every_statistic_of_the_bundled_model() -> None:
    (table,) = re.findall(r"^\| Statistic \|.*?\n\n", (ROOT / "docs" / "ood-method.md").read_text(), re.M | re.S)
    cells = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w[\w.]*)`", cell)}
    assert named == statistics.build_statistics(ncml.load(ROOT / "models" / "cifar10").config).keys()


def related(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return correlated measurements of `count` images."""
    mix = np.random.default_rng(1).normal(size=(5, 5))
    rng = np.random.default_rng(seed)
    return dict(zip("abcde", (rng.normal(size=(count, 5)) @ mix + 3).T, strict=True))


def test_an_image_with_a_defect_is_suspicious_and_not_used_to_estimate() -> None:
    columns = {name: values.copy() for name, values in related(60).items()}
    assert not statistics.suspicious(columns).any()
    columns["a"][0] += 1e3
    assert statistics.suspicious(columns).tolist() == [True] + [False] * 59
    distance = statistics.Statistic.distance("d", "abcde")
    columns["bits_0"] = columns["a"]
    clean = {name: values[1:] for name, values in columns.items()}
    robust, expected = (statistics.Estimates.estimate(c, {"d": distance}) for c in (columns, clean))
    assert robust == expected
    few = {name: values[:20] for name, values in columns.items()}
    assert statistics.usual_images(few).all()  # 19 others are too few


def test_images_that_are_mostly_equal_are_not_all_suspicious() -> None:
    assert not statistics.suspicious({"a": np.array([1.0] * 30 + [2.0] * 10)}).any()


def test_correlations_are_shrunk_towards_those_of_a_prior() -> None:
    truth = statistics.Gaussian.estimate(related(20_000))
    few = [related(20, seed) for seed in range(2, 12)]
    plain = [statistics.Gaussian.estimate(columns) for columns in few]
    shrunk = [statistics.Gaussian.estimate(columns, truth) for columns in few]
    errors = [
        np.mean([np.abs(gaussian.correlation() - truth.correlation()).max() for gaussian in gaussians])
        for gaussians in (plain, shrunk)
    ]
    assert errors[1] < 0.8 * errors[0]
    other = statistics.Gaussian(("x",), (0.0,), ((1.0,),))
    assert statistics.Gaussian.estimate(few[0], other) == plain[0]  # of other measurements
