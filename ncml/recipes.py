"""The recipes: functions that return a complete `Config`. A new experiment is a new recipe rather than a new flag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from ncml.config import Config, LevelConfig, ModelConfig, SDEConfig, TrainingConfig
from ncml.errors import InputError, suggestion

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def smoke() -> Config:
    """For tests, and for trying the pipeline: 8x8, two classes, seconds on a CPU."""
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
    """Less than half the size of the bundled model; trains on one CPU core, and scores an image in milliseconds."""
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
    """The bundled model: as `cifar10_small`, but wider at 16x16 and 8x8; 4.25 million parameters.

    At the learning rates of `cifar10_small` its loss rises by tens of bits after 12,000 images.
    """
    small = cifar10_small()
    widths = (32, 64, 128)
    return replace(
        small,
        recipe="cifar10_base",
        model=replace(small.model, levels=tuple(LevelConfig(width=w, blocks=1, attention=w == 128) for w in widths)),
        training=replace(
            small.training, batch_size=32, learning_rate=1.25e-3, muon_learning_rate=2.5e-3, muon_weight_decay=0.1
        ),
    )


def _muon(training: TrainingConfig) -> TrainingConfig:
    """Return the settings with Muon as `docs/training.md` describes and measures it."""
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
    """For comparisons that need many runs, as the paper's family of objectives does: about 3.4 times as fast to train.

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


def detector() -> Config:
    """For defects in large images: trains on random crops at the scale of tiles, from the weights of another model.

    The noise levels are those of the SDE, by default as in the bundled model; the view `peak` is taken at the second,
    2.5 grey levels. 20,000 images take about 17 minutes of a core with the bundled model's network.
    """
    small = cifar10_small()
    training = replace(
        small.training,
        total_images=20_000,
        learning_rate=1e-3,
        muon_learning_rate=2e-3,
        warmup_images=500,
        ema_images=2_000,
        crop=128,
    )
    return replace(
        small, recipe="detector", model=replace(small.model, classes=(), orientations=False), training=training
    )


def detector_base() -> Config:
    """The base of detectors for images of any size: 78 thousand parameters, 250 images per second of a core to train.

    Without attention, one pass covers an image of any size. A third of its training images are made grey, because
    detectors judge grey images too. It only scores: its images would show nothing.
    """
    widths = (8, 16, 16)
    return Config(
        recipe="detector_base",
        model=ModelConfig(
            levels=tuple(
                LevelConfig(width=width, blocks=int(level == 2), attention=False) for level, width in enumerate(widths)
            ),
            mixtures=2,
            heads=1,
            embedding=64,
        ),
        training=replace(
            _muon(TrainingConfig(total_images=200_000)), batch_size=32, grey_share=1 / 3, precision="fp32"
        ),
        generates=False,
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
    """The paper's NCPN for CelebA at 64x64: no dropout; unconditional if the data has no classes."""
    return _at_64(paper_cifar10(), "paper_celeba64")


def _at_64(config: Config, recipe: str) -> Config:
    return replace(config, recipe=recipe, model=replace(config.model, height=64, width=64, classes=(), dropout=0.0))


def paper_literal(config: Config, sde: Literal["ve", "vp", "sub-vp"]) -> Config:
    """Return the configuration with the paper's literal T (VE .5, VP .1, sub-VP .025) under the usual SDE constants.

    On [-1, 1] data that is noise of 90, 41 and 1.1 grey levels, although the paper's text says about 10.
    """
    ends = {"ve": 0.5, "vp": 0.1, "sub-vp": 0.025}
    return replace(config, sde=SDEConfig(kind=sde, end_time=ends[sde]))


def maximum_likelihood(config: Config) -> Config:
    """Return the configuration for plain maximum likelihood: mu puts all of its mass at t = 0."""
    return replace(config, training=replace(config.training, clean_probability=1.0))


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        *(smoke, cifar10_tiny, cifar10_small, cifar10_base, detector, detector_base),
        *(paper_cifar10, paper_imagenet64, paper_celeba64),
    )
}


def by_name(name: str) -> Config:
    """Return the recipe of that name; raise InputError, with the nearest name, if there is none."""
    if name not in RECIPES:
        raise InputError("recipe", f"there is no recipe {name!r}{suggestion(name, list(RECIPES))}")
    return RECIPES[name]()
