"""Initialise a network with the weights of another model: fine-tuning on other images, classes or another size."""

from __future__ import annotations

import torch

from ncml.config import SHAPE, Config, LevelConfig
from ncml.errors import InputError
from ncml.network.ncpn import NCPN

LABEL, ORIENTATION, BIAS = (f"conditioning.{name}" for name in ("label.weight", "orientation.weight", "noise.2.bias"))


def check_shape(config: Config, source: Config, name: str) -> None:
    """Raise InputError if a network of `config` cannot start with the weights of `source`, the model of this name."""
    for setting in SHAPE:
        value, source_value = getattr(config.model, setting), getattr(source.model, setting)
        if value != source_value:
            raise InputError(
                "init-from",
                f"the model {name} has {setting} {_format(source_value)} and the recipe {config.recipe} has "
                f"{_format(value)}: use the recipe that it was trained with, {source.recipe}.",
            )


def start_from(network: NCPN, source: NCPN, name: str) -> None:
    """Copy the weights of `source` to `network`, so that both compute the same under the null class.

    A class of the same name keeps its embedding, any other starts as the null class. Conditions that only `source` has
    are fixed at the null class and the identity; those that only `network` has have no effect at first.

    name: of the source, for the InputError raised on another shape.
    """
    config, source_config = network.config, source.config
    check_shape(config, source_config, name)
    state = dict(source.state_dict())
    zeros_1E = torch.zeros(1, config.model.embedding, device=source.head.weight.device)
    label_NE, orientation_NE = state.pop(LABEL, zeros_1E), state.pop(ORIENTATION, zeros_1E)
    if network.conditioning.label is None:
        state[BIAS] = state[BIAS] + label_NE[-1]
    else:
        index = {class_name: i for i, class_name in enumerate(source_config.model.classes)}
        state[LABEL] = label_NE[[*(index.get(class_name, -1) for class_name in config.model.classes), -1]]
    if network.conditioning.orientation is None:
        state[BIAS] = state[BIAS] + orientation_NE[0]
    else:
        state[ORIENTATION] = orientation_NE.expand_as(network.conditioning.orientation.weight)
    network.load_state_dict(state)


def _format(value: object) -> str:
    """Format levels as width x blocks, with an a for attention, and anything else as it prints."""
    levels = [level for level in value if isinstance(level, LevelConfig)] if isinstance(value, tuple) else []
    return "/".join(f"{level.width}x{level.blocks}{'a' * level.attention}" for level in levels) or str(value)
