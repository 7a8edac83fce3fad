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
    board_cdf: Tensor | None,
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
        pin_indptr.data_ptr(),
        pin_boards.data_ptr(),
        board_indptr.data_ptr(),
        board_pins.data_ptr(),
        0 if board_cdf is None else board_cdf.data_ptr(),
        pin_boards.dtype == torch.int64,
        starts.data_ptr(),
        0 if first_walk is None else first_walk.data_ptr(),
        starts.numel(),
        walks,
        length,
        int(restart * 2.0**32),
        seed,
        visited.data_ptr(),
        torch.get_num_threads(),
    )
    return visited
