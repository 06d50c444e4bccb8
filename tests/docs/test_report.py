"""The pages of docs/report begin with what `ncml evaluate` finds in the figures that they were made from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ncml.evaluation import classes, flipped_bits, ood, published, quality, robustness, sanity
from ncml.evaluation.report_folder import KINDS, write_index

REPORT = Path(__file__).resolve().parents[2] / "docs" / "report"

FINDINGS: dict[str, Callable[[str, dict[str, Any]], list[str]]] = {
    "likelihood": lambda label, result: flipped_bits._findings({label: result}, published.CIFAR10),
    "sanity": sanity._findings,
    "robustness": lambda label, result: [robustness._finding(label, result)],
    "ood": lambda label, result: ood._findings(label, result, result["data"]),
    "samples": lambda label, result: [],
    "fid": lambda label, result: quality._findings(label, result, result["distance"].replace("FD", "KD")),
    "classes": lambda label, result: classes._findings(label, result, len(result["by_class"]["real"])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_begins_with_the_findings_of_its_figures(kind: str) -> None:
    result = json.loads((REPORT / f"{kind}.json").read_text())
    findings = FINDINGS[kind](result["model"]["name"], result)
    assert result["findings"] == findings
    listed = "".join(f"- {finding}\n" for finding in findings)
    assert (REPORT / f"{kind}.md").read_text().partition("\n\n")[2].startswith(f"{listed}\n" if listed else "`ncml")


def test_the_index_repeats_the_findings(tmp_path: Path) -> None:
    for kind in KINDS:
        (tmp_path / f"{kind}.md").write_text((REPORT / f"{kind}.md").read_text())
    write_index(tmp_path)
    assert (tmp_path / "report.md").read_text() == (REPORT / "report.md").read_text()
