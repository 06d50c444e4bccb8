"""ncml: exact likelihoods, out-of-distribution verdicts and images from a noise conditional pixel network.

>>> import ncml
>>> model = ncml.load("cifar10")
>>> model.score("photo.jpg")[0].bpd
>>> model.generate(4, classes="cat", seeds=7)
>>> model.complete("half.png", keep="top")
>>> ncml.adapt("good", out="models/detector")

This package does not import HTTP libraries, Redis or RQ. `import ncml` does not import torch; `load` does.
"""

from typing import TYPE_CHECKING, Any

from ncml.errors import InputError, ModelError, NcmlError, NotAnImage, TooLarge, TrainingError

if TYPE_CHECKING:
    from ncml.calibration.adapting import adapt
    from ncml.model import Model, Score, load

__all__ = [
    "InputError",
    "Model",
    "ModelError",
    "NcmlError",
    "NotAnImage",
    "Score",
    "TooLarge",
    "TrainingError",
    "adapt",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in {"Model", "Score", "load"}:
        from ncml import model

        return getattr(model, name)
    if name == "adapt":
        from ncml.calibration import adapting

        return adapting.adapt
    raise AttributeError(f"module 'ncml' has no attribute {name!r}")
