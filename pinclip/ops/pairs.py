"""Which pairs of a pair loss are positives, which are no negatives, with which weight.

Shape suffixes: M rows (x), N columns (y), K listed positives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs between M rows (x) and N columns (y), for `contrastive_loss` and `sigmoid_loss`.

    Positives. By default the diagonal: the column of row i is i + offset; a row whose column falls outside
    [0, N) has none. With `indptr` int64 [M+1] and `indices` int64 [K] a CSR list instead, columns strictly
    increasing within a row, with `weights` float [K] ≥ 0 (None: all 1).

    Negatives are all other pairs but those of equal id (`row_ids` int64 [M], `col_ids` int64 [N]) and those
    listed in the CSR `known_indptr` int64 [M+1], `known_indices` int64. A listed positive is never masked,
    whatever its id, the known list, or its weight.

    `log_q_cols` float [N], `log_q_rows` float [M]: log of the probability with which the column (row) was
    sampled as a candidate; it is subtracted from the logits in the row (column) direction. +inf removes
    a column (row) from the candidates altogether: that, with weight 0, is how an item that takes no part
    is expressed without changing a shape; its vector must be finite, and gets zero gradient.

    `row_weights` float [M], `col_weights` float [N] ≥ 0 (None: all 1) weigh the loss of each row (column);
    weight 0 drops it. `log_q_rows` and `col_weights` belong to the column direction and are read there only.

    All tensors stand on the device of x and are constants: they get no gradient. Their values are checked
    when they are on the CPU (never on another device: that would be a synchronisation, and never under
    torch.compile). Raises ValueError naming the field and the value.
    """

    offset: int = 0
    indptr: Tensor | None = None
    indices: Tensor | None = None
    weights: Tensor | None = None
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    known_indptr: Tensor | None = None
    known_indices: Tensor | None = None
    log_q_cols: Tensor | None = None
    log_q_rows: Tensor | None = None
    row_weights: Tensor | None = None
    col_weights: Tensor | None = None

    def __post_init__(self) -> None:
        _require_together("indptr", self.indptr, "indices", self.indices)
        _require_together("known_indptr", self.known_indptr, "known_indices", self.known_indices)
        _require_together("row_ids", self.row_ids, "col_ids", self.col_ids)
        if self.indptr is not None and self.offset != 0:
            raise ValueError(f"offset={self.offset} together with indptr: positives are one or the other")
        if self.weights is not None and self.indptr is None:
            raise ValueError("weights without indptr and indices: they weigh the listed positives")
        for name in _INTEGER_FIELDS:
            _check_vector(name, getattr(self, name), (torch.int64,))
        for name in _FLOAT_FIELDS:
            _check_vector(name, getattr(self, name), _FLOATS)
        _check_csr("indptr", self.indptr, "indices", self.indices)
        _check_csr("known_indptr", self.known_indptr, "known_indices", self.known_indices)
        if self.weights is not None and self.weights.shape != self.indices.shape:
            raise ValueError(f"weights has {len(self.weights)} values for {len(self.indices)} indices")
        for name in ("weights", "row_weights", "col_weights"):
            value = getattr(self, name)
            if _readable(value) and bool((value < 0).any()):
                raise ValueError(f"{name} has the negative value {float(value.min())}")

    def positives(self, m: int, n: int, device: torch.device) -> "Positives":
        """The listed positives as coordinates sorted by row, then column. No synchronisation."""
        if self.indptr is not None:
            return Positives(csr_rows(self.indptr, self.indices), self.indices, self.weights)
        first, last = max(0, -self.offset), min(m, n - self.offset)
        rows = torch.arange(first, max(first, last), device=device)
        return Positives(rows, rows + self.offset, None)

    def known(self) -> tuple[Tensor | None, Tensor | None]:
        """Coordinates (rows, columns) of the pairs masked by the known list, or (None, None)."""
        if self.known_indptr is None:
            return None, None
        return csr_rows(self.known_indptr, self.known_indices), self.known_indices


class Positives(NamedTuple):
    """rows_K, cols_K int64 coordinates of the listed positives; weights_K float, None: all 1."""

    rows_K: Tensor
    cols_K: Tensor
    weights_K: Tensor | None


class Coefficients(NamedTuple):
    """One direction of a loss, with weights, normaliser and averaging worked in.

    entry_K: coefficient of every listed positive. segment_M: coefficient of every row's candidates.
    """

    entry_K: Tensor
    segment_M: Tensor


def csr_rows(indptr: Tensor, indices: Tensor) -> Tensor:
    """Row number of every CSR entry."""
    rows = torch.arange(len(indptr) - 1, device=indptr.device)
    return torch.repeat_interleave(rows, indptr.diff(), output_size=len(indices))


def coefficients(
    of_K: Tensor,
    entry_weights_K: Tensor | None,
    segment_weights_M: Tensor | None,
    segments: int,
    *,
    normalizer: Tensor | float | None,
    share: float,
    normalize_entries: bool,
    empty: str,
    dtype: torch.dtype,
) -> Coefficients:
    """share · w_i / Z for every row i that has positives, 0 for the others; times its weight per positive.

    `of_K` is the row of each positive (for the column direction: its column). `normalize_entries` makes
    the weights of one row's positives sum to 1. Z = `normalizer`, by default the sum of w_i over rows
    that have positives. Sums are taken in fp64, so that the order of atomics on a GPU leaves no trace.
    """
    ones = torch.ones(len(of_K), dtype=torch.float64, device=of_K.device)
    entries = ones if entry_weights_K is None else entry_weights_K.double()
    total_M = torch.zeros(segments, dtype=torch.float64, device=of_K.device).index_add(0, of_K, entries)
    has_positive_M = total_M > 0
    if segment_weights_M is None:
        w_M = has_positive_M.double()
    else:
        w_M = segment_weights_M.double()
        if empty == "error":
            _raise_if_empty(~has_positive_M & (w_M != 0))
        w_M = torch.where(has_positive_M, w_M, 0.0)
    if segment_weights_M is None and empty == "error":
        _raise_if_empty(~has_positive_M)
    z = w_M.sum() if normalizer is None else scalar(normalizer, of_K, torch.float64)
    segment_M = share * w_M / torch.where(z > 0, z, 1.0)  # nothing has a positive: the loss is zero
    if normalize_entries:
        entries = entries / torch.where(has_positive_M, total_M, 1.0)[of_K]
    return Coefficients((segment_M[of_K] * entries).to(dtype), segment_M.to(dtype))


def _raise_if_empty(empty_M: Tensor) -> None:
    if bool(empty_M.any()):
        raise ValueError(f"empty_rows='error': row {int(empty_M.nonzero()[0])} has no positive")


def check_pair_arguments(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    pairs: Pairs,
    dims: Sequence[int] | None,
    normalizer: Tensor | float | None,
    empty_rows: str,
) -> None:
    """ValueError naming the argument and its value, for what both pair losses ask of their arguments."""
    for name, value in (("x", x), ("y", y)):
        if value.dim() != 2 or value.shape[0] == 0 or value.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected two non-empty dimensions")
        if value.dtype not in _FLOATS:
            raise ValueError(f"{name} has dtype {value.dtype}, expected one of {_FLOATS}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has D={x.shape[1]} but y has D={y.shape[1]}")
    if x.dtype != y.dtype:
        raise ValueError(f"y has dtype {y.dtype}, x has {x.dtype}")
    if y.device != x.device:
        raise ValueError(f"y is on {y.device}, x is on {x.device}")
    check_scalar("scale", scale, x.device)
    _check_positive("scale", scale)
    if normalizer is not None:
        check_scalar("normalizer", normalizer, x.device)
        _check_positive("normalizer", normalizer)
    if dims is not None and (len(dims) == 0 or not all(1 <= d <= x.shape[1] for d in dims)):
        raise ValueError(f"dims={tuple(dims)}, expected prefix lengths between 1 and D={x.shape[1]}")
    if empty_rows not in ("zero", "error"):
        raise ValueError(f"empty_rows={empty_rows!r}, expected 'zero' or 'error'")
    _check_pairs(pairs, x.shape[0], y.shape[0], x.device)


def check_scalar(name: str, value: Tensor | float, device: torch.device) -> None:
    """ValueError unless `value` is a number or a 0-d floating tensor on `device`."""
    if not isinstance(value, Tensor):
        return
    if value.dim() != 0 or not value.dtype.is_floating_point:
        shape = tuple(value.shape)
        raise ValueError(f"{name} has shape {shape} and dtype {value.dtype}, expected a 0-d float")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, x is on {device}")


def scalar(value: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as a 0-d tensor on the device of `like`, without a copy from the host."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGER_FIELDS = ("indptr", "indices", "known_indptr", "known_indices", "row_ids", "col_ids")
_FLOAT_FIELDS = ("weights", "log_q_cols", "log_q_rows", "row_weights", "col_weights")


def _readable(value: Tensor | None) -> bool:
    """Whether the values may be looked at: on the CPU, and not while torch.compile traces."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_positive(name: str, value: Tensor | float) -> None:
    known = _readable(value) or not isinstance(value, Tensor)
    if known and bool(value <= 0):  # NaN passes: it propagates
        raise ValueError(f"{name}={float(value)} is not positive")


def _require_together(a: str, value_a: Tensor | None, b: str, value_b: Tensor | None) -> None:
    if (value_a is None) != (value_b is None):
        given, lacking = (a, b) if value_b is None else (b, a)
        raise ValueError(f"{given} is given without {lacking}")


def _check_vector(name: str, value: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> None:
    if value is None:
        return
    if value.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected one dimension")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {value.dtype}, expected one of {dtypes}")


def _check_csr(ptr_name: str, indptr: Tensor | None, name: str, indices: Tensor | None) -> None:
    if indptr is None:
        return
    if len(indptr) == 0:
        raise ValueError(f"{ptr_name} is empty, expected M+1 values")
    if not (_readable(indptr) and _readable(indices)):
        return
    counts = indptr.diff()
    if int(indptr[0]) != 0 or int(indptr[-1]) != len(indices) or bool((counts < 0).any()):
        raise ValueError(
            f"{ptr_name} runs from {int(indptr[0])} to {int(indptr[-1])} for {len(indices)} {name}, "
            f"expected non-decreasing from 0 to {len(indices)}"
        )
    if len(indices) == 0:
        return
    if int(indices.min()) < 0:
        raise ValueError(f"{name} has the negative column {int(indices.min())}")
    rows = csr_rows(indptr, indices)
    unsorted = (rows[1:] == rows[:-1]) & (indices[1:] <= indices[:-1])
    if bool(unsorted.any()):
        at = int(unsorted.nonzero()[0])
        raise ValueError(
            f"{name} of row {int(rows[at])} has column {int(indices[at + 1])} after {int(indices[at])}, "
            "expected strictly increasing columns"
        )


def _check_pairs(pairs: Pairs, m: int, n: int, device: torch.device) -> None:
    lengths = {
        "indptr": m + 1,
        "known_indptr": m + 1,
        "row_ids": m,
        "col_ids": n,
        "log_q_rows": m,
        "log_q_cols": n,
        "row_weights": m,
        "col_weights": n,
    }
    for name in (*_INTEGER_FIELDS, *_FLOAT_FIELDS):
        value = getattr(pairs, name)
        if value is None:
            continue
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, x is on {device}")
        if name in lengths and len(value) != lengths[name]:
            raise ValueError(f"{name} has length {len(value)}, expected {lengths[name]} (M={m}, N={n})")
    for name in ("indices", "known_indices"):
        value = getattr(pairs, name)
        if _readable(value) and len(value) and int(value.max()) >= n:
            raise ValueError(f"{name} has column {int(value.max())}, there are N={n}")
