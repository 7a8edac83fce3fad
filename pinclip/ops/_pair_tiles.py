"""The shared tile of the pair losses: a block of logits with its masks applied.

Plain torch, so it runs on every device; both losses, forward and backward, walk these tiles.
Shape suffixes: R rows and C columns of one tile, M rows (x), N columns (y), D features.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pinclip.ops.l2_normalize import l2_normalize
from pinclip.reference.pairs import compute_dtype

if TYPE_CHECKING:
    from pinclip_kernels.triton._pair_tile import PairProblem

# 4 MB of fp32 logits. Measured on cores with 1 MB of L2, D = 256, N = 8192, one thread: 1.49 s for forward
# and backward, as at 512×1024 (half the tile, twice the barriers between threads); 1.68 s at 512×8192, which
# no longer stays in the caches from the product to its epilogue.
TILE = (1024, 1024)


class PairMasks(NamedTuple):
    """Coordinates of the listed positives; ids of rows and columns; coordinates of known pairs. All int64.

    The coordinates (-1, -1) are a pair that is not there.
    """

    pos_rows: Tensor
    pos_cols: Tensor
    row_ids: Tensor | None
    col_ids: Tensor | None
    known_rows: Tensor | None
    known_cols: Tensor | None

    def of_columns(self, first: int, last: int) -> "PairMasks":
        """The masks of the columns first … last - 1 alone, counted from 0. No synchronisation."""
        positives = _in_columns(self.pos_rows, self.pos_cols, first, last)
        col_ids = None if self.col_ids is None else self.col_ids[first:last]
        known = None, None
        if self.known_rows is not None:
            known = _in_columns(self.known_rows, self.known_cols, first, last)
        return PairMasks(*positives, self.row_ids, col_ids, *known)


def _in_columns(rows: Tensor, cols: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    inside = (cols >= first) & (cols < last)
    return torch.where(inside, rows, -1), torch.where(inside, cols - first, -1)


class Prefixes:
    """Matryoshka: the prefixes x[:, :d] and y[:, :d] for every d, ascending, each row renormalised.

    parts: the features of each prefix that the one before has not. inverse_x [P, M], inverse_y [P, N]: one
    over the norm of every row, as of `l2_normalize` (eps 1e-12), 0 for a row of norm 0.
    """

    def __init__(self, x: Tensor, y: Tensor, dims: Sequence[int]) -> None:
        self.ends = sorted(dims)
        self.parts = [slice(first, last) for first, last in zip([0, *self.ends], self.ends)]
        self.inverse_x, self.inverse_y = (_inverse_norms(each, self.ends) for each in (x, y))

    def __len__(self) -> int:
        return len(self.parts)

    def subtract_radial_(self, dx: Tensor, inner_PM: Tensor, x: Tensor, inverse_PM: Tensor) -> None:
        """Takes out of dx what changes the norms: x_i[part p] · Σ_{q ≥ p} inner_qi / |x_i[:d_q]|²."""
        # Below eps the divisor is a constant.
        radial_PM = torch.where(inverse_PM < 1 / _EPS, inverse_PM.square() * inner_PM, 0.0)
        for part, factor_M in zip(self.parts, radial_PM.flip(0).cumsum(0).flip(0).to(dx.dtype)):
            dx[:, part].addcmul_(x[:, part], factor_M[:, None], value=-1)


_EPS = 1e-12


def _inverse_norms(x: Tensor, ends: Sequence[int]) -> Tensor:
    dtype = compute_dtype(x)
    norm_PM = torch.stack([torch.linalg.vector_norm(x[:, :d], dim=1, dtype=dtype) for d in ends])
    return torch.where(norm_PM == 0, 0.0, norm_PM.clamp_min(_EPS).reciprocal())


class Tile(NamedTuple):
    """rows, cols: where the tile stands; prefix: of which Matryoshka prefix, 0 where there are none. s_RC:
    its logits, masked pairs at -inf, listed positives never masked. dots_RC: x yᵀ of the prefix before it is
    renormalised, None where there are none. Both are buffers that the next tile overwrites. entries: numbers
    of the listed positives that stand in it. at: their places in s_RC.view(-1)."""

    rows: slice
    cols: slice
    prefix: int
    s_RC: Tensor
    dots_RC: Tensor | None
    entries: Tensor
    at: Tensor


class PairTiles:
    """Iterates over the tiles of S = scale · x yᵀ + bias, row block by row block; with `dims` over those of
    all Matryoshka prefixes, one prefix after the other in a place, from one x yᵀ.

    x [M, D], y [N, D] in the compute dtype; scale, bias 0-d. Extra memory: one tile, with prefixes two, and
    O(M + N + positives + known pairs) integers, with P prefixes P·(M + N) numbers.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        masks: PairMasks,
        dims: Sequence[int] | None,
    ) -> None:
        self.x, self.y, self.scale, self.bias, self.masks = x, y, scale, bias, masks
        self.prefixes = None if dims is None else Prefixes(x, y, dims)
        self.shape = (min(TILE[0], len(x)), min(TILE[1], len(y)))
        self.positives = _Bucketed(masks.pos_rows, masks.pos_cols, self.shape, len(x), len(y))
        self.known = None
        if masks.known_rows is not None:
            self.known = _Bucketed(masks.known_rows, masks.known_cols, self.shape, len(x), len(y))

    def buffer(self, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory for one tile; `view` cuts it to a tile's shape."""
        return self.x.new_empty(self.shape[0] * self.shape[1], dtype=dtype or self.x.dtype)

    @staticmethod
    def view(buffer: Tensor, like: Tensor) -> Tensor:
        """The front of `buffer` in the shape of the tile `like`."""
        return buffer[: like.numel()].view(like.shape)

    def __iter__(self) -> Iterator[Tile]:
        (m, n), (tile_m, tile_n) = (len(self.x), len(self.y)), self.shape
        buffers = [self.buffer() for _ in range(1 if self.prefixes is None else 2)]
        equal = self.buffer(torch.bool) if self.masks.row_ids is not None else None
        number = 0
        for r in range(0, m, tile_m):
            rows = slice(r, min(r + tile_m, m))
            x_RD = self.x[rows] * self.scale if self.prefixes is None else self.x[rows]
            for c in range(0, n, tile_n):
                cols = slice(c, min(c + tile_n, n))
                entries, at = self.positives.of_tile(number)
                for prefix, (s_RC, dots_RC) in enumerate(self._logits(x_RD, rows, cols, buffers)):
                    if self.bias is not None:
                        s_RC += self.bias
                    if prefix == 0 and equal is not None:
                        equal_RC = self.view(equal, s_RC)
                        torch.eq(self.masks.row_ids[rows, None], self.masks.col_ids[cols], out=equal_RC)
                    self._mask_(s_RC, number, at, equal)
                    yield Tile(rows, cols, prefix, s_RC, dots_RC, entries, at)
                number += 1

    def _logits(self, x_RD: Tensor, rows: slice, cols: slice, buffers: list[Tensor]):
        """scale · x yᵀ of a tile and None; for every prefix the logits, and x yᵀ up to it."""
        of, y_CD = self.prefixes, self.y[cols]
        s_RC, *dots = (each[: len(x_RD) * len(y_CD)].view(len(x_RD), len(y_CD)) for each in buffers)
        if of is None:
            yield torch.mm(x_RD, y_CD.T, out=s_RC), None
            return
        dots_RC = dots[0].zero_()
        for part, inverse_M, inverse_N in zip(of.parts, of.inverse_x, of.inverse_y):
            dots_RC.addmm_(x_RD[:, part], y_CD[:, part].T)
            torch.mul(dots_RC, (self.scale * inverse_M[rows])[:, None], out=s_RC)
            yield s_RC.mul_(inverse_N[cols]), dots_RC

    def _mask_(self, s_RC: Tensor, number: int, at: Tensor, equal: Tensor | None) -> None:
        if equal is None and self.known is None:
            return
        flat = s_RC.view(-1)
        kept = flat[at]
        if equal is not None:
            s_RC.masked_fill_(self.view(equal, s_RC), -torch.inf)
        if self.known is not None:
            flat[self.known.of_tile(number)[1]] = -torch.inf
        flat[at] = kept


class _Bucketed:
    """Coordinates sorted by the tile they fall into; those not there behind all tiles. One read of the bounds
    by the host."""

    def __init__(self, rows: Tensor, cols: Tensor, shape: tuple[int, int], m: int, n: int) -> None:
        tile_m, tile_n = shape
        across = -(-n // tile_n)
        tiles = -(-m // tile_m) * across
        number = torch.where(rows < 0, tiles, rows // tile_m * across + cols // tile_n)
        number, self.order = torch.sort(number, stable=True)
        self.bounds = torch.searchsorted(number, torch.arange(tiles + 1, device=rows.device)).tolist()
        width = (n - cols // tile_n * tile_n).clamp_max(tile_n)  # the last tile of a row block is narrower
        self.flat = (rows % tile_m * width + cols % tile_n)[self.order]

    def of_tile(self, number: int) -> tuple[Tensor, Tensor]:
        """(entry numbers, places in the flattened tile) of the coordinates in this tile."""
        here = slice(self.bounds[number], self.bounds[number + 1])
        return self.order[here], self.flat[here]


class PairGradients:
    """dX += G·Y and dY += Gᵀ·X over the tiles of G = dL/dS, in the order of the tiles."""

    def __init__(self, tiles: PairTiles, need_x: bool, need_y: bool) -> None:
        self.tiles, self.need_x, self.need_y = tiles, need_x, need_y
        # The gradient of scale falls out of either product, so one of them is always formed.
        self.dx = torch.zeros_like(tiles.x) if need_x or not need_y else None
        self.dy = torch.zeros_like(tiles.y) if need_y else None

    def add(self, tile: Tile, g_RC: Tensor) -> None:
        """g_RC is used up."""
        self._add(tile, g_RC, slice(None))

    def _add(self, tile: Tile, g_RC: Tensor, part: slice) -> None:
        if self.dx is not None:
            self.dx[tile.rows, part].addmm_(g_RC, self.tiles.y[tile.cols, part])
        if self.dy is not None:
            self.dy[tile.cols, part].addmm_(g_RC.T, self.tiles.x[tile.rows, part])

    def result(self, grad: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, y (in `dtype`; empty where not needed) and scale, for S = scale · x yᵀ."""
        sides = (self.tiles.x, self.dx) if self.dx is not None else (self.tiles.y, self.dy)
        blocks = zip(
            *(side.split(TILE[0]) for side in sides)
        )  # a whole product would be memory as large as x
        inner = torch.stack([(a * b).sum(dtype=torch.float64) for a, b in blocks]).sum()
        dscale = (grad * inner).to(scale.dtype)  # ⟨X, dX⟩ = ⟨Y, dY⟩
        return *self._scaled(grad * scale, dtype), dscale

    def _scaled(self, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dx = self.dx.mul_(factor).to(dtype) if self.need_x else factor.new_empty(0, dtype=dtype)
        dy = self.dy.mul_(factor).to(dtype) if self.need_y else factor.new_empty(0, dtype=dtype)
        return dx, dy


class PrefixGradients(PairGradients):
    """The same for the mean over Matryoshka prefixes, from G of every prefix in turn.

    With r = 1/|x_i[:d]| and H_p = Σ_{q ≥ p} G_q · r_q(x_i) r_q(y_j), the features that prefix p adds get
    dX[:, part p] = H_p·Y[:, part p] - X[:, part p] · Σ_{q ≥ p} r_q² ⟨G_q, cos_q⟩_i, which takes products as
    large as those of one loss. Extra memory: a tile per prefix.
    """

    def __init__(self, tiles: PairTiles, need_x: bool, need_y: bool) -> None:
        self.tiles, self.need_x, self.need_y = tiles, need_x, need_y
        self.dx = torch.zeros_like(tiles.x) if need_x else None
        self.dy = torch.zeros_like(tiles.y) if need_y else None
        self.held = [tiles.buffer() for _ in tiles.prefixes.parts]
        self.inner_x = torch.zeros_like(tiles.prefixes.inverse_x)  # ⟨G, cos⟩ of every row
        self.inner_y = torch.zeros_like(tiles.prefixes.inverse_y)

    def add(self, tile: Tile, g_RC: Tensor) -> None:
        of, p = self.tiles.prefixes, tile.prefix
        held_RC = self.tiles.view(self.held[p], g_RC)
        torch.mul(g_RC, of.inverse_x[p, tile.rows, None], out=held_RC).mul_(of.inverse_y[p, tile.cols])
        torch.mul(held_RC, tile.dots_RC, out=g_RC)
        self.inner_x[p, tile.rows] += g_RC.sum(1)
        if self.need_y:
            self.inner_y[p, tile.cols] += g_RC.sum(0)
        if p + 1 < len(of):
            return
        for p, part in reversed(list(enumerate(of.parts))):
            above_RC, held_RC = held_RC, self.tiles.view(self.held[p], g_RC)
            if p + 1 < len(of):
                held_RC += above_RC
            self._add(tile, held_RC, part)

    def result(self, grad: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        of, (x, y) = self.tiles.prefixes, (self.tiles.x, self.tiles.y)
        if self.need_x:
            of.subtract_radial_(self.dx, self.inner_x, x, of.inverse_x)
        if self.need_y:
            of.subtract_radial_(self.dy, self.inner_y, y, of.inverse_y)
        grad = grad / len(of)
        dscale = (grad * self.inner_x.sum(dtype=torch.float64)).to(scale.dtype)
        return *self._scaled(grad * scale, dtype), dscale


def pair_gradients(tiles: PairTiles, need: tuple[bool, bool]) -> PairGradients:
    return (PairGradients if tiles.prefixes is None else PrefixGradients)(tiles, *need)


def runs_triton(x: Tensor) -> bool:
    """Whether a pair loss of x runs the Triton kernels: on a GPU from sm_80 on, but not in fp64."""
    return x.is_cuda and x.dtype != torch.float64 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def triton_problems(
    x: Tensor, y: Tensor, masks: PairMasks, offset: int | None, dims: Sequence[int] | None
) -> Iterator[tuple[slice, "PairProblem"]]:
    """The problem as the kernels of `pinclip_kernels.triton` take it, and which prefixes it is: all of them
    together where the kernels can, else one of renormalised rows after the other."""
    from pinclip_kernels.triton._pair_tile import Listed, PairProblem
    from pinclip_kernels.triton._pair_tile import Prefixes as Given

    ids = None if masks.row_ids is None else (masks.row_ids, masks.col_ids)
    known = None if masks.known_rows is None else Listed(masks.known_rows, masks.known_cols)
    rest = Listed(masks.pos_rows, masks.pos_cols), offset, ids, known
    if dims is None:
        yield slice(0, 1), PairProblem(x, y, *rest)
    elif _together(x, dims):
        of = Prefixes(x, y, dims)
        given = Given(of.ends, of.inverse_x, of.inverse_y, of.subtract_radial_)
        yield slice(0, len(of)), PairProblem(x, y, *rest, given)
    else:
        for p, d in enumerate(sorted(dims)):
            units = (l2_normalize(each[:, :d].to(compute_dtype(each))) for each in (x, y))
            yield slice(p, p + 1), PairProblem(*units, *rest)


def _together(x: Tensor, dims: Sequence[int] | None) -> bool:
    from pinclip_kernels.triton._pair_tile import takes_prefixes

    return dims is None or takes_prefixes(x, dims)


def mean_of_problems(
    gradients_of: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    y: Tensor,
    masks: PairMasks,
    offset: int | None,
    dims: Sequence[int] | None,
) -> tuple[Tensor, ...]:
    """(dx, dy, …) of the mean over prefixes, dx or dy empty where it is not needed.

    gradients_of(which prefixes, problem) -> the same of one of `triton_problems`.
    """
    total, together = None, _together(x, dims)
    for which, problem in triton_problems(x, y, masks, offset, dims):
        found = gradients_of(which, problem)
        if together:
            return found
        found = [_before_normalizing(found[0], x), _before_normalizing(found[1], y), *found[2:]]
        total = found if total is None else [a + b for a, b in zip(total, found)]
    dx, dy, *others = (each / len(dims) for each in total)
    return dx.to(x.dtype), dy.to(y.dtype), *others


def _before_normalizing(d_unit: Tensor, x: Tensor) -> Tensor:
    """Gradient of x, from that of a renormalised prefix; empty stays empty."""
    if d_unit.numel() == 0:
        return d_unit
    prefix = x[:, : d_unit.shape[1]].to(d_unit.dtype)
    norm = torch.linalg.vector_norm(prefix, dim=1, keepdim=True)
    dx = torch.ops.pinclip.l2_normalize_backward(d_unit, prefix, norm, _EPS)
    return F.pad(dx, (0, x.shape[1] - prefix.shape[1]))
