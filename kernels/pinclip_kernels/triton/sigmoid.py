"""Sigmoid pair loss on a GPU: value and gradients from one pass over S = scale · x yᵀ + bias.

The loss has no normaliser over j, so a tile of S gives at once its part of the loss and its part of
G = dL/dS. Chunk by chunk of rows, G is stored in the dtype of x, then dX = G·y and dY += Gᵀ·x by the BLAS
with fp32 accumulation. A pair takes one exponential t = e^-|S|: the sigmoid is 1 / (1 + t) or t / (1 + t),
and softplus max(S, 0) + log(1 + t), the logarithm by a polynomial, as log2 loses a small t beside 1.

Listed positives stand in no tile: their logits are fp32 dots, and their entries of G are placed last.

Logits are in units of log 2. Nothing is summed by atomics, and the order of every sum is fixed.

Shape suffixes: M rows (x), N columns (y), D features, K listed positives, R rows of one chunk.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pinclip_kernels.triton._launch import CompileCase
from pinclip_kernels.triton._pair_tile import (
    GREATEST,
    LOG2_E,
    MASKED,
    TILE_INTEGERS,
    ChunkGradients,
    PairProblem,
    in_log2,
    listed_cases,
    tile_cases,
    tile_features,
    tile_mask,
    tile_place,
    tile_products,
    tile_quarter,
    tile_step,
    tile_steps,
    tile_times_inverse,
)

_LN_2 = tl.constexpr(1 / LOG2_E)

# Kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _log1p(t):
    """log(1 + t) for t in [0, 1] by the polynomial of least relative error; in fp32 it errs by 1.6e-7."""
    p = tl.fma(t, 0.005232690833508968, -0.029505228623747826)
    p = tl.fma(t, p, 0.07822594791650772)
    p = tl.fma(t, p, -0.13663245737552643)
    p = tl.fma(t, p, 0.19106008112430573)
    p = tl.fma(t, p, -0.2484298199415207)
    p = tl.fma(t, p, 0.3331909775733948)
    p = tl.fma(t, p, -0.4999949336051941)
    return t * tl.fma(t, p, 0.9999999403953552)


@triton.jit
def _reciprocal(u, EXACT: tl.constexpr):
    """1 / u for u in [1, 2]; one instruction less than half of a division's, and 2.5e-7 off, unless EXACT."""
    if EXACT:
        return 1.0 / u
    root = tl.rsqrt(u)
    return root * root


@triton.jit(do_not_specialize=TILE_INTEGERS)
def _sigmoid_kernel(
    x,
    y,
    g,
    scale,
    bias,
    row_factor,
    q_cols,
    losses,
    inner,
    sums,
    inner_cols,
    row_ids,
    col_ids,
    bits,
    inverse_x,
    inverse_y,
    bounds,
    m,
    n,
    d8,
    first_row,
    last_row,
    offset,
    prefixes,
    GRADIENT: tl.constexpr,
    LOGQ: tl.constexpr,
    IDS: tl.constexpr,
    LISTS: tl.constexpr,
    PREFIXED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """row_factor · Σ softplus over the negatives of every row of a tile, [P, tiles of columns, R]; with
    GRADIENT G [R, P · tiles of columns · BLOCK_N], zero where no negative is, and in the same shape as the
    losses the sums ⟨G, x yᵀ⟩ (inner) and Σ G (sums). Without prefixes P = 1; with them x yᵀ in the sums are
    cosines, and G that of the products of what is not renormalised; inner_cols [P, tiles of rows, N] is inner
    of every column."""
    d = d8 * 8  # so the compiler knows that every row is aligned
    tl.assume(d > 0)
    tiles_m, tiles_n = tl.cdiv(last_row - first_row, BLOCK_M), tl.cdiv(n, BLOCK_N)
    width = tiles_n * BLOCK_N * (prefixes if PREFIXED else 1)
    s_scale, s_bias = tl.load(scale), tl.load(bias)
    if PREFIXED:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    steps = tile_steps(tiles_m * tiles_n, prefixes, PREFIXED)
    for step in tl.range(steps[0], steps[1], steps[2], flatten=FLATTEN):
        t, p = tile_step(step, prefixes, PREFIXED)
        place0 = p * (tiles_n * BLOCK_N)
        at_m, at_n = tile_place(t, tiles_m, tiles_n, GROUP)
        row0, col0 = first_row + at_m * BLOCK_M, at_n * BLOCK_N
        first, last = tile_features(p, bounds, d, PREFIXED, PREFIXED)
        before = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if PREFIXED:
            before = tl.where(p == 0, before, acc)
        acc = tile_products(
            x,
            y,
            before,
            row0,
            col0,
            first,
            last,
            m,
            n,
            d,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DESCRIPTORS,
            PRECISION,
        )
        rows = row0 + tl.arange(0, BLOCK_M)
        in_m = rows < last_row
        factor_m = tl.load(row_factor + rows, mask=in_m, other=0.0)
        loss_m = tl.zeros([BLOCK_M], tl.float32)
        inner_m = tl.zeros([BLOCK_M], tl.float32)
        sum_m = tl.zeros([BLOCK_M], tl.float32)
        for quarter in tl.static_range(4):
            quarter0 = col0 + quarter * (BLOCK_N // 4)
            s_quarter = tile_quarter(acc, quarter)
            if PREFIXED:
                s_quarter = tile_times_inverse(s_quarter, inverse_x, inverse_y, p, row0, quarter0, m, n)
            s_quarter = tile_mask(
                s_quarter,
                row0,
                quarter0,
                last_row,
                n,
                first_row,
                offset,
                row_ids,
                col_ids,
                bits,
                tiles_n * (BLOCK_N // 32),
                MASKED,
                IDS,
                LISTS,
                BLOCK_M,
                BLOCK_N // 4,
            )
            cols = quarter0 + tl.arange(0, BLOCK_N // 4)
            s = tl.fma(s_quarter, s_scale, s_bias)
            if LOGQ:
                s -= tl.load(q_cols + cols, mask=cols < n, other=0.0)[None, :]
            e = tl.exp2(-tl.abs(s))
            loss_m += tl.sum(tl.fma(tl.maximum(s, 0.0), _LN_2, _log1p(e)), 1)
            if GRADIENT:
                slope = tl.where(s >= 0, 1.0, e) * _reciprocal(1.0 + e, PRECISION == "tf32x3")
                g_quarter = slope * factor_m[:, None]
                sum_m += tl.sum(g_quarter, 1)
                inner_m += tl.sum(g_quarter * s_quarter, 1)
                if PREFIXED:
                    inner_n = tl.sum(g_quarter * s_quarter, 0)
                    to_n = (p * tiles_m + at_m).to(tl.int64) * n + cols
                    tl.store(inner_cols + to_n, inner_n, mask=cols < n)
                    g_quarter = tile_times_inverse(g_quarter, inverse_x, inverse_y, p, row0, quarter0, m, n)
                if DESCRIPTORS:
                    g.store([row0 - first_row, place0 + quarter0], g_quarter.to(g.dtype))
                else:
                    to = (rows - first_row).to(tl.int64)[:, None] * width + (place0 + cols)[None, :]
                    tl.store(g + to, g_quarter.to(g.dtype.element_ty), mask=in_m[:, None])
        to_m = (p * tiles_n + at_n).to(tl.int64) * (last_row - first_row) + (rows - first_row)
        tl.store(losses + to_m, tl.where(factor_m == 0, 0.0, loss_m * factor_m), mask=in_m)
        if GRADIENT:
            tl.store(inner + to_m, inner_m, mask=in_m)
            tl.store(sums + to_m, sum_m, mask=in_m)


# Launch --------------------------------------------------------------------------------------------------

_VALUE_ROWS = 8192


def value_and_gradients(
    problem: PairProblem,
    scale: Tensor,
    bias: Tensor,
    segment_M: Tensor,
    entry_K: Tensor,
    log_q_cols: Tensor | None,
    need: tuple[bool, bool] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, the mean over prefixes, and the gradients of x, y, scale, bias for a unit gradient of the loss;
    empty where not needed.

    scale, bias 0-d fp32; segment_M, entry_K: coefficients of the softplus of every negative of a row, and of
    every listed positive; log_q_cols fp32 [N] in natural units. need: whether x and y get gradients, None:
    nothing does. Extra memory beyond that of `problem` and of `ChunkGradients`: 12·P bytes per row of a chunk
    and tile of columns, with prefixes 4·P per column and tile of rows, and O(P·(M + N + K)) numbers.
    """
    entry_K = torch.where(problem.positives.rows_K < 0, 0.0, entry_K)
    greatest = torch.cat([segment_M, entry_K]).max() * problem.greatest_inverse()
    gain = torch.where(greatest > 0, GREATEST / greatest, 1.0)
    dots_PK = problem.listed_products()
    s_PK = dots_PK * scale + bias
    if log_q_cols is not None:
        s_PK = s_PK - log_q_cols[problem.positives.cols_K]
    g_PK = -gain * entry_K * torch.sigmoid(-s_PK)
    # A dropped row may stand against a removed column: 0 · inf.
    loss_PK = torch.where(entry_K == 0, 0.0, entry_K * F.softplus(-s_PK, threshold=40))
    loss, inner, sums = ([each.sum(dtype=torch.float64)] for each in (loss_PK, g_PK * dots_PK, g_PK))

    count, gradients = len(problem.ends), None
    chunks = ((chunk, problem.nothing) for chunk in problem.chunks(_VALUE_ROWS))
    if need is not None:
        chunks = gradients = ChunkGradients(problem, scale / (gain * count), *need)
        gradients.add_listed_inner(g_PK * dots_PK)
    log_q = problem.nothing if log_q_cols is None else log_q_cols * LOG2_E
    scalars, row_factor, operands = (in_log2(scale), in_log2(bias)), gain * segment_M, problem.operands()
    for chunk, g in chunks:
        tiles_m, tiles_n = problem.tiles(chunk)
        of_tiles = s_PK.new_empty((3, count, tiles_n, chunk[1] - chunk[0]))
        inner_cols = problem.nothing
        if problem.prefixes is not None:
            inner_cols = s_PK.new_empty((count, tiles_m, len(problem.y)))
        _sigmoid_kernel[problem.grid(chunk)](
            *operands,
            g if need is None else problem.gradient_block(g),
            *scalars,
            row_factor,
            log_q,
            *of_tiles.unbind(),
            inner_cols,
            GRADIENT=need is not None,
            LOGQ=log_q_cols is not None,
            **problem.arguments(chunk),
        )
        loss.append(of_tiles[0].sum(dtype=torch.float64) / gain)
        if need is not None:
            for p, g_K in enumerate(g_PK * problem.listed_inverse()):
                problem.positives.place(g_K, gradients.of_prefix(g, p), chunk)
            inner.append(of_tiles[1].sum(dtype=torch.float64))
            sums.append(of_tiles[2].sum(dtype=torch.float64))
            if problem.prefixes is not None:
                gradients.add_inner(chunk, of_tiles[1], inner_cols)
    total = (torch.stack(loss).sum() / count).to(scale.dtype)
    if need is None:
        return total, problem.x.new_empty(0), problem.x.new_empty(0), total.new_empty(0), total.new_empty(0)
    dscale, dbias = ((torch.stack(each).sum() / (gain * count)).to(scale.dtype) for each in (inner, sums))
    return total, *gradients.result(), dscale, dbias


# Compilations --------------------------------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Every compilation that the launch code can ask for (see `tile_cases`)."""
    variants = {"value": {"GRADIENT": False}, "gradient": {"GRADIENT": True}}
    return [*tile_cases(_sigmoid_kernel, variants, ("LOGQ",)), *listed_cases()]
