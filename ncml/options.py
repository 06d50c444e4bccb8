"""The options of sampling and of scores, each declared once; does not import torch.

`SamplingOptions` is the declaration. The keyword arguments of the library and of the client have this type; the fields
of jobs, requests and published models and the flags of the command line are made from its annotations. A new option
also needs a value in `ncml.sampling.defaults.SamplingSettings`, and whatever uses it. `ScoreOptions` are the fields
that the request and the job of a score share.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from reprlib import repr as quote
from typing import Annotated, Any, TypedDict, TypeVar, cast, get_args, get_type_hints

from pydantic import BaseModel, Field, create_model

from ncml.config import SOLVERS
from ncml.errors import InputError
from ncml.limits import DETECTOR, MAX_STEPS

ModelType = TypeVar("ModelType", bound=type[BaseModel])
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Option:
    """The last part of an option's annotation."""

    help: str
    """In the help of the command line and of the library, and at the beginning of the description of a parameter."""
    remark: str
    """The rest of that description."""
    metavar: str
    """The value in the help of the command line."""
    default: Any
    """The field of a published model with the model's default."""
    default_name: str = ""
    """Name of that field, and of the default in a model folder; "": that of the option."""
    range: tuple[float, float] | None = None
    """Smallest and largest value of a number."""


class SamplingOptions(TypedDict, total=False):
    """The options of generation and completion; one that is omitted or None has the model's default.

    Guidance takes about three times the time (`ncml.sampling.guidance`).
    """

    noise: Annotated[
        float | None,
        Field(ge=0, allow_inf_nan=False),
        Option(
            help="Start noise in grey levels; 0 samples directly, without refinement.",
            remark="Default: the model's.",
            metavar="LEVELS",
            default=Field(None, description="the default start noise in grey levels; null: `noise`"),
            default_name="start_noise",
            range=(0, 255),
        ),
    ]
    steps: Annotated[
        int | None,
        Field(ge=1, le=MAX_STEPS),
        Option(
            help="Refinement steps.",
            remark="Default: the model's, or those of the solver.",
            metavar="COUNT",
            default=Field(None, description="its default number of steps; null: that in `solvers`"),
            range=(1, MAX_STEPS),
        ),
    ]
    solver: Annotated[
        str | None,
        Field(max_length=64),
        Option(
            help="tweedie, euler-maruyama, heun or predictor-corrector.",
            remark="Default: the model's `solver` in /models, or with several steps its `stepped_solver`.",
            metavar="NAME",
            default=Field(description="the default solver"),
        ),
    ]
    guidance: Annotated[
        float | None,
        Field(allow_inf_nan=False, examples=[2], json_schema_extra={"minimum": 0.5, "maximum": 10}),
        Option(
            help="Weight of the class against no class, 0.5 to 10; above 1, images show the class more clearly and "
            "vary less.",
            remark="Needs `class`. Default: the model's; 1: the model as trained.",
            metavar="WEIGHT",
            default=Field(1.0, description="the default for images of a class; 1: the model as trained"),
            range=(0.5, 10),
        ),
    ]
    temperature: Annotated[
        float | None,
        Field(allow_inf_nan=False, examples=[0.95], json_schema_extra={"minimum": 0.5, "maximum": 1.5}),
        Option(
            help="0.5 to 1.5; below 1, likely values become more likely.",
            remark="Default: the model's; 1: the model as trained.",
            metavar="FACTOR",
            default=Field(1.0, description="the default; 1: the model as trained"),
            range=(0.5, 1.5),
        ),
    ]


TYPES = get_type_hints(SamplingOptions)

_ANNOTATIONS = get_type_hints(SamplingOptions, include_extras=True)

OPTIONS: dict[str, Option] = {name: get_args(annotation)[-1] for name, annotation in _ANNOTATIONS.items()}

REQUEST_FIELDS = {
    name: (Annotated[_ANNOTATIONS[name], Field(description=f"{option.help} {option.remark}")], None)
    for name, option in OPTIONS.items()
}
"""The fields of a job or a request; None stands for the model's default."""

DEFAULT_NAMES = {name: option.default_name or name for name, option in OPTIONS.items()}

DEFAULT_FIELDS = {
    DEFAULT_NAMES[name]: (TYPES[name] if option.default.default is None else get_args(TYPES[name])[0], option.default)
    for name, option in OPTIONS.items()
}
"""The fields of a published model with its defaults."""


def with_fields(fields: Mapping[str, Any]) -> Callable[[ModelType], ModelType]:
    """Return a decorator that adds these fields to a pydantic model, after its own."""

    def add_fields(model: ModelType) -> ModelType:
        names = {"__module__": model.__module__, "__doc__": model.__doc__}
        return cast(ModelType, create_model(model.__name__, __base__=model, **names, **fields))

    return add_fields


def spell_out(function: Function) -> Function:
    """Name the options of a function in its signature and, for `{options}`, in its docstring, as `help` shows them."""
    signature = inspect.signature(function)
    named = [parameter for parameter in signature.parameters.values() if parameter.kind != Parameter.VAR_KEYWORD]
    options = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in OPTIONS]
    function.__signature__ = signature.replace(parameters=[*named, *options])
    texts = (f"{name}: {option.help}" for name, option in OPTIONS.items())
    function.__doc__ = (function.__doc__ or "").replace("{options}", "\n        ".join(texts))
    return function


def select_options(source: object) -> SamplingOptions:
    """Return the options among the attributes of a job, of a request's parameters or of a command's options."""
    return cast(SamplingOptions, {name: getattr(source, name) for name in OPTIONS})


def select_defaults(source: object) -> SamplingOptions:
    """Return the options whose defaults are attributes of a published model; None for one without a default."""
    return cast(SamplingOptions, {name: getattr(source, default) for name, default in DEFAULT_NAMES.items()})


def name_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every option, or None, under the name of the model's default."""
    return {default: options.get(name) for name, default in DEFAULT_NAMES.items()}


def read_defaults(data: object) -> SamplingOptions:
    """Read the defaults in a model folder, a JSON object.

    Raises `InputError` naming the default that is unknown, of another type or out of range.
    """
    names = {default: name for name, default in DEFAULT_NAMES.items()}
    if not isinstance(data, dict) or not data.keys() <= names.keys():
        raise InputError("sampling", f"sampling must be an object with any of {', '.join(names)}")
    for name, value in data.items():
        if name == "solver":
            if not isinstance(value, str) or value not in SOLVERS:
                raise InputError(name, f"sampling.solver must be one of {', '.join(SOLVERS)}, not {quote(value)}")
            continue
        low, high = OPTIONS[names[name]].range or (0, 0)
        kinds, noun = ((int,), "an integer") if name == "steps" else ((int, float), "a number")
        if type(value) not in kinds or not low <= value <= high:
            raise InputError(name, f"sampling.{name} must be {noun} from {low:g} to {high:g}, not {quote(value)}")
    return cast(SamplingOptions, {names[name]: value for name, value in data.items()})


def leaves_verdict_to_detector(calibration: str | None, statistic: str | None) -> bool:
    """Return whether a detector gives the verdict of a score with these options, if the model is one."""
    return calibration == DETECTOR or (calibration is None and statistic is None)


class ScoreOptions(BaseModel):
    """The options of a score that a job takes from a request as they are."""

    noise: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Score at this noise level, in grey levels. Default: 0, the exact likelihood of the image.",
    )
    map: bool = Field(
        default=False,
        description="Also return bits per dimension for each pixel, the local scores of a detector, or with `tile` the "
        "score of each tile. Default: no; requesting a PNG, which shows the map, implies it.",
    )
    ood: bool = Field(
        default=True,
        description="Also return the out-of-distribution verdict of a calibrated model. Default: yes; 0: bits per "
        "dimension only, which takes one pass of the network.",
    )
    calibration: str | None = Field(
        default=None,
        max_length=64,
        description="The calibration of the verdict, one of the model's `calibrations` in /models, or `detector`. "
        "Default: `detector` if the model is one and no `statistic` is named, else `default`.",
        examples=["tolerant"],
    )
    statistic: str | None = Field(
        default=None,
        max_length=64,
        description="The statistic of the verdict, one of the calibration's; a detector has none. Default: that of the "
        "calibration.",
    )
    sanity: bool = Field(
        default=False,
        description="Also score the image with the least significant bit of every value flipped, an invisible change. "
        "Default: no.",
    )

    @property
    def scoring(self) -> dict[str, Any]:
        """The options as arguments of `Model.score`."""
        return {name: getattr(self, name) for name in ScoreOptions.model_fields}
