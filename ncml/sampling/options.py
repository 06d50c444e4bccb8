"""Options of sampling: what a caller may choose, and the one place that fills in defaults and checks ranges.

The command line, the queue and the service use it too, so it does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from ncml.config import DEFAULT_SOLVER, SAMPLING_RANGES, SOLVERS, STEPPED_SOLVER, SamplingDefaults
from ncml.errors import InputError
from ncml.limits import MAX_STEPS, check_count, check_number

SAMPLERS = ("incremental", "naive")
"""The first is the default; `naive` is the reference, hundreds of times slower."""


@dataclass(frozen=True, kw_only=True)
class SamplingLimits:
    """The ranges and the defaults of a model's sampling options."""

    max_noise: float
    """The largest start noise, in grey levels."""
    noise: float
    """The default start noise."""
    solver: str = DEFAULT_SOLVER
    steps: int | None = None
    """The default number of steps of the default solver; None: its number in `solvers`."""
    stepped_solver: str = STEPPED_SOLVER
    """The default solver for more than one step."""
    solvers: Mapping[str, int] = field(default_factory=lambda: SOLVERS)
    """Every solver and its default number of steps; a solver whose default is 1 accepts no other number."""
    guidance: float = 1.0
    """The default for images of a class."""
    temperature: float = 1.0
    has_classes: bool = True

    @classmethod
    def for_model(cls, max_noise: float, defaults: SamplingDefaults, *, has_classes: bool) -> SamplingLimits:
        """Return the limits of a model that recommends these defaults."""
        return cls(
            max_noise=max_noise,
            noise=max_noise if defaults.start_noise is None else defaults.start_noise,
            solver=defaults.solver or DEFAULT_SOLVER,
            steps=defaults.steps,
            guidance=defaults.guidance or 1.0,
            temperature=defaults.temperature or 1.0,
            has_classes=has_classes,
        )


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Options with every default filled in and every range checked."""

    noise: float
    """Start noise in grey levels; 0 samples directly, without refinement."""
    steps: int
    """Refinement steps, the last of them Tweedie's."""
    solver: str
    guidance: float = 1.0
    """Weight of the class against no class; images without a class ignore it."""
    temperature: float = 1.0
    sampler: str = SAMPLERS[0]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The options of a request; None stands for a default. The fields are those of `SamplingSettings`."""

    noise: float | None = None
    steps: int | None = None
    solver: str | None = None
    guidance: float | None = None
    temperature: float | None = None
    sampler: str | None = None

    @classmethod
    def from_attributes(cls, source: object) -> SamplingOptions:
        """Return the options among the attributes of a job or of a request's parameters."""
        return cls(**{option.name: getattr(source, option.name, None) for option in fields(cls)})

    def check_refinement(self) -> None:
        """Raise `InputError` for options of refinement beside a noise of 0, which a user cannot have meant.

        `resolve` accepts them, for callers that vary the noise.
        """
        for name, is_given in (("solver", self.solver is not None), ("steps", self.steps not in (None, 1))):
            if self.noise == 0 and is_given:
                detail = "cannot be combined with noise=0, which samples without refinement; omit one of the two."
                raise InputError(name, f"{name} {detail}")

    def resolve(self, limits: SamplingLimits, *, has_class: bool) -> SamplingSettings:
        """Fill in defaults; raise `InputError`, which names the field and the remedy, for a value out of range.

        has_class: whether every image has a class.
        """
        noise = check_noise(self.noise, limits.max_noise) if self.noise is not None else limits.noise
        steps = None if self.steps is None else check_count("steps", self.steps, MAX_STEPS)
        if self.solver is None and steps is None:
            steps = limits.steps
        solver = self.solver or (limits.solver if steps in (None, 1, limits.steps) else limits.stepped_solver)
        if solver not in limits.solvers:
            raise InputError("solver", f"there is no solver {solver!r}: choose from {', '.join(limits.solvers)}.")
        if limits.solvers[solver] == 1 and steps not in (None, 1):
            others = " or ".join(name for name, count in limits.solvers.items() if count > 1)
            detail = f"the {solver} solver takes exactly 1 step, not {steps}: leave steps out, or choose {others}."
            raise InputError("steps", detail)
        sampler = self.sampler or SAMPLERS[0]
        if sampler not in SAMPLERS:
            raise InputError("sampler", f"there is no sampler {sampler!r}: choose from {', '.join(SAMPLERS)}.")
        return SamplingSettings(
            noise=noise,
            steps=steps or limits.solvers[solver],
            solver=solver,
            guidance=self._guidance(limits, has_class),
            temperature=_check_range("temperature", self.temperature, limits.temperature),
            sampler=sampler,
        )

    def _guidance(self, limits: SamplingLimits, has_class: bool) -> float:
        guidance = _check_range("guidance", self.guidance, limits.guidance)
        if self.guidance not in (None, 1) and not has_class:
            if limits.has_classes:
                raise InputError("guidance", "guidance needs a class: name a class, or leave guidance out.")
            raise InputError("guidance", "guidance needs a model with classes, and this one has none: leave it out.")
        return guidance


def check_noise(noise: float, max_noise: float) -> float:
    """Return a noise level in grey levels; raise `InputError` if it is out of range."""
    noise = check_number("noise", noise)
    if not 0 <= noise <= max_noise:
        raise InputError("noise", f"noise must be 0 to {max_noise:g} grey levels, not {noise:g}.")
    return noise


def _check_range(name: str, value: float | None, default: float) -> float:
    low, high = SAMPLING_RANGES[name]
    if value is None:
        return default
    number = check_number(name, value)
    if not low <= number <= high:
        raise InputError(name, f"{name} must be {low:g} to {high:g}, not {number:g}.")
    return number
