"""L2 normalisation of rows on a GPU: y = x / max(||x||, eps); forward and backward read and write a row once.

Shapes: n rows, D features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pinclip_kernels.triton._launch import TYPES, CompileCase
from pinclip_kernels.triton._rows import (
    WIDTHS,
    RowWalk,
    load_rows,
    mul,
    row_case,
    row_config,
    store_rows,
    sub,
    sum_row,
)

# Launch table --------------------------------------------------------------------------------------------

_FORWARD = RowWalk(
    depth=4,
    resident=24,
    reason="""Compiled: four loads of 16 bytes a thread at 24 warps are 48 KB under way per SM, more than
    bandwidth times latency (about 32 KB on an H200). Up to 64 registers a thread at powers of two, 80 at 1152
    features, 96 at 768: all of them are resident.""",
)
_BACKWARD = RowWalk(
    depth=2,
    resident=24,
    reason="""Compiled: the same, of two tensors; up to 62, 92 and 93 registers.""",
)

# Kernels -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def _normalize_forward_kernel(
    x, y, norm, n, eps, D: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, FEATURES: tl.constexpr
):
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        there = rows < n
        row = load_rows(x, rows, there, D, T, FEATURES)
        length = tl.sqrt_rn(sum_row(mul(row, row)))
        tl.store(norm + rows, length, mask=there)
        # A NaN must not pass for a small norm.
        divisor = tl.where(length < eps, eps, length)[:, None, None]
        store_rows(y, rows, there, [piece / divisor for piece in row], D, T, FEATURES)


@triton.jit(do_not_specialize=["n"])
def _normalize_backward_kernel(
    grad,
    x,
    norm,
    grad_x,
    n,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    FEATURES: tl.constexpr,
):
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        there = rows < n
        up = load_rows(grad, rows, there, D, T, FEATURES)
        row = load_rows(x, rows, there, D, T, FEATURES)
        length = tl.load(norm + rows, mask=there, other=0.0)
        inverse = (1.0 / tl.where(length < eps, eps, length))[:, None, None]
        y = [piece * inverse for piece in row]
        along = sum_row(mul(up, y))
        # Below eps the divisor is a constant, and the gradient has no radial part to take away.
        along = tl.where(length < eps, 0.0, along)[:, None, None]
        down = sub(up, [piece * along for piece in y])
        down = [tl.where((length == 0)[:, None, None], 0.0, piece * inverse) for piece in down]
        store_rows(grad_x, rows, there, down, D, T, FEATURES)


# Launch --------------------------------------------------------------------------------------------------


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> y [n, D] in the dtype of x, norms fp32 [n]. x contiguous."""
    n, width = x.shape
    config = row_config(width, _FORWARD)
    y, norm = torch.empty_like(x), x.new_empty(n, dtype=torch.float32)
    _normalize_forward_kernel[(config.grid(triton.cdiv(n, config.rows), x.device),)](
        x,
        y,
        norm,
        n,
        eps,
        **config.constants(width),
        num_warps=config.warps,
    )
    return y, norm


def backward(grad: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """-> gradient of x [n, D]. grad, x contiguous."""
    n, width = x.shape
    config = row_config(width, _BACKWARD)
    grad_x = torch.empty_like(x)
    _normalize_backward_kernel[(config.grid(triton.cdiv(n, config.rows), x.device),)](
        grad,
        x,
        norm,
        grad_x,
        n,
        eps,
        **config.constants(width),
        num_warps=config.warps,
    )
    return grad_x


# Compilations --------------------------------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Every width of the model's configurations in every dtype."""
    cases = []
    for kind in TYPES.values():
        kinds = dict.fromkeys(("x", "y", "grad", "grad_x"), f"*{kind}")
        for kernel, walk in ((_normalize_forward_kernel, _FORWARD), (_normalize_backward_kernel, _BACKWARD)):
            cases += [row_case(kernel, kind, kinds, width, walk) for width in WIDTHS]
    return cases
