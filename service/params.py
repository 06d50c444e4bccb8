"""What may be asked: the parameters of each endpoint, alike in the query, in a form and in JSON."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from worker.contract import MAX_IMAGES, MAX_SEED, MAX_STEPS, Priority


def _blank_is_absent(value: Any) -> Any:
    """An empty form field says nothing."""
    return None if value == "" else value


class Params(BaseModel):
    """What all three endpoints take."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    model: Annotated[
        str | None,
        BeforeValidator(_blank_is_absent),
        Field(
            max_length=200,
            description="A model by `name`, or by `name@version` to insist on one version. Left out: the only model "
            "that is served, or the first by name.",
            examples=["cifar10"],
        ),
    ] = None
    class_name: Annotated[
        str | None,
        BeforeValidator(_blank_is_absent),
        Field(
            alias="class",
            max_length=200,
            description="One of the model's classes, by name. Left out: no class.",
            examples=["cat"],
        ),
    ] = None
    priority: Priority = Field(default=Priority.NORMAL, description="Jobs of a higher priority are started first.")


class ScoreParams(Params):
    """What /score takes besides images."""

    noise: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Score at this noise level, in grey levels; 0 is the exact likelihood of the image itself.",
    )
    map: bool = Field(default=False, description="Also return bits per dimension for each pixel.")


class PictureParams(Params):
    """What /generate and /complete share."""

    n: int = Field(default=1, ge=1, le=MAX_IMAGES, description="How many pictures.", examples=[4])
    seed: Annotated[
        int | None,
        BeforeValidator(_blank_is_absent),
        Field(
            ge=0,
            le=MAX_SEED,
            description="Picture i is drawn with seed + i; the same seed gives the same picture. Left out: a random "
            "one, told in X-Seed.",
            examples=[7],
        ),
    ] = None
    noise: Annotated[
        float | None,
        BeforeValidator(_blank_is_absent),
        Field(
            ge=0,
            allow_inf_nan=False,
            description="Noise level to start from, in grey levels. Left out: the model's own; 0: sampled directly, "
            "without refinement.",
        ),
    ] = None
    steps: Annotated[
        int | None,
        BeforeValidator(_blank_is_absent),
        Field(ge=1, le=MAX_STEPS, description="Refinement steps. Left out: the solver's default."),
    ] = None
    solver: Annotated[
        str | None,
        BeforeValidator(_blank_is_absent),
        Field(max_length=64, description="Refinement solver, one of the model's. Left out: the model's default."),
    ] = None


class GenerateParams(PictureParams):
    """What /generate takes."""


class CompleteParams(PictureParams):
    """What /complete takes besides an image."""

    keep: Annotated[
        Literal["top", "bottom", "left", "right"] | None,
        BeforeValidator(_blank_is_absent),
        Field(description="The half that is known. Left out: what the picture says, or else top."),
    ] = None
