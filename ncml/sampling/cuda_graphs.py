"""On a GPU: drawings of a kind that comes again are replayed from CUDA graphs, one for each row.

A picture takes tens of thousands of operations, and starting one from Python takes longer than a GPU needs for it. A
graph starts a row's operations at once; what they compute, and in what order, stays `ncml.sampling.cached`'s.

A kind's first drawing is drawn plainly. So is its second, which is then recorded and drawn once more from the record:
only a record that yields the same pictures, to the bit, is ever used.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ncml.network.likelihood import PixelNoise
from ncml.network.ncpn import NCPN
from ncml.sampling.cached import RowSampler, sample_cached
from ncml.sampling.sample import Conditions

log = logging.getLogger(__name__)

MOST = 4
"""Kinds of drawings that are kept recorded: each holds caches, a megabyte for each picture of the bundled model's size,
and the weights once more, laid out for the sampler."""

Work = Callable[[], None]

Recorder = Callable[[Work], Work]
"""Records what a function does to memory, without doing it -> what does the same to the same memory."""

Kind = tuple[NCPN, tuple[int, ...], int, bool]
"""Network, shape of the batch, first unknown row, whether t = 0."""


def cuda_graphs(device: torch.device) -> Recorder:
    """Records of one drawing: they share their memory, since they are always replayed in one order."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return record


@dataclass(frozen=True)
class _Record:
    """A drawing and its rows, recorded."""

    sampler: RowSampler
    rows: list[Work]

    def draw(self, x_BCHW: Tensor, conditions: Conditions, noise: PixelNoise, on_row: Callable[[int], bool]) -> None:
        """The pictures, into x, from the record."""
        self.sampler.reset(x_BCHW, conditions, noise)
        first = self.sampler.rows.start
        self.sampler.sample_rows(x_BCHW, lambda i: self.rows[i - first](), on_row)


class Replay:
    """A `ncml.sampling.sample.Sampler` with the results of `sample_cached`, for weights that do not change."""

    def __init__(self, recorders: Callable[[torch.device], Recorder] = cuda_graphs) -> None:
        """recorders: makes the recorder of a drawing's rows on a device."""
        self.recorders = recorders
        self.records: OrderedDict[Kind, _Record] = OrderedDict()
        """The last one used comes last."""
        self.seen: set[Kind] = set()
        self.refused: set[Kind] = set()
        """Kinds of which no record can be made."""
        self.lock = threading.Lock()

    def __call__(
        self,
        network: NCPN,
        x_BCHW: Tensor,
        conditions: Conditions,
        noise: PixelNoise,
        *,
        first_row: int,
        on_row: Callable[[int], bool],
    ) -> None:
        """Draw the pixels of x from row `first_row` on, in place."""
        kind = (network, tuple(x_BCHW.shape), first_row, conditions.t == 0)
        with self.lock:  # a record is a place to draw in
            record = self.records.get(kind)
            if record is not None:
                self.records.move_to_end(kind)
                record.draw(x_BCHW, conditions, noise, on_row)
                return
            rows_done = first_row

            def count(row: int) -> bool:
                nonlocal rows_done
                rows_done = row
                return on_row(row)

            try:
                sample_cached(network, x_BCHW, conditions, noise, first_row=first_row, on_row=count)
            except torch.OutOfMemoryError:
                self.records.clear()  # before whoever asked tries fewer pictures
                raise
            if kind in self.seen - self.refused and rows_done == x_BCHW.shape[2]:
                self._record(kind, x_BCHW, conditions, noise, on_row)
            self.seen.add(kind)

    def _record(
        self,
        kind: Kind,
        x_BCHW: Tensor,
        conditions: Conditions,
        noise: PixelNoise,
        on_row: Callable[[int], bool],
    ) -> None:
        """Keep a record of a kind of drawing, of which x is one, if it yields x; nothing once x is no longer wanted."""
        network, shape, first_row, clean = kind
        try:
            sampler = RowSampler(network, x_BCHW, first_row=first_row, clean=clean)
            sampler.reset(x_BCHW, conditions, noise)
            recorder = self.recorders(x_BCHW.device)
            rows: list[Work] = []
            for i in sampler.rows:
                rows.append(recorder(partial(sampler.sample_row, i)))
                if on_row(shape[2]):
                    return
            record = _Record(sampler, rows)
            again_BCHW = x_BCHW.clone()
            again_BCHW[:, :, first_row:] = 0
            record.draw(again_BCHW, conditions, noise, lambda row: False)
            if not torch.equal(again_BCHW, x_BCHW):
                raise RuntimeError("its pictures differ")
        except RuntimeError as error:
            self.refused.add(kind)
            why = str(error).splitlines()[0]
            log.warning("batches of %s pictures are drawn plainly, for they cannot be recorded: %s", len(x_BCHW), why)
            return
        while len(self.records) >= MOST:
            self.records.popitem(last=False)
        self.records[kind] = record
