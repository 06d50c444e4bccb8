"""Pin third-party images to their current digests, so that every build and start uses the same bytes.

python docker/pin.py    rewrites `name:tag` as `name:tag@sha256:...` in the Dockerfile, the compose file and the
                        manifests. It gets the digests with `docker buildx imagetools`; run it again to renew them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIGEST = r"(?:@sha256:[0-9a-f]{64})?"
FILES = {
    "docker/Dockerfile": rf"^(ARG PYTHON=)(\S+?){DIGEST}$",
    "docker-compose.yml": rf"^( +image: )((?!ncml-)\S+?:\S+?){DIGEST}$",
    "docker/k8s/base/valkey.yaml": rf"^( +image: )(\S+?:\S+?){DIGEST}$",
}
"""Patterns of the lines in each file that name an image; the second group is the name without the digest."""


def digest_of(image: str) -> str:
    """Return the digest of an image's index, which covers every platform. Raises `CalledProcessError`."""
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", image]
    digest = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise ValueError(f"{image}: {digest!r} is not a digest")
    return digest


def pin(root: Path, look_up: Callable[[str], str]) -> dict[str, str]:
    """Pin the images in the files below `root`; return the digest of each image."""
    digests: dict[str, str] = {}
    texts: dict[Path, str] = {}

    def pinned(match: re.Match[str]) -> str:
        image = f"python:{match[2]}" if match[1].startswith("ARG") else match[2]
        digests.setdefault(image, look_up(image))
        return f"{match[1]}{match[2]}@{digests[image]}"

    for name, pattern in FILES.items():
        texts[root / name] = re.sub(pattern, pinned, (root / name).read_text(), flags=re.MULTILINE)
    for path, text in texts.items():  # only once all digests are known
        path.write_text(text)
    return digests


def main() -> int:
    """Pin the images of this clone and print their digests; return 1 if a registry cannot be reached."""
    try:
        for image, digest in pin(ROOT, digest_of).items():
            print(f"{image} {digest}")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        print(f"pin: nothing was changed, because a digest is not available: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
