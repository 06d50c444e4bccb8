"""Sample with the chosen batching on an emulated machine: prints one JSON line for each cell of the matrix.

    MKL_CBWR=AVX2 python tests/ncml/sampling/emulated.py THREADS[,THREADS] MODEL[,MODEL]

A model is `bundled` or `smallest`. A cell has the outcome of the check and the batches whose bytes differ.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import ncml
from ncml.config import Config, LevelConfig, ModelConfig
from ncml.network.ncpn import NCPN
from ncml.network.sde import end_time
from ncml.sampling.batch_invariance import GroupedSampler, choose_batching
from ncml.sampling.batching import Batching, fixed_groups
from ncml.sampling.conditions import NO_TILT, Conditions, Tilt
from ncml.sampling.sample import BatchDraws
from tests.ncml import nets

MEMBERS = [*range(17)]
BATCHES = ([0], [7], [16], [3, 9, 0], [9, 1], MEMBERS[1:])
HEIGHT = 8


def smallest() -> NCPN:
    """Return the smallest network with every part: its products have few columns."""
    levels = tuple(LevelConfig(width=width, blocks=1) for width in (6, 10))
    model = ModelConfig(height=8, width=8, levels=levels, mixtures=1, heads=2, embedding=8)
    return nets.network(Config(recipe="test", model=model), dtype=torch.float32, spread=0.03)


def bundled() -> NCPN:
    return ncml.load(Path(__file__).resolve().parents[3] / "models" / "cifar10").network


@torch.inference_mode()
def sample(network: NCPN, sampler: GroupedSampler, seeds: list[int], tilt: Tilt = NO_TILT) -> Tensor:
    """Sample the first rows of images at t > 0, before rounding could hide a difference, [B, 3, H, W]."""
    model = network.config.model
    H, W = HEIGHT, model.width
    null_classes = 2 - tilt.rows_per_image  # none with guidance, which acts on images of a class only
    class_B = torch.tensor(seeds) % (len(model.classes) + null_classes)
    conditions = Conditions(end_time(network.config.sde), class_B, torch.zeros_like(class_B), tilt)
    draws = BatchDraws(seeds, dtype=torch.float32, device=torch.device("cpu")).draw_pixels(model.mixtures, H, W)
    x_BCHW = torch.zeros(len(seeds), 3, H, W).contiguous(memory_format=torch.channels_last)
    sampler(network, x_BCHW, conditions, draws, lambda row: False)
    return x_BCHW


def find_differing(network: NCPN, batching: Batching, tilt: Tilt = NO_TILT) -> list[list[int]]:
    """Return the batches in which an image has other bytes than in the largest batch, or than in fixed groups."""

    def sample_batch(seeds: list[int]) -> Tensor:
        groups = batching.divide(seeds, rows_per_image=tilt.rows_per_image)
        return sample(network, GroupedSampler(groups), seeds, tilt)

    whole = sample_batch(MEMBERS)
    differing_batches = [seeds for seeds in BATCHES if not torch.equal(sample_batch(seeds), whole[seeds])]
    fixed = sample(network, GroupedSampler(fixed_groups(MEMBERS, tilt.rows_per_image)), MEMBERS, tilt)
    return differing_batches if torch.equal(fixed, whole) else [*differing_batches, MEMBERS]


def main(threads: str, models: str) -> None:
    for name in models.split(","):
        network = {"bundled": bundled, "smallest": smallest}[name]()
        for count in map(int, threads.split(",")):
            torch.set_num_threads(count)
            for tilt in (NO_TILT, Tilt(2.0 if network.config.model.classes else 1.0, 0.9)):
                batching = choose_batching(network, tilt=tilt)
                cell = {"model": name, "threads": count, "groups": batching.groups, "check": batching.check}
                cell |= {"tilt": str(tilt), "differing": find_differing(network, batching, tilt)}
                print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
