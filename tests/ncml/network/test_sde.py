"""The noising SDEs against their closed forms."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from ncml.config import SDEConfig
from ncml.errors import InputError
from ncml.network import sde as sde_module
from ncml.network.sde import GREY_LEVEL, VESDE, VPSDE, SubVPSDE
from ncml.recipes import cifar10_small, paper_literal

SDES = [VESDE(), VPSDE(), SubVPSDE()]
TIMES = torch.tensor([0.001, 0.02, 0.1, 0.5, 1.0], dtype=torch.float64)
each_sde = pytest.mark.parametrize("sde", SDES, ids=["ve", "vp", "sub-vp"])


@each_sde
def test_t_0_is_clean_data_exactly(sde: sde_module.SDE) -> None:
    assert sde.alpha(torch.tensor(0.0)) == 1
    assert sde.sigma(torch.tensor(0.0)) == 0
    assert sde.time_of(0) == 0


def test_marginals_are_the_published_ones() -> None:
    """Song et al. (2021), Eq. 29: beta from .1 to 20, sigma from .01 to 50."""
    for t in TIMES.tolist():
        integral = 0.5 * t**2 * (20 - 0.1) + 0.1 * t
        time = torch.tensor(t, dtype=torch.float64)
        assert VESDE().alpha(time).item() == 1
        assert VESDE().sigma(time).item() == pytest.approx(0.01 * 5000**t)
        assert VPSDE().alpha(time).item() == pytest.approx(math.exp(-integral / 2))
        assert VPSDE().sigma(time).item() == pytest.approx(math.sqrt(1 - math.exp(-integral)))
        assert SubVPSDE().alpha(time).item() == pytest.approx(math.exp(-integral / 2))
        assert SubVPSDE().sigma(time).item() == pytest.approx(1 - math.exp(-integral))


@each_sde
def test_drift_and_diffusion_lead_to_the_marginals(sde: sde_module.SDE) -> None:
    """Integrate the moments' equations, m' = f m and v' = 2 f v + g^2, from just above t = 0."""

    def slope(t: float, moments: list[float]) -> list[float]:
        time = torch.tensor(t, dtype=torch.float64)
        rate = sde.drift(torch.ones((), dtype=torch.float64), time).item()
        return [rate * moments[0], 2 * rate * moments[1] + sde.diffusion_squared(time).item()]

    start, end = torch.tensor([1e-6, 0.3], dtype=torch.float64)
    initial = [sde.alpha(start).item(), sde.sigma(start).item() ** 2]
    mean, variance = solve_ivp(slope, (start.item(), end.item()), initial, rtol=1e-9, atol=1e-12).y[:, -1]
    assert mean == pytest.approx(sde.alpha(end).item(), rel=1e-6)
    assert variance == pytest.approx(sde.sigma(end).item() ** 2, rel=1e-6)


@pytest.mark.parametrize(("name", "expected"), [("ve", 0.2418), ("vp", 0.0204), ("sub-vp", 0.0857)])
def test_the_time_of_ten_grey_levels(name: str, expected: float) -> None:
    config = SDEConfig(kind=name, grey_levels=10)  # type: ignore[arg-type]
    assert sde_module.end_time(config) == pytest.approx(expected, abs=5e-5)
    assert sde_module.make_sde(config).grey_levels_at(sde_module.end_time(config)) == pytest.approx(10)


@pytest.mark.parametrize(("name", "expected"), [("ve", 90), ("vp", 41), ("sub-vp", 1.1)])
def test_the_papers_literal_times(name: str, expected: float) -> None:
    config = paper_literal(cifar10_small(), name).sde  # type: ignore[arg-type]
    levels = sde_module.make_sde(config).grey_levels_at(sde_module.end_time(config))
    assert levels == pytest.approx(expected, rel=0.03)


@each_sde
@pytest.mark.parametrize("levels", [1.3, 2.0, 10.0, 60.0])
def test_time_of_is_the_inverse_of_sigma(sde: sde_module.SDE, levels: float) -> None:
    assert sde.grey_levels_at(sde.time_of(levels)) == pytest.approx(levels, rel=1e-9)


def test_ve_refuses_less_than_its_smallest_noise() -> None:
    with pytest.raises(InputError, match=r"at least 1\.2[78]") as refused:
        VESDE().time_of(1.2)
    assert refused.value.field == "noise"


@pytest.mark.parametrize("sigma_min", [0.003, 0.005, 0.01, 0.02])
def test_the_smallest_noise_of_ve_is_not_clean(sigma_min: float) -> None:
    """sigma jumps from 0 to sigma_min at t = 0: the smallest noise must not become clean data."""
    sde = VESDE(sigma_min=sigma_min)
    t = sde.time_of(sigma_min / GREY_LEVEL)
    assert sde.sigma(torch.tensor(t, dtype=torch.float32)).item() == pytest.approx(sigma_min, rel=1e-6)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE()], ids=["vp", "sub-vp"])
@pytest.mark.parametrize("levels", [-1.0, 127.5, 200.0, math.nan])
def test_noise_without_a_time_is_refused(sde: VPSDE, levels: float) -> None:
    with pytest.raises(InputError, match=r"127\.5") as refused:
        sde.time_of(levels)
    assert refused.value.field == "noise"


def test_an_unknown_sde_is_refused() -> None:
    with pytest.raises(InputError, match="ve, vp, sub-vp") as refused:
        sde_module.make_sde(SDEConfig(kind="cosine"))  # type: ignore[arg-type]
    assert refused.value.field == "kind"


def test_broadcast_to_gives_each_image_its_own_value() -> None:
    x = torch.ones(2, 3, 4, 4)
    assert (sde_module.broadcast_to(torch.tensor([2.0, 3.0]), x) * x).amax((1, 2, 3)).tolist() == [2, 3]
