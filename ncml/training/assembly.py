"""The configuration of a run: its recipe, what the caller changes of it, and what an earlier run or a model gives it.

Does not import torch, so that the command line refuses a wrong option at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ncml import recipes
from ncml.config import SHAPE, Config
from ncml.errors import InputError
from ncml.network.sde import largest_noise

DETECTOR = recipes.detector.__name__
"""The recipe whose network is that of the weights it starts with."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a run changes of its recipe; None keeps the recipe's."""

    size: tuple[int, int] | None = None
    """Height and width in pixels."""
    process: Literal["vp", "ve", "sub-vp"] = "vp"
    noise: float | Literal["paper"] = 10.0
    """The largest noise in grey levels, or the end time that the paper states for the process."""
    objective: Literal["ncml", "mle"] = "ncml"
    batch_size: int | None = None
    learning_rate: float | None = None
    """Of Adam; Muon's changes in proportion."""
    precision: Literal["fp32", "bf16"] | None = None
    constant_rate: bool = False
    """Whether the learning rate does not fall at the end."""
    crop: int | None = None
    """Side in pixels of the squares to train on."""


def assemble(recipe: str, changes: Changes) -> Config:
    """Return the configuration of a new run; raise `InputError` for a recipe or a value that cannot be used."""
    config = recipes.by_name(recipe)
    model, training = config.model, config.training
    if changes.size is not None:
        height, width = changes.size
        model = replace(model, height=height, width=width)
    adam_rate, muon_rate = changes.learning_rate or training.learning_rate, training.muon_learning_rate
    training = replace(
        training,
        batch_size=changes.batch_size or training.batch_size,
        learning_rate=adam_rate,
        muon_learning_rate=muon_rate and muon_rate * adam_rate / training.learning_rate,
        cooldown_fraction=0.0 if changes.constant_rate else training.cooldown_fraction,
        precision=changes.precision or training.precision,
        crop=changes.crop or training.crop,
    )
    config = replace(config, model=model, training=training)
    if changes.noise == "paper":
        config = recipes.paper_literal(config, changes.process)
    else:
        config = replace(config, sde=replace(config.sde, kind=changes.process, grey_levels=changes.noise))
    if changes.objective == "mle":
        config = recipes.maximum_likelihood(config)
    if changes.crop is not None and changes.crop < (side := min(model.height, model.width)):
        raise InputError("crop", f"--crop must be at least {side}, the model's size in pixels, not {changes.crop}.")
    largest_noise(config.sde)  # refuses a noise that the SDE does not reach
    return config


def continue_from(config: Config, changes: Changes, saved: Config | None, initial: Config | None) -> Config:
    """Return the configuration with what is kept of the run that is continued, and of the weights it starts with.

    saved: of the run that is resumed or branched from. initial: of the model whose weights a new run starts with.
    """
    if saved is not None:
        earlier = saved.training
        training = replace(config.training, muon_weight_decay=earlier.muon_weight_decay)
        if changes.learning_rate is None:
            adam_rate, muon_rate = earlier.learning_rate, earlier.muon_learning_rate
            training = replace(training, learning_rate=adam_rate, muon_learning_rate=muon_rate)
        if changes.precision is None:
            training = replace(training, precision=earlier.precision)
        config = replace(config, training=training)
    start = initial or saved
    if config.recipe == DETECTOR and start is not None:
        shape = {name: getattr(start.model, name) for name in SHAPE}
        config = replace(config, model=replace(config.model, **shape), generates=start.generates)
    return config
