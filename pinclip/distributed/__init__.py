"""The only place that issues collectives.

Averaging, stated once. Let L = (Σ over all ranks' rows of w_i l_i) / Z be the one global loss, with Z the
global normaliser. Rank r's loss is

    L_r = W · (Σ over its local rows of w_i l_i) / Z,     W = world_size(),

so the mean over ranks of L_r is L, and the mean over ranks of *parameter* gradients, which is what DDP and
ZeRO compute, is the gradient of L. For that the backward of `gather_rows` returns to each owner the sum (not
the mean) over ranks. Gathered rows stand in rank order; local row i of rank r is global row
counts[0] + … + counts[r-1] + i. Ranks may hold different numbers of rows, none included.

Everything works with torch.distributed not initialised: the world is then one process.
"""

from pinclip.distributed.collectives import (
    all_mean,
    all_sum,
    any_true,
    barrier,
    gather_counts,
    gather_rows,
    leave,
    rank,
    world_size,
)
from pinclip.distributed.shards import GatheredRows, RowSums, check_same, exchange_rows

__all__ = [
    "GatheredRows",
    "RowSums",
    "all_mean",
    "all_sum",
    "any_true",
    "barrier",
    "check_same",
    "exchange_rows",
    "gather_counts",
    "gather_rows",
    "leave",
    "rank",
    "world_size",
]
