"""Replayed drawings are the plain ones; checked on a CPU with a tape in the place of CUDA graphs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ncml.config import Config
from ncml.network.ncpn import NCPN
from ncml.sampling.cached import sample_cached
from ncml.sampling.cuda_graphs import MOST, Recorder, Replay, Work
from ncml.sampling.sample import Conditions, Noise
from tests.ncml import nets

T = 0.02


class Tape(TorchDispatchMode):
    """Keeps the operations that are done meanwhile, with the very tensors they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and keep it."""
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        """Do the same to the same memory, as a CUDA graph does: nothing of Python's runs again."""
        for func, args, kwargs, out in self.steps:
            for mine, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(mine, Tensor) and mine.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    mine.copy_(new)


def tapes(device: torch.device) -> Recorder:
    """Unlike a graph's, this recorder does the work as well, so it leaves the drawing in disorder."""

    def record(work: Work) -> Work:
        with Tape() as tape:
            work()
        return tape.play

    return record


def drawn(sampler: Any, net: NCPN, given: Conditions, seed: int, known: Tensor | None = None, rows: int = 0) -> Tensor:
    """Pictures, [B, 3, H, W]; the rows before `rows` are those of `known`."""
    model, weight = net.config.model, net.head.weight
    B, H, W = len(given.class_B), model.height, model.width
    x = torch.full((B, 3, H, W), torch.nan, dtype=weight.dtype, device=weight.device)
    if known is not None:
        x[:, :, :rows] = known[:, :, :rows]
    noise = Noise(list(range(seed, seed + B)), dtype=weight.dtype, device=weight.device)
    with torch.inference_mode():
        sampler(net, x, given, noise.pixels(model.mixtures, H, W), first_row=rows, on_row=lambda row: False)
    return x


SHAPES = {
    "3 levels": nets.config(((4, 1), (6, 1), (8, 1))),
    "1 level, odd size": nets.config(((4, 1),), height=5, width=7),
    "2 levels, no attention": nets.config(((4, 1), (6, 1)), height=8, width=4, attention=False, classes=()),
}


@pytest.mark.parametrize("t", [0.0, T], ids=["clean", "noisy"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_replayed_drawing_is_the_plain_one(config: Config, t: float) -> None:
    """Byte for byte, with other seeds, classes and times than the one that was recorded, and from known rows."""
    net = nets.network(config, dtype=torch.float32, spread=0.08)
    replay = Replay(tapes)
    half = config.model.height // 2
    for rows in (0, half):
        for seed in range(4):
            turn = seed % 4 if config.model.orientations and config.model.height == config.model.width else 0
            given = nets.conditions(3, t * (1 + seed) / 4, config, turn=turn)
            known = torch.rand(3, 3, config.model.height, config.model.width) * 2 - 1
            plain = drawn(sample_cached, net, given, seed, known, rows)
            assert plain.isfinite().all()
            assert torch.equal(drawn(replay, net, given, seed, known, rows), plain), (rows, seed)
    assert len(replay.records) == 2


@pytest.fixture
def small() -> NCPN:
    """A network in fp32."""
    return nets.network(nets.config(((4, 1),)), dtype=torch.float32)


def test_a_kind_is_recorded_when_it_comes_again_and_only_the_last_few_are_kept(small: NCPN) -> None:
    """And what was let go is recorded once more when it is wanted."""
    replay = Replay(tapes)
    for B in range(1, MOST + 3):
        given = nets.conditions(B, 0.0, small.config)
        for times in range(3):
            drawn(replay, small, given, 0)
            assert ((small, (B, 3, 8, 8), 0, True) in replay.records) == (times > 0)
    assert [kind[1][0] for kind in replay.records] == list(range(3, MOST + 3))
    drawn(replay, small, nets.conditions(1, 0.0, small.config), 0)
    assert [kind[1][0] for kind in replay.records] == [*range(4, MOST + 3), 1]


def misses_a_step(device: torch.device) -> Recorder:
    """A recorder that loses an operation of each row."""

    def record(work: Work) -> Work:
        with Tape() as tape:
            work()
        del tape.steps[next(i for i, step in enumerate(tape.steps) if step[0] is torch.ops.aten.addcmul.out)]
        return tape.play

    return record


def fails(device: torch.device) -> Recorder:
    """A recorder on a device that cannot."""

    def record(work: Work) -> Work:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    return record


@pytest.mark.parametrize(
    ("recorder", "why"),
    [(misses_a_step, "its pictures differ"), (fails, "operation not permitted when stream is capturing")],
)
def test_a_record_that_is_not_the_drawing_is_never_used(
    small: NCPN, recorder: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once; the pictures are right all the time."""
    replay = Replay(recorder)
    given = nets.conditions(2, T, small.config)
    plain = drawn(sample_cached, small, given, 0)
    assert torch.equal(drawn(replay, small, given, 0), plain)
    for _ in range(2):
        assert torch.equal(drawn(replay, small, given, 0), plain)
    assert caplog.messages == [f"batches of 2 pictures are drawn plainly, for they cannot be recorded: {why}"]
    assert not replay.records


def test_a_replayed_drawing_stops_within_a_row_and_a_stopped_one_is_not_recorded(small: NCPN) -> None:
    """`on_row` hears of every row."""
    replay = Replay(tapes)
    given = nets.conditions(2, T, small.config)
    for records in (0, 0, 1, 1):
        if records:
            drawn(replay, small, given, 0)
        rows: list[int] = []

        def on_row(row: int, rows: list[int] = rows) -> bool:
            rows.append(row)
            return row == 3

        x = torch.full((2, 3, 8, 8), torch.nan)
        with torch.inference_mode():
            draws = Noise([0, 1], dtype=x.dtype, device=x.device).pixels(small.config.model.mixtures, 8, 8)
            replay(small, x, given, draws, first_row=0, on_row=on_row)
        assert rows == [1, 2, 3]
        assert x[:, :, :3].isfinite().all()
        assert x[:, :, 3:].isnan().all()
        assert len(replay.records) == records


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_cuda_graphs_draw_the_plain_pictures(config: Config) -> None:
    """On a real GPU."""
    net = nets.network(config, dtype=torch.float32, spread=0.08).to("cuda")
    replay = Replay()
    for seed in range(4):
        cpu = nets.conditions(3, T, config)
        given = Conditions(cpu.t, cpu.class_B.cuda(), cpu.orientation_B.cuda())
        assert torch.equal(drawn(replay, net, given, seed), drawn(sample_cached, net, given, seed))
    assert len(replay.records) == 1
