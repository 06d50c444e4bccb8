"""`ncml compress`."""

from pathlib import Path
from typing import Annotated, cast

import numpy as np
from PIL import Image
from tyro.conf import Positional, arg

from ncml import images
from ncml.archive import check_names
from ncml.cli.terminal import (
    DeviceOption,
    JsonOption,
    ModelOption,
    check_output_file,
    check_threads,
    describe,
    identity,
    load,
    print_json,
    progress_bar,
    use_threads,
    write_file,
)
from ncml.data.inventory import counted
from ncml.errors import InputError
from ncml.images.reading import list_images
from ncml.paths import check_exists


def compress(
    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE|FOLDER...", help_behavior_hint="")],
    /,
    *,
    output: Annotated[Path, arg(name="output", aliases=("-o",))],
    threads: Annotated[int, arg(metavar="COUNT")] = 1,
    model: ModelOption = "",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Compress images of the model's size losslessly into one archive, by arithmetic coding under the model.

    An archive of natural images has about the bits/dim that `ncml score` reports. One of random values has more,
    because the coder leaves out the outlier component of likelihoods.

    Args:
        files: Images of exactly the model's size, or folders of them: PNG, JPEG, WebP, BMP, TIFF or GIF, in 8-bit
            RGB or grey, without transparency.
        output: The archive to write.
        threads: CPU threads. The archive contains the number, and decompressing uses the same.
        model: Name or folder of the model; decompressing needs the same model.
        device: Device to compute on: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    if not files:
        raise InputError("files", "no image is given: ncml compress FILE... -o ARCHIVE")
    for file in files:
        check_exists(file)
    paths = [cast(Path, path) for path in list_images(files, "files")]
    check_output_file(output, inputs=paths)
    names = [path.stem for path in paths]
    check_names(names, len(paths))
    check_threads(threads)
    description = describe(model, device)
    pixels = [images.open_image(path, field=str(path)) for path in paths]
    for path, image in zip(paths, pixels, strict=True):
        height, width, _ = image.shape
        if (height, width) != (description.height, description.width):
            needed = f"{description.name} needs {description.width} x {description.height}"
            detail = f"{path} is {width} x {height} pixels, and {needed}: resize it first, or omit it."
            raise InputError("files", detail)
        _check_lossless(path)
    from ncml import codec

    use_threads(threads)
    loaded = load(description, device)
    with progress_bar() as on_progress:
        archive = codec.compress(loaded, np.stack(pixels), names, on_progress)
    write_file(output, archive)
    values = len(pixels) * 3 * description.height * description.width
    bits = 8 * len(archive) / values
    if as_json:
        result = {"file": str(output), "images": len(pixels), "bytes": len(archive), "bits_per_dim": bits}
        print_json({"model": identity(description)} | result)
    else:
        print(f"{output}  {counted(len(pixels), 'image')}, {len(archive):,} bytes of {values:,}: {bits:.3f} bits/dim")


def _check_lossless(path: Path) -> None:
    """Refuse a file that contains more than 8-bit RGB, the only information that is coded."""
    with Image.open(path) as image:
        for is_lossy, reason in (
            (image.has_transparency_data, "has transparency"),
            (getattr(image, "n_frames", 1) > 1, "has several frames"),
            (image.mode not in ("1", "L", "P", "RGB") or ";16" in str(image.tile), "is not 8-bit RGB or grey"),
        ):
            if is_lossy:
                raise InputError("files", f"{path} {reason}, which would be lost: save it as plain RGB, or omit it.")
