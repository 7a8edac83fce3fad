"""Sigmoid pair loss (SigLIP) over tiles, with listed positives, masks, logQ and weights.

Shape suffixes: M rows (x), N columns (y), D features, K listed positives, R×C one tile.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pinclip.ops._checks import without_autocast
from pinclip.ops._pair_tiles import PairMasks, PairTiles, mean_of_problems, pair_gradients, runs_triton
from pinclip.ops.pairs import (
    Pairs,
    check_pair_arguments,
    check_scalar,
    coefficients,
    scalar,
)
from pinclip.reference.pairs import compute_dtype


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    pairs: Pairs = Pairs(),  # noqa: B008  (frozen, no mutable state)
    *,
    dims: Sequence[int] | None = None,
    normalizer: Tensor | float | None = None,
    empty_rows: str = "zero",
) -> Tensor:
    """Pairwise sigmoid loss of the rows of x against the rows of y.

    With S'_ij = scale · x_i·y_j + bias - log_q_cols[j],

        L = Σ_i w_i [ Σ_p a_ip softplus(-S'_ip) + Σ_j softplus(S'_ij) ] / Z,

    p running over the listed positives of row i with weights a_ip, j over its negatives (see `Pairs`), and
    Z = normalizer, by default Σ w_i over the rows that have positives. A row whose positives have total
    weight 0 has no loss, its negatives included; with empty_rows="error" it raises (unless its own weight
    is 0), which reads the device from the host. `log_q_rows` and `col_weights` are not read. dims=(d1, …):
    Matryoshka, see `contrastive_loss`.

    Args: x [M, D], y [N, D], fp32, bf16, fp16 or fp64, one device; scale, bias 0-d tensors or floats,
    scale > 0.
    Returns a scalar, fp32 (fp64 for fp64), with gradients for x, y, scale and bias. Computed and accumulated
    in fp32 (fp64); deterministic. No collectives. The loss needs no normaliser over j, so its gradients are
    formed in the same pass over S as its value.
    Extra memory beyond inputs and gradients, never M×N: two tiles of 1024×1024, O(M + N + K) vectors, and
    fp32 copies of x and y where they are not fp32. On a GPU as `contrastive_loss`.
    Raises ValueError, naming the argument and its value.

    Source: SigLIP, Zhai et al., arXiv 2303.15343; Matryoshka, Kusupati et al., arXiv 2205.13147.
    """
    check_pair_arguments(x, y, scale, pairs, dims, normalizer, empty_rows)
    check_scalar("bias", bias, x.device)
    dtype = compute_dtype(x)
    listed = pairs.positives(len(x), len(y), x.device)
    entry_K, segment_M = coefficients(
        listed.rows_K,
        listed.weights_K,
        pairs.row_weights,
        len(x),
        normalizer=normalizer,
        share=1.0,
        normalize_entries=False,
        empty=empty_rows,
        dtype=dtype,
    )
    ids = pairs.row_ids, pairs.col_ids
    constants = (
        listed.rows_K,
        listed.cols_K,
        entry_K,
        segment_M,
        *ids,
        *pairs.known(),
        pairs.log_q_cols,
        pairs.offset if pairs.indptr is None else None,
        None if dims is None else sorted(dims),
    )
    scale, bias = scalar(scale, x, dtype), scalar(bias, x, dtype)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, scale, bias))
    need = (wanted and x.requires_grad, wanted and y.requires_grad)
    return _sigmoid(x, y, scale, bias, *constants, wanted, *need)[0]


@torch.library.custom_op("pinclip::sigmoid", mutates_args=())
def _sigmoid(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    pos_rows: Tensor,
    pos_cols: Tensor,
    entry: Tensor,
    segment: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    known_rows: Tensor | None,
    known_cols: Tensor | None,
    log_q_cols: Tensor | None,
    offset: int | None,
    dims: Sequence[int] | None,
    need_grad: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of x, y, scale, bias for a unit gradient of the loss); empty where not needed.

    entry [K], segment [M] are `Coefficients`; offset: that of diagonal positives, None for listed ones.
    """
    masks = PairMasks(pos_rows, pos_cols, row_ids, col_ids, known_rows, known_cols)
    need = (need_x, need_y) if need_grad else None
    return sigmoid_parts(x, y, scale, bias, masks, offset, entry, segment, log_q_cols, need, dims)


@torch.library.custom_op("pinclip::sigmoid_backward", mutates_args=())
def _sigmoid_backward(
    grad: Tensor, dx: Tensor, dy: Tensor, dscale: Tensor, dbias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients that the forward formed, times the gradient of the loss."""
    return tuple((grad * each).to(each.dtype) for each in (dx, dy, dscale, dbias))


@_sigmoid.register_fake
def _(x, y, scale, bias, pos_rows, pos_cols, entry, segment, *rest):
    need_grad, need_x, need_y = rest[-3:]
    return (
        scale.new_empty(()),
        x.new_empty(x.shape if need_grad and need_x else (0,)),
        y.new_empty(y.shape if need_grad and need_y else (0,)),
        scale.new_empty(() if need_grad else (0,)),
        bias.new_empty(() if need_grad else (0,)),
    )


@_sigmoid_backward.register_fake
def _(grad, dx, dy, dscale, dbias):
    return tuple(torch.empty_like(each) for each in (dx, dy, dscale, dbias))


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad, *_):
    unread = (None,) * (len(ctx.needs_input_grad) - 4)
    if grad is None:
        return (None, None, None, None, *unread)
    grads = _sigmoid_backward(grad, *ctx.saved_tensors)
    return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), *unread)


_sigmoid.register_autograd(_backward, setup_context=_setup_context)


def sigmoid_parts(x, y, scale, bias, masks: PairMasks, offset, entry, segment, log_q_cols, need, dims):
    """(loss, gradients of x, y, scale and bias) as of `_sigmoid`, without autograd. All five are sums over
    the columns, and so over shards of them."""
    parts = _triton if runs_triton(x) else _tiled
    return parts(x, y, scale, bias, masks, offset, entry, segment, log_q_cols, need, dims)


def _tiled(x, y, scale, bias, masks: PairMasks, offset, entry, segment, log_q_cols, need, dims):
    """Loss, and where `need` = (need_x, need_y) is given the gradients, from one pass over S."""
    tiles = PairTiles(x.to(scale.dtype), y.to(scale.dtype), scale, bias, masks, dims)
    prefixes = 1 if dims is None else len(dims)
    log_q = None if log_q_cols is None else log_q_cols.to(scale.dtype)
    sums = None if need is None else pair_gradients(tiles, need)
    attract_PK, repel_M = entry.new_zeros((prefixes, len(entry))), torch.zeros_like(segment)
    dbias = torch.zeros_like(segment)
    for tile in tiles:
        s_RC = tile.s_RC if log_q is None else tile.s_RC.sub_(log_q[tile.cols])
        flat = s_RC.view(-1)
        away_K = -flat[tile.at]
        flat[tile.at] = -torch.inf  # the listed positives are no negatives
        attract_PK[tile.prefix, tile.entries] = _softplus(away_K)
        repel_M[tile.rows] += _softplus(s_RC).sum(1)
        if sums is None:
            continue
        g_RC = s_RC.sigmoid_().mul_(segment[tile.rows, None])
        g_RC.view(-1)[tile.at] = -entry[tile.entries] * torch.sigmoid(away_K)
        dbias[tile.rows] += g_RC.sum(1)
        sums.add(tile, g_RC)

    # A dropped row may stand against a removed column: 0 · inf.
    attract = torch.where(entry == 0, 0.0, entry * attract_PK).sum()
    loss = (attract + (segment * repel_M).sum()) / prefixes
    if sums is None:
        return loss, x.new_empty(0), y.new_empty(0), loss.new_empty(0), loss.new_empty(0)
    gradients = sums.result(torch.ones_like(scale), scale, x.dtype)
    return loss, *gradients, dbias.sum() / prefixes


def _softplus(s: Tensor) -> Tensor:
    """log(1 + e^s); above 40 it is s to the last bit of fp64."""
    return F.softplus(s, threshold=40)


@without_autocast
def _triton(x, y, scale, bias, masks: PairMasks, offset, entry, segment, log_q_cols, need, dims):
    """`_tiled` on a GPU."""
    from pinclip_kernels.triton import sigmoid as kernels

    log_q = None if log_q_cols is None else log_q_cols.to(scale.dtype)

    def gradients_of(which, problem):
        loss, *gradients = kernels.value_and_gradients(problem, scale, bias, segment, entry, log_q, need)
        return *gradients, loss

    with torch.cuda.device_of(x):
        *gradients, loss = mean_of_problems(gradients_of, x, y, masks, offset, dims)
    return loss, *gradients
