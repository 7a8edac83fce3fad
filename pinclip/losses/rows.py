"""What the losses share: local rows against gathered columns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pinclip.distributed import GatheredRows, world_size
from pinclip.ops.contrastive import contrastive_loss
from pinclip.ops.pairs import Pairs
from pinclip.ops.sigmoid import sigmoid_loss


def check_kind(kind: str) -> None:
    """ValueError unless `kind` names a pair loss."""
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"kind={kind!r}, expected 'softmax' or 'sigmoid'")


def check_bias(kind: str, bias: Tensor | float | None) -> None:
    """ValueError for a sigmoid loss without a bias."""
    if kind == "sigmoid" and bias is None:
        raise ValueError("bias=None, the sigmoid loss needs a bias")


def only(x: Tensor, valid: Tensor) -> Tensor:
    """x with zeros in the rows that are not valid: no value and no gradient passes there, NaN included."""
    return torch.where(valid[:, None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def only_columns(y: Tensor | GatheredRows, valid: Tensor | None) -> GatheredRows:
    """y as columns, with zeros in the rows that are not valid. Rows that are gathered already stay as they
    are: they must be finite; as candidates `removing` takes them out."""
    if isinstance(y, GatheredRows):
        return y
    return GatheredRows(y if valid is None else only(y, valid))


def removing(log_q: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """log_q, with +inf for candidates that are not valid (see `Pairs`)."""
    if valid is None:
        return log_q
    base = torch.zeros((), device=valid.device) if log_q is None else log_q
    return torch.where(valid, base, torch.inf)


def mean_over(total: Tensor | int) -> Tensor | float:
    """The op's normaliser for a mean over `total` rows of all ranks: total / W, see `pinclip.distributed`."""
    if isinstance(total, Tensor):
        return total.double().clamp_min(1) / world_size()
    return max(total, 1) / world_size()


def pair_loss(
    kind: str,
    x: Tensor,
    y_all: Tensor,
    scale: Tensor | float,
    bias: Tensor | float | None,
    pairs: Pairs,
    dims: Sequence[int] | None,
    normalizer: Tensor | float | None,
) -> Tensor:
    """Rows of x against columns of y_all; zero, on the graph, for a rank that holds no rows."""
    check_bias(kind, bias)
    if len(x) == 0 and world_size() > 1:
        # This rank must still take part in the backward exchange, and give its parameters a gradient.
        zero = (x.sum() + y_all[:0].sum()) * scale
        return zero if kind == "softmax" else zero + 0.0 * bias
    if kind == "sigmoid":
        return sigmoid_loss(x, y_all, scale, bias, pairs, dims=dims, normalizer=normalizer)
    return contrastive_loss(x, y_all, scale, pairs, direction="rows", dims=dims, normalizer=normalizer)
