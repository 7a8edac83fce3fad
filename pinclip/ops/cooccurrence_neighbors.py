"""The pins that share the most boards with a pin.

Shape legend: P pins, B boards, S starts, K neighbors per start.
"""

from __future__ import annotations

import torch
from pinclip_kernels.cpu import cooccurrence_neighbors as cpu
from torch import Tensor

from pinclip.ops._neighbors import check_starts, check_top
from pinclip.ops.random_walk import WalkGraph
from pinclip.reference.cooccurrence_neighbors import cooccurrence_neighbors as reference


def cooccurrence_neighbors(
    graph: WalkGraph,
    starts: Tensor,
    *,
    top_k: int,
    board_weights: Tensor | None = None,
    pin_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The K pins with the most boards in common with each start, damped.

    With A_pb = 1 where pin p is on board b, the weight of j != i is

        w_ij = z_j Σ_b A_ib A_jb v_b    (v = board_weights, z = pin_scale; 1 where not given),

    summed in fp64 over the boards in the order of i's list, then rounded to fp32. Neighbors come heaviest
    first, of equal ones the lower pin first; what weighs nothing is left out.

    Args:
        graph: its `board_alias` is not read.
        starts: int64 [S], pins, or -1 for none.
        top_k: K >= 1.
        board_weights: float64 [B], finite, >= 0.
        pin_scale: float32 [P], finite, >= 0; 0 leaves a pin out.

    Returns (neighbors int64 [S, K], weights float32 [S, K]), filled up with -1 and 0. No gradient. The same
    numbers for any number of threads and any division of the starts. Time: Σ_b s_b for each start, over its
    boards b of s_b pins; so Σ_b s_b^2 for all pins, which giant boards rule.
    Extra memory on the CPU: for each thread 32 bytes times the next power of two above 2 min(Σ_b s_b, P).

    Raises ValueError for an argument out of range, RuntimeError where the C++ extension is not built.

    Source: item-to-item counts, Linden, Smith, York, "Amazon.com recommendations", IEEE Internet Computing
    7(1), 2003; the damping is ours.
    """
    check_top(top_k, pin_scale, graph.num_pins)
    if board_weights is not None:
        _check_board_weights(board_weights, graph.board_indptr.numel() - 1)
    return torch.ops.pinclip.cooccurrence_neighbors(
        graph.pin_indptr,
        graph.pin_boards,
        graph.board_indptr,
        graph.board_pins,
        None if board_weights is None else board_weights.contiguous(),
        None if pin_scale is None else pin_scale.contiguous(),
        starts.contiguous(),
        top_k,
    )


@torch.library.custom_op("pinclip::cooccurrence_neighbors", mutates_args=())
def _cooccurrence_neighbors(
    pin_indptr: Tensor,
    pin_boards: Tensor,
    board_indptr: Tensor,
    board_pins: Tensor,
    board_weights: Tensor | None,
    pin_scale: Tensor | None,
    starts: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    check_starts(starts, pin_indptr.numel() - 1)
    mine = cpu.cooccurrence_neighbors if starts.device.type == "cpu" else reference
    return mine(pin_indptr, pin_boards, board_indptr, board_pins, board_weights, pin_scale, starts, top_k)


@_cooccurrence_neighbors.register_fake
def _(pin_indptr, pin_boards, board_indptr, board_pins, board_weights, pin_scale, starts, top_k):
    neighbors = starts.new_empty((starts.shape[0], top_k))
    return neighbors, neighbors.new_empty(neighbors.shape, dtype=torch.float32)


def _check_board_weights(weights: Tensor, boards: int) -> None:
    if weights.dtype != torch.float64 or weights.shape != (boards,):
        kind = f"{weights.dtype} {tuple(weights.shape)}"
        raise ValueError(f"cooccurrence_neighbors: board_weights is {kind}, want torch.float64 ({boards},)")
    if boards and not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError("cooccurrence_neighbors: board_weights must be finite and not negative")
