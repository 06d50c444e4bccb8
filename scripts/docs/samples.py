"""Draw docs/samples.png and docs/refinement.png with the bundled model: `python scripts/docs/samples.py`."""

from pathlib import Path

import ncml
from ncml.evaluation.report import draw_sheet

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BEST = 2.5
"""Grey levels from which the bundled model draws its best images (docs/report/fid.md)."""


def main() -> None:
    """Draw sixteen images of each class, not selected; and ten seeds by five methods."""
    model = ncml.load(ROOT / "models" / "cifar10")
    classes = [
        (name, model.generate(16, classes=name, seeds=16 * i, noise=BEST)) for i, name in enumerate(model.classes)
    ]
    draw_sheet(classes).savefig(DOCS / "samples.png")
    methods = {
        "direct": {"noise": 0.0},
        f"{BEST:g} levels, Tweedie": {"noise": BEST},
        f"{model.noise:g} levels, Tweedie": {},
        f"{model.noise:g} levels, Euler-Maruyama": {"solver": "euler-maruyama"},
        f"{model.noise:g} levels, Heun": {"solver": "heun"},
    }
    rows = [
        (name, model.generate(10, classes=list(range(10)), seeds=100, **arguments))
        for name, arguments in methods.items()
    ]
    draw_sheet(rows).savefig(DOCS / "refinement.png")


if __name__ == "__main__":
    main()
