"""`ncml decompress`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ncml import images
from ncml.archive import read_archive
from ncml.cli.terminal import (
    DeviceOption,
    JsonOption,
    ModelOption,
    describe,
    identity,
    load,
    print_json,
    progress_bar,
    write_file,
)
from ncml.data.inventory import counted
from ncml.errors import InputError
from ncml.paths import check_exists, check_output_folder


def decompress(
    archive: Annotated[Positional[Path], arg(metavar="ARCHIVE")],
    /,
    *,
    output: Annotated[Path, arg(name="output", aliases=("-o",), metavar="FOLDER")],
    model: ModelOption = "",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Write the images of an archive as PNG files with identical pixels.

    Args:
        archive: Archive written by `ncml compress`.
        output: Folder for the images; existing files are not overwritten.
        model: Name or folder of the model that wrote the archive.
        device: Device to compute on: cpu, cuda or cuda:N.
        as_json: Print JSON.
    """
    check_exists(archive)
    try:
        data = archive.read_bytes()
    except OSError as error:
        raise InputError("archive", f"{archive} cannot be read: {error.strerror}.") from error
    description = describe(model, device)
    header = read_archive(data, description).header
    if output.is_file():
        raise InputError("output", f"{output} is a file: choose a folder.")
    check_output_folder(output, "output")
    if output.suffix.lower() in images.SUFFIXES and not output.is_dir():
        raise InputError("output", f"-o names a folder, not an image: choose another name than {output}.")
    files = [output / f"{name}.png" for name in header.names]
    for path in files:
        if path.exists():
            raise InputError("output", f"{path} already exists: choose another folder.")
    from ncml import codec

    m = load(description, device)
    with progress_bar() as on_progress:
        _, decoded = codec.decompress(m, data, on_progress)
    output.mkdir(parents=True, exist_ok=True)
    try:
        for path, pixels in zip(files, decoded, strict=True):
            write_file(path, images.to_png(pixels))
    except OSError:
        for path in files:  # none existed before, and the same command can run again
            path.unlink(missing_ok=True)
        raise
    if as_json:
        print_json({"model": identity(m), "files": [str(path) for path in files]})
    else:
        print(f"{output}  {counted(len(files), 'image')}")
