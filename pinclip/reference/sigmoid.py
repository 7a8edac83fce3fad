"""Sigmoid pair loss (SigLIP) in plain torch: forms the M×N matrix, is right in fp64.

Shape suffixes: M rows (x), N columns (y).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pinclip.reference.pairs import compute_dtype, dense_pairs, prefixes


def sigmoid_loss(
    x: Tensor, y: Tensor, scale, bias, pairs, *, dims=None, normalizer=None, empty_rows: str = "zero"
) -> Tensor:
    """The truth that `pinclip.ops.sigmoid_loss` is held to; the equation stands there.

    x [M, D], y [N, D], scale and bias 0-d tensors or floats, pairs like `pinclip.ops.Pairs`. Computes in
    fp32 (fp64 for fp64 inputs); extra memory O(M·N). Raises ValueError for `empty_rows="error"` when a
    row of non-zero weight has no positive.
    """
    dtype = compute_dtype(x)
    dense = dense_pairs(pairs, x.shape[0], y.shape[0], device=x.device, dtype=dtype)
    has_positive_M = dense.weight_MN.sum(1) > 0
    w_M = torch.ones_like(dense.weight_MN[:, 0]) if pairs.row_weights is None else pairs.row_weights.to(dtype)
    if empty_rows == "error" and (~has_positive_M & (w_M != 0)).any():
        raise ValueError("empty_rows='error': a row has no positive")
    w_M = w_M * has_positive_M
    if normalizer is None:
        normalizer = w_M.sum()

    kept = w_M > 0
    weight, negative = dense.weight_MN[kept], dense.negative_MN[kept]
    losses = []
    for x_d, y_d in prefixes(x.to(dtype), y.to(dtype), dims):
        s = ((scale * x_d) @ y_d.T + bias)[kept]
        if not kept.any():
            losses.append(s.sum())
            continue
        if pairs.log_q_cols is not None:
            s = s - pairs.log_q_cols.to(dtype)
        attract = torch.where(weight > 0, -F.logsigmoid(s.masked_fill(weight == 0, 0)) * weight, 0.0)
        repel = -F.logsigmoid(-s.masked_fill(~negative, -torch.inf))
        row_loss = (attract + repel).sum(1)
        losses.append((w_M[kept] * row_loss).sum() / normalizer)
    return torch.stack(losses).mean()
