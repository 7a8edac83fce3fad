"""Random walks on a GPU: the thin call into csrc/random_walk.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from pinclip_kernels import extension


def is_built() -> bool:
    """Whether the extension was built where nvcc was."""
    return hasattr(extension.load(), "random_walk_cuda")


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
    """int64 [S, W, L] visited pins; contiguous tensors of one CUDA device, already checked by the caller.

    On the current stream, without a synchronisation. Raises RuntimeError with CUDA's own words.
    """
    visited = starts.new_empty((starts.numel(), walks, length))
    with torch.cuda.device(starts.device):
        extension.load().random_walk_cuda(
            extension.graph(pin_indptr, pin_boards, board_indptr, board_pins, board_alias),
            extension.walk_plan(starts, first_walk, walks, length, restart, seed),
            visited.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return visited
