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
    add,
    add_rows,
    load_rows,
    load_vector,
    mul,
    no_sums,
    row_case,
    row_config,
    standardize,
    standardize_backward,
    store_rows,
    store_sums,
)

# Launch table --------------------------------------------------------------------------------------------

_FORWARD = RowWalk(
    depth=2,
    resident=20,
    reason="""Compiled: 20 warps with four loads of 16 bytes a thread each have 40 KB under way per SM, more
    than bandwidth times latency (about 32 KB on an H200); 63 to 96 registers a thread, at 768 features up to
    128, let all of them be resident.""",
)
_BACKWARD = RowWalk(
    depth=1,
    resident=20,
    reason="""Compiled: again four loads a thread, here of four tensors. As three sums and two vectors over D
    stay in registers, 91 to 96 a thread at 1024 features leave room for 20 warps, up to 126 at 1152 for 16,
    up to 160 at 768 for 12.""",
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
    T: tl.constexpr,
    FEATURES: tl.constexpr,
):
    g, w = load_vector(gate, D, T, FEATURES), load_vector(weight, D, T, FEATURES)
    b = load_vector(bias, D, T, FEATURES)
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        there = rows < n
        r = load_rows(x, rows, there, D, T, FEATURES)
        branch = load_rows(y, rows, there, D, T, FEATURES)
        r = add(r, mul(g, branch))
        store_rows(residual, rows, there, r, D, T, FEATURES)
        x_hat, r_mean, r_rstd = standardize(r, eps, D, T, FEATURES)
        store_rows(normed, rows, there, add(mul(x_hat, w), b), D, T, FEATURES)
        tl.store(mean + rows, r_mean, mask=there)
        tl.store(rstd + rows, r_rstd, mask=there)


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
    T: tl.constexpr,
    FEATURES: tl.constexpr,
):
    g, w = load_vector(gate, D, T, FEATURES), load_vector(weight, D, T, FEATURES)
    gate_sum, weight_sum, bias_sum = no_sums(T, FEATURES), no_sums(T, FEATURES), no_sums(T, FEATURES)
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        there = rows < n
        up = load_rows(grad_normed, rows, there, D, T, FEATURES)
        r = load_rows(residual, rows, there, D, T, FEATURES)
        past = load_rows(grad_residual, rows, there, D, T, FEATURES)
        branch = load_rows(y, rows, there, D, T, FEATURES)
        r_mean = tl.load(mean + rows, mask=there, other=0.0)[:, None, None]
        r_rstd = tl.load(rstd + rows, mask=there, other=0.0)
        x_hat = [(piece - r_mean) * r_rstd[:, None, None] for piece in r]
        grad = add(past, standardize_backward(mul(up, w), x_hat, r_rstd, D))
        store_rows(grad_x, rows, there, grad, D, T, FEATURES)
        store_rows(grad_y, rows, there, mul(grad, g), D, T, FEATURES)
        gate_sum = add_rows(gate_sum, mul(grad, branch))
        weight_sum = add_rows(weight_sum, mul(up, x_hat))
        bias_sum = add_rows(bias_sum, up)
    store_sums(gate_partials, tl.program_id(0), gate_sum, D, T, FEATURES)
    store_sums(weight_partials, tl.program_id(0), weight_sum, D, T, FEATURES)
    store_sums(bias_partials, tl.program_id(0), bias_sum, D, T, FEATURES)


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
        **config.constants(width),
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
        **config.constants(width),
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
