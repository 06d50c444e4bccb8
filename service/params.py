"""What may be asked: the parameters of each endpoint, alike in the query, in a form and in JSON."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from worker.contract import MAX_IMAGES, MAX_SEED, MAX_STEPS, Priority


class Params(BaseModel):
    """What all three endpoints take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        default=None,
        max_length=200,
        description="A model by `name`, or by `name@version` to insist on one version. Left out: the only model "
        "that is served, or the first by name.",
    )
    class_name: str | None = Field(
        default=None,
        alias="class",
        max_length=200,
        description="One of the model's classes, by name. Left out: no class.",
        examples=["cat"],
    )
    priority: Priority = Field(
        default=Priority.NORMAL, description="Jobs of a higher priority start first. Left out: normal."
    )


class ScoreParams(Params):
    """What /score takes besides images."""

    noise: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Score at this noise level, in grey levels. Left out: 0, the exact likelihood of the image.",
    )
    map: bool = Field(
        default=False,
        description="Also return bits per dimension for each pixel, or with `tile` the score of each tile. Left out: "
        "no; a PNG is of the map, so asking for one asks for it.",
    )
    ood: bool = Field(
        default=True,
        description="Whether a calibrated model also says if the picture belongs to what it was trained on. Left out: "
        "yes; 0: bits per dimension alone, which takes one pass of the network.",
    )
    statistic: str | None = Field(
        default=None,
        max_length=64,
        description="The statistic that gives the verdict, one of the calibration's. Left out: its default.",
    )
    statistics: str | None = Field(
        default=None,
        max_length=1000,
        description="Statistics to return besides: `all`, or names separated by commas. Left out: none.",
        examples=["all"],
    )
    sanity: bool = Field(
        default=False,
        description="Also score the picture with the least significant bit of every value flipped: a likelihood that "
        "is sound tells the two apart. Left out: no.",
    )
    tile: bool = Field(
        default=False,
        description="Cut a picture larger than the model into overlapping tiles and judge it by its worst one; only "
        "`model`, `priority`, `map` and `tile_size` go with it. Left out: no; the picture is brought to the model's "
        "size.",
    )
    tile_size: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Pixels of a tile's shorter side, each tile being brought to the model's size; for `tile`. Left "
        "out: the size at which tiles were calibrated, or the model's.",
        examples=[64],
    )


class PictureParams(Params):
    """What /generate and /complete share."""

    n: int = Field(default=1, ge=1, le=MAX_IMAGES, description="How many pictures. Left out: one.", examples=[4])
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Picture i is drawn with seed + i; the same seed gives the same picture. Left out: a random one, "
        "told in X-Seed.",
        examples=[7],
    )
    noise: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Noise level to start from, in grey levels. Left out: the model's own; 0: sampled directly, "
        "without refinement.",
    )
    steps: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="Refinement steps. Left out: the solver's default."
    )
    solver: str | None = Field(
        default=None,
        max_length=64,
        description="Refinement solver, one of the model's. Left out: the `solver` that /models tells, or its "
        "`stepped_solver` where several steps are asked for.",
    )


class GenerateParams(PictureParams):
    """What /generate takes."""


class CompleteParams(PictureParams):
    """What /complete takes besides an image."""

    keep: Literal["top", "bottom", "left", "right"] | None = Field(
        default=None, description="The half that is known. Left out: what the picture says, or else top."
    )
