"""The model card of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version

from ncml.data.dataset import Dataset
from ncml.network.sde import noise_at_end
from ncml.training.provenance import duration, machine
from ncml.training.trainer import Trainer


@dataclass(frozen=True)
class Measurement:
    """The bits/dim of averaged weights at t = 0."""

    bpd: float
    standard_error: float
    """Standard error over the images, if they are independent; NaN for a single one."""
    split: str
    """Split of the images: "test" or "held-out"."""
    count: int
    """Number of images or of random crops."""


def model_card(trainer: Trainer, name: str, command: str, data: Dataset, measured: Measurement) -> str:
    """Return a card, in Markdown, with what was done and measured and nothing else."""
    config = trainer.config
    contents = data.inventory.lines(config.model.height, config.model.width, data.crops, published=True)
    classes = [f"{label} ({data.inventory.classes[label]:,})" for label in config.model.classes]
    noise = noise_at_end(config.sde)
    size = trainer.group.world_size
    processes = f"{size} processes, each on " if size > 1 else ""
    unit = "images" if data.crops == 1 else "random crops"
    parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
    left_out = trainer.skipped_steps * config.training.batch_size
    without_effect = f", {left_out:,} of them in steps without effect" if left_out else ""
    error = measured.standard_error
    is_known = data.crops == 1 and not math.isnan(error)  # crops of one image resemble each other
    uncertainty = f" (standard error {error:.2g})" if is_known else ""
    began_with = f"- Began with the weights of: {trainer.starting_model}\n" if trainer.starting_model else ""
    curve = "\n".join(
        f"| {row['images']:,.0f} | {row['train_bpd']:.3f} | {row['held_out_bpd']:.3f} |" for row in trainer.history
    )
    return f"""# {name}

NCPN of {parameters:,} parameters (recipe `{config.recipe}`) for images of height {config.model.height} and width
{config.model.width}, trained by
{"noise conditional maximum likelihood" if config.is_noise_conditional else "maximum likelihood"}
({config.sde.kind.upper()} SDE, noise up to {noise:.3g} grey levels,
{config.training.clean_probability:.0%} of the objective's mass at t = 0).

- Command: `{command}`
- Data: {"; ".join(contents)}
- Trained on: {len(trainer.data) // data.crops:,} of {len(data) // data.crops:,} images (the training part),
  {trainer.images_seen:,} {unit} seen{without_effect}
{began_with}- Wall time: {duration(trainer.seconds)} on {processes}{machine(trainer.device)}
- Classes: {", ".join(classes) or "none"}
- Orientations: {"all four: completes every half" if config.model.orientations else "identity: completes the top half"}
- **{measured.bpd:.4f} bits/dim**{uncertainty} at t = 0 on {measured.count:,} {measured.split} {unit}, averaged weights,
  no class given
- Written: {date.today().isoformat()}, ncml {version("ncml")}

Learning curve (training loss over all noise levels; held-out clean images, averaged weights; bits/dim):

| images | training | held-out |
|---|---|---|
{curve}
"""
