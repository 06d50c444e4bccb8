"""The arguments of `ncml.Model` for a batch of images: checked, and converted to one form. Does not import torch.

The command line checks with the same functions before it loads a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ncml.checkpoint import Description
from ncml.errors import InputError
from ncml.images import place_known_half_of, resize_to
from ncml.images.reading import Images, list_images, name_of, read_image, read_pil
from ncml.limits import MAX_SEED, Keep
from ncml.network.sde import make_sde
from ncml.options import SamplingOptions
from ncml.sampling.defaults import SamplingLimits, SamplingSettings, check_noise, resolve

Classes = str | int | None | Sequence[str | int | None]


def read_images(
    images: Images, height: int, width: int, *, preprocess: bool = True
) -> tuple[NDArray[np.uint8], list[str | None]]:
    """Return images as uint8 [B, height, width, 3], and the path of each that was read from a file.

    preprocess: crop and resize images of another size as the service does; False refuses them.

    Raises `InputError` for anything that is not an image, and if there is none.
    """
    pixels: list[NDArray[np.uint8]] = []
    paths: list[str | None] = []
    listed = list_images(images)
    for position, image in enumerate(listed):
        array = read_image(image, "images" if len(listed) == 1 else f"images[{position}]")
        if not preprocess:
            _check_size(array.shape, height, width)
        pixels.append(resize_to(array, height, width))
        paths.append(name_of(image))
    return np.stack(pixels), paths


def read_halves(
    images: Images, height: int, width: int, *, keeps: Collection[Keep], keep: Keep | None, preprocess: bool = True
) -> tuple[NDArray[np.uint8], Keep]:
    """Return images of which one half is known as uint8 [B, height, width, 3], the other half black, and that half.

    `ncml.images.place_known_half` describes how they are placed. Without `preprocess`, other sizes are refused.
    """
    if keep is not None and keep not in keeps:
        raise InputError("keep", f"keep must be {' or '.join(keeps)} for this model, not {keep!r}.")
    canvases: list[NDArray[np.uint8]] = []
    halves: list[Keep] = []
    for image in list_images(images):
        pil_image = read_pil(image)
        if not preprocess:
            _check_size((pil_image.height, pil_image.width, len(pil_image.getbands())), height, width)
        field = name_of(image) or "images"
        canvas, half = place_known_half_of(pil_image, height, width, keeps=keeps, keep=keep, field=field)
        canvases.append(canvas)
        halves.append(half)
    if len(set(halves)) > 1:
        names = " and ".join(sorted(set(halves)))
        raise InputError("keep", f"the known halves of the images differ ({names}): complete them in separate calls.")
    return np.stack(canvases), halves[0]


def _check_size(shape: tuple[int, ...], height: int, width: int) -> None:
    if shape[:2] != (height, width):
        raise InputError(
            "images",
            f"images must be uint8 [{height}, {width}, 3], not uint8 {list(shape)}: resize them, or omit "
            "preprocess=False.",
        )


def class_indices(classes: Classes, n: int, names: Sequence[str]) -> list[int]:
    """Return the class of each of n images as its index in `names`; `len(names)` stands for no class."""
    class_B = [classes] * n if isinstance(classes, str) or not isinstance(classes, Iterable) else list(classes)
    if len(class_B) != n:
        raise InputError("classes", f"there are {len(class_B)} classes for {n} images; give one for each.")
    return [_class_index(name, names) for name in class_B]


def image_seeds(seeds: int | Sequence[int], n: int) -> list[int]:
    """Return the seed of each of n images: consecutive ones from a single seed."""
    if not isinstance(seeds, Iterable):
        first = seeds if isinstance(seeds, int | np.integer) else -1  # refused below
        seeds = [first + i for i in range(n)]
    seed_B = list(seeds)
    if len(seed_B) != n:
        raise InputError("seeds", f"there are {len(seed_B)} seeds for {n} images; give one for each.")
    if not all(isinstance(seed, int | np.integer) and 0 <= seed <= MAX_SEED for seed in seed_B):
        raise InputError("seed", f"seeds must be whole numbers from 0 to {MAX_SEED}.")
    return [int(seed) for seed in seed_B]


def check_conditions(model: Description, classes: str | int | None, noise: float) -> None:
    """Raise `InputError` for a class or a noise level that a model cannot score with."""
    class_indices(classes, 1, model.classes)
    make_sde(model.config.sde).time_of(check_noise(noise, model.noise))


def sampling_limits(model: Description) -> SamplingLimits:
    """Return the ranges and the defaults of a model's sampling options."""
    return SamplingLimits(
        max_noise=model.noise,
        recommended=model.sampling,
        has_classes=bool(model.classes),
        generates=model.config.generates,
    )


def resolve_sampling(
    model: Description,
    n: int,
    classes: Classes,
    seeds: int | Sequence[int],
    options: SamplingOptions,
    sampler: str | None = None,
) -> tuple[list[int], list[int], SamplingSettings]:
    """Return the class and the seed of each of n images, and the options with their defaults; all are checked."""
    class_B = class_indices(classes, n, model.classes)
    has_class = all(index < len(model.classes) for index in class_B)
    settings = resolve(options, sampling_limits(model), has_class=has_class, sampler=sampler)
    return class_B, image_seeds(seeds, n), settings


def _class_index(name: str | int | None, names: Sequence[str]) -> int:
    if name is None:
        return len(names)
    if isinstance(name, int | np.integer) and 0 <= name < len(names):
        return int(name)
    if isinstance(name, str) and name in names:
        return names.index(name)
    remedy = f"choose from {', '.join(names)}." if names else "this model has no classes."
    raise InputError("class", f"there is no class {name!r}: {remedy}")
