"""What callers of `ncml.Model` pass for a batch, checked and in one form: images, classes and seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ncml.errors import InputError
from ncml.images import to_rgb
from ncml.limits import MAX_SEED

Classes = str | int | None | Sequence[str | int | None]
Images = NDArray[np.uint8] | Image.Image | Sequence[NDArray[np.uint8] | Image.Image]


def stack_images(images: Images, height: int, width: int) -> NDArray[np.uint8]:
    """Return images as uint8 [B, H, W, 3]; raise `InputError` for another size or type, and for none."""
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]
    arrays = [to_rgb(image) if isinstance(image, Image.Image) else np.asarray(image) for image in images]
    for pixels in arrays:
        if pixels.dtype != np.uint8 or pixels.shape != (height, width, 3):
            expected = f"uint8 [{height}, {width}, 3]"
            raise InputError("images", f"images must be {expected}, not {pixels.dtype} {list(pixels.shape)}.")
    if not arrays:
        raise InputError("images", "there is no image; pass at least one.")
    return np.stack(arrays)


def class_indices(classes: Classes, n: int, names: Sequence[str]) -> torch.Tensor:
    """Return the class of each of n images as its index among `names`, int64 [n]; their number stands for no class."""
    class_B = [classes] * n if classes is None or isinstance(classes, str | int | np.integer) else list(classes)
    if len(class_B) != n:
        raise InputError("classes", f"there are {len(class_B)} classes for {n} images; give one for each.")
    return torch.tensor([_class_index(name, names) for name in class_B])


def image_seeds(seeds: int | Sequence[int], n: int) -> list[int]:
    """Return the seed of each of n images: consecutive ones from a single seed."""
    seed_B = [seeds + i for i in range(n)] if isinstance(seeds, int | np.integer) else list(seeds)
    if len(seed_B) != n:
        raise InputError("seeds", f"there are {len(seed_B)} seeds for {n} images; give one for each.")
    if not all(isinstance(seed, int | np.integer) and 0 <= seed <= MAX_SEED for seed in seed_B):
        raise InputError("seed", f"seeds must be whole numbers from 0 to {MAX_SEED}.")
    return [int(seed) for seed in seed_B]


def _class_index(name: str | int | None, names: Sequence[str]) -> int:
    if name is None:
        return len(names)
    if isinstance(name, int | np.integer) and 0 <= name < len(names):
        return int(name)
    if isinstance(name, str) and name in names:
        return names.index(name)
    remedy = f"choose from {', '.join(names)}." if names else "this model has no classes."
    raise InputError("class", f"there is no class {name!r}: {remedy}")
