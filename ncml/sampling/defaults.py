"""The one place that fills in defaults of sampling options and checks ranges; `ncml.options` declares the options.

The command line, the queue and the service use it too, so it does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ncml.config import DEFAULT_SOLVER, SOLVERS, STEPPED_SOLVER
from ncml.errors import InputError, suggestion
from ncml.limits import MAX_STEPS, check_count, check_number
from ncml.options import OPTIONS, SamplingOptions

SAMPLERS = ("incremental", "naive")
"""The first is the default; `naive` is the reference, hundreds of times slower."""


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
class SamplingLimits:
    """The ranges and the defaults of a model's sampling options."""

    max_noise: float
    """The largest start noise, in grey levels."""
    recommended: SamplingOptions = field(default_factory=SamplingOptions)
    """The defaults that the model recommends."""
    stepped_solver: str = STEPPED_SOLVER
    """The default solver for more than one step."""
    solvers: Mapping[str, int] = field(default_factory=lambda: SOLVERS)
    """Every solver and its default number of steps; a solver whose default is 1 accepts no other number."""
    has_classes: bool = True
    generates: bool = True
    """False for a model that only scores: it refuses all options."""

    @property
    def defaults(self) -> SamplingSettings:
        """The settings of a call without options, for images of a class if the model has classes."""
        return resolve({}, replace(self, generates=True), has_class=self.has_classes)


def check_refinement(options: SamplingOptions) -> None:
    """Raise `InputError` for options of refinement beside a noise of 0, which a user cannot have meant.

    `resolve` accepts them, for callers that vary the noise.
    """
    for name, implied in (("solver", None), ("steps", 1)):
        if options.get("noise") == 0 and options.get(name) not in (None, implied):
            detail = "cannot be combined with noise=0, which samples without refinement; omit one of the two."
            raise InputError(name, f"{name} {detail}")


def resolve(
    options: SamplingOptions, limits: SamplingLimits, *, has_class: bool, sampler: str | None = None
) -> SamplingSettings:
    """Fill in defaults; raise `InputError`, which names the field and the remedy, for a value out of range.

    has_class: whether every image has a class.
    """
    if not limits.generates:
        raise InputError("model", "model: this one only scores images; choose a model that generates them.")
    for name in options.keys() - OPTIONS:
        raise InputError(name, f"{name} is not an option of sampling{suggestion(name, [*OPTIONS, 'seeds', 'classes'])}")
    recommended = limits.recommended
    noise, steps, solver = options.get("noise"), options.get("steps"), options.get("solver")
    if noise is None:
        noise = recommended.get("noise")
    noise = limits.max_noise if noise is None else check_noise(noise, limits.max_noise)
    steps = None if steps is None else check_count("steps", steps, MAX_STEPS)
    default_solver, default_steps = recommended.get("solver") or DEFAULT_SOLVER, recommended.get("steps")
    if solver is None and steps is None:
        steps = default_steps
    solver = solver or (default_solver if steps in (None, 1, default_steps) else limits.stepped_solver)
    if solver not in limits.solvers:
        raise InputError("solver", f"there is no solver {solver!r}: choose from {', '.join(limits.solvers)}.")
    if limits.solvers[solver] == 1 and steps not in (None, 1):
        others = " or ".join(name for name, count in limits.solvers.items() if count > 1)
        detail = f"the {solver} solver takes exactly 1 step, not {steps}: leave steps out, or choose {others}."
        raise InputError("steps", detail)
    sampler = sampler or SAMPLERS[0]
    if sampler not in SAMPLERS:
        raise InputError("sampler", f"there is no sampler {sampler!r}: choose from {', '.join(SAMPLERS)}.")
    guidance = _number("guidance", options, recommended)
    if options.get("guidance") not in (None, 1) and not has_class:
        detail = "a class: name a class, or leave guidance out."
        if not limits.has_classes:
            detail = "a model with classes, and this one has none: leave it out."
        raise InputError("guidance", f"guidance needs {detail}")
    return SamplingSettings(
        noise=noise,
        steps=steps or limits.solvers[solver],
        solver=solver,
        guidance=guidance,
        temperature=_number("temperature", options, recommended),
        sampler=sampler,
    )


def check_noise(noise: float, max_noise: float) -> float:
    """Return a noise level in grey levels; raise `InputError` if it is out of range."""
    noise = check_number("noise", noise)
    if not 0 <= noise <= max_noise:
        raise InputError("noise", f"noise must be 0 to {max_noise:g} grey levels, not {noise:g}.")
    return noise


def _number(name: str, options: Mapping[str, Any], recommended: Mapping[str, Any]) -> float:
    """Return the number that an option, the model or else `SamplingSettings` gives; check that of the option."""
    value = options.get(name)
    if value is None:
        return recommended.get(name) or getattr(SamplingSettings, name)
    number, bounds = check_number(name, value), OPTIONS[name].range
    if bounds and not bounds[0] <= number <= bounds[1]:
        raise InputError(name, f"{name} must be {bounds[0]:g} to {bounds[1]:g}, not {number:g}.")
    return number
