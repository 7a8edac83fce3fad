"""Gradients through the RMS norm and the rotation that attention applies when it loads queries and keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pinclip_kernels.triton._attention_tile import (
    inner_rows,
    inverse_rms,
    load_columns,
    load_rows,
    load_turns,
    load_weight,
    store_rows,
)

_ROWS = 32
_PROGRAMS = 1024
_NUMBERS = ["x_batch8", "x_row8", "x_head8", "g_batch8", "g_row8", "n", "rows", "heads", "eps"]


@triton.jit
def _turned_back(g, base, at, inside, positions, cols, cos, sin, DH: tl.constexpr):
    """The columns `cols` of the gradient before the rotation, fp32."""
    y = g.to(tl.float32)
    if cos is not None:
        other = load_columns(base, at, 1, inside, (cols + DH // 2) % DH, DH, DH).to(tl.float32)
        c, s = load_turns(cos, sin, positions, inside, cols, DH)
        y = y * c - other * s
    return y


@triton.jit(do_not_specialize=_NUMBERS)
def attention_norm_backward(
    x,
    g,
    weight,
    cos,
    sin,
    starts,
    lengths,
    partial,
    x_batch8,
    x_row8,
    x_head8,
    g_batch8,
    g_row8,
    n,
    rows,
    heads,
    eps,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """In place of g, the gradient of normalised and rotated heads, that of x; the weight's in parts.

    rows: tokens times heads; n: tokens of a sequence; starts: first token of every token's segment, or None;
    lengths: how many tokens of a sequence count, or None. partial [programs, DH]: sums over the rows of a
    program."""
    W0: tl.constexpr = 128 if DH == 128 else 64
    W1: tl.constexpr = 16 if DH <= 80 else 32
    cols0, cols1 = tl.arange(0, W0), 64 + tl.arange(0, W1)
    dw0, dw1 = tl.zeros([W0], tl.float32), tl.zeros([W1], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        token, head = row // heads, row % heads
        place = token % n
        sequence = (token // n).to(tl.int64)
        positions = place
        if starts is not None:
            positions = token - tl.load(starts + token, mask=inside, other=0)
        x_at = sequence * (x_batch8 * 8) + place.to(tl.int64) * (x_row8 * 8) + head * (x_head8 * 8)
        g_at = sequence * (g_batch8 * 8) + place.to(tl.int64) * (g_row8 * 8) + head * DH
        g_rows = load_rows(g, g_at, 1, inside, DH)
        y0 = _turned_back(g_rows[0], g, g_at, inside, positions, cols0, cos, sin, DH)
        if len(g_rows) == 2:
            dy = (y0, _turned_back(g_rows[1], g, g_at, inside, positions, cols1, cos, sin, DH))
        else:
            dy = (y0,)
        tl.debug_barrier()  # the features of a pair are read by each other's threads before they are replaced
        if weight is not None:
            real = inside
            if lengths is not None:  # what stands in the padding may be NaN
                real = inside & (place < tl.load(lengths + sequence, mask=inside, other=0))
            x_rows = load_rows(x, x_at, 1, real, DH)
            inverse = inverse_rms(x_rows, (weight, eps, cos, sin), DH)[:, None]
            unit0 = x_rows[0].to(tl.float32) * inverse
            dw0 += tl.sum(dy[0] * unit0, 0)
            u0 = dy[0] * load_weight(weight, cols0, DH)
            if len(dy) == 2:
                unit1 = x_rows[1].to(tl.float32) * inverse
                dw1 += tl.sum(dy[1] * unit1, 0)
                u1 = dy[1] * load_weight(weight, cols1, DH)
                mean = inner_rows((u0, u1), (unit0, unit1))[:, None] / DH
                dy = (inverse * (u0 - unit0 * mean), inverse * (u1 - unit1 * mean))
            else:
                dy = (inverse * (u0 - unit0 * (inner_rows((u0,), (unit0,))[:, None] / DH)),)
        store_rows(g, g_at, 1, inside, dy, DH)
    if weight is not None:
        to = partial + tl.program_id(0) * DH
        tl.store(to + cols0, dw0)
        if DH != 64 and DH != 128:
            tl.store(to + cols1, dw1, mask=cols1 < DH)


def norm_backward(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """Replaces g by the gradient of x, and returns that of the weight, fp32 [Dh] (empty without one).

    x, g: [B, N, H, Dh], or [1, T, H, Dh] with `starts`; fp32 weight [Dh] and tables [.., Dh/2]. The x beyond
    `lengths` [B] are not read.
    """
    batch, n, heads, width = x.shape
    rows = batch * n * heads
    programs = min(triton.cdiv(rows, _ROWS), _PROGRAMS)
    partial = x.new_empty((programs, width if weight is not None else 0), dtype=torch.float32)
    strides = [s // 8 for s in (*x.stride()[:3], *g.stride()[:2])]
    attention_norm_backward[(programs,)](
        x,
        g,
        weight,
        cos,
        sin,
        starts,
        lengths,
        partial,
        *strides,
        n,
        rows,
        heads,
        eps,
        DH=width,
        ROWS=_ROWS,
    )
    return partial.sum(0)
