"""Random walks on the CPU: the thin call into csrc/random_walk.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from pinclip_kernels import extension


def random_walk(
    pin_indptr: Tensor,
    pin_boards: Tensor,
    board_indptr: Tensor,
    board_pins: Tensor,
    board_alias: Tensor | None,
    starts: Tensor,
    first_walk: Tensor | None,
    walks: int,
    length: int,
    restart: float,
    seed: int,
) -> Tensor:
    """int64 [S, W, L] visited pins; arguments are contiguous CPU tensors, already checked by the caller.

    `pin_boards` and `board_pins` are both int32 or both int64.
    """
    visited = starts.new_empty((starts.numel(), walks, length))
    extension.load().random_walk(
        extension.graph(pin_indptr, pin_boards, board_indptr, board_pins, board_alias),
        extension.walk_plan(starts, first_walk, walks, length, restart, seed),
        visited.data_ptr(),
        torch.get_num_threads(),
    )
    return visited


def board_alias(pin_indptr: Tensor, pin_boards: Tensor, board_weights: Tensor) -> Tensor:
    """int64 [E], the alias table of weights float64 [B]; contiguous CPU tensors, already checked."""
    table = torch.empty(pin_boards.numel(), dtype=torch.int64)
    graph = extension.graph(pin_indptr, pin_boards, pin_indptr, pin_boards)  # one direction is all it reads
    extension.load().board_alias(graph, pin_indptr.numel() - 1, board_weights.data_ptr(), table.data_ptr())
    return table
