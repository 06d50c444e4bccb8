"""`ncml review`."""

import os
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ncml.cli.rows import SkippedFiles
from ncml.cli.terminal import JsonOption, print_json
from ncml.errors import InputError, ServiceError
from ncml.images import open_image
from ncml.paths import check_exists, list_files, printable


def review(
    files: Annotated[Positional[list[Path]], arg(metavar="FILE|FOLDER", help_behavior_hint="(required)")],
    /,
    *,
    model: Annotated[str, arg(metavar="NAME")],
    good: bool = False,
    defective: bool = False,
    server: Annotated[str, arg(metavar="URL", help_behavior_hint="(required)")] = "",
    api_key: Annotated[str, arg(metavar="KEY", help_behavior_hint="(default: NCML_API_KEY)")] = "",
    as_json: JsonOption = False,
) -> None:
    """Send reviewed images to a service: good ones that its detector flags, or defective ones.

    The service judges each image first; files that are not images are skipped. An update of the detector learns from
    them. Without a service, collect the images in folders for ncml adapt --update.

    Args:
        files: Images, or folders of images.
        model: Detector of the service.
        good: The images are good, although the detector flags them.
        defective: The images are defective.
        server: Address of the service.
        api_key: API key for that service, to which the reviews will belong.
        as_json: Print JSON.
    """
    if not files:
        raise InputError("files", "no image is given: ncml review FILE...")
    if good == defective:
        raise InputError("good", "name what the images are, with one of --good and --defective.")
    if not server:
        raise InputError(
            "server",
            "a service keeps reviews: add --server, or collect the images in a folder for ncml adapt --update.",
        )
    for path in files:
        check_exists(path)
    from ncml.client import Client

    reviews: list[dict[str, Any]] = []
    skipped = SkippedFiles()
    try:
        with Client(server, api_key=api_key or os.environ.get("NCML_API_KEY")) as client:
            for path in list_files(files):
                try:
                    open_image(path, field=printable(path))  # before it is sent
                    kept = client.review(path, "good" if good else "defective", model=model)
                except (InputError, ServiceError) as error:
                    if error.field != printable(path):
                        raise
                    skipped.add(path, str(error))
                    continue
                reviews.append({"path": str(path)} | kept)
                if not as_json:
                    verdict = f"p {kept['p_value']:.4f}{' OOD' if kept['is_ood'] else ''}"
                    print(f"{verdict}  {printable(path)} is kept as {kept['verdict']} ({kept['id']})", flush=True)
        if not reviews:
            raise InputError("files", skipped.messages[0] if skipped.count else f"there is no image in {files[0]}.")
    finally:
        if reviews:  # those before an error are kept as well
            if as_json:
                print_json({"reviews": reviews})
            skipped.report(skipped.count)
