"""The power of a calibration: its shares, and its description."""

from dataclasses import replace

import numpy as np
import pytest

import ncml
from ncml.calibration.descriptions import describe
from ncml.calibration.held_out_power import measure_power
from ncml.images.perturbations import ALTERATIONS, PROCESSING, paste_patch, shift_colours
from ncml.ood.calibration import Calibration
from ncml.ood.power import Power, explain_few, summary
from tests.ncml.nets import NEW, RANK

STRONG = Power(
    images=100,
    good=0.05,
    processed={"JPEG, quality 95": 0.1, "half size and back": 0.4},
    altered={"blur": 1.0, "noise": 0.6, "colour shift": 0.1},
    foreign={"one colour": 1.0},
)


def test_shares_are_those_of_the_verdicts(calibrated: ncml.Model, calibration: Calibration) -> None:
    statistic = calibration.statistic
    own = np.array([s.statistics[statistic] for s in calibrated.score(RANK[:20], statistics=[statistic])])
    power = measure_power(calibrated, calibration, RANK[:20], own, foreign={"new": NEW})
    changes = {**PROCESSING, **ALTERATIONS}
    assert power.processed.keys() | power.altered.keys() == changes.keys()
    for name, change in changes.items():
        pixels = np.stack([change(image, np.random.default_rng(i)) for i, image in enumerate(RANK[:20])])
        flagged = [s.ood.is_ood for s in calibrated.score(pixels) if s.ood is not None]
        assert {**power.processed, **power.altered}[name] == np.mean(flagged), name
    assert power.foreign["new"] == np.mean([s.ood.is_ood for s in calibrated.score(NEW) if s.ood is not None])
    assert Power.from_json(power.to_json()) == power


def test_good_images_are_ranked_among_the_others(calibrated: ncml.Model, calibration: Calibration) -> None:
    """Each unchanged ranking image is left out of its own ranks, so the expected rate is flagged."""
    statistic = calibration.statistic
    own = np.array([s.statistics[statistic] for s in calibrated.score(RANK, statistics=[statistic])])
    power = measure_power(calibrated, calibration, RANK, own)
    ranks = np.argsort(np.argsort(-own))  # 0: the highest
    assert power.good == np.mean((1 + ranks) / len(own) <= 0.05)


@pytest.mark.parametrize(
    ("power", "n_rank", "reason"),
    [
        (None, 75, "it ranks among 75 images, and 76 are needed"),
        (None, 76, ""),
        (STRONG, 5_000, ""),
        (replace(STRONG, altered={"blur": 0.9, "noise": 0.05}), 5_000, "it detects 48% of the standard alterations"),
    ],
)
def test_a_weak_calibration_has_a_reason(
    calibration: Calibration, power: Power | None, n_rank: int, reason: str
) -> None:
    weakness = replace(calibration, power=power, ranked={calibration.statistic: np.zeros(n_rank)}).weakness
    assert weakness.startswith(reason)
    assert bool(weakness) == bool(reason)


def test_the_number_of_images_that_are_needed_suffices() -> None:
    assert "among 129 images, and 130 are needed" in explain_few(129, 0.03)
    assert "among 129 scenes, and 130 are needed" in explain_few(129, 0.03, "scenes")
    assert not explain_few(130, 0.03)


def test_a_summary_names_what_is_detected_and_what_is_missed() -> None:
    assert summary(STRONG, 0.0002) == (
        "This calibration detects most of: blur (100%), noise (60%), one colour (100%); it misses most of: colour "
        "shift (10%); no p-value is below 0.0002."
    )


def test_a_tolerance_is_named_for_processing_that_is_flagged_often(calibration: Calibration) -> None:
    assert STRONG.tolerances(0.05) == ["resize"]
    assert STRONG.tolerances(0.02) == ["jpeg", "resize"]
    measured = replace(calibration, power=STRONG)
    assert any(line.endswith("calibrate with --tolerate resize") for line in describe(measured))
    assert not any("--tolerate" in line for line in describe(replace(measured, tolerate=("resize",))))


def test_a_pasted_patch_comes_from_the_image() -> None:
    image = np.arange(16 * 16 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    pasted = paste_patch(3 / 8)(image, np.random.default_rng(0))
    changed = np.argwhere((pasted != image).any(2))
    assert len(changed) > 10
    assert (changed.max(0) - changed.min(0) < 6).all()
    assert {tuple(value) for value in pasted.reshape(-1, 3)} <= {tuple(value) for value in image.reshape(-1, 3)}


def test_a_colour_shift_is_one_offset_for_each_channel() -> None:
    image = np.full((4, 4, 3), 128, np.uint8)
    shifted = shift_colours(40)(image, np.random.default_rng(0)).astype(int) - 128
    assert (shifted == shifted[0, 0]).all()
    assert 0 < abs(shifted).max() <= 40
