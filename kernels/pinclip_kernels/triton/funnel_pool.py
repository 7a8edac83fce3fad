"""Funnel pooling on a GPU: each token of a grid is read once and each pooled one written once; backward the
reverse.

Shapes: n pooled rows of all grids, G grid, D features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pinclip_kernels.triton._launch import TYPES, CompileCase
from pinclip_kernels.triton._rows import (
    WIDTHS,
    RowWalk,
    add,
    load_rows,
    row_case,
    row_config,
    store_rows,
)

# Launch table --------------------------------------------------------------------------------------------

_FORWARD = RowWalk(
    depth=2,
    resident=16,
    reason="""Compiled: a pooled row takes four loads, so two rows of a thread are eight loads of 16 bytes at
    once; at 16 warps 64 KB under way per SM, more than bandwidth times latency (about 32 KB on an H200).""",
)
_BACKWARD = RowWalk(
    depth=2,
    resident=24,
    reason="""Compiled: one load and four stores a row; stores wait for nothing.""",
)

# Kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _first_of_four(rows, grid):
    """Row of x at the upper left of the 2 x 2 neighbors of pooled rows."""
    half = grid // 2
    line = rows // half  # of all grids: two lines of x for one
    return line.to(tl.int64) * 2 * grid + (rows % half) * 2


@triton.jit(do_not_specialize=["n", "grid"])
def _funnel_forward_kernel(
    x,
    residual,
    y,
    n,
    grid,
    RESIDUAL: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    FEATURES: tl.constexpr,
):
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        there = rows < n
        corner = _first_of_four(rows, grid)
        total = load_rows(x, corner, there, D, T, FEATURES)
        for neighbor in tl.static_range(1, 4):
            token = corner + neighbor // 2 + neighbor % 2 * grid
            total = add(total, load_rows(x, token, there, D, T, FEATURES))
        pooled = [0.25 * piece for piece in total]
        if RESIDUAL:
            pooled = add(pooled, load_rows(residual, rows, there, D, T, FEATURES))
        store_rows(y, rows, there, pooled, D, T, FEATURES)


@triton.jit(do_not_specialize=["n", "grid"])
def _funnel_backward_kernel(
    grad, grad_x, n, grid, D: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, FEATURES: tl.constexpr
):
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        there = rows < n
        quarter = [0.25 * piece for piece in load_rows(grad, rows, there, D, T, FEATURES)]
        corner = _first_of_four(rows, grid)
        for neighbor in tl.static_range(4):
            token = corner + neighbor // 2 + neighbor % 2 * grid
            store_rows(grad_x, token, there, quarter, D, T, FEATURES)


# Launch --------------------------------------------------------------------------------------------------


def forward(x: Tensor, residual: Tensor | None, dtype: torch.dtype, grid: int) -> Tensor:
    """-> y [n, D] of `dtype`; x [4 n, D] and residual [n, D] contiguous."""
    n, width = len(x) // 4, x.shape[1]
    config = row_config(width, _FORWARD)
    y = x.new_empty((n, width), dtype=dtype)
    _funnel_forward_kernel[(config.grid(triton.cdiv(n, config.rows), x.device),)](
        x,
        x if residual is None else residual,
        y,
        n,
        grid,
        RESIDUAL=residual is not None,
        **config.constants(width),
        num_warps=config.warps,
    )
    return y


def backward(grad: Tensor, dtype: torch.dtype, grid: int) -> Tensor:
    """-> gradient of x [4 n, D] of `dtype`; grad [n, D] contiguous."""
    n, width = grad.shape
    config = row_config(width, _BACKWARD)
    grad_x = grad.new_empty((4 * n, width), dtype=dtype)
    _funnel_backward_kernel[(config.grid(triton.cdiv(n, config.rows), grad.device),)](
        grad,
        grad_x,
        n,
        grid,
        **config.constants(width),
        num_warps=config.warps,
    )
    return grad_x


# Compilations --------------------------------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Every width of the model's configurations in every dtype, with the residual."""
    cases = []
    for kind in TYPES.values():
        kinds = dict.fromkeys(("x", "residual", "y", "grad", "grad_x"), f"*{kind}")
        for width in WIDTHS:
            cases.append(row_case(_funnel_forward_kernel, kind, kinds, width, _FORWARD, {"RESIDUAL": True}))
            cases.append(row_case(_funnel_backward_kernel, kind, kinds, width, _BACKWARD))
    return cases
