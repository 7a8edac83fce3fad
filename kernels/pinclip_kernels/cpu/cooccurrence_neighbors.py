"""Neighbors by shared boards on the CPU: the thin call into csrc/cooccurrence_neighbors.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from pinclip_kernels import extension


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
    """(int64 [S, K] neighbors, float32 [S, K] weights); contiguous CPU tensors, already checked."""
    neighbors = starts.new_empty((starts.numel(), top_k))
    weights = torch.empty(neighbors.shape, dtype=torch.float32)
    extension.load().cooccurrence_neighbors(
        extension.graph(pin_indptr, pin_boards, board_indptr, board_pins),
        pin_indptr.numel() - 1,
        extension.address(board_weights),
        extension.address(pin_scale),
        starts.data_ptr(),
        starts.numel(),
        top_k,
        neighbors.data_ptr(),
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    return neighbors, weights
