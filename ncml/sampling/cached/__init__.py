"""The exact cached sampler: each activation of the network is computed once, in raster order.

It reads the weights of `ncml.network` and mirrors its structure, stream by stream. For each row i:

    start the row       u of the whole row, at every level whose stride divides i; then, for every ul block, all terms
                        that come from the row above and from u, for the whole row at once (`prepare`)
    for each column j   ul at every level whose stride divides i and j, from the left neighbour and the position itself
                        (`step`); the head; one pixel

Three levels are visited as follows (level l where 2^l divides row and column):

    row 0   012 0 01 0 012 0 01 0       at (i, j): up the blocks of level 0;
    row 1   0   0 0  0 0   0 0  0                  where i and j are even, shrink to (i/2, j/2) of level 1, the same
    row 2   01  0 01 0 01  0 01 0                  there, and grow its position to a 2x2 block;
    row 3   0   0 0  0 0   0 0  0                  down the blocks of level 0

The sequential part, `step`, is about a quarter of the arithmetic. Known rows are computed by the network itself in one
pass, with hooks on its layers that fill the caches.

The modules, in reading order:

    products            matrix products and elementwise operations whose bits do not depend on the batch
    buffers             a row of a stream in memory, with a view of each position
    u_stream            u blocks, a row at a time
    ul_stream           ul blocks: a row's share from above at once, then a position at a time
    stem_and_head       from pixels to both streams, and from ul to the mixture of a pixel
    levels              the blocks of one resolution, and the resampling to the level below and back
    network_cache       all of these for one batch: `reset`, then `advance` row by row
    prefill             the caches of known rows
    sampler             sampling of a batch, and visits of pixels by another rule (`ncml.codec`)

Shapes: B images of the batch, S the same padded to a multiple of SLOT, R images of a row product (B or S), H rows, W
columns, F filters, G outputs of a layer, N heads, D channels of a head, K components, E embedding.
"""

from ncml.sampling.cached.network_cache import NetworkCache, PixelChooser
from ncml.sampling.cached.sampler import RowSampler, sample_cached, visit_pixels

__all__ = ["NetworkCache", "PixelChooser", "RowSampler", "sample_cached", "visit_pixels"]
