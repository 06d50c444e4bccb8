"""Replayed batches equal the plain ones; checked on a CPU with a tape in place of CUDA graphs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ncml.config import Config
from ncml.network.ncpn import NCPN
from ncml.sampling import cuda_graphs, guidance
from ncml.sampling.cached import sample_cached
from ncml.sampling.conditions import NO_TILT, Conditions, Tilt
from ncml.sampling.cuda_graphs import MAX_RECORDINGS, Operations, Recorder, ReplaySampler
from ncml.sampling.sample import BatchDraws
from tests.ncml import nets

T = 0.02


@pytest.fixture(autouse=True)
def library_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tilted pixels are sampled in PyTorch, since no operation of NumPy is recorded."""
    monkeypatch.setattr(guidance, "choose_library", lambda device: torch)


class Tape(TorchDispatchMode):
    """Records the operations that run in its context, with the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it."""
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        """Run the operations on the same memory, as a CUDA graph does, without the Python code around them."""
        for func, args, kwargs, out in self.steps:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def tapes(device: torch.device) -> Recorder:
    """Unlike that of a graph, this recorder runs the operations, so it leaves the caches in disorder."""

    def record(operations: Operations) -> Operations:
        with Tape() as tape:
            operations()
        return tape.play

    return record


def sample(
    sampler: Any, net: NCPN, conditions: Conditions, seed: int, known_half: Tensor | None = None, rows: int = 0
) -> Tensor:
    """Sample images, [B, 3, H, W]; the rows before `rows` are those of `known`."""
    model, weight = net.config.model, net.head.weight
    B, H, W = len(conditions.class_B), model.height, model.width
    x = torch.full((B, 3, H, W), torch.nan, dtype=weight.dtype, device=weight.device)
    if known_half is not None:
        x[:, :, :rows] = known_half[:, :, :rows]
    draws = BatchDraws(list(range(seed, seed + B)), dtype=weight.dtype, device=weight.device)
    with torch.inference_mode():
        pixel_draws = draws.draw_pixels(model.mixtures, H, W)
        sampler(net, x, replace(conditions, first_row=rows), pixel_draws, lambda row: False)
    return x


SHAPES = {
    "3 levels": nets.config(((4, 1), (6, 1), (8, 1)), height=4, width=4),
    "1 level, odd size": nets.config(((4, 1),), height=5, width=7),
    "2 levels, no attention": nets.config(((4, 1), (6, 1)), height=4, width=2, attention=False, classes=()),
}


@pytest.mark.parametrize("tilt", [NO_TILT, Tilt(temperature=0.9), Tilt(2.0, 0.9)], ids=str)
@pytest.mark.parametrize("t", [0.0, T], ids=["clean", "noisy"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_replayed_batch_equals_the_plain_one(config: Config, t: float, tilt: Tilt) -> None:
    """Compare bytes, with other seeds, classes, times and tilts than those recorded, and from known rows."""
    net = nets.network(config, dtype=torch.float32, spread=0.08)
    replay = ReplaySampler(tapes)
    half = config.model.height // 2
    for rows in (0, half):
        for seed in range(3):
            orientation = 1 + seed if config.model.orientations and config.model.height == config.model.width else 0
            conditions = nets.conditions(4, t * (1 + seed) / 3, config, orientation=orientation)
            if tilt != NO_TILT:
                guided = tilt.guidance + seed * (tilt.guidance != 1)
                conditions = replace(conditions, tilt=Tilt(guided, tilt.temperature - seed / 10))
            known_half = torch.rand(4, 3, config.model.height, config.model.width) * 2 - 1
            plain = sample(sample_cached, net, conditions, seed, known_half, rows)
            assert plain.isfinite().all()
            assert torch.equal(sample(replay, net, conditions, seed, known_half, rows), plain), (rows, seed)
    assert len(replay.recordings) == 2


@pytest.fixture
def small() -> NCPN:
    """A network in fp32."""
    return nets.network(nets.config(((4, 1),), height=4, width=4), dtype=torch.float32)


def test_a_kind_is_recorded_at_its_second_use_and_only_the_first_few_are(small: NCPN) -> None:
    """In a service, the number of images of a batch varies."""
    made = 0

    def counted_tapes(device: torch.device) -> Recorder:
        nonlocal made
        made += 1
        return tapes(device)

    replay = ReplaySampler(counted_tapes)
    for _ in range(2):
        for index in range(MAX_RECORDINGS + 2):
            B, rows = (1, 4)[index // 4], index % 4
            conditions, known_half = nets.conditions(B, 0.0, small.config), torch.zeros(B, 3, 4, 4)
            for times in range(3):
                sample(replay, small, conditions, 0, known_half, rows)
                is_recorded = (small, (B, 3, 4, 4), rows, True, 1, 0) in replay.recordings
                assert is_recorded == (index < MAX_RECORDINGS and (times > 0 or made == MAX_RECORDINGS)), (index, times)
    assert made == MAX_RECORDINGS


def test_batches_are_padded_to_the_sizes_of_fast_groups(small: NCPN) -> None:
    """Each is that of the padded size, whose other images are left out, also where it is recorded."""
    replay = ReplaySampler(tapes)
    for tilt, counts in ((NO_TILT, (5, 8, 6, 7)), (Tilt(2.0), (3, 4, 3))):
        conditions = replace(nets.conditions(8, T, small.config), tilt=tilt)
        plain = sample(sample_cached, small, conditions.select(slice(max(counts))), 0)
        for count in counts:
            images = sample(replay, small, conditions.select(slice(count)), 0)
            torch.testing.assert_close(images, plain[:count], rtol=0, atol=1e-4)
    assert [(kind.shape[0], kind.rows_per_image) for kind in replay.recordings] == [(8, 1), (4, 2)]
    sample(replay, small, nets.conditions(65, T, small.config), 0)
    assert {kind.shape[0] for kind in replay.sampled_kinds} == {8, 4, 128}


def test_released_recordings_are_not_made_again(small: NCPN) -> None:
    """As after memory ran out."""
    replay = ReplaySampler(tapes)
    conditions = nets.conditions(4, T, small.config)
    plain = sample(sample_cached, small, conditions, 0)
    for recordings in (1, 0):
        for _ in range(3):
            assert torch.equal(sample(replay, small, conditions, 0), plain)
        assert len(replay.recordings) == recordings
        replay.release()
        assert not replay.recordings


def test_a_recording_serves_neither_clean_and_noisy_batches_nor_other_grids(
    small: NCPN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_RECORDINGS", 6)
    replay = ReplaySampler(tapes)
    noisy = nets.conditions(4, T, small.config)
    cooler = replace(noisy, tilt=Tilt(temperature=0.8))
    kinds = (noisy, replace(noisy, t=0.0), cooler, replace(cooler, t=0.0), replace(cooler, tilt=Tilt(2.0)))
    for conditions in (*kinds, replace(cooler, t=T / 1000)):
        plain = sample(sample_cached, small, conditions, 0)
        assert all(torch.equal(sample(replay, small, conditions, 0), plain) for _ in range(3))
    assert len(replay.recordings) == len(kinds) + 1


def misses_a_step(device: torch.device) -> Recorder:
    """Return a recorder that loses an operation of each row."""

    def record(operations: Operations) -> Operations:
        with Tape() as tape:
            operations()
        del tape.steps[next(i for i, step in enumerate(tape.steps) if step[0] is torch.ops.aten.addcmul.out)]
        return tape.play

    return record


def fails(device: torch.device) -> Recorder:
    """Return a recorder for a device that cannot record."""

    def record(operations: Operations) -> Operations:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    return record


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [(misses_a_step, "the replayed images differ"), (fails, "operation not permitted when stream is capturing")],
)
def test_a_recording_that_does_not_reproduce_the_images_is_never_used(
    small: NCPN, recorder: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is logged once, and nothing else is recorded; the images are always correct."""
    replay = ReplaySampler(recorder)
    for B in (4, 8):
        conditions = nets.conditions(B, T, small.config)
        plain = sample(sample_cached, small, conditions, 0)
        for _ in range(3):
            assert torch.equal(sample(replay, small, conditions, 0), plain)
    assert caplog.messages == [f"a batch of 4 images was not recorded as CUDA graphs; nor are others: {reason}"]
    assert not replay.recordings


def test_a_replayed_batch_stops_after_a_row_and_a_stopped_one_is_not_recorded(small: NCPN) -> None:
    """`on_row` is called for every row."""
    replay = ReplaySampler(tapes)
    conditions = nets.conditions(4, T, small.config)
    for recordings in (0, 0, 1, 1):
        if recordings:
            sample(replay, small, conditions, 0)
        rows: list[int] = []

        def on_row(row: int, rows: list[int] = rows) -> bool:
            rows.append(row)
            return row == 3

        x = torch.full((4, 3, 4, 4), torch.nan)
        with torch.inference_mode():
            draws = BatchDraws([0, 1, 2, 3], dtype=x.dtype, device=x.device)
            replay(small, x, conditions, draws.draw_pixels(small.config.model.mixtures, 4, 4), on_row)
        assert rows == [1, 2, 3]
        assert x[:, :, :3].isfinite().all()
        assert x[:, :, 3:].isnan().all()
        assert len(replay.recordings) == recordings


def test_a_batch_sampled_in_the_middle_of_another_leaves_its_memory_alone(small: NCPN) -> None:
    """Both are of a kind that is recorded; the one in the middle neither waits for the memory nor uses it."""
    replay = ReplaySampler(tapes)
    conditions = nets.conditions(4, T, small.config)
    plain, inner_plain = (sample(sample_cached, small, conditions, seed) for seed in (0, 7))
    for times in range(4):
        inner: list[Tensor] = []

        def sampler(*arguments: Any, inner: list[Tensor] = inner) -> None:
            def on_row(row: int) -> bool:
                inner.append(sample(replay, small, conditions, 7))
                return False

            replay(*arguments[:-1], on_row)

        assert torch.equal(sample(sampler, small, conditions, 0), plain)
        assert len(inner) >= 4
        assert all(torch.equal(x, inner_plain) for x in inner)
        assert len(replay.recordings) == (times > 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("tilt", [NO_TILT, Tilt(temperature=0.9), Tilt(2.0, 0.9)], ids=str)
@pytest.mark.parametrize("t", [0.0, T], ids=["clean", "noisy"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_cuda_graphs_reproduce_the_plain_images(config: Config, t: float, tilt: Tilt) -> None:
    """Needs a GPU; with other seeds, times and temperatures than those recorded, and from known rows."""
    net = nets.network(config, dtype=torch.float32, spread=0.08).to("cuda")
    replay = ReplaySampler()
    known_half = torch.rand(4, 3, config.model.height, config.model.width).cuda() * 2 - 1
    for rows in (0, config.model.height // 2):
        for seed in range(4):
            cpu = nets.conditions(4, t * (1 + seed) / 4, config)
            changed = tilt if tilt == NO_TILT else replace(tilt, temperature=tilt.temperature - seed / 10)
            conditions = Conditions(cpu.t, cpu.class_B.cuda(), cpu.orientation_B.cuda(), changed)
            plain = sample(sample_cached, net, conditions, seed, known_half, rows)
            assert torch.equal(sample(replay, net, conditions, seed, known_half, rows), plain)
    assert len(replay.recordings) == 2
