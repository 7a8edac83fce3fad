"""Attention backward. With P the probabilities, delta = Σ out ∘ dout of every row, and s the scale:

    dV = Pᵀ dO,   dS = P ∘ (dO Vᵀ - delta),   dQ = s dS K,   dK = s dSᵀ Q

Either in one kernel, one program per window and head, where all queries fit on the chip; or in two, dQ by
tiles of queries and dK, dV by tiles of keys, which form P and dO Vᵀ twice. Nothing is added up by atomics.
"""

import triton
import triton.language as tl

from pinclip_kernels.triton._attention_tile import (
    LOG2_E,
    NUMBERS,
    add_outer,
    add_product,
    add_sum,
    along_row,
    dot_rows,
    inner_row,
    inner_rows,
    keep_pairs,
    load_row,
    load_rows,
    load_tile,
    offset_of,
    scale_rows,
    store_row,
    store_rows,
    window_of,
    zero_rows,
)


@triton.jit
def _probabilities(
    queries, keys, lse2, n_k, scale2, MASK: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr
):
    """The softmax of one tile, fp32, from its rows' logsumexp."""
    p = tl.exp2(dot_rows(queries[1], keys[1]) * scale2 - lse2[:, None])
    if MASK:
        p = tl.where(keep_pairs(queries[0], keys[0], n_k, PACKED, CAUSAL), p, 0.0)
    return p


@triton.jit
def _slopes(p, do_rows, v_rows, delta):
    """The gradient of the scores of one tile, in the dtype of the inputs."""
    return (p * (dot_rows(do_rows, v_rows) - delta[:, None])).to(do_rows[0].dtype)


@triton.jit
def _rates(s, dp, lse2, delta, scale2):
    """P and dS, fp32, of products that are no tile: of rows with one row, or of two."""
    p = tl.exp2(s * scale2 - lse2)
    return p, p * (dp - delta)


@triton.jit
def _load_upstream(rows, dout, lse, n_q, heads, DH: tl.constexpr):
    """dout, and the logsumexp in units of log 2, of some queries."""
    inside = rows < n_q
    lse2 = tl.load(lse + rows * heads, mask=inside, other=0.0) * LOG2_E
    return load_rows(dout, rows, heads * DH, inside, DH), lse2


@triton.jit
def _add(a, b):
    """a + b, each the result of a product of its own.

    Not `+`, which the compiler would make one accumulator of both products: it then lays out the first one
    over twice the registers."""
    if len(a) == 2:
        return (tl.fma(b[0], 1.0, a[0]), tl.fma(b[1], 1.0, a[1]))
    else:
        return (tl.fma(b[0], 1.0, a[0]),)


@triton.jit
def _backward_step(
    dqs,
    groups,
    memory,
    key0,
    sizes,
    starts,
    scale,
    norm,
    last,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DH: tl.constexpr,
):
    """KEYS keys against all groups of queries, one after the other: writes dk and dv, returns the dq (but for
    the scale). last: what the query behind the groups adds, its P and dS, q and dout; or None first."""
    k, v, dk, dv, k_row, dk_row = memory
    row0, n_k, stored = sizes
    PACKED: tl.constexpr = starts is not None
    keys = load_tile(k, key0, k_row, n_k, row0, starts, norm, KEYS, DH)
    cols = keys[0][0]
    v_rows = load_rows(v, cols, k_row, cols < n_k, DH)
    updated = ()
    for g in tl.static_range(len(groups)):
        queries, do_rows, lse2, delta = groups[g]
        p = _probabilities(queries, keys, lse2, n_k, scale * LOG2_E, MASK, PACKED, CAUSAL)
        dv_part = add_product(zero_rows(KEYS, DH), p.to(do_rows[0].dtype).T, do_rows)
        ds = _slopes(p, do_rows, v_rows, delta)
        updated = updated + (add_product(dqs[g], ds, keys[1]),)  # noqa: RUF005
        dk_part = add_product(zero_rows(KEYS, DH), ds.T, queries[1])
        if g == 0:
            dk_rows, dv_rows = dk_part, dv_part
        else:
            dk_rows, dv_rows = _add(dk_rows, dk_part), _add(dv_rows, dv_part)
    if last[0] is not None:
        rates, n, q1, do1 = last
        dv_rows = add_outer(dv_rows, tl.load(rates + cols), load_row(do1, DH))
        dk_rows = add_outer(dk_rows, tl.load(rates + n + cols), load_row(q1, DH))
    store_rows(dk, cols, dk_row, cols < stored, scale_rows(dk_rows, scale), DH)
    store_rows(dv, cols, dk_row, cols < stored, dv_rows, DH)
    return updated


@triton.jit
def _last_query(dq, q, do, lse2, delta, k, v, k_row, scale2, rates, N: tl.constexpr, DH: tl.constexpr):
    """One query against the first N keys: adds to its dq (but for the scale), and writes P and dS as `rates`
    [2, N]."""
    for first in tl.static_range(0, N, 128):
        cols = first + tl.arange(0, 128)
        k_rows, v_rows = (
            load_rows(k, cols, k_row, cols < N, DH),
            load_rows(v, cols, k_row, cols < N, DH),
        )
        p, ds = _rates(along_row(k_rows, q), along_row(v_rows, do), lse2, delta, scale2)
        dq = add_sum(dq, ds, k_rows)
        tl.store(rates + cols, p)
        tl.store(rates + N + cols, ds)
    return dq


@triton.jit(do_not_specialize=NUMBERS)
def attention_backward(
    q,
    k,
    v,
    out,
    dout,
    lse,
    dq,
    dk,
    dv,
    rates,
    bounds,
    starts,
    lengths,
    q_weight,
    k_weight,
    cos,
    sin,
    q_batch8,
    q_row8,
    q_head8,
    k_batch8,
    k_row8,
    k_head8,
    dq_batch8,
    dq_row8,
    dk_batch8,
    dk_row8,
    n_q,
    n_k,
    heads,
    scale,
    eps,
    CAUSAL: tl.constexpr,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL_KEYS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """All gradients of one head of one window of at most N = GROUPS * ROWS queries.

    Queries and dout stay in shared memory, dq in registers; keys and values pass by once. The scores of one
    group of ROWS queries at a time are in registers.

    rates: the windows are N + 1 queries and keys without any mask, norm or rotation (patches and CLS). The
    last ones are no tile, but single rows: what they add to the gradients of the others is a number of every
    row times one row. P and dS of the last query wait in rates, fp32 [windows, heads, 2, N]."""
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads
    stored = n_k
    row0, n_q, n_k = window_of(window, bounds, lengths, n_q, n_k)
    if bounds is not None:
        stored = n_k
    if n_q > 0:
        q += offset_of(window, head, row0, bounds, q_batch8, q_row8, q_head8)
        dq += offset_of(window, head, row0, bounds, dq_batch8, dq_row8, DH // 8)
        k_at = offset_of(window, head, row0, bounds, k_batch8, k_row8, k_head8)
        dk_at = offset_of(window, head, row0, bounds, dk_batch8, dk_row8, DH // 8)
        memory = k + k_at, v + k_at, dk + dk_at, dv + dk_at, k_row8 * 8, dk_row8 * 8
        out_at = (row0 * heads + head) * DH

        lse += row0 * heads + head
        N: tl.constexpr = GROUPS * ROWS
        scale2 = scale * LOG2_E
        last = None, N, q, dout
        if rates is not None:
            rates += tl.program_id(0).to(tl.int64) * (2 * N)
            last_q, last_do = q + N * q_row8 * 8, dout + out_at + N * heads * DH
            last = rates, N, last_q, last_do
            q1, do1 = load_row(last_q, DH), load_row(last_do, DH)
            k1, v1 = load_row(k + k_at + N * k_row8 * 8, DH), load_row(v + k_at + N * k_row8 * 8, DH)
            lse1 = tl.load(lse + N * heads) * LOG2_E
            delta1 = inner_row(load_row(out + out_at + N * heads * DH, DH), do1)
            p1, ds1 = _rates(inner_row(q1, k1), inner_row(do1, v1), lse1, delta1, scale2)
            dk1, dv1, dq1 = scale_rows(q1, ds1), scale_rows(do1, p1), scale_rows(k1, ds1)
            dq1 = _last_query(
                dq1, q1, do1, lse1, delta1, k + k_at, v + k_at, k_row8 * 8, scale2, rates, N, DH
            )
            store_row(dq + N * dq_row8 * 8, scale_rows(dq1, scale), DH)
        groups, dqs = (), ()
        for g in tl.static_range(GROUPS):
            queries = load_tile(
                q, g * ROWS, q_row8 * 8, n_q, row0, starts, (q_weight, eps, cos, sin), ROWS, DH
            )
            rows = queries[0][0]
            do_rows, lse2 = _load_upstream(rows, dout + out_at, lse, n_q, heads, DH)
            delta = inner_rows(load_rows(out + out_at, rows, heads * DH, rows < n_q, DH), do_rows)
            groups = groups + ((queries, do_rows, lse2, delta),)  # noqa: RUF005
            dq_rows = zero_rows(ROWS, DH)
            if rates is not None:
                p, ds = _rates(along_row(queries[1], k1), along_row(do_rows, v1), lse2, delta, scale2)
                dk1, dv1 = add_sum(dk1, ds, queries[1]), add_sum(dv1, p, do_rows)
                dq_rows = add_outer(dq_rows, ds, k1)
            dqs = dqs + (dq_rows,)  # noqa: RUF005
        if rates is not None:
            store_row(dk + dk_at + N * dk_row8 * 8, scale_rows(dk1, scale), DH)
            store_row(dv + dk_at + N * dk_row8 * 8, dv1, DH)
            tl.debug_barrier()  # the rates are read by other threads than those that wrote them

        sizes, k_norm = (row0, n_k, stored), (k_weight, eps, cos, sin)
        MASK: tl.constexpr = RAGGED or CAUSAL or starts is not None
        whole = n_k if RAGGED else n_k // KEYS * KEYS
        for key0 in tl.range(0, whole, KEYS):
            dqs = _backward_step(
                dqs,
                groups,
                memory,
                key0,
                sizes,
                starts,
                scale,
                k_norm,
                last,
                KEYS,
                MASK,
                CAUSAL,
                DH,
            )
        if TAIL_KEYS > 0:
            dqs = _backward_step(
                dqs,
                groups,
                memory,
                whole,
                sizes,
                starts,
                scale,
                k_norm,
                last,
                TAIL_KEYS,
                True,
                CAUSAL,
                DH,
            )
        if lengths is not None:  # keys that do not count
            for key0 in tl.range(tl.cdiv(n_k, KEYS) * KEYS, stored, KEYS):
                cols = key0 + tl.arange(0, KEYS)
                store_rows(memory[2], cols, dk_row8 * 8, cols < stored, zero_rows(KEYS, DH), DH)
                store_rows(memory[3], cols, dk_row8 * 8, cols < stored, zero_rows(KEYS, DH), DH)
        for g in tl.static_range(GROUPS):
            rows = groups[g][0][0][0]
            store_rows(dq, rows, dq_row8 * 8, rows < n_q, scale_rows(dqs[g], scale), DH)


@triton.jit(do_not_specialize=NUMBERS)
def attention_backward_queries(
    q,
    k,
    v,
    out,
    dout,
    lse,
    delta,
    dq,
    bounds,
    starts,
    lengths,
    q_weight,
    k_weight,
    cos,
    sin,
    q_batch8,
    q_row8,
    q_head8,
    k_batch8,
    k_row8,
    k_head8,
    dq_batch8,
    dq_row8,
    n_q,
    n_k,
    heads,
    tiles,
    scale,
    eps,
    CAUSAL: tl.constexpr,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """dq and delta = Σ out ∘ dout of one tile of queries of one head: the first of two backward passes."""
    row = tl.program_id(0) % tiles * ROWS
    head = tl.program_id(0) // tiles % heads
    window = tl.program_id(0) // tiles // heads
    row0, n_q, n_k = window_of(window, bounds, lengths, n_q, n_k)
    if row < n_q:
        q += offset_of(window, head, row0, bounds, q_batch8, q_row8, q_head8)
        dq += offset_of(window, head, row0, bounds, dq_batch8, dq_row8, DH // 8)
        k_at = offset_of(window, head, row0, bounds, k_batch8, k_row8, k_head8)
        out_at = (row0 * heads + head) * DH
        queries = load_tile(q, row, q_row8 * 8, n_q, row0, starts, (q_weight, eps, cos, sin), ROWS, DH)
        rows = queries[0][0]
        do_rows, lse2 = _load_upstream(rows, dout + out_at, lse + row0 * heads + head, n_q, heads, DH)
        delta_rows = inner_rows(load_rows(out + out_at, rows, heads * DH, rows < n_q, DH), do_rows)
        tl.store(delta + row0 * heads + head + rows * heads, delta_rows, mask=rows < n_q)

        MASK: tl.constexpr = RAGGED or CAUSAL or starts is not None
        PACKED: tl.constexpr = starts is not None
        dq_rows = zero_rows(ROWS, DH)
        if CAUSAL:
            n_k = tl.minimum(n_k, row + ROWS)
        for key0 in tl.range(0, n_k, KEYS):
            keys = load_tile(
                k + k_at, key0, k_row8 * 8, n_k, row0, starts, (k_weight, eps, cos, sin), KEYS, DH
            )
            v_rows = load_rows(v + k_at, keys[0][0], k_row8 * 8, keys[0][0] < n_k, DH)
            p = _probabilities(queries, keys, lse2, n_k, scale * LOG2_E, MASK, PACKED, CAUSAL)
            dq_rows = add_product(dq_rows, _slopes(p, do_rows, v_rows, delta_rows), keys[1])
        store_rows(dq, rows, dq_row8 * 8, rows < n_q, scale_rows(dq_rows, scale), DH)


@triton.jit(do_not_specialize=NUMBERS)
def attention_backward_keys(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    bounds,
    starts,
    lengths,
    q_weight,
    k_weight,
    cos,
    sin,
    q_batch8,
    q_row8,
    q_head8,
    k_batch8,
    k_row8,
    k_head8,
    dk_batch8,
    dk_row8,
    n_q,
    n_k,
    heads,
    tiles,
    scale,
    eps,
    CAUSAL: tl.constexpr,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """dk and dv of one tile of keys of one head: the second of two backward passes."""
    key0 = tl.program_id(0) % tiles * KEYS
    head = tl.program_id(0) // tiles % heads
    window = tl.program_id(0) // tiles // heads
    stored = n_k
    row0, n_q, n_k = window_of(window, bounds, lengths, n_q, n_k)
    if bounds is not None:
        stored = n_k
    if key0 < stored:
        q += offset_of(window, head, row0, bounds, q_batch8, q_row8, q_head8)
        k_at = offset_of(window, head, row0, bounds, k_batch8, k_row8, k_head8)
        dk_at = offset_of(window, head, row0, bounds, dk_batch8, dk_row8, DH // 8)
        dout += (row0 * heads + head) * DH
        at = row0 * heads + head
        keys = load_tile(k + k_at, key0, k_row8 * 8, n_k, row0, starts, (k_weight, eps, cos, sin), KEYS, DH)
        cols = keys[0][0]
        v_rows = load_rows(v + k_at, cols, k_row8 * 8, cols < n_k, DH)

        MASK: tl.constexpr = RAGGED or CAUSAL or starts is not None
        PACKED: tl.constexpr = starts is not None
        dk_rows, dv_rows = zero_rows(KEYS, DH), zero_rows(KEYS, DH)
        first = key0 // ROWS * ROWS if CAUSAL else 0
        for row in tl.range(first, n_q if key0 < n_k else 0, ROWS):
            queries = load_tile(q, row, q_row8 * 8, n_q, row0, starts, (q_weight, eps, cos, sin), ROWS, DH)
            rows = queries[0][0]
            do_rows, lse2 = _load_upstream(rows, dout, lse + at, n_q, heads, DH)
            delta_rows = tl.load(delta + at + rows * heads, mask=rows < n_q, other=0.0)
            p = _probabilities(queries, keys, lse2, n_k, scale * LOG2_E, MASK, PACKED, CAUSAL)
            dv_rows = add_product(dv_rows, p.to(do_rows[0].dtype).T, do_rows)
            dk_rows = add_product(dk_rows, _slopes(p, do_rows, v_rows, delta_rows).T, queries[1])
        store_rows(dk + dk_at, cols, dk_row8 * 8, cols < stored, scale_rows(dk_rows, scale), DH)
        store_rows(dv + dk_at, cols, dk_row8 * 8, cols < stored, dv_rows, DH)
