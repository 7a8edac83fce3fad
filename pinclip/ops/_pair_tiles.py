"""The shared tile of the pair losses: a block of logits with its masks applied.

Plain torch, so it runs on every device; both losses, forward and backward, walk these tiles.
Shape suffixes: R rows and C columns of one tile, M rows (x), N columns (y), D features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

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


class Tile(NamedTuple):
    """rows, cols: where the tile stands. s_RC: its logits, masked pairs at -inf, listed positives never
    masked; a buffer that the next tile overwrites. entries: numbers of the listed positives that stand in
    it. at: their places in s_RC.view(-1)."""

    rows: slice
    cols: slice
    s_RC: Tensor
    entries: Tensor
    at: Tensor


class PairTiles:
    """Iterates over the tiles of S = scale · x yᵀ + bias, row block by row block.

    x [M, D], y [N, D] in the compute dtype; scale, bias 0-d. Extra memory: one tile, and
    O(M + N + positives + known pairs) integers.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        masks: PairMasks,
    ) -> None:
        self.x, self.y, self.scale, self.bias, self.masks = x, y, scale, bias, masks
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
        logits = self.buffer()
        equal = self.buffer(torch.bool) if self.masks.row_ids is not None else None
        number = 0
        for r in range(0, m, tile_m):
            rows = slice(r, min(r + tile_m, m))
            scaled_RD = self.x[rows] * self.scale
            for c in range(0, n, tile_n):
                cols = slice(c, min(c + tile_n, n))
                s_RC = logits[: (rows.stop - r) * (cols.stop - c)].view(rows.stop - r, cols.stop - c)
                torch.mm(scaled_RD, self.y[cols].T, out=s_RC)
                if self.bias is not None:
                    s_RC += self.bias
                entries, at = self.positives.of_tile(number)
                self._mask_(s_RC, rows, cols, number, at, equal)
                yield Tile(rows, cols, s_RC, entries, at)
                number += 1

    def _mask_(self, s_RC: Tensor, rows: slice, cols: slice, number: int, at: Tensor, equal) -> None:
        if equal is None and self.known is None:
            return
        flat = s_RC.view(-1)
        kept = flat[at]
        if equal is not None:
            equal_RC = self.view(equal, s_RC)
            torch.eq(self.masks.row_ids[rows, None], self.masks.col_ids[cols], out=equal_RC)
            s_RC.masked_fill_(equal_RC, -torch.inf)
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
        if self.dx is not None:
            self.dx[tile.rows].addmm_(g_RC, self.tiles.y[tile.cols])
        if self.dy is not None:
            self.dy[tile.cols].addmm_(g_RC.T, self.tiles.x[tile.rows])

    def result(self, grad: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, y (in `dtype`; empty where not needed) and scale, for S = scale · x yᵀ."""
        sides = (self.tiles.x, self.dx) if self.dx is not None else (self.tiles.y, self.dy)
        blocks = zip(
            *(side.split(TILE[0]) for side in sides)
        )  # a whole product would be memory as large as x
        inner = torch.stack([(a * b).sum(dtype=torch.float64) for a, b in blocks]).sum()
        dscale = (grad * inner).to(scale.dtype)  # ⟨X, dX⟩ = ⟨Y, dY⟩
        factor = grad * scale
        dx = self.dx.mul_(factor).to(dtype) if self.need_x else factor.new_empty(0, dtype=dtype)
        dy = self.dy.mul_(factor).to(dtype) if self.need_y else factor.new_empty(0, dtype=dtype)
        return dx, dy, dscale


def runs_triton(x: Tensor) -> bool:
    """Whether a pair loss of x runs the Triton kernels: on a GPU from sm_80 on, but not in fp64."""
    return x.is_cuda and x.dtype != torch.float64 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def triton_problem(x: Tensor, y: Tensor, masks: PairMasks, offset: int | None):
    """The problem as the kernels of `pinclip_kernels.triton` take it."""
    from pinclip_kernels.triton._pair_tile import Listed, PairProblem

    ids = None if masks.row_ids is None else (masks.row_ids, masks.col_ids)
    known = None if masks.known_rows is None else Listed(masks.known_rows, masks.known_cols)
    return PairProblem(x, y, Listed(masks.pos_rows, masks.pos_cols), offset, ids, known)
