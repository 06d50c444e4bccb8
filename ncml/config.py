"""Everything that decides what is built and how it is trained: frozen dataclasses, and recipes that fill them.

A recipe is a function that returns a complete `Config`; a new experiment is a new recipe rather than a new flag.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ncml.errors import InputError

SOLVERS = {"tweedie": 1, "euler-maruyama": 20, "heun": 10, "predictor-corrector": 10}
"""Refinement solvers and their default number of steps."""

DEFAULT_SOLVER = "tweedie"
"""One score evaluation; the others cost twenty and look no better at the bundled model's size."""

STEPPED_SOLVER = "euler-maruyama"
"""What is meant by several steps where no solver is named: the reverse SDE."""

ADDED: dict[str, float | None] = {"muon_learning_rate": None, "embedding_rate": 1.0}
"""Fields of `TrainingConfig` that the first version of format 1 did not have, and what their absence means."""

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
class NoiseConfig:
    """The noising process and how far it goes."""

    process: Literal["ve", "vp", "sub-vp"] = "vp"
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

    clean_mass: float = 0.25
    """Probability of t = 0 under mu (Eq. 8 of the paper), the rest uniform on (0, T]; 1 is maximum likelihood."""
    null_class: float = 0.1
    """Probability that an image's class is withheld, which trains the unconditional model."""
    turned: float = 0.25
    """Probability of an orientation other than the identity, for a model conditioned on it."""
    flip: bool = True
    """Mirror half of the images left to right."""
    images: int = 100_000_000
    """How many images the run draws in all."""
    batch_size: int = 32
    learning_rate: float = 2e-3
    """Of Adam."""
    muon_learning_rate: float | None = None
    """Of Muon, which trains the matrices of the network's body (`ncml.training.optimizer`); None: Adam trains all."""
    embedding_rate: float = 1.0
    """The learning rate of class and orientation embeddings, as a multiple of Adam's."""
    warmup: int = 20_000
    """Images over which the learning rate rises linearly from 0."""
    cooldown: float = 0.3
    """Share of the run, at its end, over which the learning rate falls linearly to 0."""
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.999
    """Decay of the moving average of the weights, for each step."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network's body; the head and the likelihood are always fp32."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """A complete recipe."""

    recipe: str
    model: ModelConfig
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; what was added to format 1 is left out where it is None or 1, so that digests stay."""
        data = asdict(self)
        for name, absent in ADDED.items():
            if data["training"][name] == absent:
                del data["training"][name]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """The inverse of `to_json`; raises TypeError, KeyError or ValueError on anything else."""
        model = dict(data["model"])
        model["levels"] = tuple(LevelConfig(**level) for level in model["levels"])
        model["classes"] = tuple(model["classes"])
        training = dict(data["training"])
        training["betas"] = tuple(training["betas"])
        return cls(
            recipe=data["recipe"],
            model=ModelConfig(**model),
            noise=NoiseConfig(**data["noise"]),
            training=TrainingConfig(**training),
        )


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
        training=TrainingConfig(images=2_048, warmup=256, ema=0.9),
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


def _muon(training: TrainingConfig) -> TrainingConfig:
    """The optimiser's settings that `docs/training.md` measures as fastest on one core."""
    return replace(
        training,
        batch_size=16,
        learning_rate=2e-3,
        muon_learning_rate=4e-3,
        embedding_rate=5.0,
        warmup=5_000,
        ema=0.9995,
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
        training=_muon(TrainingConfig(images=200_000)),
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
            images=500_000 * 64,
            batch_size=64,
            learning_rate=1e-3,
            warmup=64_000,
            betas=(0.95, 0.9995),
            ema=0.9995,
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


def paper_literal(config: Config, process: Literal["ve", "vp", "sub-vp"]) -> Config:
    """The recipe with the paper's literal T (VE .5, VP .1, sub-VP .025) under the usual SDE constants.

    On [-1, 1] data that is noise of 90, 41 and 1.1 grey levels, although the paper's text says about 10.
    """
    ends = {"ve": 0.5, "vp": 0.1, "sub-vp": 0.025}
    return replace(config, noise=NoiseConfig(process=process, end_time=ends[process]))


def maximum_likelihood(config: Config) -> Config:
    """The recipe trained by plain maximum likelihood: all of mu's mass at t = 0."""
    return replace(config, training=replace(config.training, clean_mass=1.0))


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (smoke, cifar10_tiny, cifar10_small, paper_cifar10, paper_imagenet64, paper_celeba64)
}


def recipe(name: str) -> Config:
    """The recipe of that name; InputError with the nearest name on a typo."""
    if name in RECIPES:
        return RECIPES[name]()
    nearest = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(RECIPES)}."
    raise InputError("recipe", f"there is no recipe {name!r}: {hint}")
