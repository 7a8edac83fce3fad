"""Softmax pair loss (InfoNCE) over tiles, with listed positives, masks, logQ and weights.

Shape suffixes: M rows (x), N columns (y), D features, K listed positives, R×C one tile.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pinclip.ops._checks import without_autocast
from pinclip.ops._pair_tiles import (
    PairMasks,
    PairTiles,
    Tile,
    mean_of_problems,
    pair_gradients,
    runs_triton,
    triton_problems,
)
from pinclip.ops.pairs import (
    Pairs,
    check_pair_arguments,
    coefficients,
    scalar,
)
from pinclip.reference.pairs import compute_dtype

_DIRECTIONS = ("symmetric", "rows", "columns")
_LOG2_E = math.log2(math.e)


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    pairs: Pairs = Pairs(),  # noqa: B008  (frozen, no mutable state)
    *,
    direction: str = "symmetric",
    dims: Sequence[int] | None = None,
    normalizer: Tensor | float | None = None,
    empty_rows: str = "zero",
) -> Tensor:
    """Softmax contrastive loss of the pairs between the rows of x and the rows of y.

    With S_ij = scale · x_i·y_j and S'_ij = S_ij - log_q_cols[j], the loss of row i is

        l_i = Σ_p π_ip (logsumexp_{j ∈ A(i)} S'_ij - S'_ip),      π_ip = a_ip / Σ_p a_ip,

    p running over the listed positives of i with weights a_ip, A(i) = listed positives ∪ negatives of i
    (see `Pairs`), and

        L_rows = Σ_i w_i l_i / Z,       Z = normalizer, by default Σ w_i over the rows that have positives.

    direction="columns" is the same for the transposed problem (log_q_rows, col_weights), "symmetric" the
    mean of both, from one computation of S. A row whose positives have total weight 0 has no loss; with
    empty_rows="error" it raises (unless its own weight is 0), which reads the device from the host.
    dims=(d1, d2, …): Matryoshka; every prefix x[:, :d], y[:, :d] is L2-normalised and the loss is the mean
    of the prefix losses, from one pass over x yᵀ for all of them; on a GPU only if they are distinct and
    multiples of 64 (in fp32, and on all but sm_90, of 32), else one after the other in fp32.

    Args: x [M, D], y [N, D], fp32, bf16, fp16 or fp64, one device; scale 0-d tensor or float, > 0.
    Returns a scalar, fp32 (fp64 for fp64), with gradients for x, y and scale. Computed and accumulated in
    fp32 (fp64); deterministic. No collectives.
    Extra memory beyond inputs and gradients, never M×N: three tiles of 1024×1024, O(M + N + K) vectors, and
    fp32 copies of x and y where they are not fp32. On a GPU (Triton from sm_80 on, not in fp64) everything is
    multiplied in the dtype of x and summed in fp32, and a chunk of R <= 8192 rows, R·N·itemsize <= 0.75 GiB,
    takes G [R, N] in that dtype, with lists of pairs a bit per pair, R·N/8 bytes of partial sums, 4·N·D bytes
    of sums of dY and at most 36·R·D of dX. With P prefixes: on the CPU P + 1 tiles and O(P·(M + N)) more; on
    a GPU P such G, for which R is smaller, and 4·N·Σ d bytes of sums of dY.
    Raises ValueError, naming the argument and its value.

    Source: InfoNCE, van den Oord et al., arXiv 1807.03748; in the symmetric form CLIP, Radford et al.,
    arXiv 2103.00020; tiles with online log-sum-exp after Milakov & Gimelshein, arXiv 1805.02867; Matryoshka,
    Kusupati et al., arXiv 2205.13147; logQ, Yi et al., RecSys 2019.
    """
    check_pair_arguments(x, y, scale, pairs, dims, normalizer, empty_rows)
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction={direction!r}, expected one of {_DIRECTIONS}")
    dtype = compute_dtype(x)
    listed = pairs.positives(len(x), len(y), x.device)
    share = 0.5 if direction == "symmetric" else 1.0
    options = {"normalizer": normalizer, "share": share, "empty": empty_rows, "dtype": dtype}
    row_entry = row_segment = col_entry = col_segment = None
    if direction != "columns":
        row_entry, row_segment = coefficients(
            listed.rows_K, listed.weights_K, pairs.row_weights, len(x), normalize_entries=True, **options
        )
    if direction != "rows":
        col_entry, col_segment = coefficients(
            listed.cols_K, listed.weights_K, pairs.col_weights, len(y), normalize_entries=True, **options
        )
    constants = (
        listed.rows_K,
        listed.cols_K,
        row_entry,
        row_segment,
        col_entry,
        col_segment,
        pairs.row_ids,
        pairs.col_ids,
        *pairs.known(),
        pairs.log_q_cols,
        pairs.log_q_rows,
        pairs.offset if pairs.indptr is None else None,
        None if dims is None else sorted(dims),
    )
    return _contrastive(x, y, scalar(scale, x, dtype), *constants)[0]


@torch.library.custom_op("pinclip::contrastive", mutates_args=())
def _contrastive(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    pos_rows: Tensor,
    pos_cols: Tensor,
    row_entry: Tensor | None,
    row_segment: Tensor | None,
    col_entry: Tensor | None,
    col_segment: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    known_rows: Tensor | None,
    known_cols: Tensor | None,
    log_q_cols: Tensor | None,
    log_q_rows: Tensor | None,
    offset: int | None,
    dims: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, row peak [P, M], row total [P, M], column peak [P, N], column total [P, N]).

    Peak is about the greatest logit of a row or column in log 2 units, total the sum of 2^(logit - peak).
    *_entry [K] and *_segment [M] / [N] are `Coefficients`; None for a direction that is not asked for, whose
    peak and total are then empty. offset: that of diagonal positives, None for listed ones.
    """
    masks = PairMasks(pos_rows, pos_cols, row_ids, col_ids, known_rows, known_cols)
    of = sides(row_entry, row_segment, col_entry, col_segment, log_q_cols, log_q_rows, scale.dtype)
    s_PK, statistics = softmax_statistics(x, y, scale, masks, offset, of, dims)
    return softmax_loss(s_PK, statistics, masks, of), *(part for side in statistics for part in side)


@torch.library.custom_op("pinclip::contrastive_backward", mutates_args=())
def _contrastive_backward(
    grad: Tensor,
    row_peak: Tensor,
    row_total: Tensor,
    col_peak: Tensor,
    col_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    pos_rows: Tensor,
    pos_cols: Tensor,
    row_entry: Tensor | None,
    row_segment: Tensor | None,
    col_entry: Tensor | None,
    col_segment: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    known_rows: Tensor | None,
    known_cols: Tensor | None,
    log_q_cols: Tensor | None,
    log_q_rows: Tensor | None,
    offset: int | None,
    dims: Sequence[int] | None,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y (empty where not needed) and scale."""
    masks = PairMasks(pos_rows, pos_cols, row_ids, col_ids, known_rows, known_cols)
    of = sides(row_entry, row_segment, col_entry, col_segment, log_q_cols, log_q_rows, scale.dtype)
    statistics = (row_peak, row_total), (col_peak, col_total)
    return softmax_gradients(grad, statistics, x, y, scale, masks, offset, of, (need_x, need_y), dims)


@_contrastive.register_fake
def _(x, y, scale, pos_rows, pos_cols, row_entry, row_segment, col_entry, col_segment, *rest):
    rows = len(x) if row_entry is not None else 0
    cols = len(y) if col_entry is not None else 0
    count = 1 if rest[-1] is None else len(rest[-1])
    return (scale.new_empty(()), *(scale.new_empty((count, size)) for size in (rows, rows, cols, cols)))


@_contrastive_backward.register_fake
def _(grad, row_peak, row_total, col_peak, col_total, x, y, scale, *rest):
    need_x, need_y = rest[-2:]
    return (
        x.new_empty(x.shape if need_x else (0,)),
        y.new_empty(y.shape if need_y else (0,)),
        scale.new_empty(()),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.offset, ctx.dims = inputs
    ctx.save_for_backward(*output[1:], *tensors)


def _backward(ctx, grad, *_):
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    unread = (None,) * (len(ctx.needs_input_grad) - 3)
    if grad is None or not (need_x or need_y or need_scale):
        return (None, None, None, *unread)
    dx, dy, dscale = _contrastive_backward(grad, *ctx.saved_tensors, ctx.offset, ctx.dims, need_x, need_y)
    return (dx if need_x else None, dy if need_y else None, dscale if need_scale else None, *unread)


_contrastive.register_autograd(_backward, setup_context=_setup_context)


# The loss in parts, without autograd, for a caller that has the columns a shard at a time -------------------


class Side(NamedTuple):
    """The rows (dim 1 is reduced) or the columns (dim 0) of S as softmax segments; log_q in log 2 units."""

    dim: int
    entry_K: Tensor
    segment: Tensor
    log_q: Tensor | None

    def of_segments(self, values: Tensor, tile: Tile) -> Tensor:
        """The part of a number per prefix and segment that stands in the tile."""
        return values[tile.prefix, tile.rows if self.dim == 1 else tile.cols]

    def logits(self, tile: Tile, out: Tensor) -> Tensor:
        """S' = S - log_q of the tile, in `out` unless there is no log_q."""
        if self.log_q is None:
            return tile.s_RC
        log_q = self.log_q[tile.cols if self.dim == 1 else tile.rows]
        return torch.sub(tile.s_RC, log_q.unsqueeze(1 - self.dim), out=out)


def sides(row_entry, row_segment, col_entry, col_segment, log_q_cols, log_q_rows, dtype):
    """(rows, columns), None for a direction that is not asked for."""

    def side(dim, entry, segment, log_q):
        if entry is None:
            return None
        return Side(dim, entry, segment, None if log_q is None else log_q.to(dtype) * _LOG2_E)

    return side(1, row_entry, row_segment, log_q_cols), side(0, col_entry, col_segment, log_q_rows)


def softmax_statistics(x, y, scale, masks: PairMasks, offset, sides, dims):
    """Logits of the listed positives [P, K], and (peak, total) of both sides, [P, M] and [P, N] each, empty
    for a side that is None. P is 1 where dims is None; else S is that of the renormalised prefixes x[:, :d],
    y[:, :d], d ascending. Log-sum-exp is peak + log2(total), in units of log 2. Statistics of a row over
    several shards of columns merge by `merge_statistics`."""
    forward = _triton_statistics if runs_triton(x) else _tiled_statistics
    return forward(x, y, scale, masks, offset, sides, dims)


def merge_statistics(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(peak, total) of the union of two parts of the same segments."""
    peak = torch.maximum(one[0], other[0])
    shift = _finite(peak)
    return peak, one[1] * torch.exp2(one[0] - shift) + other[1] * torch.exp2(other[0] - shift)


def softmax_loss(s_PK, statistics, masks: PairMasks, sides) -> Tensor:
    """The loss, the mean over prefixes, from the logits of the listed positives and the statistics of the
    sides that are not None."""
    loss = s_PK.new_zeros(())
    for side, (peak, total) in zip(sides, statistics):
        if side is None:
            continue
        segment_K, candidate_K = (masks.pos_rows, masks.pos_cols)[:: 1 if side.dim == 1 else -1]
        target_PK = s_PK if side.log_q is None else s_PK - side.log_q[candidate_K]
        loss_PK = (_finite(peak)[:, segment_K] - target_PK + total.log2()[:, segment_K]) * side.entry_K
        # A dropped row may stand against a removed column: 0 · inf.
        loss += torch.where(side.entry_K == 0, 0.0, loss_PK).sum() / (_LOG2_E * len(s_PK))
    return loss


def softmax_gradients(grad, statistics, x, y, scale, masks: PairMasks, offset, sides, need, dims):
    """Gradients of x, y (empty where not needed) and scale, from a second pass over S. `statistics` are those
    over all columns (rows), so the gradient of x over several shards of columns is the sum of theirs."""
    backward = _triton_backward if runs_triton(x) else _tiled_backward
    return backward(grad, statistics, x, y, scale, masks, offset, sides, need, dims)


# The same by tiles in plain torch --------------------------------------------------------------------------


class _OnlineLogSumExp:
    """log2 Σ 2^S' of every segment as (peak, total), tile by tile: log2 Σ 2^S' = peak + log2 total.

    The two are never added up: at scale 100 the rounding of their sum would be an error of 1e-5 in all
    probabilities of a segment at once, ten times that of plain torch in the gradient of scale.
    """

    def __init__(self, side: Side, prefixes: int, scratch: Tensor) -> None:
        self.side, self.scratch = side, scratch
        self.peak = side.segment.new_full((prefixes, len(side.segment)), -torch.inf)
        self.total = torch.zeros_like(self.peak)

    def add(self, tile: Tile) -> None:
        dim = self.side.dim
        work = PairTiles.view(self.scratch, tile.s_RC)
        s_RC = self.side.logits(tile, work)
        peak = self.side.of_segments(self.peak, tile)
        total = self.side.of_segments(self.total, tile)
        new_peak = torch.maximum(peak, s_RC.amax(dim))
        shift = _finite(new_peak)
        torch.sub(s_RC, shift.unsqueeze(dim), out=work).exp2_()
        total.mul_(torch.exp2(peak - shift)).add_(work.sum(dim))
        peak.copy_(new_peak)


def _finite(peak: Tensor) -> Tensor:
    """0 where the peak is infinite: a segment that is wholly masked so far, or has overflowed."""
    return torch.where(peak.isinf(), 0.0, peak)


def _tiles(x, y, scale, masks: PairMasks, dims) -> PairTiles:
    # Logits in units of log 2: torch's exp2 is 4 times as fast as its exp on a CPU, 10 times where it
    # underflows, and as accurate.
    scale_log2 = (scale.double() * _LOG2_E).to(scale.dtype)
    return PairTiles(x.to(scale.dtype), y.to(scale.dtype), scale_log2, None, masks, dims)


def _tiled_statistics(x, y, scale, masks: PairMasks, offset, sides, dims):
    """Logits of the listed positives, and (peak, total) of both sides, from one pass over S."""
    tiles = _tiles(x, y, scale, masks, dims)
    prefixes = 1 if dims is None else len(dims)
    scratch = tiles.buffer()
    sums = [None if side is None else _OnlineLogSumExp(side, prefixes, scratch) for side in sides]
    s_PK = tiles.x.new_zeros((prefixes, len(masks.pos_rows)))
    for tile in tiles:
        s_PK[tile.prefix, tile.entries] = tile.s_RC.view(-1)[tile.at]
        for each in sums:
            if each is not None:
                each.add(tile)
    nothing = s_PK.new_empty((prefixes, 0))
    return s_PK, tuple(
        (nothing, nothing.clone()) if each is None else (each.peak, each.total) for each in sums
    )


def _tiled_backward(grad, statistics, x, y, scale, masks: PairMasks, offset, sides, need, dims):
    """Gradients from a second pass over S: G = dL/dS of one tile at a time, dX += G·Y, dY += Gᵀ·X."""
    tiles = _tiles(x, y, scale, masks, dims)
    sums = pair_gradients(tiles, need)
    asked = [_Probabilities(side, *s, tiles.buffer()) for side, s in zip(sides, statistics) if side]
    entry_K = sum(each.side.entry_K for each in asked)
    for tile in tiles:
        g_RC = asked[0].of_tile(tile)
        if len(asked) == 2:
            g_RC += asked[1].of_tile(tile)
        g_RC.view(-1)[tile.at] -= entry_K[tile.entries]
        sums.add(tile, g_RC)
    return sums.result(grad, scale, x.dtype)


class _Probabilities:
    """coefficient · 2^(S' - peak) / total, tile by tile."""

    def __init__(self, side: Side, peak: Tensor, total: Tensor, scratch: Tensor) -> None:
        self.side, self.scratch, self.shift = side, scratch, _finite(peak)
        self.factor = torch.where(side.segment == 0, 0.0, side.segment / total)

    def of_tile(self, tile: Tile) -> Tensor:
        dim = self.side.dim
        work = PairTiles.view(self.scratch, tile.s_RC)
        shift, factor = (self.side.of_segments(v, tile).unsqueeze(dim) for v in (self.shift, self.factor))
        return torch.sub(self.side.logits(tile, work), shift, out=work).exp2_().mul_(factor)


@without_autocast
def _triton_statistics(x, y, scale, masks: PairMasks, offset, sides, dims):
    """`_tiled_statistics` on a GPU."""
    from pinclip_kernels.triton import contrastive as kernels

    with torch.cuda.device_of(x):
        found = [
            kernels.statistics(problem, kernels.in_log2(scale), *_directions(sides))
            for _, problem in triton_problems(x, y, masks, offset, dims)
        ]
    s_PK, *parts = (torch.cat(each) if len(each) > 1 else each[0] for each in zip(*found))
    return s_PK, (tuple(parts[:2]), tuple(parts[2:]))


@without_autocast
def _triton_backward(grad, statistics, x, y, scale, masks: PairMasks, offset, sides, need, dims):
    """`_tiled_backward` on a GPU."""
    from pinclip_kernels.triton import contrastive as kernels

    def gradients_of(which, problem):
        found = (part[which].contiguous() for side in statistics for part in side)
        return kernels.gradients(problem, scale, grad, *found, *_directions(sides), *need)

    with torch.cuda.device_of(x):
        return mean_of_problems(gradients_of, x, y, masks, offset, dims)


def _directions(sides):
    from pinclip_kernels.triton.contrastive import Direction

    return [None if side is None else Direction(side.segment, side.entry_K, side.log_q) for side in sides]
