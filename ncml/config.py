"""The configuration of a network and its training: frozen dataclasses, which `ncml.recipes` fills."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, TypeAdapter

from ncml.errors import InputError

SHAPE = ("levels", "mixtures", "heads", "embedding")
"""Settings that a model must share with the one whose weights it starts with; sizes, classes and noise may differ."""

SOLVERS = {"tweedie": 1, "euler-maruyama": 20, "heun": 10, "predictor-corrector": 10}
"""Refinement solvers and their default number of steps."""

DEFAULT_SOLVER = "tweedie"
"""It takes one evaluation of the score function; the others take about twenty, and their images look no better at the
bundled model's size."""

STEPPED_SOLVER = "euler-maruyama"
"""The default solver for more than one step: the reverse SDE."""

MAX_BLOCKS = 512
"""Gated blocks of all levels together: a network is built before its weights are compared with it."""

# What a model folder may contain. The bounds are far beyond any useful network, and small enough to build it at once.
Side = Annotated[int, Field(ge=1, le=1024)]
Width = Annotated[int, Field(ge=1, le=4096)]
Count = Annotated[int, Field(ge=1, le=10**15)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, le=1000)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One resolution of the network."""

    width: Width
    """Filters."""
    blocks: Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
    """Gated blocks of each stream going up; coming down there is one more, except at the lowest resolution."""
    attention: bool = True
    """Axial attention after each gated block."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network's shape."""

    height: Side = 32
    width: Side = 32
    """Pixels; each divisible by 2 to the power of the number of levels less one."""
    levels: Annotated[tuple[LevelConfig, ...], Field(min_length=1, max_length=10)]
    """From full resolution down; each halves the one before."""
    mixtures: Annotated[int, Field(ge=1, le=1000)] = 10
    """Logistic components for each pixel."""
    heads: Width = 8
    """Attention heads; they divide every level's width."""
    classes: Annotated[tuple[Name, ...], Field(max_length=10**5)] = ()
    """Class names; none makes an unconditional model."""
    orientations: bool = False
    """Conditioned on an orientation, so that every half of an image is a prefix in some raster order."""
    embedding: Annotated[int, Field(ge=2, le=8192, multiple_of=2)] = 256
    """Width of the conditioning vector (noise level, class, orientation)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        stride = self.stride
        if not self.levels or self.height % stride or self.width % stride or min(self.height, self.width) < stride:
            raise InputError("size", f"height and width must be multiples of {stride}, not {self.height}x{self.width}")
        if any(level.attention and level.width % self.heads for level in self.levels):
            raise InputError("heads", f"the {self.heads} heads must divide the width of every level with attention")
        if sum(level.blocks for level in self.levels) > MAX_BLOCKS:
            raise InputError("blocks", f"the levels must have at most {MAX_BLOCKS} blocks together")

    @property
    def stride(self) -> int:
        """Rows, and columns, of the image for each of the lowest resolution."""
        return 2 ** (len(self.levels) - 1)


@dataclass(frozen=True, kw_only=True)
class SDEConfig:
    """The SDE that noises images, and its end time."""

    kind: Literal["ve", "vp", "sub-vp"] = "vp"
    grey_levels: Annotated[float, Field(gt=0, le=10_000)] = 10.0
    """Standard deviation of the noise at T on the 0..255 scale; T is solved from it."""
    end_time: Annotated[float | None, Field(gt=0, le=1)] = None
    """T itself; overrides `grey_levels`."""
    beta_min: Annotated[float, Field(ge=1e-6, le=1000)] = 0.1
    beta_max: Annotated[float, Field(ge=1e-6, le=1000)] = 20.0
    sigma_min: Annotated[float, Field(ge=1e-6, le=1000)] = 0.01
    sigma_max: Annotated[float, Field(ge=1e-6, le=1000)] = 50.0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The objective and the optimiser."""

    clean_probability: Share = 0.25
    """Probability of t = 0 under mu (Eq. 8 of the paper), the rest uniform on (0, T]; 1 is maximum likelihood."""
    class_dropout: Share = 0.1
    """Probability that an image's class is withheld, which trains the unconditional model."""
    orientation_probability: Share = 0.25
    """Probability of an orientation other than the identity, for a model conditioned on it."""
    flip: bool = True
    """Mirror half of the images left to right."""
    grey_share: Share = 0.0
    """Probability that an image is made grey: a model that shall also judge grey images has to know them."""
    total_images: Count = 100_000_000
    """Length of the run in images; an image counts each time it is drawn."""
    batch_size: Count = 32
    learning_rate: Rate = 2e-3
    """Learning rate of Adam."""
    muon_learning_rate: Rate | None = None
    """Learning rate of Muon for the matrices of the network's body (`ncml.training.optimizer`); None: Adam only."""
    muon_weight_decay: Share = 0.0
    """Share of the weights that Muon trains, times its learning rate, by which each step makes them smaller."""
    embedding_lr_multiplier: Rate = 1.0
    """The learning rate of class and orientation embeddings, as a multiple of Adam's."""
    warmup_images: Annotated[int, Field(ge=0, le=10**15)] = 20_000
    """Images over which the learning rate rises linearly from 0."""
    cooldown_fraction: Share = 0.3
    """Share of the run, at its end, over which the learning rate falls linearly to 0."""
    betas: tuple[Share, Share] = (0.9, 0.99)
    """Decay rates of Adam's moving averages."""
    ema_images: Annotated[float, Field(gt=0, le=1e15)] = 32_000
    """Horizon of the weights' moving average in images: its decay per step is 1 - batch_size / ema_images, or 0."""
    grad_clip: Annotated[float, Field(gt=0, le=1e15)] = 1.0
    """Largest global norm of the gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network's body; the head and the likelihood are always fp32."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    split: Annotated[int, Field(ge=8, le=1000)] = 50
    """Of this many images, in the dataset's order, 7 are held out: 2 to estimate statistics, and 5 to rank."""
    crop: Side | None = None
    """Side in pixels of the random squares that are cut from each image; None: whole images."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A complete recipe."""

    recipe: Name
    model: ModelConfig
    sde: SDEConfig = field(default_factory=SDEConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    generates: bool = True
    """Whether it is offered for generation; the base of detectors scores only. The version does not depend on it."""

    @property
    def is_noise_conditional(self) -> bool:
        """Whether the model is trained on noised images, so that it can sample at t > 0 and refine."""
        return self.training.clean_probability < 1

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """Read the result of `to_json`; raise TypeError, LookupError or ValueError on anything else.

        A value of another type or out of range is a ValueError that names it.
        """
        try:
            # Only to check: the values stay as they are stored, because the model's version hashes them.
            _CHECKS.validate_json(json.dumps(data), strict=True)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{place}: {message[0].lower()}{message[1:]}" if place else message) from error
        model = dict(data["model"])
        model["levels"] = tuple(LevelConfig(**level) for level in model["levels"])
        model["classes"] = tuple(model["classes"])
        training = dict(data["training"])
        training["betas"] = tuple(training["betas"])
        return cls(
            recipe=data["recipe"],
            model=ModelConfig(**model),
            sde=SDEConfig(**data["sde"]),
            training=TrainingConfig(**training),
            generates=data.get("generates", True),
        )


_CHECKS = TypeAdapter(Config)
