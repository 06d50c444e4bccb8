"""`ncml compress`."""

from pathlib import Path
from typing import Annotated

from PIL import Image
from tyro.conf import Positional, arg

from ncml import images
from ncml.cli.draw import ThreadsOption
from ncml.cli.terminal import JsonOption, ModelOption, identity, load, print_json, progress_bar, use_threads
from ncml.errors import InputError
from ncml.paths import list_files


def compress(
    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE|FOLDER...", help_behavior_hint="")],
    /,
    *,
    output: Annotated[Path, arg(name="output", aliases=("-o",))],
    threads: ThreadsOption = 1,
    model: ModelOption = "cifar10",
    device: str = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Compress pictures of the model's size losslessly into one archive, in the bits that the model gives them.

    Args:
        files: Pictures of exactly the model's size, or folders of them: PNG, JPEG, WebP, BMP, TIFF or GIF, of 8-bit
            colours or grey, without transparency.
        output: The archive to write.
        model: Name or folder of the model; only the same model decompresses the archive.
        device: Where to compute: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    from ncml import codec

    paths = list(list_files(files))
    if not paths:
        raise InputError("files", "no picture is named: ncml compress FILE... -o ARCHIVE")
    if output.is_dir() or not output.parent.is_dir():
        raise InputError("output", f"{output} cannot be written: it is a folder, or in one that does not exist.")
    use_threads(threads)
    m = load(model, device)
    import numpy as np

    pictures = [images.open_image(path, field=str(path)) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        height, width, _ = picture.shape
        if (height, width) != (m.height, m.width):
            raise InputError(
                "files",
                f"{path} is {width} x {height} pixels, and {m.name} codes only {m.width} x {m.height}: resize it "
                "first, or leave it out.",
            )
        _check_whole(path)
    with progress_bar() as on_progress:
        archive = codec.compress(m, np.stack(pictures), [path.stem for path in paths], on_progress)
    output.write_bytes(archive)
    values = len(pictures) * 3 * m.height * m.width
    bits = 8 * len(archive) / values
    if as_json:
        facts = {"file": str(output), "pictures": len(pictures), "bytes": len(archive), "bits_per_dim": bits}
        print_json({"model": identity(m)} | facts)
    else:
        print(f"{output}  {len(pictures)} pictures, {len(archive):,} bytes of {values:,}: {bits:.3f} bits/dim")


def _check_whole(path: Path) -> None:
    """Refuse a file that holds more than its 8-bit RGB, which alone is coded."""
    with Image.open(path) as picture:
        for more, told in (
            (picture.has_transparency_data, "has transparency"),
            (getattr(picture, "n_frames", 1) > 1, "has several frames"),
            (picture.mode not in ("1", "L", "P", "RGB") or ";16" in str(picture.tile), "is not of 8-bit RGB or grey"),
        ):
            if more:
                raise InputError("files", f"{path} {told}, which would be lost: save it as plain RGB, or leave it out.")
