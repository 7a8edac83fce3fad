"""y = gelu(x + b) on a GPU. Backward reads the gradient and x once, writes the gradient of x once, and on the
way sums it over the rows, for the gradient of b.

A program takes a block of features and walks the rows. Shapes: n rows, D features, P programs along the rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pinclip_kernels.triton._launch import TYPES, CompileCase, multiprocessors

# Launch table --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeluConfig:
    """A tile of ROWS × BLOCK features; resident: programs per SM that walk rows."""

    rows: int
    block: int
    warps: int
    resident: int
    reason: str

    def grid(self, n: int, width: int, device: torch.device) -> tuple[int, int]:
        """Programs along the rows, and blocks of features."""
        blocks = max(1, triton.cdiv(width, self.block))
        programs = triton.cdiv(self.resident * multiprocessors(device), blocks)
        return max(1, min(triton.cdiv(n, self.rows), programs)), blocks


_FORWARD = GeluConfig(
    rows=4,
    block=512,
    warps=2,
    resident=12,
    reason="""Compiled: 8 neighboring features of four rows to a thread: 48 KB under way per SM, more than
    bandwidth times latency (about 32 KB on an H200). Blocks of 512 leave little of the last one empty:
    none at 3072 and 4608 features, 7% at 4304.""",
)
_BACKWARD = GeluConfig(
    rows=2,
    block=512,
    warps=2,
    resident=12,
    reason="""Compiled: the same, of two tensors.""",
)

# Kernels -------------------------------------------------------------------------------------------------

_ROOT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_ROOT_2_PI = tl.constexpr(2.5066282746310002)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _gate(v, TANH: tl.constexpr):
    """gelu(v) / v and its derivative: the normal distribution and its density, or the approximation
    (1 + tanh) / 2 as a sigmoid. That of -|v| is taken, which neither overflows nor cancels."""
    if TANH:
        e = tl.exp(tl.abs(v) * (v * v * _CUBIC + 1.0) * (-2.0 * _ROOT_2_OVER_PI))
        r = 1.0 / (1.0 + e)
        return tl.where(v >= 0, r, e * r), e * r * r * (
            (v * v * (3.0 * _CUBIC) + 1.0) * (2.0 * _ROOT_2_OVER_PI)
        )
    return 0.5 + 0.5 * tl.erf(v * _ROOT_HALF), tl.exp(v * v * -0.5) / _ROOT_2_PI


@triton.jit(do_not_specialize=["n"])
def _gelu_forward_kernel(
    x, bias, y, n, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TANH: tl.constexpr
):
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        at, here = rows.to(tl.int64)[:, None] * D + cols[None, :], (rows < n)[:, None] & (cols < D)[None, :]
        v = tl.load(x + at, mask=here, other=0.0).to(tl.float32) + b[None, :]
        gate, _ = _gate(v, TANH)
        tl.store(y + at, (v * gate).to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["n"])
def _gelu_backward_kernel(
    grad,
    x,
    bias,
    grad_x,
    partials,
    n,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TANH: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        at, here = rows.to(tl.int64)[:, None] * D + cols[None, :], (rows < n)[:, None] & (cols < D)[None, :]
        up = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=here, other=0.0).to(tl.float32) + b[None, :]
        gate, density = _gate(v, TANH)
        down = tl.where(here, up * (gate + v * density), 0.0)
        tl.store(grad_x + at, down.to(grad_x.dtype.element_ty), mask=here)
        bias_sum += tl.sum(down, 0)
    tl.store(partials + tl.program_id(0).to(tl.int64) * D + cols, bias_sum, mask=cols < D)


# Launch --------------------------------------------------------------------------------------------------


def forward(x: Tensor, bias: Tensor, dtype: torch.dtype, tanh: bool) -> Tensor:
    """-> y [n, D] of `dtype`. x [n, D], bias [D] contiguous."""
    (n, width), config, y = x.shape, _FORWARD, torch.empty_like(x, dtype=dtype)
    constants = {"D": width, "ROWS": config.rows, "BLOCK": config.block, "TANH": tanh}
    _gelu_forward_kernel[config.grid(n, width, x.device)](x, bias, y, n, **constants, num_warps=config.warps)
    return y


def backward(grad: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """-> gradient of x [n, D] in its dtype, of bias fp32 [D]. Extra memory: 4 P D bytes."""
    (n, width), config, grad_x = x.shape, _BACKWARD, torch.empty_like(x)
    grid = config.grid(n, width, x.device)
    partials = x.new_empty((grid[0], width), dtype=torch.float32)
    constants = {"D": width, "ROWS": config.rows, "BLOCK": config.block, "TANH": tanh}
    _gelu_backward_kernel[grid](grad, x, bias, grad_x, partials, n, **constants, num_warps=config.warps)
    return grad_x, partials.sum(0)


# Compilations --------------------------------------------------------------------------------------------

_WIDTHS = (768, 3072, 4304)  # 4304, of So400m, is no multiple of the block


def compile_cases() -> list[CompileCase]:
    """Both forms in every dtype, at widths of the model's configurations."""
    cases = []
    kernels = ((_gelu_forward_kernel, _FORWARD), (_gelu_backward_kernel, _BACKWARD))
    for kind in TYPES.values():
        for kernel, config in kernels:
            for tanh in (True, False):
                for width in _WIDTHS:
                    constexprs = {"D": width, "ROWS": config.rows, "BLOCK": config.block, "TANH": tanh}
                    kinds = {"n": "i32", "partials": "*fp32", **dict.fromkeys(constexprs, "constexpr")}
                    cases.append(
                        CompileCase(
                            f"{kernel.__name__}/{'tanh' if tanh else 'erf'}/{kind}/D{width}",
                            kernel,
                            {name: kinds.get(name, f"*{kind}") for name in kernel.arg_names},
                            constexprs,
                            config.warps,
                            3,
                            needs_dot=False,
                        )
                    )
    return cases
