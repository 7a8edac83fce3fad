"""What the attention kernels share: windows of tokens, heads in pieces, norm and rotation at load, masks.

A window is what one program (or a few, one per tile of queries) attends over: a sequence of a dense batch, a
segment of a varlen buffer, or several whole consecutive segments under a block-diagonal mask.

The Dh features of a head are held as a tuple of one or two tensors, whose widths are powers of two: 64 + 16
for 72 and 80, 64 + 32 for 88 and 96. So no head dim is padded in memory, and none is multiplied as 128
features but 128 itself.

Optional tensors are None where not given; the compiler then leaves out what would read them.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# What changes from call to call without a new compilation.
NUMBERS = [
    *("q_batch8", "q_row8", "q_head8", "k_batch8", "k_row8", "k_head8"),
    *("dq_batch8", "dq_row8", "dk_batch8", "dk_row8"),
    *("n_q", "n_k", "heads", "tiles", "scale", "eps"),
]


@triton.jit
def window_of(window, bounds, lengths, n_q, n_k):
    """First row of a window among all rows of q (int64), its number of queries, and of keys that count."""
    if bounds is not None:
        first = tl.load(bounds + window)
        size = tl.load(bounds + window + 1) - first
        return first.to(tl.int64), size, size
    else:
        if lengths is not None:
            n_k = tl.maximum(tl.minimum(tl.load(lengths + window).to(tl.int32), n_k), 0)
        return window.to(tl.int64) * n_q, n_q, n_k


@triton.jit
def offset_of(window, head, row0, bounds, batch8, row8, head8):
    """Where a head of a window starts, in elements; the strides are in units of eight."""
    if bounds is not None:
        return row0 * (row8 * 8) + head * (head8 * 8)
    else:
        return window.to(tl.int64) * (batch8 * 8) + head * (head8 * 8)


@triton.jit
def load_columns(base, rows, stride, inside, cols, DH: tl.constexpr, WIDTH: tl.constexpr):
    mask = inside[:, None]
    if WIDTH > DH:  # the piece ends beyond the head
        mask = mask & (cols < DH)[None, :]
    return tl.load(base + (rows * stride)[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_rows(base, rows, stride, inside, DH: tl.constexpr):
    """Rows of one head, zero where not inside."""
    if DH == 64 or DH == 128:
        return (load_columns(base, rows, stride, inside, tl.arange(0, DH), DH, DH),)
    else:
        REST: tl.constexpr = 16 if DH <= 80 else 32
        x0 = load_columns(base, rows, stride, inside, tl.arange(0, 64), DH, 64)
        x1 = load_columns(base, rows, stride, inside, 64 + tl.arange(0, REST), DH, 64 + REST)
        return (x0, x1)


@triton.jit
def store_rows(base, rows, stride, inside, x, DH: tl.constexpr):
    to = base + (rows * stride)[:, None]
    cols = tl.arange(0, x[0].shape[1])
    tl.store(to + cols[None, :], x[0].to(base.dtype.element_ty), mask=inside[:, None])
    if len(x) == 2:
        cols = 64 + tl.arange(0, x[1].shape[1])
        mask = inside[:, None] & (cols < DH)[None, :]
        tl.store(to + cols[None, :], x[1].to(base.dtype.element_ty), mask=mask)


@triton.jit
def zero_rows(ROWS: tl.constexpr, DH: tl.constexpr):
    """fp32 zeros in the shape of ROWS rows of a head."""
    if DH == 64 or DH == 128:
        return (tl.zeros([ROWS, DH], tl.float32),)
    else:
        REST: tl.constexpr = 16 if DH <= 80 else 32
        return (tl.zeros([ROWS, 64], tl.float32), tl.zeros([ROWS, REST], tl.float32))


@triton.jit
def scale_rows(x, factor):
    """factor * x."""
    if len(x) == 2:
        return (x[0] * factor, x[1] * factor)
    else:
        return (x[0] * factor,)


@triton.jit
def inner_rows(a, b):
    """Σ a ∘ b of every row, fp32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) == 2:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return total


@triton.jit
def load_row(base, DH: tl.constexpr):
    """One row of a head, fp32."""
    if DH == 64 or DH == 128:
        return (tl.load(base + tl.arange(0, DH)).to(tl.float32),)
    else:
        cols = 64 + tl.arange(0, 16 if DH <= 80 else 32)
        x0 = tl.load(base + tl.arange(0, 64)).to(tl.float32)
        return (x0, tl.load(base + cols, mask=cols < DH, other=0.0).to(tl.float32))


@triton.jit
def store_row(base, x, DH: tl.constexpr):
    tl.store(base + tl.arange(0, x[0].shape[0]), x[0].to(base.dtype.element_ty))
    if len(x) == 2:
        cols = 64 + tl.arange(0, x[1].shape[0])
        tl.store(base + cols, x[1].to(base.dtype.element_ty), mask=cols < DH)


@triton.jit
def inner_row(a, b):
    """Σ a ∘ b of two single rows."""
    total = tl.sum(a[0] * b[0])
    if len(a) == 2:
        total += tl.sum(a[1] * b[1])
    return total


@triton.jit
def along_row(x, u):
    """Σ x ∘ u of every row x with one row u, fp32."""
    total = tl.sum(x[0].to(tl.float32) * u[0][None, :], 1)
    if len(x) == 2:
        total += tl.sum(x[1].to(tl.float32) * u[1][None, :], 1)
    return total


@triton.jit
def add_outer(acc, t, u):
    """acc + t uᵀ, of a number of every row and one row u."""
    if len(u) == 2:
        return (acc[0] + t[:, None] * u[0][None, :], acc[1] + t[:, None] * u[1][None, :])
    else:
        return (acc[0] + t[:, None] * u[0][None, :],)


@triton.jit
def add_sum(acc, t, x):
    """acc + Σ t x over the rows x, one number t of every row."""
    if len(x) == 2:
        return (
            acc[0] + tl.sum(t[:, None] * x[0].to(tl.float32), 0),
            acc[1] + tl.sum(t[:, None] * x[1].to(tl.float32), 0),
        )
    else:
        return (acc[0] + tl.sum(t[:, None] * x[0].to(tl.float32), 0),)


@triton.jit
def dot_rows(a, b):
    """a bᵀ over the features, fp32."""
    s = tl.dot(a[0], b[0].T)
    if len(a) == 2:
        s = tl.dot(a[1], b[1].T, s)
    return s


@triton.jit
def add_product(acc, t, x):
    """acc + t x."""
    if len(x) == 2:
        return (tl.dot(t, x[0], acc[0]), tl.dot(t, x[1], acc[1]))
    else:
        return (tl.dot(t, x[0], acc[0]),)


# Norm and rotation ----------------------------------------------------------------------------------------
#
# norm = (weight [Dh], eps, cos [.., Dh/2], sin [.., Dh/2]), fp32; weight, or cos and sin, may be None.


@triton.jit
def load_heads(base, rows, stride, inside, positions, norm, DH: tl.constexpr):
    """Queries or keys as the scores take them: RMS norm and rotation in fp32, rounded once."""
    x = load_rows(base, rows, stride, inside, DH)
    if norm[0] is None and norm[2] is None:
        return x
    else:
        inverse = inverse_rms(x, norm, DH)
        cols = tl.arange(0, x[0].shape[1])
        y0 = _turned(x[0], base, rows, stride, inside, positions, inverse, cols, norm, DH).to(x[0].dtype)
        if len(x) == 2:
            cols = 64 + tl.arange(0, x[1].shape[1])
            y1 = _turned(x[1], base, rows, stride, inside, positions, inverse, cols, norm, DH)
            return (y0, y1.to(x[1].dtype))
        else:
            return (y0,)


@triton.jit
def inverse_rms(x, norm, DH: tl.constexpr):
    """1 / sqrt(mean(x²) + eps) of every row, fp32; 1 without a norm. Finite also where no row is."""
    if norm[0] is None:
        return tl.full([x[0].shape[0]], 1.0, tl.float32)
    else:
        return tl.rsqrt(tl.maximum(inner_rows(x, x) / DH + norm[1], 1e-37))


@triton.jit
def _turned(x, base, rows, stride, inside, positions, inverse, cols, norm, DH: tl.constexpr):
    """The columns `cols` of norm and rotation, fp32."""
    weight, _eps, cos, sin = norm
    y = x.to(tl.float32)
    if weight is not None:
        y = y * inverse[:, None] * load_weight(weight, cols, DH)
    if cos is not None:
        partners = (cols + DH // 2) % DH
        other = load_columns(base, rows, stride, inside, partners, DH, DH).to(tl.float32)
        if weight is not None:
            other = other * inverse[:, None] * load_weight(weight, partners, DH)
        c, s = load_turns(cos, sin, positions, inside, cols, DH)
        y = y * c + other * s
    return y


@triton.jit
def load_weight(weight, cols, DH: tl.constexpr):
    return tl.load(weight + cols, mask=cols < DH, other=0.0)[None, :]


@triton.jit
def load_turns(cos, sin, positions, inside, cols, DH: tl.constexpr):
    """cos, and sin with the sign of the partner feature Dh/2 away: - in the first half. 0 beyond Dh."""
    at = (positions * (DH // 2))[:, None] + (cols % (DH // 2))[None, :]
    mask = inside[:, None] & (cols < DH)[None, :]
    c = tl.load(cos + at, mask=mask, other=0.0)
    s = tl.load(sin + at, mask=mask, other=0.0)
    return c, tl.where((cols < DH // 2)[None, :], -s, s)


# Masks ----------------------------------------------------------------------------------------------------


@triton.jit
def segment_starts(starts, row0, rows, inside):
    """First row of every row's segment, counted from the window's; 0 where the window is one segment."""
    if starts is None:
        return tl.zeros_like(rows)
    else:
        return tl.load(starts + row0 + rows, mask=inside, other=0) - row0.to(tl.int32)


@triton.jit
def load_tile(base, row, stride, n, row0, starts, norm, ROWS: tl.constexpr, DH: tl.constexpr):
    """ROWS queries or keys from `row` on, with their places: ((rows, starts of their segments), features)."""
    rows = row + tl.arange(0, ROWS)
    inside = rows < n
    rows_start = segment_starts(starts, row0, rows, inside)
    return (rows, rows_start), load_heads(base, rows, stride, inside, rows - rows_start, norm, DH)


@triton.jit
def keep_pairs(queries, keys, n_k, PACKED: tl.constexpr, CAUSAL: tl.constexpr):
    """Pairs of a tile that count: keys of the window, of the query's segment, and not after the query.

    queries, keys: (rows, starts of their segments), both counted from the window's first.
    """
    keep = (keys[0] < n_k)[None, :]
    if PACKED:
        keep = keep & (queries[1][:, None] == keys[1][None, :])
    if CAUSAL:
        keep = keep & (keys[0][None, :] <= queries[0][:, None])
    return keep
