"""Draw docs/samples.png and docs/refinement.png with the bundled model: `python scripts/docs/samples.py`."""

from pathlib import Path

import ncml
from ncml.evaluation.report import draw_sheet

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BEST = 2.5
"""Grey levels from which the bundled model draws its best pictures (docs/report/fid.md)."""


def main() -> None:
    """Sixteen pictures of each class, not chosen; and ten seeds drawn in five ways."""
    model = ncml.load(ROOT / "models" / "cifar10")
    classes = [
        (name, model.generate(16, classes=name, seeds=16 * i, noise=BEST)) for i, name in enumerate(model.classes)
    ]
    draw_sheet(classes).savefig(DOCS / "samples.png")
    ways = {
        "direct": {"noise": 0.0},
        f"{BEST:g} levels, Tweedie": {"noise": BEST},
        f"{model.noise:g} levels, Tweedie": {},
        f"{model.noise:g} levels, Euler-Maruyama": {"solver": "euler-maruyama"},
        f"{model.noise:g} levels, Heun": {"solver": "heun"},
    }
    rows = [(name, model.generate(10, classes=list(range(10)), seeds=100, **way)) for name, way in ways.items()]
    draw_sheet(rows).savefig(DOCS / "refinement.png")


if __name__ == "__main__":
    main()
