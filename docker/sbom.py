"""Document what an image contains: a CycloneDX bill of materials, and the licences of third parties with their texts.

python docker/sbom.py FOLDER    runs when the image is built, and writes FOLDER/sbom.cdx.json and FOLDER/THIRD-PARTY.txt
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import Distribution, distributions, version
from pathlib import Path
from typing import Any

OURS = "ncml"
LICENSE_FILE = re.compile(r"(^|/)(licen[cs]e|copying|notice|authors|copyright)[^/]*$", re.IGNORECASE)
MAX_TEXT_BYTES = 2**20


def name_of(distribution: Distribution) -> str:
    """Return a distribution's name as package indexes spell it."""
    return re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()


def license_of(distribution: Distribution) -> str:
    """Return the licence that a distribution declares: an SPDX expression, its classifiers, or a name."""
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or () if c.startswith("License ::")]
    name = (metadata.get("License") or "").strip().partition("\n")[0][:100]
    return " AND ".join(classifiers) or name or "not declared"


def component(distribution: Distribution) -> dict[str, Any]:
    """Return a distribution as CycloneDX 1.6 describes it."""
    name, declared = name_of(distribution), license_of(distribution)
    is_expression = distribution.metadata.get("License-Expression") is not None
    return {
        "type": "library",
        "bom-ref": f"{name}@{distribution.version}",
        "name": name,
        "version": distribution.version,
        "purl": f"pkg:pypi/{name}@{distribution.version}",
        "licenses": [{"expression": declared} if is_expression else {"license": {"name": declared}}],
    }


def license_texts(distribution: Distribution) -> list[str]:
    """Return the texts of the licence files that a distribution contains."""
    paths = [file for file in distribution.files or () if LICENSE_FILE.search(str(file))]
    located = (Path(str(file.locate())) for file in paths)
    return [path.read_text(errors="replace")[:MAX_TEXT_BYTES] for path in located if path.is_file()]


def write(folder: Path) -> None:
    """Write the bill of materials and the list of licences into a folder."""
    installed = sorted({name_of(d): d for d in distributions()}.items())
    packages = [distribution for name, distribution in installed if name != OURS]
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": OURS, "version": version(OURS)}},
        "components": [component(distribution) for distribution in packages],
    }
    parts = [f"{name_of(d)} {d.version}\nLicence: {license_of(d)}\n\n" + "\n".join(license_texts(d)) for d in packages]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sbom.cdx.json").write_text(json.dumps(bill, indent=1) + "\n")
    (folder / "THIRD-PARTY.txt").write_text(f"\n{'-' * 80}\n".join(parts) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
