"""The parameters of each endpoint, the same in the query, in a form and in JSON."""

from typing import Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ncml.limits import MAX_IMAGES_PER_REQUEST, MAX_SEED, Keep
from ncml.options import REQUEST_FIELDS, SamplingOptions, ScoreOptions, select_options, with_fields
from service.http.negotiation import Format
from worker.contract import JOB_ID, MODEL_NAME, Priority

_FORMAT = Field(
    default=None,
    description="The format of the response; it takes precedence over `Accept`. Default: that of `Accept`.",
    examples=["json"],
)


class JobParams(BaseModel):
    """Parameters of every endpoint that creates a job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        default=None,
        max_length=200,
        description="A model by `name`, or by `name@version` to require one version. Default: the one that "
        "/models marks as `default`.",
    )
    priority: Priority = Field(
        default=Priority.NORMAL, description="Jobs of a higher priority start first. Default: normal."
    )

    webhook: str | None = Field(
        default=None,
        max_length=2000,
        description="An address to which the service sends the state of the job when it ends, signed, as in "
        "`webhooks` of this document; the operator allows its host with NCML_WEBHOOK_HOSTS. Default: none.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_boolean(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false in JSON where a number is expected; they would be read as 1 and 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
            raise PydanticCustomError("boolean", "it must be a number, not true or false")
        return value


class Params(JobParams):
    """Parameters of /score, /generate and /complete."""

    class_name: str | None = Field(
        default=None,
        alias="class",
        max_length=200,
        description="One of the model's classes, by name. Default: no class.",
        examples=["cat"],
    )


class ScoreParams(ScoreOptions, Params):
    """Parameters of /score."""

    format: Literal["json", "png", "npz"] | None = _FORMAT
    statistics: str | None = Field(
        default=None,
        max_length=1000,
        description="Additional statistics to return: `all`, or names separated by commas; in JSON also a list of "
        "names. Default: none.",
        examples=["all"],
        json_schema_extra={
            "anyOf": [
                {"type": "string", "maxLength": 1000}, {"type": "array", "items": {"type": "string"}}, {"type": "null"},
            ]
        },
    )  # fmt: skip
    tile: bool = Field(
        default=False,
        description="Split an image larger than the model into overlapping tiles and judge it by them; can be combined "
        "with `model`, `priority`, `webhook`, `map`, `format` and `tile_size` only. Default: no; the image is resized "
        "to the model's size.",
    )
    tile_size: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="With `tile`: pixels of a tile's shorter side; each tile is resized to the model's size. Default: "
        "the size at which tiles were calibrated, or the model's.",
        examples=[64],
    )

    @field_validator("statistics", mode="before")
    @classmethod
    def _join_names(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        names = cast(list[object], value)
        return ",".join(map(str, names)) if all(isinstance(name, str) for name in names) else names


class CalibrateParams(JobParams):
    """Parameters of /calibrate."""

    name: str = Field(
        pattern=MODEL_NAME,
        max_length=64,
        description="Name of the new model: letters, digits, dots, hyphens and underscores, beginning with a letter or "
        "digit, at most 64.",
        examples=["bottles"],
    )
    false_positive_rate: float = Field(
        default=0.05, ge=0.001, le=0.5, description="Share of good images that the verdict flags. Default: 0.05."
    )


class UpdateParams(JobParams):
    """Parameters of /update."""

    name: str = Field(
        pattern=MODEL_NAME,
        max_length=64,
        description="Name of the new version: letters, digits, dots, hyphens and underscores, beginning with a letter "
        "or digit, at most 64.",
        examples=["bottles-2"],
    )


class ReviewParams(BaseModel):
    """Parameters of /models/{name}/reviews."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str = Field(
        pattern=JOB_ID, description="The id of the job in which the detector judged the image.", examples=["0b6a3c1e9d"]
    )
    verdict: Literal["good", "defective"] = Field(
        description="What the image is; `good` only if the detector flagged it.", examples=["good"]
    )


@with_fields(REQUEST_FIELDS)
class SamplingParams(Params):
    """Parameters of /generate and /complete."""

    format: Format | None = _FORMAT
    n: int = Field(
        default=1, ge=1, le=MAX_IMAGES_PER_REQUEST, description="Number of images. Default: 1.", examples=[4]
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Image i uses seed + i; the same seed gives the same image. Default: random, returned in X-Seed.",
        examples=[7],
    )

    @property
    def sampling(self) -> SamplingOptions:
        """The options of sampling; None stands for the model's defaults."""
        return select_options(self)


class GenerateParams(SamplingParams):
    """Parameters of /generate."""


class CompleteParams(SamplingParams):
    """Parameters of /complete."""

    keep: Keep | None = Field(default=None, description="The known half. Default: derived from the image, or else top.")
