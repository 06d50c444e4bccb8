"""CUDA graphs: on a GPU, kinds of batches that were sampled before are replayed, with one graph for each row.

An image takes tens of thousands of operations, and launching one from Python takes longer than a GPU needs for it. A
graph launches a row's operations at once; what they compute, and in what order, is defined by `ncml.sampling.cached`.

The first batch of a kind is sampled without a graph. So is the second, which is then recorded and replayed once: a
recording is kept only if it reproduces the images, to the bit. Batches are padded to the sizes of fast groups, or to
multiples of the largest, so that those of a service are of few kinds.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ncml.network.mixture import PixelDraws
from ncml.network.ncpn import NCPN
from ncml.runtime import first_line
from ncml.sampling.batching import padded_size
from ncml.sampling.cached import RowSampler, sample_cached
from ncml.sampling.conditions import Conditions, OnRow
from ncml.sampling.guidance import grid_of

log = logging.getLogger(__name__)

MAX_RECORDINGS = 4
"""Maximum number of kinds of batches that are recorded. Each holds a node of a graph for every operation, outside
PyTorch's allocator: with the bundled model's defaults 160,000, which may take a gigabyte (others report 3 to 10 kB for
each). Its caches and its copy of the weights are far smaller."""

Operations = Callable[[], None]

Recorder = Callable[[Operations], Operations]
"""Records the operations of a function without running them; returns a function that runs them on the same memory."""


class BatchKind(NamedTuple):
    """What the operations on a batch depend on."""

    network: NCPN
    shape: tuple[int, ...]
    first_row: int
    clean: bool
    """t = 0."""
    rows_per_image: int
    cells: int
    """Cells of the grid of the tilt; 0 without one."""

    @classmethod
    def of(cls, network: NCPN, x_BCHW: Tensor, conditions: Conditions) -> BatchKind:
        """Return the kind of a batch."""
        cells, rows_per_image = len(grid_of(network, conditions)), conditions.tilt.rows_per_image
        return cls(network, tuple(x_BCHW.shape), conditions.first_row, conditions.t == 0, rows_per_image, cells)


def cuda_graphs(device: torch.device) -> Recorder:
    """Return a recorder for the rows of one batch: its graphs share memory, since they always run in the same order."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(operations: Operations) -> Operations:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),  # restores it if a capture cannot be ended
            # Other threads may allocate memory meanwhile.
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            operations()
        return graph.replay

    return record


@dataclass(frozen=True)
class _Recording:
    """A row sampler, and the recorded operations of its rows."""

    sampler: RowSampler
    rows: list[Operations]

    def sample(self, x_BCHW: Tensor, conditions: Conditions, draws: PixelDraws, on_row: OnRow) -> None:
        """Sample the pixels of x by replaying the rows."""
        self.sampler.reset(x_BCHW, conditions, draws)
        first = self.sampler.rows.start
        self.sampler.sample_rows(x_BCHW, lambda i: self.rows[i - first](), on_row)


class ReplaySampler:
    """A `ncml.sampling.sample.Sampler` with the results of `sample_cached`, for weights that do not change."""

    def __init__(self, make_recorder: Callable[[torch.device], Recorder] = cuda_graphs) -> None:
        """make_recorder: makes the recorder of a batch's rows on a device."""
        self.make_recorder = make_recorder
        self.recordings: dict[BatchKind, _Recording] = {}
        """The kinds that were first sampled twice: replacing them would record more often than replay if sizes vary."""
        self.sampled_kinds: set[BatchKind] = set()
        self.can_record = True
        self.lock = threading.RLock()
        self._is_sampling = False

    def __call__(self, network: NCPN, x_BCHW: Tensor, conditions: Conditions, draws: PixelDraws, on_row: OnRow) -> None:
        """Sample the unknown pixels of x, in place."""
        B = len(x_BCHW)
        padding = padded_size(B, conditions.tilt.rows_per_image) - B
        padded_G = torch.tensor([*range(B), *[0] * padding], device=x_BCHW.device)
        x_GCHW = x_BCHW[padded_G]

        def on_padded_row(row: int) -> bool:
            x_BCHW.copy_(x_GCHW[:B])
            return on_row(row)

        self._sample_padded(network, x_GCHW, conditions.select(padded_G), draws.select(padded_G), on_padded_row)

    def release(self) -> None:
        """Release the memory of all recordings, and record no more: the same kinds would fill it again."""
        self.recordings.clear()
        self.can_record = False

    def _sample_padded(
        self, network: NCPN, x_BCHW: Tensor, conditions: Conditions, draws: PixelDraws, on_row: OnRow
    ) -> None:
        kind = BatchKind.of(network, x_BCHW, conditions)
        with self._reserved() as is_free:
            if not is_free:
                sample_cached(network, x_BCHW, conditions, draws, on_row)
                return
            recording = self.recordings.get(kind)
            if recording is not None:
                recording.sample(x_BCHW, conditions, draws, on_row)
                return
            rows_done = conditions.first_row

            def count_row(row: int) -> bool:
                nonlocal rows_done
                rows_done = row
                return on_row(row)

            sample_cached(network, x_BCHW, conditions, draws, count_row)
            is_recorded = self.can_record and kind in self.sampled_kinds and len(self.recordings) < MAX_RECORDINGS
            if is_recorded and rows_done == x_BCHW.shape[2]:
                self._record(kind, x_BCHW, conditions, draws, on_row)
            self.sampled_kinds.add(kind)

    @contextlib.contextmanager
    def _reserved(self) -> Generator[bool]:
        """Wait until no other thread samples, since a recording has memory for one batch at a time.

        False: this thread samples already, and its `on_row` samples another batch.
        """
        with self.lock:
            was_sampling, self._is_sampling = self._is_sampling, True
            try:
                yield not was_sampling
            finally:
                self._is_sampling = was_sampling

    def _record(
        self, kind: BatchKind, x_BCHW: Tensor, conditions: Conditions, draws: PixelDraws, on_row: OnRow
    ) -> None:
        """Record a kind of batch, of which x is a result, if the recording reproduces x; stop when `on_row` does.

        After a failure nothing more is recorded, because CUDA may not have ended the capture.
        """
        try:
            sampler = RowSampler(kind.network, x_BCHW, conditions)
            sampler.reset(x_BCHW, conditions, draws)
            record = self.make_recorder(x_BCHW.device)
            rows: list[Operations] = []
            for i in sampler.rows:
                rows.append(record(partial(sampler.sample_row, i)))
                if on_row(x_BCHW.shape[2]):
                    return
            recording = _Recording(sampler, rows)
            replayed_BCHW = x_BCHW.clone()
            replayed_BCHW[:, :, kind.first_row :] = 0
            recording.sample(replayed_BCHW, conditions, draws, lambda row: False)
            if not torch.equal(replayed_BCHW, x_BCHW):
                raise RuntimeError("the replayed images differ")
        except RuntimeError as error:
            self.can_record = False
            reason = first_line(error)
            log.warning("a batch of %s images was not recorded as CUDA graphs; nor are others: %s", len(x_BCHW), reason)
            return
        self.recordings[kind] = recording
