"""Gated residual and LayerNorm on a GPU: residual = x + g y, normed = standardize(residual) w + b.

Forward reads x and y and writes both results; backward reads both gradients, the residual and y and writes
the gradients of x and y: each of them once. The gradients of g, w and b are summed in a fixed order.

Shapes: n rows, D features, P programs. g, w, b [D] in fp32; other dtypes as they come, fp32 inside.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pinclip_kernels.triton._launch import CompileCase
from pinclip_kernels.triton._rows import (
    WIDTHS,
    RowWalk,
    add_to_partials,
    row_case,
    row_config,
    row_tile,
    row_vector,
    standardize,
    standardize_backward,
)

# Launch table --------------------------------------------------------------------------------------------

_FORWARD = RowWalk(
    depth=2,
    resident=24,
    reason="""Compiled: 24 warps with four loads of 16 bytes a thread each have 48 KB under way per SM, more
    than bandwidth times latency (about 32 KB on an H200); 80 registers a thread let them all be resident.""",
)
_BACKWARD = RowWalk(
    depth=1,
    resident=24,
    reason="""Compiled: again four loads a thread, here of four tensors. Two rows at once would leave room for
    16 warps only, as three sums and two vectors over D stay in registers.""",
)

# Kernels -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def _gated_forward_kernel(
    x,
    y,
    gate,
    weight,
    bias,
    residual,
    normed,
    mean,
    rstd,
    n,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    g, w, b = row_vector(gate, D, BLOCK), row_vector(weight, D, BLOCK), row_vector(bias, D, BLOCK)
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        at, here = row_tile(rows, rows < n, D, BLOCK)
        r = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        r += g[None, :] * tl.load(y + at, mask=here, other=0.0).to(tl.float32)
        tl.store(residual + at, r.to(residual.dtype.element_ty), mask=here)
        x_hat, r_mean, r_rstd = standardize(r, here, eps, D)
        result = x_hat * w[None, :] + b[None, :]
        tl.store(normed + at, result.to(normed.dtype.element_ty), mask=here)
        tl.store(mean + rows, r_mean, mask=rows < n)
        tl.store(rstd + rows, r_rstd, mask=rows < n)


@triton.jit(do_not_specialize=["n"])
def _gated_backward_kernel(
    grad_residual,
    grad_normed,
    residual,
    y,
    mean,
    rstd,
    gate,
    weight,
    grad_x,
    grad_y,
    gate_partials,
    weight_partials,
    bias_partials,
    n,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    g, w = row_vector(gate, D, BLOCK), row_vector(weight, D, BLOCK)
    gate_sum = tl.zeros([BLOCK], tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        at, here = row_tile(rows, rows < n, D, BLOCK)
        up = tl.load(grad_normed + at, mask=here, other=0.0).to(tl.float32)
        r = tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
        past = tl.load(grad_residual + at, mask=here, other=0.0).to(tl.float32)
        branch = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
        r_mean = tl.load(mean + rows, mask=rows < n, other=0.0)
        r_rstd = tl.load(rstd + rows, mask=rows < n, other=0.0)
        x_hat = (r - r_mean[:, None]) * r_rstd[:, None]
        grad = past + standardize_backward(up * w[None, :], x_hat, r_rstd, D)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=here)
        tl.store(grad_y + at, (grad * g[None, :]).to(grad_y.dtype.element_ty), mask=here)
        gate_sum += tl.sum(grad * branch, 0)
        weight_sum += tl.sum(up * x_hat, 0)
        bias_sum += tl.sum(up, 0)
    add_to_partials(gate_partials, gate_sum, D, BLOCK)
    add_to_partials(weight_partials, weight_sum, D, BLOCK)
    add_to_partials(bias_partials, bias_sum, D, BLOCK)


# Launch --------------------------------------------------------------------------------------------------


def forward(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> residual, normed [n, D] of `dtype`; mean, rstd fp32 [n]. x, y [n, D] contiguous."""
    n, width = x.shape
    config = row_config(width, _FORWARD)
    residual, normed = (torch.empty_like(x, dtype=dtype) for _ in range(2))
    mean, rstd = (x.new_empty(n, dtype=torch.float32) for _ in range(2))
    _gated_forward_kernel[(config.grid(triton.cdiv(n, config.rows), x.device),)](
        x,
        y,
        gate,
        weight,
        bias,
        residual,
        normed,
        mean,
        rstd,
        n,
        eps,
        D=width,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return residual, normed, mean, rstd


def backward(
    grad_residual: Tensor,
    grad_normed: Tensor,
    residual: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
    weight: Tensor,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, y [n, D] in their dtypes, and of gate, weight, bias [D] in fp32.

    Extra memory: 12 P D bytes.
    """
    n, width = residual.shape
    config = row_config(width, _BACKWARD)
    programs = config.grid(triton.cdiv(n, config.rows), y.device)
    grad_x, grad_y = torch.empty_like(y, dtype=x_dtype), torch.empty_like(y)
    partials = y.new_empty((3, programs, width), dtype=torch.float32)
    _gated_backward_kernel[(programs,)](
        grad_residual,
        grad_normed,
        residual,
        y,
        mean,
        rstd,
        gate,
        weight,
        grad_x,
        grad_y,
        *partials,
        n,
        D=width,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return grad_x, grad_y, *(each.sum(0) for each in partials)


# Compilations --------------------------------------------------------------------------------------------

# Dtypes of the stream x and the branch y. Others, such as a branch in fp32 beside a stream in half precision,
# convert at other places and need no more registers than fp32 everywhere.
_KINDS = (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"))


def compile_cases() -> list[CompileCase]:
    """Every width of the model's configurations, in every dtype, with the stream in fp32 or not."""
    cases = []
    for stream, branch in _KINDS:
        of_stream = ("x", "residual", "normed", "grad_residual", "grad_normed", "grad_x")
        kinds = {**dict.fromkeys(of_stream, f"*{stream}"), **dict.fromkeys(("y", "grad_y"), f"*{branch}")}
        for kernel, walk in ((_gated_forward_kernel, _FORWARD), (_gated_backward_kernel, _BACKWARD)):
            cases += [row_case(kernel, f"{stream}+{branch}", kinds, width, walk) for width in WIDTHS]
    return cases
