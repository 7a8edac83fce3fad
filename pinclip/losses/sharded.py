"""A pair loss of the local rows against the columns of all ranks, which come a shard at a time.

Every rank computes its rows against all columns, each pair once: X_r Y_rᵀ, X_r Y_r+1ᵀ, … While one shard is
computed the next one arrives, and the gradient of the one before goes to its owner. For the symmetric loss
the statistics of the columns, (peak, total), are merged over ranks.

Shape suffixes: M local rows, N columns of all ranks, K listed positives, P Matryoshka prefixes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pinclip.distributed import GatheredRows, RowSums, check_same, exchange_rows, gather_rows
from pinclip.losses.rows import check_bias
from pinclip.ops._checks import without_autocast
from pinclip.ops._pair_tiles import PairMasks
from pinclip.ops.contrastive import (
    Side,
    compute_dtype,
    merge_statistics,
    sides,
    softmax_gradients,
    softmax_loss,
    softmax_statistics,
)
from pinclip.ops.pairs import Pairs, check_pair_arguments, coefficients, scalar
from pinclip.ops.sigmoid import sigmoid_parts


def sharded_loss(
    kind: str,
    x: Tensor,
    y: GatheredRows,
    scale: Tensor | float,
    bias: Tensor | float | None,
    pairs: Pairs,
    *,
    symmetric: bool,
    dims: Sequence[int] | None,
    normalizer: Tensor | float,
) -> Tensor:
    """The "softmax" or "sigmoid" loss of the local x [M, D] against the rows of all ranks [N, D].

    `pairs` are those between the local rows and the N columns. symmetric (softmax): the
    mean of both directions; row i and column i + pairs.offset must then be one item, on one rank, and
    `normalizer` holds for both. Gradients for x, y, scale and bias of the sum of all ranks' losses; that of
    the loss must be the same on all ranks (RuntimeError), as it is under DDP and ZeRO.

    Collectives: those of `GatheredRows`; backward (sigmoid: forward) those of `RowSums`; symmetric: one
    all_to_all of the columns' statistics and one gather of them, 8·P·N bytes each. Extra memory: the N rows
    (softmax), a shard of gradients, and that of the op on one shard.
    """
    check_bias(kind, bias)
    if len(x):
        check_pair_arguments(x, y.local if len(y.local) else x, scale, Pairs(), dims, normalizer, "zero")
    dims = None if dims is None else tuple(dims)
    dtype = compute_dtype(x)
    m, n = len(x), sum(y.counts)
    listed = pairs.positives(m, n, x.device)
    masks = PairMasks(listed.rows_K, listed.cols_K, pairs.row_ids, pairs.col_ids, *pairs.known())
    offset = pairs.offset if pairs.indptr is None else None
    options = {
        "normalizer": normalizer,
        "share": 0.5 if symmetric else 1.0,
        "normalize_entries": kind == "softmax",
        "empty": "zero",
        "dtype": dtype,
    }
    of_rows = coefficients(listed.rows_K, listed.weights_K, pairs.row_weights, m, **options)
    scale = scalar(scale, x, dtype)
    if kind == "sigmoid":
        rows = Side(1, *of_rows, None if pairs.log_q_cols is None else pairs.log_q_cols.to(dtype))
        shards = _Shards(y, offset, masks, (rows, None), dims)
        wanted = torch.is_grad_enabled()
        return _Sigmoid.apply(x, y.local, scale, scalar(bias, x, dtype), shards, wanted)
    of_cols = None, None
    if symmetric:  # every column has a positive, be it on another rank
        entry_N, segment_N = coefficients(
            torch.arange(n, device=x.device), None, pairs.col_weights, n, **options
        )
        of_cols = entry_N[listed.cols_K], segment_N
    both = sides(*of_rows, *of_cols, pairs.log_q_cols, pairs.log_q_rows, dtype)
    return _Softmax.apply(x, y.local, scale, _Shards(y, offset, masks, both, dims))


class _Shards(NamedTuple):
    """The problem of the local rows against all columns, and its cut by ranks."""

    rows: GatheredRows
    offset: int | None
    masks: PairMasks
    sides: tuple[Side, Side | None]
    dims: tuple[int, ...] | None

    @property
    def prefixes(self) -> int:
        return 1 if self.dims is None else len(self.dims)

    @property
    def counts(self) -> tuple[int, ...]:
        return self.rows.counts

    def columns(self, r: int) -> slice:
        first = sum(self.counts[:r])
        return slice(first, first + self.counts[r])

    def of(self, r: int) -> tuple[PairMasks, int | None, tuple[Side, Side | None]]:
        """Masks, offset and sides of the columns of rank r."""
        here, (rows, cols) = self.columns(r), self.sides
        rows = rows._replace(log_q=None if rows.log_q is None else rows.log_q[here])
        cols = None if cols is None else cols._replace(segment=cols.segment[here])
        offset = None if self.offset is None else self.offset - here.start
        return self.masks.of_columns(here.start, here.stop), offset, (rows, cols)


class _Softmax(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, x: Tensor, y: Tensor, scale: Tensor, shards: _Shards) -> Tensor:
        symmetric = shards.sides[1] is not None
        rows = _of_nothing(scale, shards.prefixes, len(x))
        s_PK = scale.new_zeros((shards.prefixes, len(shards.masks.pos_rows)))
        of_cols = [None] * len(shards.counts)
        for r, y_r in shards.rows:
            col = _of_nothing(scale, shards.prefixes, len(y_r))
            if len(x) and len(y_r):
                masks, offset, both = shards.of(r)
                s, (row, col) = softmax_statistics(x, y_r, scale, masks, offset, both, shards.dims)
                s_PK = torch.where(masks.pos_rows < 0, s_PK, s)
                rows = merge_statistics(rows, row)
            if symmetric:
                of_cols[r] = torch.stack(col).permute(2, 0, 1)
        cols = _merged_columns(of_cols, shards.counts) if symmetric else (s_PK.new_empty(0),) * 2
        ctx.shards = shards
        ctx.save_for_backward(x, scale, *rows, *cols)
        return softmax_loss(s_PK, (rows, cols), shards.masks, shards.sides)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad: Tensor):
        x, scale, *statistics = ctx.saved_tensors
        rows, cols = statistics[:2], statistics[2:]
        shards, need = ctx.shards, ctx.needs_input_grad[:2]
        check_same(grad, "the gradient of the loss")
        dx = torch.zeros_like(x, dtype=scale.dtype) if need[0] else None
        dy, dscale = RowSums(shards.counts), torch.zeros_like(scale)
        for r, y_r in shards.rows:
            part = None
            if len(x) and len(y_r):
                masks, offset, both = shards.of(r)
                here = [each[:, shards.columns(r)] for each in cols] if both[1] is not None else cols
                of_r = (rows, here), x, y_r, scale, masks, offset, both, need, shards.dims
                dx_r, part, dscale_r = softmax_gradients(grad, *of_r)
                dscale += dscale_r
                if need[0]:
                    dx += dx_r
            if need[1]:
                dy.add(torch.zeros_like(y_r) if part is None else part)
        return dx.to(x.dtype) if need[0] else None, dy.result() if need[1] else None, dscale, None


def _of_nothing(scale: Tensor, prefixes: int, size: int) -> tuple[Tensor, Tensor]:
    """(peak, total) [P, size] of segments without a candidate."""
    return scale.new_full((prefixes, size), -torch.inf), scale.new_zeros((prefixes, size))


def _merged_columns(of_cols: list[Tensor], counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(peak, total) [P, N] of the columns over the rows of all ranks; of_cols[r] [counts[r], 2, P]: what this
    rank's rows give the columns of rank r. An owner merges its columns in rank order."""
    merged, *others = (part.unbind(1) for part in exchange_rows(of_cols, counts))
    for part in others:
        merged = merge_statistics(merged, part)
    every = gather_rows(torch.stack(merged, 1), counts)
    return tuple(each.T.contiguous() for each in every.unbind(1))


class _Sigmoid(torch.autograd.Function):
    """The gradients are formed with the value, so they are exchanged in the forward pass already."""

    @staticmethod
    @without_autocast
    def forward(ctx, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, shards: _Shards, wanted: bool):
        need = ctx.needs_input_grad[:2] if wanted else None
        dx = torch.zeros_like(x, dtype=scale.dtype)
        dy, (loss, dscale, dbias) = RowSums(shards.counts), scale.new_zeros(3)
        for r, y_r in shards.rows:
            part = None
            if len(x) and len(y_r):
                masks, offset, (rows, _) = shards.of(r)
                entry = torch.where(masks.pos_rows < 0, 0.0, rows.entry_K)
                of_r = x, y_r, scale, bias, masks, offset, entry, rows.segment, rows.log_q
                loss_r, dx_r, part, *of_scalars = sigmoid_parts(*of_r, need, shards.dims)
                loss = loss + loss_r
                if wanted:
                    dscale, dbias = dscale + of_scalars[0], dbias + of_scalars[1]
                    dx = dx + dx_r if need[0] else dx
            if wanted and need[1]:
                dy.add(torch.zeros_like(y_r) if part is None else part)
        if wanted:
            ctx.save_for_backward(dx.to(x.dtype), dy.result() if need[1] else y[:0], dscale, dbias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        check_same(grad, "the gradient of the loss")
        found = ((grad * each).to(each.dtype) for each in ctx.saved_tensors)
        return *(each if need else None for need, each in zip(ctx.needs_input_grad, found)), None, None
