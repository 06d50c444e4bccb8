"""Images as arrays: decoding and preprocessing, tile geometry, heat maps, perturbations, alterations.

Imports Pillow and numpy, never torch. Read `decoding.py` first, then `preprocess.py`.
"""

from ncml.images.decoding import MAX_BYTES, MAX_PIXELS, SUFFIXES, is_grey, open_image, to_rgb
from ncml.images.encoding import (
    enlarge,
    format_values,
    grid,
    png_parts,
    reduced_jpeg,
    to_html,
    to_html_table,
    to_png,
)
from ncml.images.preprocess import (
    PREPROCESSING,
    open_resized,
    place_known_half,
    place_known_half_of,
    resize_to,
)

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "PREPROCESSING",
    "SUFFIXES",
    "enlarge",
    "format_values",
    "grid",
    "is_grey",
    "open_image",
    "open_resized",
    "place_known_half",
    "place_known_half_of",
    "png_parts",
    "reduced_jpeg",
    "resize_to",
    "to_html",
    "to_html_table",
    "to_png",
    "to_rgb",
]
