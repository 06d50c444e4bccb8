"""Positions spread over an order. Does not import torch."""

import itertools
import random

import numpy as np
from numpy.typing import NDArray


def evenly_spaced(count: int, most: int) -> NDArray[np.int64]:
    """Return `most` of `count` positions, evenly spaced from the first one on, or all."""
    number = min(count, most)
    return np.arange(number) * count // max(1, number)


def one_of_each_block(count: int, blocks: int) -> NDArray[np.int64]:
    """Return one position of each of `blocks` consecutive blocks of `count` positions, at random, ascending.

    They are spread over the whole order, but follow no period in it: of images that two cameras took in turn, every
    second one is of one camera. Equal numbers give equal positions, with any version of Python.
    """
    edges = [block * count // blocks for block in range(blocks + 1)]
    shares = random.Random(count)
    positions = [first + int(shares.random() * (after - first)) for first, after in itertools.pairwise(edges)]
    return np.array(positions, np.int64)
