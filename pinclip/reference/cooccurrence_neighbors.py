"""The pins that share the most boards with a pin, in plain torch.

Shape legend: P pins, B boards, S starts, K neighbors per start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pinclip.reference.walk_neighbors import top_of_rows


def cooccurrence_neighbors(
    pin_indptr: Tensor,
    pin_boards: Tensor,
    board_indptr: Tensor,
    board_pins: Tensor,
    board_weights: Tensor | None,
    pin_scale: Tensor | None,
    starts: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Neighbors and weights: see `pinclip.ops.cooccurrence_neighbors.cooccurrence_neighbors`.

    Extra memory: about six int64 values for each pin of each board of each start.
    """
    pins = pin_indptr.numel() - 1
    row = (starts >= 0).nonzero()[:, 0]
    edge, of_edge = _entries(pin_indptr, starts[row])
    board = pin_boards[edge].long()
    place, of_place = _entries(board_indptr, board)
    row = row[of_edge[of_place]]
    pin = board_pins[place].long()
    weight = torch.ones_like(pin, dtype=torch.float64)
    if board_weights is not None:
        weight = board_weights[board[of_place]]
    counted = (pin != starts[row]) & (weight > 0)
    keys, group = (row[counted] * pins + pin[counted]).unique(return_inverse=True)
    total = torch.zeros(len(keys), dtype=torch.float64, device=keys.device)
    total = total.index_add_(0, group, weight[counted]).float()
    row, pin = (keys // pins, keys % pins) if len(keys) else (keys, keys)
    if pin_scale is not None:
        total = total * pin_scale[pin]
    return top_of_rows(row, pin, total, len(starts), top_k)


def _entries(indptr: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the lists of `owners`, one after the other, and which owner each belongs to."""
    begin, count = indptr[owners], indptr[owners + 1] - indptr[owners]
    owner = torch.repeat_interleave(torch.arange(len(owners), device=owners.device), count)
    inside = torch.arange(len(owner), device=owners.device) - (torch.cumsum(count, 0) - count)[owner]
    return begin[owner] + inside, owner
