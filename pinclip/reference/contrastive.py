"""Softmax pair loss (InfoNCE) in plain torch: forms the M×N matrix, is right in fp64.

Shape suffixes: M rows (x), N columns (y).
"""

import torch
from torch import Tensor

from pinclip.reference.pairs import DensePairs, compute_dtype, dense_pairs, prefixes


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    scale,
    pairs,
    *,
    direction: str = "symmetric",
    dims=None,
    normalizer=None,
    empty_rows: str = "zero",
) -> Tensor:
    """The truth that `pinclip.ops.contrastive_loss` is held to; the equation stands there.

    x [M, D], y [N, D], scale 0-d tensor or float, pairs like `pinclip.ops.Pairs`. Computes in fp32
    (fp64 for fp64 inputs); extra memory O(M·N). Raises ValueError for `empty_rows="error"` when a row
    of non-zero weight has no positive.
    """
    dtype = compute_dtype(x)
    dense = dense_pairs(pairs, x.shape[0], y.shape[0], device=x.device, dtype=dtype)
    losses = []
    for x_d, y_d in prefixes(x.to(dtype), y.to(dtype), dims):
        s_MN = (scale * x_d) @ y_d.T
        sides = []
        if direction in ("rows", "symmetric"):
            sides.append(_row_loss(s_MN, dense, pairs.log_q_cols, pairs.row_weights, normalizer, empty_rows))
        if direction in ("columns", "symmetric"):
            turned = DensePairs(*(part.T for part in dense))
            sides.append(
                _row_loss(s_MN.T, turned, pairs.log_q_rows, pairs.col_weights, normalizer, empty_rows)
            )
        losses.append(torch.stack(sides).mean())
    return torch.stack(losses).mean()


def _row_loss(s_MN, dense: DensePairs, log_q_N, weights_M, normalizer, empty_rows: str) -> Tensor:
    if log_q_N is not None:
        s_MN = s_MN - log_q_N.to(s_MN.dtype)
    total_M = dense.weight_MN.sum(1)
    w_M = torch.ones_like(total_M) if weights_M is None else weights_M.to(s_MN.dtype)
    if empty_rows == "error" and ((total_M == 0) & (w_M != 0)).any():
        raise ValueError("empty_rows='error': a row has no positive")
    w_M = w_M * (total_M > 0)
    if normalizer is None:
        normalizer = w_M.sum()

    kept = w_M > 0  # dropped rows must not touch the graph: their logits may be infinite
    if not kept.any():
        return s_MN[kept].sum()
    s, listed, negative = s_MN[kept], dense.listed_MN[kept], dense.negative_MN[kept]
    pi = dense.weight_MN[kept] / total_M[kept, None]
    lse = torch.logsumexp(s.masked_fill(~(listed | negative), -torch.inf), dim=1, keepdim=True)
    row_loss = (pi * torch.where(pi > 0, lse - s, 0.0)).sum(1)
    return (w_M[kept] * row_loss).sum() / normalizer
