"""Noising SDEs: x_t = alpha(t) x_0 + sigma(t) eps, eps ~ N(0, 1), on pixels in [-1, 1].

VE, VP and sub-VP are the SDEs of Song et al., "Score-Based Generative Modeling through SDEs" (2021), used by
NCML for small t only. t = 0 is clean data exactly: alpha(0) = 1 and sigma(0) = 0 for every SDE, although VE's
sigma tends to `sigma_min` as t falls to 0. Users speak of noise in grey levels (the standard deviation sigma(t) on the
0..255 scale); `time_of` and `grey_levels_at` convert. Does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ncml.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ncml.config import SDEConfig

Time = TypeVar("Time", "Tensor", float)

GREY_LEVEL = 1 / 127.5
"""One step of the 0..255 scale on the [-1, 1] scale."""

ROUNDING = 1e-12
"""Maximum error of a conversion between times and grey levels."""


@dataclass(frozen=True)
class VESDE:
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t for t > 0."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at time t (any shape)."""
        return t.new_ones(t.shape)

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t, on the [-1, 1] scale; 0 at t = 0."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t * (t > 0)

    def drift(self, x_BCHW: Tensor, t: Tensor) -> Tensor:
        """f(x, t) of dx = f dt + g dw."""
        return x_BCHW.new_zeros(x_BCHW.shape)

    def diffusion_squared(self, t: Tensor) -> Tensor:
        """g(t)^2 of dx = f dt + g dw: the derivative of sigma^2."""
        return 2 * self.sigma(t) ** 2 * math.log(self.sigma_max / self.sigma_min)

    def time_of(self, grey_levels: float) -> float:
        """The t at which sigma is `grey_levels` on the 0..255 scale; 0 for 0."""
        if grey_levels == 0:
            return 0.0
        ratio = grey_levels * GREY_LEVEL / self.sigma_min
        if not ratio > 1 - ROUNDING:
            floor = self.sigma_min / GREY_LEVEL
            raise InputError("noise", f"noise must be 0 or at least {floor:.4g} grey levels for this SDE.")
        # Never 0, which is clean data.
        return max(ROUNDING, math.log(ratio) / math.log(self.sigma_max / self.sigma_min))

    def grey_levels_at(self, t: float) -> float:
        """Sigma at time t on the 0..255 scale: the inverse of `time_of`."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t / GREY_LEVEL if t > 0 else 0.0


@dataclass(frozen=True)
class VPSDE:
    """Variance preserving: alpha = exp(-B(t) / 2), sigma^2 = 1 - alpha^2, B the integral of beta."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def beta(self, t: Tensor) -> Tensor:
        """The schedule of VP and sub-VP, linear in t."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def integral(self, t: Time) -> Time:
        """B(t), the integral of beta from 0 to t."""
        return t * self.beta_min + 0.5 * t**2 * (self.beta_max - self.beta_min)

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at time t (any shape)."""
        return (-0.5 * self.integral(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t, on the [-1, 1] scale; 0 at t = 0."""
        return (-(-self.integral(t)).expm1()).sqrt()

    def drift(self, x_BCHW: Tensor, t: Tensor) -> Tensor:
        """f(x, t) of dx = f dt + g dw."""
        return -0.5 * self.beta(t) * x_BCHW

    def diffusion_squared(self, t: Tensor) -> Tensor:
        """g(t)^2 of dx = f dt + g dw."""
        return self.beta(t)

    def time_of(self, grey_levels: float) -> float:
        """The t at which sigma is `grey_levels` on the 0..255 scale; 0 for 0."""
        if not 0 <= grey_levels * GREY_LEVEL < 1:
            raise InputError("noise", f"noise must be at least 0 and less than {1 / GREY_LEVEL:g} grey levels.")
        return self._time_of_integral(self._integral_at(grey_levels * GREY_LEVEL))

    def grey_levels_at(self, t: float) -> float:
        """Sigma at time t on the 0..255 scale: the inverse of `time_of`."""
        return self._sigma_at(self.integral(t)) / GREY_LEVEL

    def _integral_at(self, sigma: float) -> float:
        return -math.log1p(-(sigma**2))

    def _sigma_at(self, integral: float) -> float:
        return math.sqrt(-math.expm1(-integral))

    def _time_of_integral(self, integral: float) -> float:
        slope = self.beta_max - self.beta_min
        # The stable root of slope/2 t^2 + beta_min t - integral = 0.
        return 2 * integral / (self.beta_min + math.sqrt(self.beta_min**2 + 2 * slope * integral))


@dataclass(frozen=True)
class SubVPSDE(VPSDE):
    """Sub-variance preserving: the drift of VP, sigma = 1 - alpha^2."""

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t, on the [-1, 1] scale; 0 at t = 0."""
        return -(-self.integral(t)).expm1()

    def diffusion_squared(self, t: Tensor) -> Tensor:
        """g(t)^2 of dx = f dt + g dw."""
        return self.beta(t) * -(-2 * self.integral(t)).expm1()

    def _integral_at(self, sigma: float) -> float:
        return -math.log1p(-sigma)

    def _sigma_at(self, integral: float) -> float:
        return -math.expm1(-integral)


SDE = VESDE | VPSDE
"""Any noising SDE; SubVPSDE is a VPSDE."""


def make_sde(config: SDEConfig) -> SDE:
    """Return the SDE of a configuration."""
    match config.kind:
        case "ve":
            return VESDE(sigma_min=config.sigma_min, sigma_max=config.sigma_max)
        case "vp":
            return VPSDE(beta_min=config.beta_min, beta_max=config.beta_max)
        case "sub-vp":
            return SubVPSDE(beta_min=config.beta_min, beta_max=config.beta_max)
        case unknown:
            raise InputError("kind", f"the kind of SDE must be one of ve, vp, sub-vp, not {unknown!r}.")


def end_time(config: SDEConfig) -> float:
    """Return T, the largest time: as configured, or solved from the noise in grey levels."""
    return make_sde(config).time_of(config.grey_levels) if config.end_time is None else config.end_time


def noise_at_end(config: SDEConfig) -> float:
    """Return the noise at T in grey levels."""
    return make_sde(config).grey_levels_at(end_time(config))


def largest_noise(config: SDEConfig) -> float:
    """Return the noise at T in grey levels, rounded to 6 decimals: the largest noise that users may request."""
    return round(noise_at_end(config), 6)


def reaches(sde: SDE, grey_levels: float) -> bool:
    """Return whether the SDE has a time with this noise; VE has none between 0 and its smallest noise."""
    try:
        sde.time_of(grey_levels)
    except InputError:
        return False
    return True


def broadcast_to(value_B: Tensor, x_BCHW: Tensor) -> Tensor:
    """Shape one value for each image so that it multiplies a batch of images."""
    return value_B.to(x_BCHW).view(-1, *[1] * (x_BCHW.dim() - 1))
