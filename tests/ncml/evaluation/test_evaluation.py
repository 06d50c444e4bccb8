"""`ncml evaluate`: what it computes against slow or known answers, that it resumes, and what it says of bad input."""

import csv
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg

import ncml
from ncml import checkpoint
from ncml.calibration.estimation import calibrate
from ncml.cli import main as cli
from ncml.config import SOLVERS, maximum_likelihood
from ncml.evaluation import numbers, pictures, quality, run
from ncml.evaluation.context import Context
from ncml.evaluation.likelihood import bits, flip, seven_bit_bits
from ncml.evaluation.store import Store
from ncml.network.likelihood import from_uint8
from tests.ncml import nets

Run = Callable[..., subprocess.CompletedProcess[str]]
RNG = np.random.default_rng(0)


# -------------------------------------------------------------------- numbers


def test_flips_are_of_lowest_bits_and_do_not_depend_on_the_chunk() -> None:
    pixels = nets.pictures(20).numpy()
    np.testing.assert_array_equal(flip(pixels, 0), pixels)
    np.testing.assert_array_equal(flip(pixels, 1), pixels ^ 1)
    half = flip(pixels, 0.5)
    assert set(np.unique(half ^ pixels)) == {0, 1}
    assert (half != pixels).mean() == pytest.approx(0.5, abs=0.03)
    np.testing.assert_array_equal(np.concatenate([flip(pixels[:7], 0.5), flip(pixels[7:], 0.5, 7)]), half)


def test_bits_are_those_of_the_front_door(model: ncml.Model) -> None:
    pixels = nets.pictures(3).numpy()
    expected = [score.bpd for score in model.score(pixels, ood=False)]
    assert bits(model.network, from_uint8(torch.from_numpy(pixels))) == pytest.approx(expected, rel=1e-6)


def test_the_seven_bit_marginal_sums_the_settings_of_a_pixels_lowest_bits(model: ncml.Model) -> None:
    """Checked where nothing comes after: of the last pixel, the settings of which do not touch any context."""
    pixels = nets.pictures(1).numpy()
    settings = np.repeat(pixels, 8, 0)
    settings[:, -1, -1] = (pixels[0, -1, -1] & 254) | np.array(list(itertools.product((0, 1), repeat=3)), np.uint8)
    maps = np.stack([score.map for score in model.score(settings, map=True, ood=False)])  # type: ignore[misc]
    last = -np.log2(np.exp2(-3.0 * maps[:, -1, -1]).sum())
    other = pixels.copy()
    other[0, -1, -1] ^= 254  # another upper part of the last pixel alone
    settings[:, -1, -1] ^= 254
    maps = np.stack([score.map for score in model.score(settings, map=True, ood=False)])  # type: ignore[misc]
    last_of_other = -np.log2(np.exp2(-3.0 * maps[:, -1, -1]).sum())
    difference = seven_bit_bits(model.network, pixels) - seven_bit_bits(model.network, other)
    assert difference[0] * pixels.size == pytest.approx(last - last_of_other, abs=1e-3)


def test_random_lowest_bits_cost_a_bit_at_least(model: ncml.Model) -> None:
    pixels = flip(nets.pictures(64).numpy(), 0.5)
    spent = bits(model.network, from_uint8(torch.from_numpy(pixels)))
    assert (seven_bit_bits(model.network, pixels) < spent).all()
    assert (seven_bit_bits(model.network, pixels) + 1).mean() <= spent.mean() + 0.01


def test_auroc_counts_pairs_and_fpr95_its_share() -> None:
    inside, outside = RNG.normal(size=80), RNG.normal(1, size=60)
    pairs = (outside[:, None] > inside).mean()
    auroc, _, fpr95 = numbers.rates(inside, outside)
    assert auroc == pytest.approx(pairs)
    threshold = np.sort(outside)[3]  # 57 of 60, or 95 %, are at least this
    assert fpr95 == pytest.approx((inside >= threshold).mean())
    perfect = numbers.detection(inside, inside.max() + 1 + np.arange(60.0))
    assert {name: rate.value for name, rate in perfect.items()} == {"auroc": 1, "aupr": 1, "fpr95": 0}


def test_of_two_equal_sets_as_much_is_flagged_as_is_found() -> None:
    same = RNG.normal(size=200)
    assert numbers.rates(same, same) == (pytest.approx(0.5), pytest.approx(0.5, abs=0.01), 0.95)


def test_an_interval_covers_as_often_as_it_says() -> None:
    covered = [found.low <= 2 <= found.high for found in (numbers.mean(RNG.normal(2, 3, size=100)) for _ in range(100))]
    assert 88 <= sum(covered) <= 100


def test_frechet_distance_is_that_of_gaussians() -> None:
    a, b = (RNG.normal(size=(500, 6)) @ RNG.normal(size=(6, 6)) + shift for shift in (0, 1))
    root = np.asarray(linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert quality.frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert quality.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_unbiased() -> None:
    a, b = RNG.normal(size=(30, 4)), RNG.normal(size=(20, 4))

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 4 + 1) ** 3)

    within = [np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
    between = np.mean([k(x, y) for x in a for y in b])
    assert quality.kernel(a, b).value == pytest.approx(sum(within) - 2 * between)
    same = [quality.kernel(RNG.normal(size=(20, 4)), RNG.normal(size=(20, 4))).value for _ in range(40)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(40)
    assert quality.kernel(a, b + 2).low > 0


# ---------------------------------------------------------- store and pictures


def test_a_measurement_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    store = Store(tmp_path / "measured", lambda stage, done, total, note="": None)
    measured: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> dict[str, np.ndarray]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((start, stop))
        time.sleep(0.01 * (stop - start))
        return {"square": np.arange(start, stop) ** 2}

    def ask(n: int, key: int = 0) -> np.ndarray:
        return store.rows("squares", {"key": key}, n, rows, chunk=4)["square"]

    with pytest.raises(KeyboardInterrupt):
        ask(12)
    assert measured == [(0, 4), (4, 8)]
    measured.clear()
    np.testing.assert_array_equal(ask(12), np.arange(12) ** 2)
    assert measured == [(8, 12)]
    assert store.spared >= 0.08  # what the first eight took
    np.testing.assert_array_equal(ask(5), np.arange(5) ** 2)
    np.testing.assert_array_equal(ask(14), np.arange(14) ** 2)
    assert measured == [(8, 12), (12, 14)]
    for file in (tmp_path / "measured").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:50])
    measured.clear()
    np.testing.assert_array_equal(ask(3), np.arange(3) ** 2)
    ask(3, key=1)
    assert measured == [(0, 3), (0, 3)]


def test_a_sorted_set_is_shuffled_in_one_way(tmp_path: Path) -> None:
    greys = np.broadcast_to(np.arange(60, dtype=np.uint8)[:, None, None, None], (60, 8, 8, 3))
    folder = str(save(tmp_path / "sorted", greys))
    found, again = (pictures.load(folder, 8, 8) for _ in range(2))
    assert found.first(20).pixels_NHWC[:, 0, 0, 0].mean() == pytest.approx(29.5, abs=12)
    np.testing.assert_array_equal(found.first(20).pixels_NHWC, again.pixels_NHWC[:20])
    assert found.first(20).digest == again.digest
    assert sorted(found.first(100).pixels_NHWC[:, 0, 0, 0]) == list(range(60))


def test_generated_sets_are_what_they_are_called() -> None:
    constant, uniform = (pictures.generated(name, 50, 8, 8) for name in pictures.GENERATED)
    assert (constant.pixels_NHWC == constant.pixels_NHWC[:, :1, :1]).all()
    assert len(np.unique(constant.pixels_NHWC[:, 0, 0], axis=0)) > 45
    assert uniform.pixels_NHWC.mean() == pytest.approx(127.5, abs=3)
    assert pictures.generated("uniform", 50, 8, 8).digest == uniform.digest


def save(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:03}.png")
    return folder


def test_what_is_odd_about_a_set_is_said(tmp_path: Path) -> None:
    folder = save(tmp_path / "odd", RNG.integers(256, size=(6, 12, 10), dtype=np.uint8))
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:60])
    said = " ".join(pictures.load(str(folder), 8, 8).notes)
    assert "1 files could not be read" in said
    assert "5 of 5 pictures had another size than 8x8" in said
    assert "5 of 5 pictures are grey" in said
    with pytest.raises(ncml.InputError, match="no readable picture"):
        pictures.load(str(save(tmp_path / "empty", np.empty((0, 8, 8, 3), np.uint8))), 8, 8)


def test_a_set_is_called_by_what_tells_it_from_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    for sources, called in (
        (("data/cifar10", "svhn", "uniform"), ["cifar10", "svhn", "uniform"]),
        (("A/good", "/far/B/good", "good"), ["A/good", "B/good", "good"]),
        (("x/cifar10:test", "x/cifar10:extra", "x/cifar10"), ["cifar10:test", "cifar10:extra", "cifar10"]),
        (("x/a:test", "y/a:test"), ["x/a:test", "y/a:test"]),
        (("odd/uniform", "uniform"), ["odd/uniform", "uniform"]),
        (("a", "./a"), ["a", "./a"]),
        ((".", "a:b", os.fsdecode(b"caf\xe9")), [".", "a:b", "caf\\xe9"]),
    ):
        assert list(pictures.names(sources).values()) == called


def test_limits_are_for_all_kinds_or_for_one() -> None:
    found = run.limits(["ood=9", "700"])
    assert (found["ood"], found["likelihood"], found["robustness"]) == (9, 700, 500)
    for option in ("x", "7", "-3", "kind=5", "ood=", "ood=1.5"):
        with pytest.raises(ncml.InputError, match="--limit"):
            run.limits([option])


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mine`, calibrated, and `mle`, trained at t = 0 alone and not calibrated; random weights."""
    folder = tmp_path_factory.mktemp("models")
    config = nets.config()
    checkpoint.save(folder / "mine", nets.network(config, dtype=torch.float32))
    checkpoint.save(folder / "mle", nets.network(maximum_likelihood(config), dtype=torch.float32, seed=1))
    held_out = nets.pictures(80, seed=5)
    calibrate(ncml.load(folder / "mine"), held_out[:40], held_out[40:]).save(folder / "mine")
    return folder


@pytest.fixture
def evaluate(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCML_MODELS", str(models))
    save(tmp_path / "cifar10", nets.pictures(24, seed=2).numpy())
    save(tmp_path / "noise", RNG.integers(256, size=(15, 8, 8, 3), dtype=np.uint8))

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        status = cli.main(["evaluate", *arguments, "--data", "cifar10", "--out", "out"])
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return command


def without_made(answer: dict[str, Any]) -> dict[str, Any]:
    assert "PyTorch" in answer["made"]["machine"]
    return {name: value for name, value in answer.items() if name != "made"}


@pytest.mark.timeout(300)
def test_all_fills_a_folder_and_resumes(evaluate: Run, tmp_path: Path) -> None:
    small = (
        "--limit",
        "16",
        "--limit",
        "sweep=8",
        "--limit",
        "solvers=8",
        "--ood",
        "noise",
        "--model",
        "mine",
        "--json",
    )
    done = evaluate("all", *small)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert list(answer) == list(run.KINDS)
    assert all("not_measured" not in section for section in answer.values()), answer
    bpd = answer["likelihood"]["bpd"]
    assert list(bpd) == ["0", "0.5", "1"]
    assert bpd["0"]["n"] == 16
    assert bpd["0"]["interval"][0] < bpd["0"]["value"] < bpd["0"]["interval"][1]
    assert answer["sanity"]["compression"]["decodes_exactly"] is True
    assert set(answer["ood"]["auroc"]) == {"noise", "constant", "uniform"}
    low, high = answer["ood"]["intervals"]["auroc"]["noise"]["multiscale"]
    assert low <= answer["ood"]["auroc"]["noise"]["multiscale"] <= high
    assert answer["ood"]["n"] == {"cifar10": 16, "noise": 15, "constant": 16, "uniform": 16}
    measured = answer["fid"]["measured"]
    assert [found["n"] for found in measured.values()] == [16] * 3
    assert [way for way in measured if "refined" in way] == [
        f"noisy at {noise} grey levels, refined (Tweedie)" for noise in ("10", "2.5")
    ]
    compared = answer["fid"]["solvers"]
    solved = [f"{solver}, {steps} step{'s'[: steps > 1]}" for solver, steps in SOLVERS.items()]
    assert {way: near["n"] for way, near in compared.items()} == dict.fromkeys(("direct (t = 0)", *solved), 8)
    assert compared["tweedie, 1 step"]["kernel"]["value"] == answer["fid"]["sweep"]["steps"][0]["value"]
    assert "no floor" in " ".join(answer["fid"]["notes"])  # a folder of pictures has no splits
    out = tmp_path / "out"
    report = (out / "report.md").read_text()
    made = answer["likelihood"]["made"]
    assert made["date"] == date.today().isoformat()
    assert f"{made['machine']}; {made['date']}; this part took {made['took']}" in report
    for title in ("Table 1", "Figure 2", "Figure 4", "Table 2", "Table 4", "Figures 1 and 5", "published"):
        assert title in report
    for file in (line.split("](")[1].rstrip(")") for line in report.splitlines() if line.startswith("![")):
        with Image.open(out / file) as picture:
            assert picture.size[0] > 100
    rows = list(csv.DictReader((out / "likelihood.csv").read_text().splitlines()))
    assert rows[0]["model"] == "mine"
    assert float(rows[0]["pi = 0"]) == pytest.approx(bpd["0"]["value"], abs=1e-5)
    assert {row["source"] for row in rows[1:]} == {"published"}
    measured = {path: path.stat().st_mtime_ns for path in (out / "measured").glob("*.npz")}
    again = evaluate("likelihood", *small)
    assert without_made(json.loads(again.stdout)) == without_made(answer["likelihood"])
    assert {path: path.stat().st_mtime_ns for path in (out / "measured").glob("*.npz")} == measured


def test_several_models_stand_side_by_side(evaluate: Run, tmp_path: Path) -> None:
    both = ("--limit", "8", "--model", "mine", "--model", "mle")
    done = evaluate("robustness", *both, "--json")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["models"]
    assert (first["model"]["name"], second["model"]["name"]) == ("mine", "mle")
    assert (len(first["grey_levels"]), second["grey_levels"]) == (8, [0.0])
    done = evaluate("samples", *both)
    assert done.returncode == 0, done.stderr
    assert "mle, direct" not in done.stdout  # a figure's label
    assert "out/completions.png" in done.stdout
    done = evaluate("ood", *both)
    assert done.returncode == 0, done.stderr
    assert "mle was left out: this model is not calibrated" in done.stdout


def test_what_cannot_be_read_is_told_and_the_rest_goes_on(evaluate: Run, tmp_path: Path) -> None:
    (tmp_path / "noise" / "003.png").write_bytes(b"cut short")
    (tmp_path / "empty").mkdir()
    few = ("--limit", "8", "--model", "mine")
    done = evaluate("ood", *few, "--ood", "empty", "--ood", "noise", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer["auroc"]) == {"noise", "constant", "uniform"}
    notes = " ".join(answer["notes"])
    assert "empty was left out: 'empty' holds no readable picture" in notes
    assert "noise: 1 files could not be read" in notes


def test_sets_of_one_name_are_told_apart(evaluate: Run, tmp_path: Path) -> None:
    save(tmp_path / "A" / "cifar10", nets.pictures(12, seed=3).numpy())
    save(tmp_path / "B" / "cifar10", RNG.integers(256, size=(12, 8, 8, 3), dtype=np.uint8))
    others = ("--ood", "A/cifar10", "--ood", "B/cifar10", "--ood", "./cifar10")
    done = evaluate("ood", "--limit", "9", "--model", "mine", *others, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer["n"]) == {"cifar10", "A/cifar10", "B/cifar10", "constant", "uniform"}
    assert answer["data"] == "cifar10"
    near, far = (answer["auroc"][f"{name}/cifar10"]["multiscale"] for name in "AB")
    assert near < 0.95 < far
    assert "./cifar10 was left out: its pictures are those of cifar10" in " ".join(answer["notes"])


def test_the_training_split_is_read_for_the_floor_whatever_split_is_named(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, seed in (("train", 1), ("test", 2)):
        images = [Image.fromarray(picture) for picture in nets.pictures(10, seed=seed).numpy()]
        features = datasets.Features({"img": datasets.Image()})
        table = datasets.Dataset.from_dict({"img": images}, features=features)
        (tmp_path / "set").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    source = f"{tmp_path / 'set'}:test"
    store = Store(tmp_path / "measured", lambda stage, done, total, note="": None)
    model = ncml.load(models / "mine")
    context = Context({"mine": model}, source, (), store)
    digests = [context.pictures(source, model, "fid", split=split).digest for split in ("", "test", "train")]
    assert digests[0] == digests[1] != digests[2]
    assert digests[2] == pictures.load(str(tmp_path / "set"), 8, 8, split="train").digest


def test_models_without_noise_have_no_table_of_refinement(evaluate: Run, tmp_path: Path) -> None:
    done = evaluate("fid", "--limit", "8", "--model", "mle")
    assert done.returncode == 0, done.stderr
    assert "direct (t = 0)" in done.stdout
    assert "Every solver" not in done.stdout + (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "quality_solvers.csv").read_text().count("\n") == 1


def test_mistakes_are_one_line(evaluate: Run, tmp_path: Path) -> None:
    for arguments, said in [
        (("ood", "--model", "mle"), "mle: this model is not calibrated"),
        (("likelihood", "--model", "nobody"), "there is no model 'nobody'"),
        (("likelihood", "--model", "mine", "--limit", "many"), "--limit many is not understood"),
        (("everything", "--model", "mine"), "everything"),
    ]:
        done = evaluate(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
        assert said in done.stderr
    for file in (tmp_path / "cifar10").iterdir():
        file.unlink()
    assert "no readable picture" in evaluate("likelihood", "--model", "mine").stderr
