"""The pins that random walks from a pin visit most.

Shape legend: P pins, S starts, W walks per start, L hops per walk, K neighbors per start.
"""

from __future__ import annotations

import torch
from pinclip_kernels.cpu import walk_neighbors as cpu
from torch import Tensor

from pinclip.ops._neighbors import check_starts, check_top
from pinclip.ops.random_walk import WalkGraph, backend, check_walks
from pinclip.reference.walk_neighbors import walk_neighbors as reference_walk_neighbors


def walk_neighbors(
    graph: WalkGraph,
    starts: Tensor,
    *,
    walks: int,
    length: int,
    restart: float = 0.0,
    top_k: int,
    pin_scale: Tensor | None = None,
    stop_visits: int = 0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The K pins that the walks of `random_walk` from each start visit most, damped.

    With c_ij the hops of the W walks from i that end at j != i, the weight of j is

        w_ij = c_ij z_j    (z = pin_scale, or 1),

    in fp32, one rounding. Neighbors come heaviest first, of equal ones the lower pin first; what weighs
    nothing is left out. With stop_visits = n > 0 the walks of a start are made in rounds of 64, and none are
    made after the first round at whose end K pins have been visited n times or more.

    Args:
        starts: int64 [S], pins, or -1 for none.
        walks, length, restart, seed: see `random_walk`.
        top_k: K >= 1.
        pin_scale: float32 [P], finite, >= 0, for instance degree^-damping; 0 leaves a pin out.

    Returns (neighbors int64 [S, K], weights float32 [S, K]), filled up with -1 and 0. No gradient. The same
    numbers on every device, for any number of threads, and for any division of the starts.
    Extra memory on the CPU: for each thread 16 (32 for int64 graphs) bytes times the next power of two above
    2 min(W L, P), and 256 kB or 512 L bytes; on a GPU about ten int64 values per hop.

    Raises ValueError for an argument out of range, RuntimeError where the C++ extension is not built.

    Source: visit counts as importance, Ying et al., "PinSage", KDD 2018; early stopping, Eksombatchai et al.,
    "Pixie", WWW 2018. The damping by pin_scale is ours.
    """
    check_walks(starts, walks, length, restart, seed)
    check_top(top_k, pin_scale, graph.num_pins)
    if not 0 <= stop_visits < 2**31:
        raise ValueError(f"walk_neighbors: stop_visits cannot be {stop_visits}")
    return torch.ops.pinclip.walk_neighbors(
        graph.pin_indptr,
        graph.pin_boards,
        graph.board_indptr,
        graph.board_pins,
        graph.board_alias,
        None if pin_scale is None else pin_scale.contiguous(),
        starts.contiguous(),
        walks,
        length,
        restart,
        top_k,
        stop_visits,
        seed,
    )


@torch.library.custom_op("pinclip::walk_neighbors", mutates_args=())
def _walk_neighbors(
    pin_indptr: Tensor,
    pin_boards: Tensor,
    board_indptr: Tensor,
    board_pins: Tensor,
    board_alias: Tensor | None,
    pin_scale: Tensor | None,
    starts: Tensor,
    walks: int,
    length: int,
    restart: float,
    top_k: int,
    stop_visits: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    check_starts(starts, pin_indptr.numel() - 1)
    graph = (pin_indptr, pin_boards, board_indptr, board_pins, board_alias)
    plan = (pin_scale, starts, walks, length, restart, top_k, stop_visits, seed)
    if starts.device.type == "cpu":
        return cpu.walk_neighbors(*graph, *plan)
    return reference_walk_neighbors(*graph, *plan, walker=backend(starts))


@_walk_neighbors.register_fake
def _(
    pin_indptr,
    pin_boards,
    board_indptr,
    board_pins,
    board_alias,
    pin_scale,
    starts,
    walks,
    length,
    restart,
    top_k,
    *_,
):
    neighbors = starts.new_empty((starts.shape[0], top_k))
    return neighbors, neighbors.new_empty(neighbors.shape, dtype=torch.float32)
