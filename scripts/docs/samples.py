"""Make docs/samples.png and docs/refinement.png with the bundled model: `python scripts/docs/samples.py`."""

import argparse
from pathlib import Path

import torch

import ncml
from ncml.evaluation.report import draw_sheet
from ncml.evaluation.samples import as_trained

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def main() -> None:
    """Generate sixteen images of each class, not selected, and ten seeds with each of six methods."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    model = ncml.load(ROOT / "models" / "cifar10")
    classes = [(name, model.generate(16, classes=name, seeds=16 * i)) for i, name in enumerate(model.classes)]
    draw_sheet(classes).savefig(DOCS / "samples.png")
    defaults = model.sampling_limits.defaults
    from_largest_noise = as_trained(model.noise)
    methods = {
        "direct": as_trained(0.0),
        f"{defaults.noise:g} levels, Tweedie": as_trained(defaults.noise),
        f"{model.noise:g} levels, Tweedie": from_largest_noise,
        f"{model.noise:g} levels, Euler-Maruyama": from_largest_noise | {"solver": "euler-maruyama", "steps": 20},
        f"{model.noise:g} levels, Heun": from_largest_noise | {"solver": "heun", "steps": 10},
        f"{defaults.noise:g} levels, guidance {defaults.guidance:g}": {},
    }
    rows = [
        (name, model.generate(10, classes=list(range(10)), seeds=100, **arguments))
        for name, arguments in methods.items()
    ]
    draw_sheet(rows).savefig(DOCS / "refinement.png")


if __name__ == "__main__":
    main()
