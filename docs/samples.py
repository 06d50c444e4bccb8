"""Draw docs/samples.png and docs/refinement.png with the bundled model: `python docs/samples.py`."""

from pathlib import Path

import numpy as np
from PIL import Image

import ncml
from ncml.images import grid

HERE = Path(__file__).parent
SCALE = 2


def save(pictures: np.ndarray, columns: int, name: str) -> None:
    """Write a grid, each pixel as a square."""
    sheet = grid(pictures, columns=columns)
    height, width, _ = sheet.shape
    Image.fromarray(sheet).resize((SCALE * width, SCALE * height), Image.Resampling.NEAREST).save(
        HERE / name, optimize=True
    )
    print(HERE / name)


def main() -> None:
    """Sixteen pictures of each class, not chosen; and ten seeds drawn in four ways."""
    model = ncml.load(HERE.parent / "models" / "cifar10")
    classes = [model.generate(16, classes=name, seeds=16 * i) for i, name in enumerate(model.classes)]
    save(np.concatenate(classes), 16, "samples.png")
    ways = [{"noise": 0.0}, {"solver": "tweedie"}, {"solver": "euler-maruyama"}, {"solver": "heun"}]
    rows = [model.generate(10, classes=list(range(10)), seeds=100, **way) for way in ways]
    save(np.concatenate(rows), 10, "refinement.png")


if __name__ == "__main__":
    main()
