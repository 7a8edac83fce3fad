"""Neighbors by walks on the CPU: the thin call into csrc/walk_neighbors.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from pinclip_kernels import extension


def walk_neighbors(
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
    """(int64 [S, K] neighbors, float32 [S, K] weights); contiguous CPU tensors, already checked."""
    neighbors = starts.new_empty((starts.numel(), top_k))
    weights = torch.empty(neighbors.shape, dtype=torch.float32)
    extension.load().walk_neighbors(
        extension.graph(pin_indptr, pin_boards, board_indptr, board_pins, board_alias),
        extension.walk_plan(starts, None, walks, length, restart, seed),
        pin_indptr.numel() - 1,
        extension.address(pin_scale),
        top_k,
        stop_visits,
        neighbors.data_ptr(),
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    return neighbors, weights
