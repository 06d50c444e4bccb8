"""Figures of docs/ood.md about the bundled model are those of its calibrations and of docs/ood-method.md."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).resolve().parents[2]
CALIBRATIONS = ROOT / "models" / "cifar10" / "calibration.json"
PAGE = (ROOT / "docs" / "ood.md").read_text()
METHOD = (ROOT / "docs" / "ood-method.md").read_text()


def rows(page: str) -> list[tuple[str, str]]:
    """Return the shares that each row of a table of both calibrations reports, such as `4.2% [3.6, 4.9]`."""
    share = r"[\d.]+% \[[\d., ]+\]"
    return re.findall(rf"^\| [^|]+ \| ({share}) \| ({share}) \|$", page, re.MULTILINE)


@pytest.mark.skipif(not CALIBRATIONS.is_file(), reason="models/cifar10 is not in this checkout")
def test_the_power_of_both_calibrations_is_documented() -> None:
    calibrations = json.loads(CALIBRATIONS.read_text())["calibrations"]
    power = {name: mean(calibration["power"]["altered"].values()) for name, calibration in calibrations.items()}
    ((tolerant, default),) = re.findall(
        r"It detects (\d+)% of the standard alterations, where `default` detects (\d+)%", PAGE
    )
    assert (default, tolerant) == (f"{100 * power['default']:.0f}", f"{100 * power['tolerant']:.0f}")


def test_the_main_table_repeats_rows_of_the_complete_tables() -> None:
    assert len(rows(PAGE)) > 10
    assert set(rows(PAGE)) <= set(rows(METHOD))


def test_the_false_positive_rate_of_the_report_is_that_of_its_measurement() -> None:
    measured = (ROOT / "docs" / "report" / "ood_flagged.csv").read_text()
    (share,) = re.findall(r"^cifar10,cifar10,multiscale_corr,([\d.]+,[\d.]+,[\d.]+),1000,", measured, re.MULTILINE)
    value, low, high = (f"{100 * float(number):.1f}" for number in share.split(","))
    assert f"measures {value}% [{low}, {high}] on 1,000 test images" in PAGE
