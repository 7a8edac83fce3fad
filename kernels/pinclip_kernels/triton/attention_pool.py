"""Absorbed attention pooling on a GPU: p = softmax over the tokens of x uᵀ, z = pᵀ x, per sample.

A tile of tokens lies whole in shared memory, as parts of 128 features, and serves both products, so that
forward reads x once, and backward reads x once and writes its gradient once. A program takes one sample
(forward: an online softmax over its tokens) or several (backward: their part of the gradient of u stays in
registers, and the programs' parts are added up in order).

With `standardize` the tokens are (x - mean) / sqrt(var + eps) instead of x. Every product with such a token
is one with x, less the mean times a sum over the other factor, times 1 / sqrt(var + eps). The gradient goes
back through it likewise: its sums over the features follow from products that there are already.

Logits are in units of log 2. Shapes: B samples, N tokens, D features, R rows of u (probes times heads),
W features of a part.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pinclip_kernels.triton._launch import TYPES, CompileCase, multiprocessors

# Launch table --------------------------------------------------------------------------------------------

ROWS = 16  # of a product; more rows would not fit the registers of the backward pass
WIDEST = 1152


@dataclass(frozen=True)
class PoolConfig:
    """A tile of `tokens`; features of a part."""

    tokens: int
    width: int
    warps: int
    stages: int
    reason: str


_CONFIG = PoolConfig(
    tokens=32,
    width=128,
    warps=8,
    stages=2,
    reason="""Compiled for sm_90. At D = 1152 the forward pass takes 128 registers a thread and 110 KB, so
    that two programs fit an SM, and one loads while the other multiplies. Tiles of 64 tokens pass through
    registers instead of being copied straight to shared memory, and spill. The backward pass holds u and
    the gradient of z as left and as right factors, 220 KB, so a program is alone on its SM; up to 512
    features two fit.""",
)

# Inside kernels ------------------------------------------------------------------------------------------

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_parts(base, rows, there, D: tl.constexpr, W: tl.constexpr):
    """Rows of D features as a tuple of [rows, W]."""
    parts = ()
    for i in tl.static_range((D + W - 1) // W):
        cols = i * W + tl.arange(0, W)
        at, here = rows[:, None] * D + cols[None, :], there[:, None] & (cols < D)[None, :]
        parts = parts + (tl.load(base + at, mask=here, other=0.0),)  # noqa: RUF005
    return parts


@triton.jit
def _store_columns(base, rows, there, parts, offset, factor, D: tl.constexpr, W: tl.constexpr):
    """(parts - offset) · factor, parts [W, R], as rows of D features."""
    for i in tl.static_range(len(parts)):
        cols = i * W + tl.arange(0, W)
        at, here = rows[:, None] * D + cols[None, :], there[:, None] & (cols < D)[None, :]
        column = (parts[i] - offset[None, :]) * factor[None, :]
        tl.store(base + at, column.T.to(base.dtype.element_ty), mask=here)


@triton.jit
def _zeros(D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr):
    parts = ()
    for _ in tl.static_range((D + W - 1) // W):
        parts = parts + (tl.zeros([W, ROWS], tl.float32),)  # noqa: RUF005
    return parts


@triton.jit
def _sums(parts):
    """Sum over the features of every row, in fp32."""
    total = tl.sum(parts[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(parts)):
        total += tl.sum(parts[i].to(tl.float32), 1)
    return total


@triton.jit
def _statistics(xs, eps, D: tl.constexpr, W: tl.constexpr):
    """Mean and 1 / sqrt(var + eps) of every token."""
    mean = _sums(xs) / D
    square = tl.zeros_like(mean)
    for i in tl.static_range(len(xs)):
        cols = i * W + tl.arange(0, W)
        centered = tl.where((cols < D)[None, :], xs[i].to(tl.float32) - mean[:, None], 0.0)
        square += tl.sum(centered * centered, 1)
    return mean, 1.0 / tl.sqrt_rn(square / D + eps)


@triton.jit
def _products(xs, us):
    """x uᵀ in fp32."""
    acc = tl.dot(xs[0], us[0].T)
    for i in tl.static_range(1, len(xs)):
        acc = tl.dot(xs[i], us[i].T, acc)
    return acc


@triton.jit
def _add_columns(acc, factor, xs, p):
    """acc · factor + xᵀ p, in parts [W, R]."""
    parts = ()
    for i in tl.static_range(len(xs)):
        parts = parts + (tl.dot(xs[i].T, p, acc[i] * factor[None, :]),)  # noqa: RUF005
    return parts


# Kernels -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "count"])
def _pool_forward_kernel(
    x,
    u,
    key_lengths,
    z,
    lse,
    means,
    rstds,
    n,
    count,
    eps,
    D: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    LENGTHS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, ROWS)
    us = _load_parts(u, r, r < count, D, W)
    u_sum = _sums(us)
    length = n
    if LENGTHS:
        length = tl.minimum(tl.load(key_lengths + b).to(tl.int32), n)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    offset = tl.zeros([ROWS], tl.float32)  # Σ p mean
    zs = _zeros(D, W, ROWS)
    for first in tl.range(0, length, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        there = tokens < length
        xs = _load_parts(x, b * n + tokens, there, D, W)
        s = _products(xs, us)
        if STANDARDIZE:
            mean, rstd = _statistics(xs, eps, D, W)
            tl.store(means + b * n + tokens, mean, mask=there)
            tl.store(rstds + b * n + tokens, rstd, mask=there)
            s = (s - mean[:, None] * u_sum[None, :]) * rstd[:, None]
        s = tl.where(there[:, None], s * _LOG2_E, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 0))
        p, shrink = tl.exp2(s - new_top[None, :]), tl.exp2(top - new_top)
        total, top = total * shrink + tl.sum(p, 0), new_top
        if STANDARDIZE:
            p = p * rstd[:, None]
        p_low = p.to(x.dtype.element_ty)
        if STANDARDIZE:
            offset = offset * shrink + tl.sum(p_low.to(tl.float32) * mean[:, None], 0)
        zs = _add_columns(zs, shrink, xs, p_low)
    inverse = tl.where(total > 0, 1.0 / total, 0.0)  # no token: zero
    _store_columns(z, b * count + r, r < count, zs, offset, inverse, D, W)
    tl.store(lse + b * count + r, top + tl.log2(total), mask=r < count)


@triton.jit(do_not_specialize=["batch", "n", "count"])
def _pool_backward_kernel(
    grad_z,
    x,
    u,
    z,
    lse,
    means,
    rstds,
    key_lengths,
    grad_x,
    partials,
    batch,
    n,
    count,
    D: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    LENGTHS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
):
    r = tl.arange(0, ROWS)
    real = r < count
    us = _load_parts(u, r, real, D, W)
    u_sum = _sums(us)
    ones = tl.full([ROWS], 1.0, tl.float32)
    offset = tl.zeros([ROWS], tl.float32)  # Σ ds mean
    grad_us = _zeros(D, W, ROWS)
    for each in tl.range(tl.program_id(0), batch, tl.num_programs(0)):
        rows = (each + tl.zeros([ROWS], tl.int64)) * count + r
        gs = _load_parts(grad_z, rows, real, D, W)
        zs = _load_parts(z, rows, real, D, W)
        g_sum = _sums(gs)
        delta = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(len(zs)):
            delta += tl.sum(gs[i].to(tl.float32) * zs[i].to(tl.float32), 1)
        level = tl.load(lse + rows, mask=real, other=float("inf"))
        length = n
        if LENGTHS:
            length = tl.minimum(tl.load(key_lengths + each).to(tl.int32), n)
        for first in tl.range(0, n, TOKENS):
            tokens = first + tl.arange(0, TOKENS)
            there = tokens < length
            at = (each + tl.zeros([TOKENS], tl.int64)) * n + tokens
            xs = _load_parts(x, at, there, D, W)
            s, dp = _products(xs, us), _products(xs, gs)
            if STANDARDIZE:
                mean = tl.load(means + at, mask=there, other=0.0)
                rstd = tl.load(rstds + at, mask=there, other=0.0)
                s = (s - mean[:, None] * u_sum[None, :]) * rstd[:, None]
                dp = (dp - mean[:, None] * g_sum[None, :]) * rstd[:, None]
            p = tl.where(there[:, None], tl.exp2(s * _LOG2_E - level[None, :]), 0.0)
            ds = p * (dp - delta[None, :])
            if STANDARDIZE:
                # Means over the features of the token's gradient, and of it times the token.
                grad_mean = tl.sum(ds * u_sum[None, :] + p * g_sum[None, :], 1) / D
                grad_along = tl.sum(ds * s + p * dp, 1) / D
                # The gradient of the token times rstd is what is left of it for x.
                ds, p = ds * rstd[:, None], p * rstd[:, None]
            ds_low, p_low = ds.to(x.dtype.element_ty), p.to(x.dtype.element_ty)
            if STANDARDIZE:
                offset += tl.sum(ds_low.to(tl.float32) * mean[:, None], 0)
            grad_us = _add_columns(grad_us, ones, xs, ds_low)
            for i in tl.static_range(len(xs)):
                down = tl.dot(p_low, gs[i], tl.dot(ds_low, us[i]))
                if STANDARDIZE:
                    x_hat = (xs[i].to(tl.float32) - mean[:, None]) * rstd[:, None]
                    down -= (grad_mean[:, None] + x_hat * grad_along[:, None]) * rstd[:, None]
                cols = i * W + tl.arange(0, W)
                here = (tokens < n)[:, None] & (cols < D)[None, :]
                tl.store(
                    grad_x + at[:, None] * D + cols[None, :], down.to(grad_x.dtype.element_ty), mask=here
                )
    _store_columns(partials, tl.program_id(0).to(tl.int64) * count + r, real, grad_us, offset, ones, D, W)


# Launch --------------------------------------------------------------------------------------------------


def limits(dtype: torch.dtype, arch: int) -> tuple[int, int]:
    """The most rows and features of u that the kernels take; none in fp32, whose tiles would not fit shared
    memory, nor before sm_90 and from sm_120 on, where those of the backward pass would not."""
    return (ROWS, WIDEST) if dtype in (torch.bfloat16, torch.float16) and 90 <= arch < 120 else (0, 0)


def _constants(width: int, lengths: bool, standardize: bool) -> dict:
    return {
        "D": width,
        "W": _CONFIG.width,
        "ROWS": ROWS,
        "TOKENS": _CONFIG.tokens,
        "LENGTHS": lengths,
        "STANDARDIZE": standardize,
    }


def forward(
    x: Tensor, u: Tensor, key_lengths: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> z [B, R, D] in the dtype of x; log2 of the softmax's sums [B, R], fp32; mean and 1 / sqrt(var + eps)
    of every token, fp32 [B, N], 0 for those that are not read, empty without eps.

    x [B, N, D], u [R, D] contiguous, R ≤ ROWS; eps: tokens are standardized first.
    """
    (batch, n, width), count = x.shape, u.shape[0]
    z = x.new_empty((batch, count, width))
    lse = x.new_empty((batch, count), dtype=torch.float32)
    tokens = (0,) if eps is None else (batch, n)
    filled = x.new_empty if key_lengths is None else x.new_zeros
    mean, rstd = (filled(tokens, dtype=torch.float32) for _ in range(2))
    if batch:
        _pool_forward_kernel[(batch,)](
            x,
            u,
            u if key_lengths is None else key_lengths.contiguous(),
            z,
            lse,
            mean,
            rstd,
            n,
            count,
            0.0 if eps is None else eps,
            **_constants(width, key_lengths is not None, eps is not None),
            num_warps=_CONFIG.warps,
            num_stages=_CONFIG.stages,
        )
    return z, lse, mean, rstd


def backward(
    grad_z: Tensor,
    x: Tensor,
    u: Tensor,
    z: Tensor,
    lse: Tensor,
    mean: Tensor,
    rstd: Tensor,
    key_lengths: Tensor | None,
    standardize: bool,
) -> tuple[Tensor, Tensor]:
    """-> gradients of x [B, N, D] in its dtype, of u [R, D] in fp32. All contiguous.

    Extra memory: 4 R D bytes for each program, of which there are at most two per SM.
    """
    (batch, n, width), count = x.shape, u.shape[0]
    programs = max(1, min(batch, (2 if width <= 512 else 1) * multiprocessors(x.device)))
    grad_x = torch.empty_like(x)
    partials = x.new_empty((programs, count, width), dtype=torch.float32)
    _pool_backward_kernel[(programs,)](
        grad_z,
        x,
        u,
        z,
        lse,
        mean,
        rstd,
        u if key_lengths is None else key_lengths.contiguous(),
        grad_x,
        partials,
        batch,
        n,
        count,
        **_constants(width, key_lengths is not None, standardize),
        num_warps=_CONFIG.warps,
        num_stages=_CONFIG.stages,
    )
    return grad_x, partials.sum(0)


# Compilations --------------------------------------------------------------------------------------------

_WIDTHS = (192, 768, 1024, 1152)  # of the model's configurations; every part more takes more registers


def compile_cases() -> list[CompileCase]:
    """Every width of the model's configurations, with and without statistics, in both dtypes; with lengths in
    int64, as without them there is less to do."""
    cases = []
    for dtype in (torch.bfloat16, torch.float16):
        for kernel in (_pool_forward_kernel, _pool_backward_kernel):
            for width in _WIDTHS:
                for standardize in (False, True):
                    constexprs = _constants(width, True, standardize)
                    kinds = {
                        **dict.fromkeys(("batch", "n", "count"), "i32"),
                        **dict.fromkeys(("lse", "means", "rstds", "partials"), "*fp32"),
                        **{"eps": "fp32", "key_lengths": "*i64"},
                        **dict.fromkeys(constexprs, "constexpr"),
                    }
                    form = "standardize" if standardize else "plain"
                    cases.append(
                        CompileCase(
                            f"{kernel.__name__}/{form}/{TYPES[dtype]}/D{width}",
                            kernel,
                            {name: kinds.get(name, f"*{TYPES[dtype]}") for name in kernel.arg_names},
                            constexprs,
                            _CONFIG.warps,
                            _CONFIG.stages,
                            archs=(90,),
                        )
                    )
    return cases
