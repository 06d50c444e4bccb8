"""The noising processes against their closed forms."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from ncml.config import SDEConfig, cifar10_small, paper_literal
from ncml.errors import InputError
from ncml.network import sde
from ncml.network.sde import GREY_LEVEL, VE, VP, SubVP

PROCESSES = [VE(), VP(), SubVP()]
TIMES = torch.tensor([0.001, 0.02, 0.1, 0.5, 1.0], dtype=torch.float64)
each_process = pytest.mark.parametrize("process", PROCESSES, ids=["ve", "vp", "sub-vp"])


@each_process
def test_t_0_is_clean_data_exactly(process: sde.Process) -> None:
    assert process.alpha(torch.tensor(0.0)) == 1
    assert process.sigma(torch.tensor(0.0)) == 0
    assert process.time_of(0) == 0


def test_marginals_are_the_published_ones() -> None:
    """Song et al. (2021), Eq. 29: beta from .1 to 20, sigma from .01 to 50."""
    for t in TIMES.tolist():
        integral = 0.5 * t**2 * (20 - 0.1) + 0.1 * t
        at = torch.tensor(t, dtype=torch.float64)
        assert VE().alpha(at).item() == 1
        assert VE().sigma(at).item() == pytest.approx(0.01 * 5000**t)
        assert VP().alpha(at).item() == pytest.approx(math.exp(-integral / 2))
        assert VP().sigma(at).item() == pytest.approx(math.sqrt(1 - math.exp(-integral)))
        assert SubVP().alpha(at).item() == pytest.approx(math.exp(-integral / 2))
        assert SubVP().sigma(at).item() == pytest.approx(1 - math.exp(-integral))


@each_process
def test_drift_and_diffusion_lead_to_the_marginals(process: sde.Process) -> None:
    """Integrate the moments' equations, m' = f m and v' = 2 f v + g^2, from just above t = 0."""

    def slope(t: float, moments: list[float]) -> list[float]:
        at = torch.tensor(t, dtype=torch.float64)
        rate = process.drift(torch.ones((), dtype=torch.float64), at).item()
        return [rate * moments[0], 2 * rate * moments[1] + process.diffusion_squared(at).item()]

    start, end = torch.tensor([1e-6, 0.3], dtype=torch.float64)
    begin = [process.alpha(start).item(), process.sigma(start).item() ** 2]
    mean, variance = solve_ivp(slope, (start.item(), end.item()), begin, rtol=1e-9, atol=1e-12).y[:, -1]
    assert mean == pytest.approx(process.alpha(end).item(), rel=1e-6)
    assert variance == pytest.approx(process.sigma(end).item() ** 2, rel=1e-6)


@pytest.mark.parametrize(("name", "expected"), [("ve", 0.2418), ("vp", 0.0204), ("sub-vp", 0.0857)])
def test_the_time_of_ten_grey_levels(name: str, expected: float) -> None:
    config = SDEConfig(kind=name, grey_levels=10)  # type: ignore[arg-type]
    assert sde.end_time(config) == pytest.approx(expected, abs=5e-5)
    assert sde.grey_levels(sde.process(config), sde.end_time(config)) == pytest.approx(10)


@pytest.mark.parametrize(("name", "expected"), [("ve", 90), ("vp", 41), ("sub-vp", 1.1)])
def test_the_paper_s_literal_times(name: str, expected: float) -> None:
    config = paper_literal(cifar10_small(), name).sde  # type: ignore[arg-type]
    levels = sde.grey_levels(sde.process(config), sde.end_time(config))
    assert levels == pytest.approx(expected, rel=0.03)


@each_process
@pytest.mark.parametrize("levels", [1.3, 2.0, 10.0, 60.0])
def test_time_of_is_the_inverse_of_sigma(process: sde.Process, levels: float) -> None:
    assert sde.grey_levels(process, process.time_of(levels)) == pytest.approx(levels, rel=1e-9)


def test_ve_refuses_less_than_its_least_noise() -> None:
    with pytest.raises(InputError, match=r"at least 1\.2[78]") as refused:
        VE().time_of(1.2)
    assert refused.value.field == "noise"


@pytest.mark.parametrize("sigma_min", [0.003, 0.005, 0.01, 0.02])
def test_ve_s_least_noise_is_noise(sigma_min: float) -> None:
    """sigma jumps from 0 to sigma_min at t = 0: the least noise must not come out as clean data."""
    process = VE(sigma_min=sigma_min)
    t = process.time_of(sigma_min / GREY_LEVEL)
    assert process.sigma(torch.tensor(t, dtype=torch.float32)).item() == pytest.approx(sigma_min, rel=1e-6)


@pytest.mark.parametrize("process", [VP(), SubVP()], ids=["vp", "sub-vp"])
@pytest.mark.parametrize("levels", [-1.0, 127.5, 200.0, math.nan])
def test_noise_that_no_time_has_is_refused(process: VP, levels: float) -> None:
    with pytest.raises(InputError, match=r"127\.5") as refused:
        process.time_of(levels)
    assert refused.value.field == "noise"


def test_an_unknown_process_is_refused() -> None:
    with pytest.raises(InputError, match="ve, vp, sub-vp") as refused:
        sde.process(SDEConfig(kind="cosine"))  # type: ignore[arg-type]
    assert refused.value.field == "process"


def test_scale_gives_each_image_its_own_value() -> None:
    x = torch.ones(2, 3, 4, 4)
    assert (sde.scale(torch.tensor([2.0, 3.0]), x) * x).amax((1, 2, 3)).tolist() == [2, 3]
