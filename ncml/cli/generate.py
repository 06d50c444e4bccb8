"""`ncml generate` and `ncml complete`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ncml import images
from ncml.cli.generate_options import SharedOptions
from ncml.cli.terminal import check_output_file, progress_bar
from ncml.limits import Keep
from ncml.paths import check_exists


def generate(*, options: SharedOptions) -> None:
    """Generate images and write them as one PNG, as a grid if there are several."""
    description = options.describe_model()
    arguments = options.arguments(description)
    model = options.load_model(description)
    with progress_bar() as on_progress:
        generated = model.generate(**arguments, callback=on_progress)
    options.write(generated, model, arguments["seeds"])


def complete(
    file: Annotated[Positional[Path], arg(metavar="FILE")],
    /,
    *,
    keep: Annotated[Keep | None, arg(help_behavior_hint="(default: derived from the image, or else top)")] = None,
    options: SharedOptions,
) -> None:
    """Complete half an image and write the result as PNG, as a grid if there are several variants.

    Args:
        file: Half an image, or a whole image of which one half is kept.
        keep: The known half.
    """
    check_exists(file)
    description = options.describe_model()
    check_output_file(options.output, inputs=[file])
    canvas, known_half = images.place_known_half(
        file, description.height, description.width, keeps=description.keeps, keep=keep, field=str(file)
    )
    arguments = options.arguments(description)
    model = options.load_model(description)
    with progress_bar() as on_progress:
        completed = model.complete(canvas, keep=known_half, **arguments, callback=on_progress)
    options.write(completed, model, arguments["seeds"], keep=known_half)
