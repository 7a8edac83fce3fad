"""Softmax pair loss on a GPU: statistics of rows and columns, and gradients, from two passes over S.

Forward. One product S = x yᵀ gives the log-sum-exp of rows and of columns. Every tile stores (peak, total)
of its rows and columns; a second kernel merges them in the order of the tiles. With both directions asked
for, a tile takes one exponential per pair: E = 2^(S - c) with c the greatest logit of the tile, masked ones
included, summed both ways and weighted with 2^-log_q. What an E loses lies below 2^-126, so a sum above 2^-90
is exact to 256 · 2^-36 = 2^-28. A tile that holds another sum (of a row whose own logits all lie far below c,
or a NaN) is taken again by the same kernel with a peak for every row and column.

Backward. S again, chunk by chunk of rows: G = dL/dS in the dtype of x, then dX = G·y and dY += Gᵀ·x by the
BLAS with fp32 accumulation. Again one exponential: E = 2^(S' - peak_i) is the probability in row i but for a
factor of the row, and that in column j is E · 2^(peak_i - peak_j), an outer product. Tiles with a difference
of peaks above 90 are taken again with two exponentials.

Listed positives stand in no tile. Their logits are fp32 dots, merged into the statistics after the tiles, and
their entries of G, like P - 1, are computed in fp32 and placed last: rounded to bf16 before 1 is subtracted,
P would lose the gradient of a pair that is nearly learnt.

Logits are in units of log 2. Nothing is summed by atomics, and the order of every sum is fixed.

Shape suffixes: M rows (x), N columns (y), D features, K listed positives, R rows of one chunk.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pinclip_kernels.triton._launch import CompileCase
from pinclip_kernels.triton._pair_tile import (
    GREATEST,
    MASKED,
    TILE_INTEGERS,
    ChunkGradients,
    PairProblem,
    in_log2,
    listed_cases,
    plain_case,
    tile_cases,
    tile_features,
    tile_inverse,
    tile_mask,
    tile_place,
    tile_products,
    tile_quarter,
    tile_step,
    tile_steps,
    tile_times_inverse,
)

# How a tile is taken: rows alone; rows and columns from shared exponentials; rows and columns apart.
ROWS, SHARED, APART = 0, 1, 2
_ROWS, _SHARED, _APART = tl.constexpr(ROWS), tl.constexpr(SHARED), tl.constexpr(APART)
_LEAST_TOTAL = tl.constexpr(2.0**-90)
_MOST_RANGE = tl.constexpr(90.0)

# Kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _finite(peak):
    """0 where the peak is infinite: a segment that is wholly masked, or has overflowed."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def _combined(peak, total, other_peak, other_total):
    """(peak, total) of the union of two parts of a segment."""
    new = tl.maximum(peak, other_peak)
    shift = _finite(new)
    return new, total * tl.exp2(peak - shift) + other_total * tl.exp2(other_peak - shift)


@triton.jit
def _log_sum(s, scale, log_q, DIM: tl.constexpr, LOGQ: tl.constexpr):
    """(peak, total) of scale · s - log_q along DIM."""
    if LOGQ:
        peak = tl.max(tl.fma(s, scale, -tl.expand_dims(log_q, 1 - DIM)), DIM)
    else:
        peak = tl.max(s, DIM) * scale
    # The peak is rounded; the exponent is therefore formed anew from it, as the gradient does.
    e = tl.fma(s, scale, -tl.expand_dims(_finite(peak), DIM))
    if LOGQ:
        e -= tl.expand_dims(log_q, 1 - DIM)
    return peak, tl.sum(tl.exp2(e), DIM)


@triton.jit(do_not_specialize=TILE_INTEGERS)
def _statistics_kernel(
    x,
    y,
    scale,
    q_cols,
    q_rows,
    least_q,
    row_peak,
    row_total,
    col_peak,
    col_total,
    again,
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
    MODE: tl.constexpr,
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
    """(peak, total) of every row, [P, tiles of columns, R], and every column, [P, tiles of rows, N], of each
    tile; without prefixes P = 1.

    SHARED reads q = 2^(least_q - log_q) and sets `again` [P, tiles] of tiles whose sums are not exact; APART
    takes those again, and it and ROWS read q = log_q.
    """
    d = d8 * 8  # so the compiler knows that every row is aligned
    tl.assume(d > 0)
    tiles_m, tiles_n = tl.cdiv(last_row - first_row, BLOCK_M), tl.cdiv(n, BLOCK_N)
    s_scale = tl.load(scale)
    flatten: tl.constexpr = FLATTEN and MODE != _APART
    adds: tl.constexpr = PREFIXED and MODE != _APART  # a prefix to the products of the one before it
    if adds:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    steps = tile_steps(tiles_m * tiles_n, prefixes, PREFIXED)
    for step in tl.range(steps[0], steps[1], steps[2], flatten=flatten):
        t, p = tile_step(step, prefixes, PREFIXED)
        wanted = True
        if MODE == _APART:
            wanted = tl.load(again + p * (tiles_m * tiles_n) + t) != 0
        if wanted:
            at_m, at_n = tile_place(t, tiles_m, tiles_n, GROUP)
            row0, col0 = first_row + at_m * BLOCK_M, at_n * BLOCK_N
            first, last = tile_features(p, bounds, d, adds, PREFIXED)
            before = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if adds:
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
            q_m = tl.load(q_rows + rows, mask=in_m, other=0.0) if LOGQ else 0.0
            peak_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total_m = tl.zeros([BLOCK_M], tl.float32)
            if MODE == _SHARED:
                # Masked pairs count, which spares a mask: they can only make a tile be taken again. A whole
                # number, as least_q is: their difference is exact.
                if PREFIXED:
                    of_n = tl.max(acc * tile_inverse(inverse_x, p, m, row0, BLOCK_M)[:, None], 0)
                    greatest = tl.max(of_n * tile_inverse(inverse_y, p, n, col0, BLOCK_N), 0)
                else:
                    greatest = tl.max(tl.max(acc, 1), 0)
                peak = _finite(tl.ceil(greatest * s_scale))

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
                    float("-inf"),
                    IDS,
                    LISTS,
                    BLOCK_M,
                    BLOCK_N // 4,
                )
                cols = quarter0 + tl.arange(0, BLOCK_N // 4)
                in_n = cols < n
                q_n = tl.load(q_cols + cols, mask=in_n, other=0.0) if LOGQ else 0.0
                if MODE == _SHARED:
                    e = tl.exp2(tl.fma(s_quarter, s_scale, -peak))
                    total_m += tl.sum(e * q_n[None, :] if LOGQ else e, 1)
                    total_n = tl.sum(e * q_m[:, None] if LOGQ else e, 0)
                    peak_n = tl.zeros([BLOCK_N // 4], tl.float32) + peak
                    if LOGQ:
                        peak_n -= tl.load(least_q + 1)
                    inexact_n = (total_n > _LEAST_TOTAL) == 0  # of a NaN, too
                    tl.store(
                        again + p * (tiles_m * tiles_n) + t + tl.zeros_like(cols), 1, mask=inexact_n & in_n
                    )
                else:
                    of_m = _log_sum(s_quarter, s_scale, q_n, 1, LOGQ)
                    peak_m, total_m = _combined(peak_m, total_m, of_m[0], of_m[1])
                if MODE == _APART:
                    peak_n, total_n = _log_sum(s_quarter, s_scale, q_m, 0, LOGQ)
                if MODE != _ROWS:
                    to_n = (p * tiles_m + at_m).to(tl.int64) * n + cols
                    tl.store(col_peak + to_n, peak_n, mask=in_n)
                    tl.store(col_total + to_n, total_n, mask=in_n)

            if MODE == _SHARED:
                inexact_m = (total_m > _LEAST_TOTAL) == 0
                tl.store(again + p * (tiles_m * tiles_n) + t + tl.zeros_like(rows), 1, mask=inexact_m & in_m)
                peak_m = tl.zeros([BLOCK_M], tl.float32) + peak
                if LOGQ:
                    peak_m -= tl.load(least_q)
            to_m = (p * tiles_n + at_n).to(tl.int64) * (last_row - first_row) + (rows - first_row)
            tl.store(row_peak + to_m, peak_m, mask=in_m)
            tl.store(row_total + to_m, total_m, mask=in_m)


@triton.jit(do_not_specialize=["parts", "size", "first"])
def _merge_kernel(
    part_peak, part_total, peak, total, parts, size, first, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """Merges [parts, size] into the segments from `first` on, PARTS parts at a time."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    whole_peak = tl.load(peak + first + at, mask=here, other=float("-inf"))
    whole_total = tl.load(total + first + at, mask=here, other=0.0)
    for part0 in range(0, parts, PARTS):
        part = part0 + tl.arange(0, PARTS)
        of_part = part.to(tl.int64)[:, None] * size + at[None, :]
        inside = (part < parts)[:, None] & here[None, :]
        peaks = tl.load(part_peak + of_part, mask=inside, other=float("-inf"))
        totals = tl.load(part_total + of_part, mask=inside, other=0.0)
        new = tl.max(peaks, 0)
        part_sum = tl.sum(totals * tl.exp2(peaks - _finite(new)[None, :]), 0)
        whole_peak, whole_total = _combined(whole_peak, whole_total, new, part_sum)
    tl.store(peak + first + at, whole_peak, mask=here)
    tl.store(total + first + at, whole_total, mask=here)


@triton.jit(do_not_specialize=["size"])
def _merge_listed_kernel(starts, order, values, peak, total, size, BLOCK: tl.constexpr):
    """Merges values[order[starts[i] : starts[i + 1]]] into segment i, one by one."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    whole_peak = tl.load(peak + at, mask=here, other=float("-inf"))
    whole_total = tl.load(total + at, mask=here, other=0.0)
    start = tl.load(starts + at, mask=here, other=0)
    stop = tl.load(starts + at + 1, mask=here, other=0)
    for i in range(0, tl.max(stop - start, 0)):
        more = start + i < stop
        entry = tl.load(order + start + i, mask=more, other=0)
        value = tl.load(values + entry, mask=more, other=float("-inf"))
        # A positive that outweighs all else becomes the peak: a loss near zero is then log2(1 + little).
        scaled = whole_total * tl.exp2(whole_peak - value)
        heavy = (value > whole_peak) | (scaled <= 1.0)
        one = tl.exp2(value - _finite(value))
        whole_total = tl.where(heavy, scaled + one, whole_total + tl.exp2(value - _finite(whole_peak)))
        whole_peak = tl.where(heavy, value, whole_peak)
    tl.store(peak + at, whole_peak, mask=here)
    tl.store(total + at, whole_total, mask=here)


@triton.jit(do_not_specialize=TILE_INTEGERS)
def _gradient_kernel(
    x,
    y,
    g,
    scale,
    row_shift,
    row_factor,
    row_ratio,
    row_high,
    col_shift,
    col_factor,
    col_ratio,
    col_low,
    q_cols,
    q_rows,
    inner,
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
    MODE: tl.constexpr,
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
    """G [R, P · tiles of columns · BLOCK_N] of the negatives, zero elsewhere; and ⟨G, x yᵀ⟩ of every row of a
    tile, [P, tiles of columns, R]. Without prefixes P = 1; with them x yᵀ are cosines, G is that of the
    products of what is not renormalised, and inner_cols [P, tiles of rows, N] the same of every column.

    With E = 2^(scale · acc - q_cols - row_shift) it is E · row_factor (ROWS), E · (row_factor + row_ratio ·
    col_ratio) (SHARED), or E · row_factor + 2^(scale · acc - q_rows - col_shift) · col_factor (APART, only in
    tiles whose row_high - col_low is too much for SHARED).
    """
    d = d8 * 8  # so the compiler knows that every row is aligned
    tl.assume(d > 0)
    tiles_m, tiles_n = tl.cdiv(last_row - first_row, BLOCK_M), tl.cdiv(n, BLOCK_N)
    width = tiles_n * BLOCK_N * (prefixes if PREFIXED else 1)
    s_scale = tl.load(scale)
    flatten: tl.constexpr = FLATTEN and MODE != _APART
    adds: tl.constexpr = PREFIXED and MODE != _APART  # a prefix to the products of the one before it
    if adds:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    steps = tile_steps(tiles_m * tiles_n, prefixes, PREFIXED)
    for step in tl.range(steps[0], steps[1], steps[2], flatten=flatten):
        t, p = tile_step(step, prefixes, PREFIXED)
        at_m, at_n = tile_place(t, tiles_m, tiles_n, GROUP)
        row0, col0 = first_row + at_m * BLOCK_M, at_n * BLOCK_N
        wanted = True
        if MODE == _APART:
            high = tl.load(row_high + p * tl.cdiv(m, BLOCK_M) + row0 // BLOCK_M)
            difference = high - tl.load(col_low + p * tiles_n + at_n)
            wanted = (difference <= _MOST_RANGE) == 0  # NaN is wanted
        if wanted:
            first, last = tile_features(p, bounds, d, adds, PREFIXED)
            before = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if adds:
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
            of_m, of_n, place0 = p * m, p * n, p * (tiles_n * BLOCK_N)
            shift_m = tl.load(row_shift + of_m + rows, mask=in_m, other=0.0)
            factor_m = tl.load(row_factor + of_m + rows, mask=in_m, other=0.0)
            ratio_m = tl.load(row_ratio + of_m + rows, mask=in_m, other=0.0) if MODE == _SHARED else 0.0
            q_m = tl.load(q_rows + rows, mask=in_m, other=0.0) if MODE == _APART and LOGQ else 0.0
            inner_m = tl.zeros([BLOCK_M], tl.float32)
            for quarter in tl.static_range(4):
                s_quarter = tile_quarter(acc, quarter)
                quarter0 = col0 + quarter * (BLOCK_N // 4)
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
                in_n = cols < n
                s = tl.fma(s_quarter, s_scale, -shift_m[:, None])
                if LOGQ:
                    s -= tl.load(q_cols + cols, mask=in_n, other=0.0)[None, :]
                e = tl.exp2(s)
                if MODE == _SHARED:
                    ratio_n = tl.load(col_ratio + of_n + cols, mask=in_n, other=0.0)
                    g_quarter = e * tl.fma(ratio_m[:, None], ratio_n[None, :], factor_m[:, None])
                else:
                    g_quarter = e * factor_m[:, None]
                    if MODE == _APART:
                        shift_n = tl.load(col_shift + of_n + cols, mask=in_n, other=0.0)
                        factor_n = tl.load(col_factor + of_n + cols, mask=in_n, other=0.0)
                        s = tl.fma(s_quarter, s_scale, -shift_n[None, :])
                        if LOGQ:
                            s -= q_m[:, None]
                        g_quarter += tl.exp2(s) * factor_n[None, :]
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
            tl.store(inner + to_m, inner_m, mask=in_m)


# Launch --------------------------------------------------------------------------------------------------

_STATISTICS_ROWS = 8192
_MERGE_BLOCK, _MERGE_PARTS = 64, 32


class Statistics(NamedTuple):
    """listed_PK: logits of the listed positives. log2 Σ 2^S' of every row [P, M] and column [P, N] is
    peak + log2(total), an infinite peak counting as 0; the peak is the greatest logit or lies up to 90 above
    it. Empty for a direction that is not asked for."""

    listed_PK: Tensor
    row_peak: Tensor
    row_total: Tensor
    col_peak: Tensor
    col_total: Tensor


class Direction(NamedTuple):
    """One direction of the loss, fp32: coefficient of every segment (row or column) and of every listed
    positive in it; log_q of every candidate in units of log 2, or None."""

    segment: Tensor
    entry_K: Tensor
    log_q: Tensor | None


def statistics(
    problem: PairProblem, scale: Tensor, rows: Direction | None, cols: Direction | None
) -> Statistics:
    """Statistics of S = scale · x yᵀ in the directions given; scale 0-d fp32, in units of log 2.

    Extra memory beyond that of `problem`: partial statistics, 8·P bytes per row of a chunk (8192 / P) and
    tile of columns, and per column and tile of rows of a chunk; O(P·(M + N + K)) numbers.
    """
    if rows is None:
        listed, *of_rows, col_peak, col_total = statistics(problem.turned(), scale, cols, None)
        return Statistics(listed, col_peak, col_total, *of_rows)
    both, q = cols is not None, _log_q(problem, rows, cols)
    count = len(problem.ends)
    row_peak, row_total = _no_segments(problem.x, count)
    col_peak, col_total = _no_segments(problem.y if both else problem.y[:0], count)
    operands = problem.operands()
    for chunk in problem.chunks(_STATISTICS_ROWS // count):
        tiles_m, tiles_n = problem.tiles(chunk)
        of_rows = row_peak.new_empty((2, count, tiles_n, chunk[1] - chunk[0]))
        of_cols = row_peak.new_empty((2, count, tiles_m, col_peak.shape[1]))
        again = problem.no_bits.new_zeros(count * tiles_m * tiles_n)
        arguments = problem.arguments(chunk)
        for mode in (SHARED, APART) if both else (ROWS,):
            _statistics_kernel[problem.grid(chunk)](
                *operands,
                scale,
                *(q.weights if mode == SHARED else q.log_q),
                q.least,
                *of_rows.unbind(),
                *of_cols.unbind(),
                again,
                MODE=mode,
                LOGQ=q.given,
                **arguments,
            )
        _merge(of_rows, row_peak, row_total, chunk[0])
        if both:
            _merge(of_cols, col_peak, col_total, 0)
    listed_PK = problem.listed_products() * scale
    rows_K, cols_K = problem.positives
    _merge_listed(rows_K, targets(listed_PK, rows, cols_K), row_peak, row_total)
    if both:
        _merge_listed(cols_K, targets(listed_PK, cols, rows_K), col_peak, col_total)
    return Statistics(listed_PK, row_peak, row_total, col_peak, col_total)


def targets(listed_PK: Tensor, direction: Direction, candidates_K: Tensor) -> Tensor:
    """S' of the listed positives: their logits less log_q of the candidate."""
    return listed_PK if direction.log_q is None else listed_PK - direction.log_q[candidates_K]


def gradients(
    problem: PairProblem,
    scale: Tensor,
    grad: Tensor,
    row_peak: Tensor,
    row_total: Tensor,
    col_peak: Tensor,
    col_total: Tensor,
    rows: Direction | None,
    cols: Direction | None,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y (in their dtype, empty where not needed) and scale (fp32), which is in natural units,
    of the mean over prefixes.

    Extra memory beyond that of `problem` and of `ChunkGradients`: O(P·(M + N + K)) numbers, and 4·P bytes per
    row of a chunk and tile of columns, with prefixes per column and tile of rows as well.
    """
    if rows is None:
        found = col_peak, col_total, row_peak, row_total
        dy, dx, dscale = gradients(problem.turned(), scale, grad, *found, cols, None, need_y, need_x)
        return dx, dy, dscale
    both, q = cols is not None, _log_q(problem, rows, cols)
    scale_log2 = in_log2(scale)
    greatest = rows.segment.max() + (cols.segment.max() if both else 0.0)
    greatest = greatest * problem.greatest_inverse()
    gain = torch.where(greatest > 0, GREATEST / greatest, 1.0)
    of_rows = _Probabilities.of(rows, row_peak, row_total, gain)
    of_cols = _Probabilities.of(cols, col_peak, col_total, gain) if both else of_rows
    shared = _shared_ratios(problem, of_rows, of_cols, rows, cols) if both else (problem.nothing,) * 4

    listed_PK = problem.listed_products()
    g_PK = of_rows.listed(listed_PK * scale_log2, *problem.positives, rows) - gain * rows.entry_K
    if both:
        turned = problem.positives.turned()
        g_PK = g_PK + of_cols.listed(listed_PK * scale_log2, *turned, cols) - gain * cols.entry_K
    g_PK = torch.where(problem.positives.rows_K < 0, 0.0, g_PK)
    inner = [(g_PK * listed_PK).sum(dtype=torch.float64)]

    row_ratio, row_high, col_ratio, col_low = shared
    grad, count = grad / len(problem.ends), len(problem.ends)
    sums = ChunkGradients(problem, grad * scale / gain, need_x, need_y)
    sums.add_listed_inner(g_PK * listed_PK)
    operands = problem.operands()
    for chunk, g in sums:
        tiles_m, tiles_n = problem.tiles(chunk)
        inner_rows = g_PK.new_empty((count, tiles_n, len(g)))
        inner_cols = problem.nothing
        if problem.prefixes is not None:
            inner_cols = g_PK.new_empty((count, tiles_m, len(problem.y)))
        arguments = problem.arguments(chunk)
        for mode in (SHARED, APART) if both else (ROWS,):
            _gradient_kernel[problem.grid(chunk)](
                *operands,
                problem.gradient_block(g),
                scale_log2,
                of_rows.shift,
                of_rows.factor,
                row_ratio,
                row_high,
                of_cols.shift,
                of_cols.factor,
                col_ratio,
                col_low,
                *q.log_q,
                inner_rows,
                inner_cols,
                MODE=mode,
                LOGQ=q.given,
                **arguments,
            )
        for p, g_K in enumerate(g_PK * problem.listed_inverse()):
            problem.positives.place(g_K, sums.of_prefix(g, p), chunk)
        inner.append(inner_rows.sum(dtype=torch.float64))
        if problem.prefixes is not None:
            sums.add_inner(chunk, inner_rows, inner_cols)
    dscale = (grad * (torch.stack(inner).sum() / gain)).to(scale.dtype)
    return *sums.result(), dscale


class _LogQ(NamedTuple):
    """Subtracted logarithms of columns and of rows, their weights 2^(least - log_q), and the two least,
    rounded down to whole numbers."""

    given: bool
    log_q: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]
    least: Tensor


def _log_q(problem: PairProblem, rows: Direction, cols: Direction | None) -> _LogQ:
    given = [rows.log_q, None if cols is None else cols.log_q]
    if given == [None, None]:
        return _LogQ(False, (problem.nothing,) * 2, (problem.nothing,) * 2, problem.nothing)
    sides = zip(given, (problem.y, problem.x))
    log_q = [side.new_zeros(len(side), dtype=torch.float32) if q is None else q for q, side in sides]
    least = torch.stack([q.min() for q in log_q]).floor()
    least = torch.where(least.isinf(), 0.0, least)  # all candidates removed
    weights = [torch.exp2(least[i] - q) for i, q in enumerate(log_q)]
    return _LogQ(True, tuple(log_q), tuple(weights), least)


def _no_segments(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    peak = x.new_full((count, len(x)), -torch.inf, dtype=torch.float32)
    return peak, torch.zeros_like(peak)


def _merge(parts: Tensor, peak: Tensor, total: Tensor, first: int) -> None:
    """Merges parts [2, P, parts, size] into the segments [P, ·] from `first` on."""
    _, _, count, size = parts.shape
    for of_p in zip(*parts, peak, total):
        _merge_kernel[(triton.cdiv(size, _MERGE_BLOCK),)](
            *of_p, count, size, first, _MERGE_BLOCK, _MERGE_PARTS
        )


def _merge_listed(segments_K: Tensor, values_PK: Tensor, peak: Tensor, total: Tensor) -> None:
    """Merges every value into its segment, those of one segment in the order of the list."""
    if len(segments_K) == 0:
        return
    of_K, order_K = torch.sort(segments_K, stable=True)
    size = peak.shape[1]
    starts = torch.searchsorted(of_K, torch.arange(size + 1, device=peak.device))
    for of_p in zip(values_PK, peak, total):
        _merge_listed_kernel[(triton.cdiv(size, _MERGE_BLOCK),)](starts, order_K, *of_p, size, _MERGE_BLOCK)


class _Probabilities(NamedTuple):
    """coefficient · 2^(S' - peak) / total = factor · 2^(S' - shift) of the segments of one direction."""

    shift: Tensor
    factor: Tensor
    total: Tensor

    @staticmethod
    def of(direction: Direction, peak: Tensor, total: Tensor, gain: Tensor) -> "_Probabilities":
        factor = torch.where(direction.segment == 0, 0.0, gain * direction.segment / total)
        return _Probabilities(torch.where(peak.isinf(), 0.0, peak), factor, total)

    def listed(self, logits_PK: Tensor, of_K: Tensor, candidates_K: Tensor, direction: Direction) -> Tensor:
        """The same of the listed positives, in fp32."""
        e_PK = torch.exp2(targets(logits_PK, direction, candidates_K) - self.shift[:, of_K])
        return torch.where(direction.segment[of_K] == 0, 0.0, e_PK * self.factor[:, of_K])


def _shared_ratios(problem, of_rows: _Probabilities, of_cols: _Probabilities, rows, cols):
    """(row_ratio, row_high, col_ratio, col_low) for SHARED.

    The probability in column j is E · 2^(high_i - low_j) up to the column's coefficient, with high_i =
    shift_i - log_q_rows and low_j = log-sum-exp_j - log_q_cols. The power is the product of two ratios about
    a common middle. row_high, col_low are the greatest high and the least low of a tile's rows and columns,
    infinite where a ratio would overflow.
    """
    config = problem.config
    high = of_rows.shift if cols.log_q is None else of_rows.shift - cols.log_q
    shift = of_cols.shift if rows.log_q is None else of_cols.shift - rows.log_q
    low = torch.where(of_cols.factor == 0, torch.inf, shift + of_cols.total.log2())
    highest = torch.where(high.isinf(), -torch.inf, high).amax(1, keepdim=True)
    lowest = torch.where(low.isinf(), torch.inf, low).amin(1, keepdim=True)
    middle = (highest + lowest) / 2
    middle = torch.where(middle.isfinite(), middle, 0.0)
    row_ratio = torch.exp2(high - middle)
    col_ratio = torch.where(of_cols.factor == 0, 0.0, torch.exp2(middle - shift) * of_cols.factor)
    high = torch.where(high - middle > _MOST_RANGE.value, torch.inf, high)
    low = torch.where(middle - low > _MOST_RANGE.value, -torch.inf, low)
    blocks = (
        F.pad(vector, (0, -vector.shape[1] % block), value=outside).view(len(vector), -1, block)
        for vector, block, outside in ((high, config.block_m, -torch.inf), (low, config.block_n, torch.inf))
    )
    return row_ratio, next(blocks).amax(2), col_ratio, next(blocks).amin(2)


# Compilations --------------------------------------------------------------------------------------------

_MODES = {"rows": {"MODE": ROWS}, "shared": {"MODE": SHARED}, "apart": {"MODE": APART}}


def compile_cases() -> list[CompileCase]:
    """Every compilation that the launch code can ask for (see `tile_cases`)."""
    merge = {"part_peak": "*fp32", "part_total": "*fp32", "peak": "*fp32", "total": "*fp32"}
    listed = {"starts": "*i64", "order": "*i64", "values": "*fp32", "peak": "*fp32", "total": "*fp32"}
    return [
        *tile_cases(_statistics_kernel, _MODES, ("LOGQ",)),
        *tile_cases(_gradient_kernel, _MODES, ("LOGQ",)),
        plain_case(_merge_kernel, merge, {"BLOCK": _MERGE_BLOCK, "PARTS": _MERGE_PARTS}),
        plain_case(_merge_listed_kernel, listed, {"BLOCK": _MERGE_BLOCK}),
        *listed_cases(),
    ]
