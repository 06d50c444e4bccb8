"""`ncml score`."""

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ncml import images
from ncml.errors import InputError
from ncml.terminal import ClassOption, JsonOption, ModelOption, identity, load, print_json, progress_bar

BATCH = 64
"""Pictures scored in one call of the model."""


def score(
    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE...", help_behavior_hint="")],
    /,
    *,
    model: ModelOption = "cifar10",
    class_: ClassOption = None,
    noise: float = 0.0,
    device: str = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Tell how likely pictures are under a model: exact bits per dimension and nats.

    Args:
        files: Pictures to score: PNG, JPEG, WebP, BMP, TIFF or GIF.
        model: Name or folder of the model.
        class_: Condition on this class.
        noise: Noise level at which to score, in grey levels.
        device: Where to compute: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    if not files:
        raise InputError("files", "no picture is named: ncml score FILE...")
    m = load(model, device)
    rows: list[dict[str, Any]] = []
    with progress_bar() as bar:
        for start in range(0, len(files), BATCH):
            some = files[start : start + BATCH]
            stack = [images.fit(images.open_image(path, field=str(path)), m.height, m.width) for path in some]
            scores = m.score(stack, classes=class_, noise=noise)
            rows += [
                {"file": str(path), "bpd": s.bpd, "log_likelihood": s.log_likelihood}
                for path, s in zip(some, scores, strict=True)
            ]
            bar("score", len(rows), len(files))
    if as_json:
        print_json({"model": identity(m), "results": rows})
    else:
        for row in rows:
            print(f"{row['bpd']:8.4f} bits/dim  {row['log_likelihood']:12.2f} nats  {row['file']}")
