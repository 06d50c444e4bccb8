"""Starting a run from the weights of another model: fine-tuning on other pictures, other classes, another size."""

from __future__ import annotations

import torch

from ncml.config import LevelConfig
from ncml.errors import InputError
from ncml.network.ncpn import NCPN

SHAPE = ("levels", "mixtures", "heads", "embedding")
"""What two models must share for one to start from the other's weights; sizes, classes and noise may differ."""

LABEL, ORIENTATION, BIAS = (f"conditioning.{name}" for name in ("label.weight", "orientation.weight", "noise.2.bias"))


def start_from(network: NCPN, source: NCPN, name: str) -> None:
    """Give `network` the weights of `source`, so that under the null class both compute the same.

    A class of the same name keeps its embedding, any other begins as the null class. What only `source` is conditioned
    on is fixed at the null class and the identity; what only `network` is conditioned on has no effect at first.

    name: of the source, for the InputError on another shape.
    """
    ours, theirs = network.config, source.config
    for part in SHAPE:
        mine, its = getattr(ours.model, part), getattr(theirs.model, part)
        if mine != its:
            raise InputError(
                "init-from",
                f"the model {name} has {part} {_plain(its)} and the recipe {ours.recipe} has {_plain(mine)}: "
                f"take the recipe that it was trained with, {theirs.recipe}.",
            )
    state = dict(source.state_dict())
    none_1E = torch.zeros(1, ours.model.embedding, device=source.head.weight.device)
    label_NE, turn_NE = state.pop(LABEL, none_1E), state.pop(ORIENTATION, none_1E)
    if network.conditioning.label is None:
        state[BIAS] = state[BIAS] + label_NE[-1]
    else:
        index = {known: i for i, known in enumerate(theirs.model.classes)}
        state[LABEL] = label_NE[[*(index.get(known, -1) for known in ours.model.classes), -1]]
    if network.conditioning.orientation is None:
        state[BIAS] = state[BIAS] + turn_NE[0]
    else:
        state[ORIENTATION] = turn_NE.expand_as(network.conditioning.orientation.weight)
    network.load_state_dict(state)


def _plain(value: object) -> str:
    """Levels as width x blocks, with an a for attention; anything else as it prints."""
    levels = value if isinstance(value, tuple) else ()
    each = [f"{v.width}x{v.blocks}{'a' * v.attention}" for v in levels if isinstance(v, LevelConfig)]
    return "/".join(each) or str(value)
