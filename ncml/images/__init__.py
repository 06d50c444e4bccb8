"""Images as arrays: decoding and preprocessing, tile geometry, heat maps, perturbations.

Imports Pillow and numpy, never torch. Read `decoding.py` first, then `preprocess.py`.
"""

from ncml.images.decoding import MAX_BYTES, MAX_PIXELS, open_image, to_rgb
from ncml.images.encoding import grid, to_png
from ncml.images.preprocess import PREPROCESSING, open_resized, place_known_half, resize_to

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "PREPROCESSING",
    "grid",
    "open_image",
    "open_resized",
    "place_known_half",
    "resize_to",
    "to_png",
    "to_rgb",
]
