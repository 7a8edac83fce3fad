"""Triton kernels to read: one as it should be, and some with a planted fault."""

import sys
from pathlib import Path

import triton
import triton.language as tl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))

from pinclip_kernels.triton._launch import CompileCase  # noqa: E402


@triton.jit
def product(x, y, out, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, depth, BLOCK_K):
        a = tl.load(x + rows[:, None] * 512 + (first + k)[None, :])
        b = tl.load(y + cols[:, None] * 512 + (first + k)[None, :])
        acc = tl.dot(a, b.T, acc)
    tl.store(out + rows[:, None] * 512 + cols[None, :], acc.to(tl.bfloat16))


@triton.jit
def by_hand(x, y, out, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same product without tl.dot."""
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth):
        a, b = tl.load(x + rows * 512 + k), tl.load(y + cols * 512 + k)
        acc += a[:, None].to(tl.float32) * b[None, :].to(tl.float32)
    tl.store(out + rows[:, None] * 512 + cols[None, :], acc.to(tl.bfloat16))


@triton.jit
def narrow(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out, tl.sum(tl.load(x + 3 * at)))


_PRODUCT = {"x": "*bf16", "y": "*bf16", "out": "*bf16", "depth": "i32"}
_BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}


def _case(name, kernel, signature, constexprs, warps, stages=3, needs_dot=True):
    whole = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    return CompileCase(name, kernel, whole, constexprs, warps, stages, needs_dot=needs_dot)


def compile_cases():
    large = {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 64}
    small = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    return [
        _case("product", product, _PRODUCT, _BLOCKS, 8),
        _case("spills", product, _PRODUCT, large, 4, 2),  # 512 accumulators a thread
        _case("no tensor cores", by_hand, _PRODUCT, small, 4),
        _case(
            "narrow and atomic", narrow, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 1024}, 4, needs_dot=False
        ),
    ]
