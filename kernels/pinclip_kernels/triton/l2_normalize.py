"""L2 normalisation of rows on a GPU: y = x / max(||x||, eps); forward and backward read and write a row once.

Shapes: n rows, D features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pinclip_kernels.triton._launch import TYPES, CompileCase
from pinclip_kernels.triton._rows import WIDTHS, RowWalk, row_case, row_config, row_tile

# Launch table --------------------------------------------------------------------------------------------

_FORWARD = RowWalk(
    depth=4,
    resident=24,
    reason="""Compiled: four loads of 16 bytes a thread at 24 warps are 48 KB under way per SM, more than
    bandwidth times latency (about 32 KB on an H200).""",
)
_BACKWARD = RowWalk(
    depth=2,
    resident=24,
    reason="""Compiled: the same, of two tensors.""",
)

# Kernels -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def _normalize_forward_kernel(x, y, norm, n, eps, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        at, here = row_tile(rows, rows < n, D, BLOCK)
        row = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        length = tl.sqrt_rn(tl.sum(row * row, 1))
        # A NaN must not pass for a small norm.
        divisor = tl.where(length < eps, eps, length)
        tl.store(y + at, (row / divisor[:, None]).to(y.dtype.element_ty), mask=here)
        tl.store(norm + rows, length, mask=rows < n)


@triton.jit(do_not_specialize=["n"])
def _normalize_backward_kernel(
    grad, x, norm, grad_x, n, eps, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        at, here = row_tile(rows, rows < n, D, BLOCK)
        up = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        row = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        length = tl.load(norm + rows, mask=rows < n, other=0.0)
        inverse = 1.0 / tl.where(length < eps, eps, length)
        y = row * inverse[:, None]
        # Below eps the divisor is a constant, and the gradient has no radial part to take away.
        along = tl.where(length < eps, 0.0, tl.sum(up * y, 1))
        down = (up - y * along[:, None]) * inverse[:, None]
        down = tl.where((length == 0)[:, None], 0.0, down)
        tl.store(grad_x + at, down.to(grad_x.dtype.element_ty), mask=here)


# Launch --------------------------------------------------------------------------------------------------


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> y [n, D] in the dtype of x, norms fp32 [n]. x contiguous."""
    n, width = x.shape
    config = row_config(width, _FORWARD)
    y, norm = torch.empty_like(x), x.new_empty(n, dtype=torch.float32)
    _normalize_forward_kernel[(config.grid(triton.cdiv(n, config.rows), x.device),)](
        x, y, norm, n, eps, D=width, ROWS=config.rows, BLOCK=config.block, num_warps=config.warps
    )
    return y, norm


def backward(grad: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """-> gradient of x [n, D]. grad, x contiguous."""
    n, width = x.shape
    config = row_config(width, _BACKWARD)
    grad_x = torch.empty_like(x)
    _normalize_backward_kernel[(config.grid(triton.cdiv(n, config.rows), x.device),)](
        grad, x, norm, grad_x, n, eps, D=width, ROWS=config.rows, BLOCK=config.block, num_warps=config.warps
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
