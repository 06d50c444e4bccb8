"""Sets of good images are joined, and keep one of each."""

from pathlib import Path

import numpy as np
from PIL import Image

from ncml.data.good_images import open_folder


def test_of_equal_images_the_first_is_kept_in_its_place(tmp_path: Path) -> None:
    for name, level in (("1", 0), ("2", 50), ("3", 0), ("4", 100)):
        Image.fromarray(np.full((40, 40, 3), level, np.uint8)).save(tmp_path / f"{name}.png")
    opened = open_folder(tmp_path, sorted(tmp_path.iterdir()))
    assert opened.distinct().names == ("1.png", "2.png", "4.png")
    assert opened.take([3, 0]).join(opened).distinct().names == ("4.png", "1.png", "2.png")
