"""Images as arrays: decoding and preprocessing, tile geometry, heat maps, perturbations.

Imports Pillow and numpy, never torch. Read `preprocess.py` first; its functions are this package's face.
"""

from ncml.images.preprocess import (
    KEEPS,
    MAX_BYTES,
    MAX_PIXELS,
    PREPROCESSING,
    Keep,
    fit,
    grid,
    half_canvas,
    open_image,
    to_png,
    to_rgb,
)

__all__ = [
    "KEEPS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "PREPROCESSING",
    "Keep",
    "fit",
    "grid",
    "half_canvas",
    "open_image",
    "to_png",
    "to_rgb",
]
