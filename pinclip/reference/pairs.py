"""Dense masks of a pair list: what `pinclip.ops.Pairs` says, spelled out as M×N matrices.

`pairs` is any object with the fields of `pinclip.ops.Pairs` (this room imports torch only).
Shape suffixes: M rows, N columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pinclip.reference.l2_normalize import l2_normalize

_EPS = 1e-12


class DensePairs(NamedTuple):
    """listed_MN: designated positives; weight_MN: their weights, 0 elsewhere; negative_MN: the negatives."""

    listed_MN: Tensor
    weight_MN: Tensor
    negative_MN: Tensor


def _csr_mask(indptr: Tensor, indices: Tensor, m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.repeat_interleave(torch.arange(m, device=indptr.device), indptr.diff())
    mask_MN = torch.zeros(m, n, dtype=torch.bool, device=indptr.device)
    mask_MN[rows, indices] = True
    return mask_MN, rows, indices


def dense_pairs(pairs, m: int, n: int, *, device: torch.device, dtype: torch.dtype) -> DensePairs:
    """The three M×N matrices of `pairs` (extra memory 6·M·N bytes in fp32)."""
    if pairs.indptr is None:
        rows = torch.arange(m, device=device)
        cols = rows + pairs.offset
        inside = (cols >= 0) & (cols < n)
        rows, cols = rows[inside], cols[inside]
        listed_MN = torch.zeros(m, n, dtype=torch.bool, device=device)
        listed_MN[rows, cols] = True
        weight_MN = listed_MN.to(dtype)
    else:
        listed_MN, rows, cols = _csr_mask(pairs.indptr, pairs.indices, m, n)
        weight_MN = listed_MN.to(dtype)
        if pairs.weights is not None:
            weight_MN[rows, cols] = pairs.weights.to(dtype)

    negative_MN = ~listed_MN
    if pairs.row_ids is not None:
        negative_MN &= pairs.row_ids[:, None] != pairs.col_ids[None, :]
    if pairs.known_indptr is not None:
        negative_MN &= ~_csr_mask(pairs.known_indptr, pairs.known_indices, m, n)[0]
    return DensePairs(listed_MN, weight_MN, negative_MN)


def prefixes(x: Tensor, y: Tensor, dims) -> list[tuple[Tensor, Tensor]]:
    """Matryoshka: (x[:, :d], y[:, :d]) for every d, each row L2-normalised again; a zero row stays zero."""
    if dims is None:
        return [(x, y)]
    return [(l2_normalize(x[:, :d], _EPS), l2_normalize(y[:, :d], _EPS)) for d in dims]


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 stays fp64, everything else is computed in fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
