"""Attention forward: tiles of queries against all keys of their window, with a running softmax."""

import triton
import triton.language as tl

from pinclip_kernels.triton._attention_tile import (
    LN_2,
    LOG2_E,
    NUMBERS,
    add_product,
    dot_rows,
    keep_pairs,
    load_rows,
    load_tile,
    offset_of,
    scale_rows,
    store_rows,
    window_of,
    zero_rows,
)


@triton.jit
def _attend(
    state,
    queries,
    k,
    v,
    k_row,
    key0,
    n_k,
    row0,
    starts,
    norm,
    scale2,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DH: tl.constexpr,
):
    """The running softmax (greatest logit m, sum total, result acc) of some queries after KEYS more keys."""
    m, total, acc = state
    at_q, q_rows = queries
    at_k, k_rows = load_tile(k, key0, k_row, n_k, row0, starts, norm, KEYS, DH)
    s = dot_rows(q_rows, k_rows) * scale2
    if MASK:
        s = tl.where(keep_pairs(at_q, at_k, n_k, starts is not None, CAUSAL), s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASK else m_new
    p = tl.exp2(s - shift[:, None])
    decay = tl.exp2(m - shift)
    v_rows = load_rows(v, at_k[0], k_row, at_k[0] < n_k, DH)
    acc = add_product(scale_rows(acc, decay[:, None]), p.to(v_rows[0].dtype), v_rows)
    return m_new, total * decay + tl.sum(p, 1), acc


@triton.jit
def _forward_tile(
    row,
    memory,
    sizes,
    starts,
    scale,
    norms,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL_KEYS: tl.constexpr,
    RAGGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    DH: tl.constexpr,
):
    """ROWS queries of one head against all keys of the window."""
    q, k, v, out, lse, q_row, k_row = memory
    row0, n_q, n_k, heads = sizes
    q_norm, k_norm = norms
    queries = load_tile(q, row, q_row, n_q, row0, starts, q_norm, ROWS, DH)
    state = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32), zero_rows(ROWS, DH)
    MASK: tl.constexpr = RAGGED or CAUSAL or starts is not None
    scale2 = scale * LOG2_E
    if CAUSAL:
        n_k = tl.minimum(n_k, row + ROWS)
    whole = n_k if RAGGED else n_k // KEYS * KEYS
    if TAIL_KEYS > 0:  # before the loop: after it, ptxas serialises the products
        state = _attend(
            state, queries, k, v, k_row, whole, n_k, row0, starts, k_norm, scale2, TAIL_KEYS, True, CAUSAL, DH
        )
    for key0 in tl.range(0, whole, KEYS):
        state = _attend(
            state, queries, k, v, k_row, key0, n_k, row0, starts, k_norm, scale2, KEYS, MASK, CAUSAL, DH
        )
    m, total, acc = state
    rows = queries[0][0]
    seen = total != 0  # and not total > 0: NaN stays NaN
    total = tl.where(seen, total, 1.0)
    store_rows(out, rows, heads * DH, rows < n_q, scale_rows(acc, (1 / total)[:, None]), DH)
    tl.store(lse + rows * heads, tl.where(seen, (m + tl.log2(total)) * LN_2, 0.0), mask=rows < n_q)


@triton.jit(do_not_specialize=NUMBERS)
def attention_forward(
    q,
    k,
    v,
    out,
    lse,
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
    n_q,
    n_k,
    heads,
    tiles,
    scale,
    eps,
    CAUSAL: tl.constexpr,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL_KEYS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """One tile of queries of one head: the result, and the logsumexp of every row.

    The last tile has TAIL_ROWS rows, the last keys are TAIL_KEYS; 0: all are whole."""
    row = tl.program_id(0) % tiles * ROWS
    head = tl.program_id(0) // tiles % heads
    window = tl.program_id(0) // tiles // heads
    row0, n_q, n_k = window_of(window, bounds, lengths, n_q, n_k)
    if row < n_q:
        q += offset_of(window, head, row0, bounds, q_batch8, q_row8, q_head8)
        k_at = offset_of(window, head, row0, bounds, k_batch8, k_row8, k_head8)
        out += (row0 * heads + head) * DH
        memory = q, k + k_at, v + k_at, out, lse + row0 * heads + head, q_row8 * 8, k_row8 * 8
        sizes = row0, n_q, n_k, heads
        norms = (q_weight, eps, cos, sin), (k_weight, eps, cos, sin)
        if TAIL_ROWS > 0:
            if row + TAIL_ROWS >= n_q:
                _forward_tile(
                    row,
                    memory,
                    sizes,
                    starts,
                    scale,
                    norms,
                    TAIL_ROWS,
                    KEYS,
                    TAIL_KEYS,
                    RAGGED,
                    CAUSAL,
                    DH,
                )
            else:
                _forward_tile(
                    row,
                    memory,
                    sizes,
                    starts,
                    scale,
                    norms,
                    ROWS,
                    KEYS,
                    TAIL_KEYS,
                    RAGGED,
                    CAUSAL,
                    DH,
                )
        else:
            _forward_tile(row, memory, sizes, starts, scale, norms, ROWS, KEYS, TAIL_KEYS, RAGGED, CAUSAL, DH)
