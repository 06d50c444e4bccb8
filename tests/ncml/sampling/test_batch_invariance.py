"""A seed gives the same bytes in every batch: in checked fast groups, or in fixed groups."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ncml
from ncml.errors import InputError
from ncml.progress import Progress
from ncml.sampling import batch_invariance, outcomes
from ncml.sampling.batch_invariance import choose_batching
from ncml.sampling.batching import FAST_SIZES, FIXED_SIZE, Batching, batching_setting, fast_groups, fixed_groups
from ncml.sampling.cached import products
from ncml.sampling.conditions import NO_TILT, Tilt
from tests.ncml import nets
from tests.ncml.sampling.emulated import MEMBERS, find_differing

ROOT = Path(__file__).parents[3]
NET = nets.network(nets.config(((6, 1), (10, 1))), dtype=torch.float32, spread=0.03)
SEEDS = [3, 11, 2**32 - 1, 4, 19, 5]
"""Seeds of which three share a row, and another two, too."""


# -- groups


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of outcomes for each test: those of imitated machines must not reach the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("count", [1, 2, 4, 5, 17, 64, 65, 200])
def test_fast_groups_have_checked_sizes_and_hold_every_image_in_order(count: int) -> None:
    groups = fast_groups(count)
    assert {len(group) for group in groups} <= set(FAST_SIZES)
    assert [member for group in groups for member in group if member is not None] == list(range(count))
    assert len(groups) == -(-count // FAST_SIZES[-1])
    assert all(member is not None for group in groups[:-1] for member in group)


def test_an_image_has_the_row_of_its_seed_in_fixed_groups_of_one_size() -> None:
    groups = fixed_groups(SEEDS)
    places = {member: row for group in groups for row, member in enumerate(group) if member is not None}
    assert places == {member: seed % FIXED_SIZE for member, seed in enumerate(SEEDS)}
    assert [len(group) for group in groups] == 3 * [FIXED_SIZE]
    assert len(fixed_groups(range(5, 5 + 64))) == 64 // FIXED_SIZE
    assert [len(group) for group in fixed_groups(SEEDS, rows_per_image=2)] == 4 * [FIXED_SIZE // 2]


# -- the setting


def test_the_argument_precedes_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCML_BATCHING", raising=False)
    assert batching_setting() == "auto"
    monkeypatch.setenv("NCML_BATCHING", "")
    assert batching_setting() == "auto"
    monkeypatch.setenv("NCML_BATCHING", "fixed")
    assert batching_setting() == "fixed"
    assert batching_setting("fast") == "fast"


def test_an_unknown_setting_is_refused(model: ncml.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^batching must be auto, fast or fixed, not 'slow'\.$"):
        ncml.load(model.folder, batching="slow")
    monkeypatch.setenv("NCML_BATCHING", "Fast")
    with pytest.raises(InputError, match=r"^NCML_BATCHING must be auto, fast or fixed, not 'Fast'\.$") as refused:
        ncml.load(model.folder)
    assert refused.value.field == "NCML_BATCHING"


@pytest.mark.parametrize("setting", ["fast", "fixed"])
def test_a_setting_is_followed_without_a_check(
    model: ncml.Model, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_invariance, "check_fast_groups", pytest.fail)
    batching = ncml.load(model.folder, batching=setting).batching
    assert batching is not None
    assert (batching.groups, batching.check) == (setting, "skipped")


# -- the check


def by_position(x_RWF: Tensor) -> Tensor:
    """Imitate a kernel that rounds a row depending on its position."""
    return x_RWF * (1 + 1e-6 * torch.arange(len(x_RWF))[:, None, None])


def by_size(x_RWF: Tensor) -> Tensor:
    """Imitate a kernel that rounds depending on the number of rows."""
    return x_RWF * (1 + 1e-6 * len(x_RWF))


@pytest.fixture(params=[by_position, by_size])
def other_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitate a machine whose kernels round depending on shape or position."""
    plain: Callable[[Tensor], Tensor] = products._concat_elu
    monkeypatch.setattr(products, "_concat_elu", lambda x_RWF: plain(request.param(x_RWF)))


@pytest.mark.usefixtures("other_machine")
@pytest.mark.parametrize("tilt", [NO_TILT, Tilt(temperature=0.9), Tilt(guidance=2.0)], ids=str)
def test_fixed_groups_are_batch_invariant_where_the_check_fails(tilt: Tilt) -> None:
    """A tilt chooses a cell of a grid, which hides differences until one of them changes the cell."""
    batching = choose_batching(NET, tilt=tilt)
    assert find_differing(NET, batching, tilt) == []
    assert (batching.groups, batching.check) == ("fixed", "failed")
    assert "differs from the same image alone" in batching.detail
    if tilt == NO_TILT:
        assert find_differing(NET, choose_batching(NET, "fast")) != []  # otherwise the check should have passed


def test_the_outcome_is_logged_and_kept_for_each_number_of_threads_and_kind_of_tilt(
    model: ncml.Model, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = ncml.load(model.folder)
    with caplog.at_level(logging.INFO, "ncml.sampling.batch_invariance"):
        assert caplog.messages == []
        loaded.generate(noise=0)
        loaded.generate(noise=0)
        assert len(caplog.messages) == 1
        assert "batches are sampled in" in caplog.messages[0]
        torch.set_num_threads(2)
        try:
            assert loaded.batching is not None
        finally:
            torch.set_num_threads(1)
        assert len(caplog.messages) == 2
        for guidance in (2, 3):
            loaded.generate(noise=0, classes=0, guidance=guidance)
        assert len(caplog.messages) == 3
        for temperature in (0.8, 0.9):
            loaded.generate(noise=0, temperature=temperature)
        assert len(caplog.messages) == 4


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Tilt]:
    """The tilts that have been checked; every check fails."""
    tilts: list[Tilt] = []

    def choose(network: object, setting: str, tilt: Tilt = NO_TILT, **options: bool) -> Batching:
        tilts.append(tilt)
        return Batching("fixed", "failed", "it is an example.")

    monkeypatch.setattr("ncml.model.choose_batching", choose)
    return tilts


def test_a_version_is_checked_once_for_each_machine(
    model: ncml.Model, checks: list[Tilt], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    assert ncml.load(model.folder).known_batching is None
    checked = ncml.load(model.folder).batching
    assert ncml.load(model.folder).known_batching == ncml.load(model.folder).batching == checked
    assert len(checks) == 1
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] == [".json"]
    shutil.rmtree(cache / "ncml")
    (cache / "ncml").write_text("a file where the cache should be")
    assert ncml.load(model.folder).batching == checked
    assert ncml.load(model.folder).batching == checked
    assert len(checks) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a home
    with pytest.raises(RuntimeError):
        Path.home()
    assert ncml.load(model.folder).batching == checked
    assert ncml.load(model.folder).known_batching is None
    assert len(checks) == 4


@pytest.mark.parametrize(
    "condition", ["version", "dtype", "threads", "build", "processor", "kernels", "numpy", "sources", "MKL_CBWR"]
)
def test_an_outcome_holds_only_under_its_conditions(
    model: ncml.Model, checks: list[Tilt], monkeypatch: pytest.MonkeyPatch, condition: str
) -> None:
    assert ncml.load(model.folder).batching is not None
    other, threads, machine = ncml.load(model.folder), torch.get_num_threads(), outcomes._machine()
    if condition == "version":
        other.version = "0" * 64
    elif condition == "dtype":
        other.network.double()
    elif condition == "threads":
        torch.set_num_threads(threads + 1)
    elif condition == "MKL_CBWR":
        monkeypatch.setenv(condition, "COMPATIBLE")
    else:
        field = "torch" if condition == "build" else condition
        monkeypatch.setattr(outcomes, "_machine", lambda: machine | {field: machine[field] + "."})
    try:
        assert other.known_batching is None
    finally:
        torch.set_num_threads(threads)


def test_a_damaged_outcome_is_ignored_and_replaced(
    model: ncml.Model, checks: list[Tilt], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checked = ncml.load(model.folder).batching
    [path] = cache.rglob("*.json")
    text = path.read_text()
    stored = json.loads(text)
    for damaged in (
        b"", b"{", b"[]", b"\xff", text[:-20].encode(),
        json.dumps(stored | {"outcome": {"groups": "fast", "check": "skipped", "detail": "no check."}}).encode(),
        json.dumps(stored | {"outcome": {"groups": "fast", "check": "failed", "detail": "a contradiction."}}).encode(),
        json.dumps(stored | {"outcome": {"groups": [], "check": "passed", "detail": ""}}).encode(),
        json.dumps(stored | {"conditions": stored["conditions"] | {"model": "another"}}).encode(),
    ):  # fmt: skip
        path.write_bytes(damaged)
        checks.clear()
        caplog.clear()
        assert ncml.load(model.folder).known_batching is None, damaged
        assert "cannot be used" in caplog.text
        assert ncml.load(model.folder).batching == checked
        assert len(checks) == 1
        assert path.read_text() == text


def test_only_a_check_that_ran_to_its_end_is_stored(
    model: ncml.Model, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    for setting in ("fast", "fixed"):
        assert ncml.load(model.folder, batching=setting).batching.check == "skipped"
    with monkeypatch.context() as patch:
        patch.setattr(batch_invariance, "LIMIT_S", -1.0)
        assert ncml.load(model.folder).batching.check == "error"
    assert not cache.exists()
    outcome = ncml.load(model.folder).batching
    assert outcome.check != "error"
    assert ncml.load(model.folder).known_batching == outcome


def test_an_outcome_that_cannot_be_stored_leaves_no_file(
    model: ncml.Model, checks: list[Tilt], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        assert ncml.load(model.folder).batching is not None
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def out_of_memory(*_: Any, **__: Any) -> None:
    raise MemoryError


def test_a_check_that_cannot_run_uses_fixed_groups_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batch_invariance, "RowSampler", out_of_memory)
    batching = choose_batching(NET)
    assert (batching.groups, batching.check) == ("fixed", "error")
    assert caplog.messages == ["batches are sampled in fixed groups: the check of fast groups did not run: MemoryError"]


def test_a_check_that_takes_too_long_uses_fixed_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_invariance, "LIMIT_S", -1.0)
    batching = choose_batching(NET)
    assert (batching.groups, batching.check) == ("fixed", "error")
    assert batching.detail.endswith("it takes longer than -1 s.")


def test_a_model_that_does_not_sample_uses_fixed_groups() -> None:
    broken = nets.network(NET.config, dtype=torch.float32)
    broken.head.bias.fill_(torch.nan)
    batching = choose_batching(broken)
    assert (batching.groups, batching.check) == ("fixed", "error")
    assert batching.detail.endswith("the model's samples are not finite.")


def test_nothing_is_checked_on_a_gpu(model: ncml.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ncml.Model, "device", torch.device("cuda"))
    monkeypatch.setattr(batch_invariance, "check_fast_groups", pytest.fail)
    assert ncml.load(model.folder).batching is None


# -- the fallback, through the front door


@pytest.fixture
def fixed(model: ncml.Model) -> ncml.Model:
    """The small model in fixed groups, as on a machine where the check fails."""
    return ncml.load(model.folder, batching="fixed")


@pytest.fixture
def passes(fixed: ncml.Model) -> Iterator[list[int]]:
    """Collect the number of images in each pass of the network."""
    counted: list[int] = []
    hook = fixed.network.register_forward_hook(lambda _, inputs, __: counted.append(len(inputs[0])))
    yield counted
    hook.remove()


@pytest.mark.usefixtures("other_machine")
@pytest.mark.parametrize(("noise", "solver"), [(0, None), (10, "euler-maruyama"), (10, "predictor-corrector")])
def test_an_image_is_the_same_alone_and_among_others(fixed: ncml.Model, noise: float, solver: str | None) -> None:
    steps = 2 if solver else None
    whole = fixed.generate(len(SEEDS), seeds=SEEDS, noise=noise, solver=solver, steps=steps)
    for index, seed in enumerate(SEEDS):
        alone = fixed.generate(seeds=seed, noise=noise, solver=solver, steps=steps)
        assert np.array_equal(alone[0], whole[index]), seed


@pytest.mark.usefixtures("other_machine")
@pytest.mark.parametrize("keep", ["top", "right"])
def test_a_completion_is_the_same_alone_and_among_others(fixed: ncml.Model, keep: Any) -> None:
    canvas = nets.images(1).numpy()
    whole = fixed.complete(canvas, keep=keep, n=len(SEEDS), seeds=SEEDS, noise=0)
    for index, seed in enumerate(SEEDS):
        assert np.array_equal(fixed.complete(canvas, keep=keep, seeds=seed, noise=0)[0], whole[index]), seed
    half = {"top": np.s_[:, :4], "right": np.s_[:, :, 4:]}[keep]
    assert (whole[half] == canvas[half]).all()


def test_known_rows_of_padding_are_not_computed(fixed: ncml.Model, passes: list[int]) -> None:
    fixed.complete(nets.images(1).numpy(), n=3, seeds=[0, 8, 5], noise=0)
    assert passes == [1, 1, 1]


def test_progress_counts_the_rows_of_all_groups(fixed: ncml.Model) -> None:
    steps: list[int] = []

    def on_progress(progress: Progress) -> None:
        steps.append(progress.done)

    images = fixed.generate(2, seeds=[0, 8], noise=0, callback=on_progress)
    assert steps == [row // 2 for row in range(1, 17)]
    steps.clear()
    assert not np.array_equal(images[0], images[1])


def test_remaining_groups_are_skipped_once_all_images_are_dropped(fixed: ncml.Model) -> None:
    calls = 0

    def on_progress(progress: Progress) -> None:
        nonlocal calls
        calls += 1

    fixed.generate(2, seeds=[0, 8], callback=on_progress, dropped={0, 1})
    assert calls == 1


def test_the_matrix_detects_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[[Tensor], Tensor] = products._concat_elu
    monkeypatch.setattr(products, "_concat_elu", lambda x_RWF: plain(by_position(x_RWF)))
    assert MEMBERS in find_differing(NET, choose_batching(NET, "fast"))
