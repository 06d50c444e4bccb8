"""Format 1 of model folders and training states: the earlier names of the configuration's fields.

A model's version hashes its configuration as format 1 spells it, so that folders keep their versions.
"""

from __future__ import annotations

from typing import Any

TRAINING_NAMES = {
    "clean_mass": "clean_probability",
    "null_class": "class_dropout",
    "turned": "orientation_probability",
    "images": "total_images",
    "embedding_rate": "embedding_lr_multiplier",
    "warmup": "warmup_images",
    "cooldown": "cooldown_fraction",
    "clip": "grad_clip",
}
"""Fields of `TrainingConfig` that were renamed: the name in format 1, and the current one."""

ADDED: dict[str, float | None] = {
    "muon_learning_rate": None,
    "muon_weight_decay": 0.0,
    "embedding_rate": 1.0,
    "split": 50,
    "crop": None,
    "grey_share": 0.0,
}
"""Fields that earlier folders lack, with the value that their absence means; format 1 omits them at that value."""


def upgrade(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a configuration of format 1 for `Config.from_json`; ArithmeticError, LookupError or TypeError if damaged.

    Format 1 stores the decay of the moving average per step, today's configuration its horizon in images.
    """
    training = ADDED | config["training"]
    horizon = training["batch_size"] / (1 - training.pop("ema"))
    training["ema_images"] = round(horizon) if abs(horizon - round(horizon)) < 1e-6 else horizon
    sde = dict(config["noise"])
    return {
        "recipe": config["recipe"],
        "model": config["model"],
        "sde": {"kind": sde.pop("process"), **sde},
        "training": {TRAINING_NAMES.get(name, name): value for name, value in training.items()},
    }


def downgrade(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite the result of `Config.to_json` as format 1 spells it: the inverse of `upgrade`, bit for bit."""
    earlier_names = {new: old for old, new in TRAINING_NAMES.items()}
    training = {earlier_names.get(name, name): value for name, value in config["training"].items()}
    # A decay written with up to 12 decimals is restored exactly.
    training["ema"] = round(1 - training["batch_size"] / training.pop("ema_images"), 12)
    training = {name: value for name, value in training.items() if name not in ADDED or value != ADDED[name]}
    sde = dict(config["sde"])
    return {
        "recipe": config["recipe"],
        "model": config["model"],
        "noise": {"process": sde.pop("kind"), **sde},
        "training": training,
    }
