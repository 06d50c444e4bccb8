"""The configuration of a network and its training: frozen dataclasses, and the recipes that fill them.

A recipe is a function that returns a complete `Config`; a new experiment is a new recipe rather than a new flag.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from ncml.errors import InputError

SOLVERS = {"tweedie": 1, "euler-maruyama": 20, "heun": 10, "predictor-corrector": 10}
"""Refinement solvers and their default number of steps."""

DEFAULT_SOLVER = "tweedie"
"""One score evaluation; the others cost twenty and look no better at the bundled model's size."""

STEPPED_SOLVER = "euler-maruyama"
"""What is meant by several steps where no solver is named: the reverse SDE."""

SAMPLING_RANGES = {"start_noise": (0, 255), "steps": (1, 1000), "guidance": (0.5, 10), "temperature": (0.5, 1.5)}
"""Smallest and largest value of the numerical sampling options that a model folder may recommend."""

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One resolution of the network."""

    width: int
    """Filters."""
    blocks: int
    """Gated blocks of each stream going up; coming down there is one more, except at the lowest resolution."""
    attention: bool = True
    """Axial attention after each gated block."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network's shape."""

    height: int = 32
    width: int = 32
    """Pixels; each divisible by 2 to the power of the number of levels less one."""
    levels: tuple[LevelConfig, ...]
    """From full resolution down; each halves the one before."""
    mixtures: int = 10
    """Logistic components for each pixel."""
    heads: int = 8
    """Attention heads; they divide every level's width."""
    classes: tuple[str, ...] = ()
    """Class names; none makes an unconditional model."""
    orientations: bool = False
    """Conditioned on an orientation, so that every half of an image is a prefix in some raster order."""
    embedding: int = 256
    """Width of the conditioning vector (noise level, class, orientation)."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        stride = 2 ** (len(self.levels) - 1)
        if not self.levels or self.height % stride or self.width % stride or min(self.height, self.width) < stride:
            raise InputError("size", f"height and width must be multiples of {stride}, not {self.height}x{self.width}")
        if any(level.attention and level.width % self.heads for level in self.levels):
            raise InputError("heads", f"the {self.heads} heads must divide the width of every level with attention")


@dataclass(frozen=True, kw_only=True)
class SDEConfig:
    """The SDE that noises images, and its end time."""

    kind: Literal["ve", "vp", "sub-vp"] = "vp"
    grey_levels: float = 10.0
    """Standard deviation of the noise at T on the 0..255 scale; T is solved from it."""
    end_time: float | None = None
    """T given literally; overrides `grey_levels`."""
    beta_min: float = 0.1
    beta_max: float = 20.0
    sigma_min: float = 0.01
    sigma_max: float = 50.0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The objective and the optimiser."""

    clean_probability: float = 0.25
    """Probability of t = 0 under mu (Eq. 8 of the paper), the rest uniform on (0, T]; 1 is maximum likelihood."""
    class_dropout: float = 0.1
    """Probability that an image's class is withheld, which trains the unconditional model."""
    orientation_probability: float = 0.25
    """Probability of an orientation other than the identity, for a model conditioned on it."""
    flip: bool = True
    """Mirror half of the images left to right."""
    total_images: int = 100_000_000
    """Length of the run in images; an image counts each time it is drawn."""
    batch_size: int = 32
    learning_rate: float = 2e-3
    """Of Adam."""
    muon_learning_rate: float | None = None
    """Of Muon, which trains the matrices of the network's body (`ncml.training.optimizer`); None: Adam trains all."""
    embedding_lr_multiplier: float = 1.0
    """The learning rate of class and orientation embeddings, as a multiple of Adam's."""
    warmup_images: int = 20_000
    """Images over which the learning rate rises linearly from 0."""
    cooldown_fraction: float = 0.3
    """Share of the run, at its end, over which the learning rate falls linearly to 0."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of Adam."""
    ema_images: float = 32_000
    """Horizon of the weights' moving average in images: its decay per step is 1 - batch_size / ema_images."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network's body; the head and the likelihood are always fp32."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """A complete recipe."""

    recipe: str
    model: ModelConfig
    sde: SDEConfig = field(default_factory=SDEConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """Read the result of `to_json`; raise TypeError, LookupError or ValueError on anything else."""
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
        )


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """The sampling options that a model recommends, chosen by measurement; None: the library's default."""

    start_noise: float | None = None
    """Grey levels, from 0 to the noise at T."""
    solver: str | None = None
    steps: int | None = None
    guidance: float | None = None
    """Weight of the class against no class, .5 to 10; 1 is the model as trained."""
    temperature: float | None = None
    """.5 to 1.5; 1 is the model as trained."""

    @classmethod
    def from_json(cls, data: object) -> SamplingDefaults:
        """Read a JSON object; raise InputError naming the option whose value is unknown or out of range."""
        names = [option.name for option in fields(cls)]
        if not isinstance(data, dict) or not data.keys() <= set(names):
            raise InputError("sampling", f"sampling must be an object with any of {', '.join(names)}")
        for name, value in data.items():
            if name == "solver":
                if not isinstance(value, str) or value not in SOLVERS:
                    raise InputError(name, f"sampling.solver must be one of {', '.join(SOLVERS)}, not {value!r}")
                continue
            low, high = SAMPLING_RANGES[name]
            kinds, noun = ((int,), "an integer") if name == "steps" else ((int, float), "a number")
            if type(value) not in kinds or not low <= value <= high:
                raise InputError(name, f"sampling.{name} must be {noun} from {low:g} to {high:g}, not {value!r}")
        return cls(**data)


def smoke() -> Config:
    """Seconds on a CPU: for tests and for trying the machinery. 8x8, two classes."""
    return Config(
        recipe="smoke",
        model=ModelConfig(
            height=8,
            width=8,
            levels=tuple(LevelConfig(width=8, blocks=blocks) for blocks in (1, 0, 1)),
            mixtures=3,
            heads=2,
            classes=("dark", "light"),
            orientations=True,
            embedding=16,
        ),
        training=TrainingConfig(total_images=2_048, warmup_images=256, ema_images=320),
    )


def cifar10_small() -> Config:
    """The bundled model: trains on one CPU core, scores an image in milliseconds."""
    return Config(
        recipe="cifar10_small",
        model=ModelConfig(
            levels=(
                LevelConfig(width=32, blocks=1, attention=False),
                LevelConfig(width=32, blocks=1, attention=False),
                LevelConfig(width=80, blocks=1, attention=True),
            ),
            heads=2,
            classes=CIFAR10_CLASSES,
            orientations=True,
        ),
        training=_muon(TrainingConfig()),
    )


def cifar10_base() -> Config:
    """The successor of the bundled model, in training: wider at 16x16 and 8x8, 4.25 million parameters.

    At the learning rates of `cifar10_small` its loss rises by tens of bits after 12,000 images.
    """
    small = cifar10_small()
    widths = (32, 64, 128)
    return replace(
        small,
        recipe="cifar10_base",
        model=replace(small.model, levels=tuple(LevelConfig(width=w, blocks=1, attention=w == 128) for w in widths)),
        training=replace(small.training, batch_size=32, learning_rate=1.25e-3, muon_learning_rate=2.5e-3),
    )


def _muon(training: TrainingConfig) -> TrainingConfig:
    """Set the optimiser up as `docs/training.md` describes and measures it."""
    return replace(
        training,
        batch_size=16,
        learning_rate=2e-3,
        muon_learning_rate=4e-3,
        embedding_lr_multiplier=5.0,
        warmup_images=5_000,
        precision="bf16",
    )


def cifar10_tiny() -> Config:
    """For comparisons that need many runs, as the paper's family of objectives does: four times as fast to train.

    Above the lowest resolution, 4x4, it has only the blocks that come down, and no attention.
    """
    widths = (16, 24, 48, 64)
    return Config(
        recipe="cifar10_tiny",
        model=ModelConfig(
            levels=tuple(LevelConfig(width=w, blocks=int(w == 64), attention=w == 64) for w in widths),
            mixtures=4,
            heads=1,
            classes=CIFAR10_CLASSES,
            embedding=64,
        ),
        training=_muon(TrainingConfig(total_images=200_000)),
    )


def paper_cifar10() -> Config:
    """The paper's NCPN for CIFAR-10 (Appendix A.2): PixelCNN++'s hyperparameters with axial attention, about 73M."""
    return Config(
        recipe="paper_cifar10",
        model=ModelConfig(
            levels=(LevelConfig(width=160, blocks=5),) * 3,
            classes=CIFAR10_CLASSES,
            embedding=512,
            dropout=0.25,
        ),
        training=TrainingConfig(
            total_images=500_000 * 64,
            batch_size=64,
            learning_rate=1e-3,
            warmup_images=64_000,
            betas=(0.95, 0.9995),
            ema_images=128_000,
            precision="bf16",
        ),
    )


def paper_imagenet64() -> Config:
    """The paper's NCPN for ImageNet at 64x64: no dropout, class names taken from the data."""
    return _at_64(paper_cifar10(), "paper_imagenet64")


def paper_celeba64() -> Config:
    """The paper's NCPN for CelebA at 64x64: no dropout, unconditional."""
    return _at_64(paper_cifar10(), "paper_celeba64")


def _at_64(config: Config, recipe: str) -> Config:
    return replace(config, recipe=recipe, model=replace(config.model, height=64, width=64, classes=(), dropout=0.0))


def paper_literal(config: Config, sde: Literal["ve", "vp", "sub-vp"]) -> Config:
    """The recipe with the paper's literal T (VE .5, VP .1, sub-VP .025) under the usual SDE constants.

    On [-1, 1] data that is noise of 90, 41 and 1.1 grey levels, although the paper's text says about 10.
    """
    ends = {"ve": 0.5, "vp": 0.1, "sub-vp": 0.025}
    return replace(config, sde=SDEConfig(kind=sde, end_time=ends[sde]))


def maximum_likelihood(config: Config) -> Config:
    """The recipe trained by plain maximum likelihood: mu puts all of its mass at t = 0."""
    return replace(config, training=replace(config.training, clean_probability=1.0))


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (smoke, cifar10_tiny, cifar10_small, cifar10_base, paper_cifar10, paper_imagenet64, paper_celeba64)
}


def recipe(name: str) -> Config:
    """The recipe of that name; InputError with the nearest name on a typo."""
    if name in RECIPES:
        return RECIPES[name]()
    nearest = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(RECIPES)}."
    raise InputError("recipe", f"there is no recipe {name!r}: {hint}")
