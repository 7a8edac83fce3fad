"""The shared tile of the pair losses: a block of x yᵀ with the pairs that are no negatives taken out.

Both losses walk these tiles in the same way: rows of x in chunks, a persistent grid over the tiles of a
chunk. Listed positives never stand in a tile; they are few, and every loss treats them apart in fp32.

Shape suffixes: M rows (x), N columns (y), D features, K listed positives, R rows of one chunk.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pinclip_kernels.triton._launch import TYPES, CompileCase, architecture, multiprocessors

# Launch table --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileConfig:
    """How a kernel walks the tiles: BLOCK_M × BLOCK_N of S, BLOCK_K features at a time.

    group: tiles of rows that are walked together, so that their blocks of y are read from L2. programs: how
    many per SM walk the tiles. descriptors: blocks come by TMA. flatten: the loads of the next tile start
    under the epilogue of this one.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int
    programs: int
    descriptors: bool
    flatten: bool
    reason: str

    def shrunk(self, m: int, n: int, k: int) -> "TileConfig":
        """The same with smaller blocks; for tests, whose matrices are small."""
        return replace(self, block_m=m, block_n=n, block_k=k, group=2, reason="a test's")


_HALF_90 = TileConfig(
    block_m=256,
    block_n=128,
    block_k=64,
    warps=8,
    stages=4,
    group=8,
    programs=1,
    descriptors=True,
    flatten=True,
    reason="""Compiled. The largest tile whose fp32 accumulator (128 registers a thread) and epilogue fit
    without a spill. 128×256 moves the same bytes, but a thread then holds 64 columns of 2 rows instead of
    32 of 4, and a column sum takes 192 shuffles a thread instead of 96; it also spills. 128×128 with two
    programs per SM reads 64 instead of 48 bytes a clock from L2 at the full rate of the tensor cores.
    Four stages of 48 KB are what fits in 227 KB.""",
)
_HALF_80 = TileConfig(
    block_m=128,
    block_n=128,
    block_k=32,
    warps=4,
    stages=4,
    group=8,
    programs=2,
    descriptors=False,
    flatten=False,
    reason="""Compiled. With four warps two programs fit into an SM's registers, and the epilogue of one runs
    under the products of the other; with eight a thread takes 160 to 250 registers, so only one fits. A
    program's 48 KB of shared memory fit every GPU from sm_80 on, twice except where there are only 99 KB.""",
)
_FLOAT_90 = TileConfig(
    block_m=64,
    block_n=128,
    block_k=32,
    warps=4,
    stages=2,
    group=8,
    programs=2,
    descriptors=False,
    flatten=False,
    reason="""Compiled. fp32 is multiplied as three tf32 products, whose operands pass through registers: of
    the larger tiles none leaves room for two programs per SM.""",
)
_FLOAT_80 = replace(
    _FLOAT_90,
    warps=8,
    programs=1,
    reason="""Compiled. As on sm_90, but there both operands of a product lie in registers: four warps spill,
    eight need 200 registers each, so one program per SM.""",
)


_HALF_90_PREFIXES = replace(
    _HALF_90,
    block_m=64,
    warps=4,
    programs=2,
    reason="""Compiled. The sums of a tile outlive the epilogue of a prefix, which needs registers beside
    them: a thread holds 64 sums with at most 3 spills, 128 not. Two programs per SM, so that the epilogues of
    one, P times those of a whole row, run under the products of the other.""",
)
_HALF_80_PREFIXES = replace(
    _HALF_80,
    block_m=64,
    reason="""Compiled. As on sm_90: with 128 sums a thread the gradients spill up to 200 registers.""",
)


def tile_config(dtype: torch.dtype, arch: int, prefixed: bool) -> TileConfig:
    """The row of the launch table. D does not enter: the loop over it is dynamic."""
    if dtype == torch.float32:
        return _FLOAT_90 if arch == 90 else _FLOAT_80
    if prefixed:
        return _HALF_90_PREFIXES if arch == 90 else _HALF_80_PREFIXES
    return _HALF_90 if arch == 90 else _HALF_80


LOG2_E = math.log2(math.e)
GREATEST = 2.0**14  # greatest entry of G: fp16 holds it, and 2^-28 of it as a normal number

# Inside kernels ------------------------------------------------------------------------------------------

# A pair that is no negative. Finite, because it is multiplied by its gradient, zero; times a scale that
# does not underflow in fp32 it lies below every logit.
MASKED = tl.constexpr(-3.0e38)


@triton.jit
def tile_place(t, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of the t-th tile: GROUP tiles of a column, then the next column."""
    per_group = GROUP * tiles_n
    first = t // per_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + t % per_group % size, t % per_group // size


@triton.jit
def tile_products(
    x,
    y,
    acc,
    row0,
    col0,
    first,
    last,
    m,
    n,
    d,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + x[row0 : row0 + BLOCK_M] · y[col0 : col0 + BLOCK_N]ᵀ over the features first … last - 1, in fp32;
    what lies beyond x or y is undefined.

    x, y are tensor descriptors of [BLOCK, BLOCK_K], or pointers to contiguous rows of d features.
    """
    if DESCRIPTORS:
        for k in tl.range(first, last, BLOCK_K):
            acc = tl.dot(x.load([row0, k]), y.load([col0, k]).T, acc, input_precision=PRECISION)
    else:
        # Rows beyond the end are read from the last one: no mask, nothing out of bounds.
        rows = tl.minimum(row0 + tl.arange(0, BLOCK_M), m - 1).to(tl.int64)
        cols = tl.minimum(col0 + tl.arange(0, BLOCK_N), n - 1).to(tl.int64)
        features = tl.arange(0, BLOCK_K)
        x_rows, y_rows = x + rows[:, None] * d, y + cols[:, None] * d
        for k in tl.range(first, last, BLOCK_K):
            here = (k + features < d)[None, :]
            a = tl.load(x_rows + (k + features)[None, :], mask=here, other=0.0)
            b = tl.load(y_rows + (k + features)[None, :], mask=here, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tile_steps(tiles, prefixes, PREFIXED: tl.constexpr):
    """(first, last, stride) of a persistent program's steps: its tiles, or all prefixes of each of its tiles
    one after the other."""
    first, last, stride = tl.program_id(0), tiles, tl.num_programs(0)
    if PREFIXED:
        first, last, stride = 0, tl.cdiv(tiles - first, stride) * prefixes, 1
    return first, last, stride


@triton.jit
def tile_step(step, prefixes, PREFIXED: tl.constexpr):
    """(tile, prefix) of a step."""
    t, p = step, 0
    if PREFIXED:
        t, p = tl.program_id(0) + step // prefixes * tl.num_programs(0), step % prefixes
    return t, p


@triton.jit
def tile_features(p, bounds, d, ADDS: tl.constexpr, PREFIXED: tl.constexpr):
    """(first, last) of the features of prefix p, with ADDS of those that it adds to the one before it. bounds
    are in units of 8, so that the compiler knows that every block is aligned."""
    first, last = 0, d
    if PREFIXED:
        last = tl.load(bounds + p + 1) * 8
    if ADDS:
        first = tl.load(bounds + p) * 8
    return first, last


@triton.jit
def tile_inverse(inverse, p, size, first, BLOCK: tl.constexpr):
    """One over the norms of prefix p from row `first` on, of inverse [P, size]; 0 beyond."""
    at = first + tl.arange(0, BLOCK)
    return tl.load(inverse + p * size + at, mask=at < size, other=0.0)


@triton.jit
def tile_times_inverse(tile, inverse_x, inverse_y, p, row0, col0, m, n):
    """A block of products of prefix p made cosines, or its gradient made that of the products."""
    inverse_m = tile_inverse(inverse_x, p, m, row0, tile.shape[0])
    inverse_n = tile_inverse(inverse_y, p, n, col0, tile.shape[1])
    return tile * inverse_m[:, None] * inverse_n[None, :]


@triton.jit
def tile_mask(
    acc,
    row0,
    col0,
    last_row,
    n,
    first_row,
    offset,
    row_ids,
    col_ids,
    bits,
    words,
    FILL: tl.constexpr,
    IDS: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """FILL in place of what is no negative: beyond the rows below last_row and the n columns, column
    row + offset, equal ids, and the pairs of the lists, whose bits stand in int32 [R, words]."""
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    diagonal = row0 + offset - col0
    crosses = (diagonal < BLOCK_N) & (diagonal > -BLOCK_M)
    if crosses | (row0 + BLOCK_M > last_row) | (col0 + BLOCK_N > n):  # no other tile pays for these
        inside = (rows < last_row)[:, None] & (cols < n)[None, :]
        acc = tl.where(inside & ((rows + offset)[:, None] != cols[None, :]), acc, FILL)
    if IDS:
        row_id = tl.load(row_ids + rows, mask=rows < last_row, other=0)
        col_id = tl.load(col_ids + cols, mask=cols < n, other=0)
        acc = tl.where(row_id[:, None] == col_id[None, :], FILL, acc)
    if LISTS:
        row_bits = bits + (tl.minimum(rows, last_row - 1) - first_row).to(tl.int64)[:, None] * words
        word = tl.load(row_bits + (col0 // 32 + tl.arange(0, BLOCK_N // 32))[None, :])
        bit = (word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        acc = tl.where(tl.reshape(bit, [BLOCK_M, BLOCK_N]) != 0, FILL, acc)
    return acc


@triton.jit
def tile_quarter(tile, QUARTER: tl.constexpr):
    """A quarter of a tile's columns, so that its epilogue stays in registers. Moves no data."""
    return _half(_half(tile, QUARTER // 2), QUARTER % 2)


@triton.jit
def _half(tile, HALF: tl.constexpr):
    halves = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    left, right = tl.split(tl.permute(halves, [0, 2, 1]))
    return left if HALF == 0 else right


# The listed pairs ----------------------------------------------------------------------------------------

_LIST_BLOCK = 256
_INTEGERS = ["entries", "first_row", "last_row", "words", "stride", "d8", "first", "last"]


@triton.jit(do_not_specialize=_INTEGERS)
def _bits_kernel(rows, cols, bits, entries, first_row, last_row, words, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + at, mask=at < entries, other=-1)
    col = tl.load(cols + at, mask=at < entries, other=0)
    here = (row >= first_row) & (row < last_row)
    bit = tl.full([BLOCK], 1, tl.int32) << (col % 32).to(tl.int32)
    tl.atomic_or(bits + (row - first_row) * words + col // 32, bit, mask=here, sem="relaxed")


@triton.jit(do_not_specialize=_INTEGERS)
def _place_kernel(rows, cols, values, g, entries, first_row, last_row, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + at, mask=at < entries, other=-1)
    col = tl.load(cols + at, mask=at < entries, other=0)
    here = (row >= first_row) & (row < last_row)
    value = tl.load(values + at, mask=here, other=0.0)
    tl.store(g + (row - first_row) * stride + col, value.to(g.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=_INTEGERS)
def _listed_products_kernel(
    x, y, rows, cols, out, entries, d8, first, last, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.maximum(tl.load(rows + at, mask=at < entries, other=0), 0)
    col = tl.maximum(tl.load(cols + at, mask=at < entries, other=0), 0)
    d = d8 * 8
    x_rows, y_rows = x + row[:, None] * d, y + col[:, None] * d
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for k in range(first, last, BLOCK_D):
        features = k + tl.arange(0, BLOCK_D)[None, :]
        a = tl.load(x_rows + features, mask=features < last, other=0.0).to(tl.float32)
        b = tl.load(y_rows + features, mask=features < last, other=0.0).to(tl.float32)
        total = tl.fma(a, b, total)
    tl.store(out + at, tl.sum(total, 1), mask=at < entries)


# Launch --------------------------------------------------------------------------------------------------


def aligned(x: Tensor) -> Tensor:
    """x [M, D] as kernels and TMA read it: contiguous rows on 16 bytes, D padded with zeros to a multiple
    of 8. A copy only where x is not so already."""
    if x.shape[1] % 8:
        return F.pad(x, (0, -x.shape[1] % 8))
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def compact_ids(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:
    """int32 numbers that are equal where the int64 ids are: the rank of each among the distinct ids."""
    ids, order = torch.sort(torch.cat([row_ids, col_ids]))
    distinct = torch.zeros(len(ids), dtype=torch.int32, device=ids.device)
    distinct[1:] = ids[1:] != ids[:-1]
    rank = torch.empty_like(distinct).scatter_(0, order, distinct.cumsum(0, dtype=torch.int32))
    return rank[: len(row_ids)].clone(), rank[len(row_ids) :].clone()


def in_log2(value: Tensor) -> Tensor:
    """A scale or bias for logits in units of log 2, rounded once."""
    return (value.double() * LOG2_E).to(value.dtype)


class Listed(NamedTuple):
    """int64 coordinates of K pairs; (-1, -1) is a pair that is not there."""

    rows_K: Tensor
    cols_K: Tensor

    def turned(self) -> "Listed":
        return Listed(self.cols_K, self.rows_K)

    def _grid(self, block: int) -> tuple[int]:
        return (triton.cdiv(len(self.rows_K), block),)

    def products(self, x: Tensor, y: Tensor, first: int, last: int) -> Tensor:
        """x_row · y_col over the features first … last - 1 of every pair in fp32 [K], anything for those not
        there; x, y `aligned`."""
        out_K = x.new_empty(len(self.rows_K), dtype=torch.float32)
        if len(out_K):
            block, block_d = _PRODUCTS_BLOCK
            _listed_products_kernel[self._grid(block)](
                x,
                y,
                self.rows_K,
                self.cols_K,
                out_K,
                len(out_K),
                x.shape[1] // 8,
                first,
                last,
                block,
                block_d,
            )
        return out_K

    def place(self, values_K: Tensor, g_RN: Tensor, chunk: tuple[int, int]) -> None:
        """Writes value_k at the place of pair k, for the pairs whose row is in the chunk that g holds."""
        if len(values_K):
            _place_kernel[self._grid(_LIST_BLOCK)](
                self.rows_K,
                self.cols_K,
                values_K,
                g_RN,
                len(values_K),
                *chunk,
                g_RN.stride(0),
                _LIST_BLOCK,
            )

    def mark(self, bits: Tensor, chunk: tuple[int, int]) -> None:
        """Sets the bit of every pair whose row is in the chunk; bits int32 [R, words]."""
        if len(self.rows_K):
            _bits_kernel[self._grid(_LIST_BLOCK)](
                self.rows_K,
                self.cols_K,
                bits,
                len(self.rows_K),
                *chunk,
                bits.shape[1],
                _LIST_BLOCK,
            )


_PRODUCTS_BLOCK = 16, 128


class Prefixes(NamedTuple):
    """Matryoshka: the losses of the rows of x[:, :d] and y[:, :d], renormalised, for every d of `ends`.

    ends: ascending; inverse_x [P, M], inverse_y [P, N] fp32: one over the norms of the rows, 0 for a row that
    is to be left out. subtract_radial_(dx, inner_PM, x, inverse_PM) takes
    x[part p] · Σ_{q ≥ p} inverse_q² inner_q out of dx, part p being the features that prefix p adds.
    """

    ends: list[int]
    inverse_x: Tensor
    inverse_y: Tensor
    subtract_radial_: Callable[[Tensor, Tensor, Tensor, Tensor], None]


def takes_prefixes(x: Tensor, dims: Sequence[int]) -> bool:
    """Whether the kernels take these prefixes of x together: distinct, and whole blocks of features."""
    block = tile_config(x.dtype, architecture(x.device), True).block_k
    return len(set(dims)) == len(dims) and all(d % block == 0 for d in dims)


class PairProblem:
    """x, y and the pairs that are no negatives, made ready for the kernels of a chunk of rows.

    x [M, D], y [N, D] of one dtype; offset: the positives are the pairs (i, i + offset), None: any.
    prefixes: those for which `takes_prefixes`, None: the loss is that of x and y themselves, P = 1. No
    synchronisation with the host. Extra memory: 4 (M + N) bytes with ids, N/8 bytes per row of a chunk
    with lists, and copies of x and y only where they are not `aligned`.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        positives: Listed,
        offset: int | None,
        ids: tuple[Tensor, Tensor] | None,
        known: Listed | None,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.x, self.y, self.positives, self.d = aligned(x), aligned(y), positives, x.shape[1]
        self.config = tile_config(x.dtype, architecture(x.device), prefixes is not None)
        self.prefixes = prefixes
        self.ends = [self.x.shape[1]] if prefixes is None else prefixes.ends
        # No column is row + N: then the positives are no diagonal.
        self.offset = len(y) if offset is None or not -len(x) < offset < len(y) else offset
        self.lists = tuple(
            each for each in (known, positives if offset is None else None) if each is not None
        )
        self.ids = None if ids is None else compact_ids(*ids)
        self.nothing = torch.zeros(1, device=x.device)  # stands for a tensor that is not given
        self.no_bits = torch.zeros(1, dtype=torch.int32, device=x.device)
        self.bounds = self.no_bits
        if prefixes is not None:
            self.bounds = _on_device([0, *(d // 8 for d in self.ends)], x.device)

    def turned(self) -> "PairProblem":
        """The problem with rows and columns exchanged."""
        other = copy.copy(self)
        other.x, other.y, other.positives = self.y, self.x, self.positives.turned()
        other.offset = len(self.x) if self.offset == len(self.y) else -self.offset
        other.lists = tuple(each.turned() for each in self.lists)
        other.ids = None if self.ids is None else self.ids[::-1]
        if self.prefixes is not None:
            inverse = {"inverse_x": self.prefixes.inverse_y, "inverse_y": self.prefixes.inverse_x}
            other.prefixes = self.prefixes._replace(**inverse)
        return other

    def chunks(self, most: int) -> list[tuple[int, int]]:
        """(first, last) of even chunks of at most `most` rows, whole tiles but for the last."""
        block = self.config.block_m
        count = triton.cdiv(len(self.x), max(most // block, 1) * block)
        size = triton.cdiv(triton.cdiv(len(self.x), count), block) * block
        return [(first, min(first + size, len(self.x))) for first in range(0, len(self.x), size)]

    def tiles(self, chunk: tuple[int, int]) -> tuple[int, int]:
        """Numbers of tiles of rows and of columns."""
        config = self.config
        return triton.cdiv(chunk[1] - chunk[0], config.block_m), triton.cdiv(len(self.y), config.block_n)

    def grid(self, chunk: tuple[int, int]) -> tuple[int]:
        tiles_m, tiles_n = self.tiles(chunk)
        return (min(tiles_m * tiles_n, self.config.programs * multiprocessors(self.x.device)),)

    def operands(self) -> tuple:
        """x and y as the kernels take them."""
        return self._block(self.x, self.config.block_m, self.config.block_k), self._block(
            self.y, self.config.block_n, self.config.block_k
        )

    def gradient_block(self, g_RN: Tensor):
        """G of a chunk as the kernels take it, which store a quarter of a tile at a time."""
        return self._block(g_RN, self.config.block_m, self.config.block_n // 4)

    def listed_products(self) -> Tensor:
        """x_row · y_col of the listed positives [P, K] in fp32, of prefixes the cosines."""
        products_PK = torch.stack(
            [self.positives.products(self.x, self.y, *part) for part in zip([0, *self.ends], self.ends)]
        )
        if self.prefixes is None:
            return products_PK
        return products_PK.cumsum(0) * self.listed_inverse()

    def listed_inverse(self) -> Tensor | float:
        """Derivative of the cosines of the listed positives by their products [P, K]."""
        if self.prefixes is None:
            return 1.0
        rows_K, cols_K = self.positives
        return self.prefixes.inverse_x[:, rows_K] * self.prefixes.inverse_y[:, cols_K]

    def greatest_inverse(self) -> Tensor | float:
        """A bound of the same for all pairs."""
        if self.prefixes is None:
            return 1.0
        return (self.prefixes.inverse_x.amax(1) * self.prefixes.inverse_y.amax(1)).max()

    def _block(self, matrix: Tensor, rows: int, cols: int):
        return TensorDescriptor.from_tensor(matrix, [rows, cols]) if self.config.descriptors else matrix

    def arguments(self, chunk: tuple[int, int]) -> dict:
        """What every tile kernel is given for a chunk, its launch options included."""
        row_ids, col_ids = self.ids or (self.no_bits, self.no_bits)
        return {
            "row_ids": row_ids,
            "col_ids": col_ids,
            "bits": self._bits(chunk),
            "inverse_x": self.nothing if self.prefixes is None else self.prefixes.inverse_x,
            "inverse_y": self.nothing if self.prefixes is None else self.prefixes.inverse_y,
            "bounds": self.bounds,
            "m": len(self.x),
            "n": len(self.y),
            "d8": self.x.shape[1] // 8,
            "first_row": chunk[0],
            "last_row": chunk[1],
            "offset": self.offset,
            "prefixes": len(self.ends),
            **tile_constants(
                self.config,
                self.x.dtype,
                ids=self.ids is not None,
                lists=bool(self.lists),
                prefixed=self.prefixes is not None,
            ),
            "num_warps": self.config.warps,
            "num_stages": self.config.stages,
        }

    def _bits(self, chunk: tuple[int, int]) -> Tensor:
        """int32 [R, words]: a bit for every pair of the lists."""
        if not self.lists:
            return self.no_bits
        words = self.tiles(chunk)[1] * (self.config.block_n // 32)
        bits = torch.zeros((chunk[1] - chunk[0], words), dtype=torch.int32, device=self.x.device)
        for each in self.lists:
            each.mark(bits, chunk)
        return bits


def _on_device(values: list[int], device: torch.device) -> Tensor:
    """int32 values, without a copy from the host."""
    return torch.cat([torch.full((1,), value, dtype=torch.int32, device=device) for value in values])


class ChunkGradients:
    """dX = factor · G·y and dY = factor · Gᵀ·x from G chunk by chunk, in the dtype of x, summed in fp32.

    Of prefixes, G [R, P·width] holds one G after the other, of the products before they are renormalised, and
    dX = factor · Σ_p G_p·y[:, :d_p], less what the norms change, for which `add_inner` is told ⟨G_p, cos_p⟩.

    The products are the BLAS's (fp32 ones follow torch.backends.cuda.matmul). G of a chunk has at most 8192
    rows and 0.75 GiB; beside it stand 4·N·Σ_p d_p bytes of sums of dY and 4·(8 + 1)·R·D of dX of the chunk.
    """

    _BYTES, _ROWS = 3 * 2**28, 8192

    def __init__(self, problem: PairProblem, factor: Tensor, need_x: bool, need_y: bool) -> None:
        self.problem, self.factor, self.need_x, self.need_y = problem, factor, need_x, need_y
        x, prefixes = problem.x, problem.prefixes
        whole = problem.ends[-1] == x.shape[1]  # features that no prefix has get zero
        self.dx = (x.new_empty if whole else x.new_zeros)(x.shape if need_x else 0)
        self.dy: list[Tensor | None] = [None] * len(problem.ends)
        if prefixes is not None:
            self.inner_x = torch.zeros_like(prefixes.inverse_x, dtype=torch.float64)
            self.inner_y = torch.zeros_like(prefixes.inverse_y, dtype=torch.float64)
        self.width = problem.tiles((0, 1))[1] * problem.config.block_n
        most = self._BYTES // (len(problem.ends) * self.width * x.element_size())
        self.chunks = problem.chunks(min(self._ROWS, most))
        self.buffer = x.new_empty((self.chunks[0][1], len(problem.ends) * self.width))

    def __iter__(self):
        """(chunk, its G [R, P · width] to be filled) one after the other; what was filled in is added up."""
        problem, n = self.problem, len(self.problem.y)
        for first, last in self.chunks:
            g = self.buffer[: last - first]
            yield (first, last), g
            x, dx = problem.x[first:last], None
            for p, d in reversed(list(enumerate(problem.ends))):
                g_RN = self.of_prefix(g, p)[:, :n]
                if self.need_x:
                    product = _product_in_parts(g_RN, problem.y[:, :d])
                    dx = product if dx is None else _add_narrower(dx, product)
                if self.need_y:
                    self.dy[p] = _add_product(self.dy[p], g_RN.T, x[:, :d])
            if self.need_x:
                if problem.prefixes is not None:
                    inverse = problem.prefixes.inverse_x[:, first:last]
                    problem.prefixes.subtract_radial_(dx, self.inner_x[:, first:last], x, inverse)
                torch.mul(dx, self.factor, out=self.dx[first:last, : dx.shape[1]])

    def of_prefix(self, g: Tensor, p: int) -> Tensor:
        """The columns of prefix p."""
        return g[:, p * self.width : (p + 1) * self.width]

    def result(self) -> tuple[Tensor, Tensor]:
        """dX [M, D], dY [N, D]; empty where not needed."""
        y, d, dtype = self.problem.y, self.problem.d, self.dx.dtype
        dx = self.dx[:, :d].contiguous() if self.need_x else self.dx
        if not self.need_y:
            return dx, self.dx.new_empty(0)
        dy = functools.reduce(_add_narrower, reversed(self.dy))
        if self.problem.prefixes is not None:
            of = self.problem.prefixes
            of.subtract_radial_(dy, self.inner_y, y, of.inverse_y)
        dy = dy.mul_(self.factor).to(dtype)
        return dx, F.pad(dy, (0, d - dy.shape[1])) if dy.shape[1] < d else dy[:, :d].contiguous()

    def add_inner(self, chunk: tuple[int, int], rows_PTR: Tensor, cols_PTN: Tensor) -> None:
        """⟨G, cos⟩ of every row of a chunk and tile of columns, and of every column and tile of rows."""
        self.inner_x[:, slice(*chunk)] += rows_PTR.sum(1, dtype=torch.float64)
        self.inner_y += cols_PTN.sum(1, dtype=torch.float64)

    def add_listed_inner(self, values_PK: Tensor) -> None:
        """The same of the listed positives, 0 for those not there. Sums are taken in fp64, so that the order
        of the additions leaves no trace."""
        if self.problem.prefixes is not None:
            for inner, at_K in zip((self.inner_x, self.inner_y), self.problem.positives):
                inner.index_add_(1, at_K.clamp_min(0), values_PK.double())


def _add_narrower(total: Tensor, other: Tensor) -> Tensor:
    """total + other in place of total; other has the first of its columns."""
    total[:, : other.shape[1]] += other
    return total


def _wide(a: Tensor) -> bool:
    """Whether the BLAS multiplies this to fp32 without a copy in fp32: only CUDA's does."""
    return a.is_cuda and a.dtype != torch.float32


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a·b in fp32, in place of total."""
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32) if _wide(a) else a.float() @ b.float()
    if _wide(a):
        return torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    return total.addmm_(a.float(), b.float())


def _product_in_parts(g_RN: Tensor, y: Tensor) -> Tensor:
    """G·y in fp32. A chunk has too few rows to fill a GPU with tiles of the result, so the sum over N is cut
    into parts, added up in their order."""
    (r, n), d = g_RN.shape, y.shape[1]
    tiles = triton.cdiv(r, 128) * triton.cdiv(d, 256)
    parts = min(triton.cdiv(4 * multiprocessors(y.device), tiles), 8, n // 2048)
    if not _wide(g_RN) or parts <= 1:
        return _add_product(None, g_RN, y)
    size = n // parts // 64 * 64
    cut = parts * size
    g_PRn = g_RN[:, :cut].unflatten(1, (parts, size)).transpose(0, 1)
    total = torch.bmm(g_PRn, y[:cut].view(parts, size, d), out_dtype=torch.float32).sum(0)
    return _add_product(total, g_RN[:, cut:], y[cut:]) if cut < n else total


# Compilations --------------------------------------------------------------------------------------------

TILE_INTEGERS = ["m", "n", "d8", "first_row", "last_row", "offset", "prefixes"]


def tile_constants(config: TileConfig, dtype: torch.dtype, *, ids: bool, lists: bool, prefixed: bool) -> dict:
    return {
        "IDS": ids,
        "LISTS": lists,
        "PREFIXED": prefixed,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        "DESCRIPTORS": config.descriptors,
        "FLATTEN": config.flatten,
        # Three tf32 products are as exact as one in fp32. Half precision is multiplied exactly in any case.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
    }


def tile_cases(kernel, variants: dict[str, dict], features: tuple[str, ...]) -> list[CompileCase]:
    """Cases of a tile kernel: every row of the launch table and every variant (name -> constants), with the
    masks and the `features` all off and all on, with and without prefixes.

    Each of them is an addition to one epilogue, so what lies between needs no more registers than all on.
    """
    cases = []
    for (dtype, arch), prefixed in itertools.product(_ROWS, (False, True)):
        config, kind = tile_config(dtype, arch, prefixed), TYPES[dtype]
        for name, constants in variants.items():
            for on in (False, True):
                constexprs = {
                    **tile_constants(config, dtype, ids=on, lists=on, prefixed=prefixed),
                    **dict.fromkeys(features, on),
                    **constants,
                }
                of = ("prefixes_" if prefixed else "") + ("all" if on else "plain")
                case = CompileCase(
                    name="/".join([kernel.__name__, name, of, kind, f"sm_{arch}"]),
                    kernel=kernel,
                    signature={a: _argument_type(a, config, kind, constexprs) for a in kernel.arg_names},
                    constexprs=constexprs,
                    num_warps=config.warps,
                    num_stages=config.stages,
                    archs=(arch,),
                )
                cases.append(case)
    return cases


_HALVES = (torch.bfloat16, torch.float16)
_ROWS = (*((dtype, arch) for arch in (90, 80) for dtype in _HALVES), (torch.float32, 90), (torch.float32, 80))


def _argument_type(name: str, config: TileConfig, kind: str, constexprs: dict) -> str:
    """fp32 vectors, but for what is named here."""
    blocks = {
        "x": (config.block_m, config.block_k),
        "y": (config.block_n, config.block_k),
        "g": (config.block_m, config.block_n // 4),
    }
    if name in constexprs:
        return "constexpr"
    if name in blocks:
        return f"tensordesc<{kind}{list(blocks[name])}>" if config.descriptors else f"*{kind}"
    if name in TILE_INTEGERS:
        return "i32"
    return "*i32" if name in ("row_ids", "col_ids", "bits", "bounds", "again") else "*fp32"


def listed_cases() -> list[CompileCase]:
    """Cases of the kernels over the listed pairs."""
    cases = []
    for kind in TYPES.values():
        product = {"x": f"*{kind}", "y": f"*{kind}", "rows": "*i64", "cols": "*i64", "out": "*fp32"}
        block, block_d = _PRODUCTS_BLOCK
        cases.append(plain_case(_listed_products_kernel, product, {"BLOCK": block, "BLOCK_D": block_d}, kind))
        place = {"rows": "*i64", "cols": "*i64", "values": "*fp32", "g": f"*{kind}"}
        cases.append(plain_case(_place_kernel, place, {"BLOCK": _LIST_BLOCK}, kind))
    mark = {"rows": "*i64", "cols": "*i64", "bits": "*i32"}
    return [*cases, plain_case(_bits_kernel, mark, {"BLOCK": _LIST_BLOCK}, "i32")]


def plain_case(kernel, pointers: dict, constexprs: dict, kind: str = "fp32") -> CompileCase:
    kinds = {**pointers, **dict.fromkeys(constexprs, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    return CompileCase(f"{kernel.__name__}/{kind}", kernel, signature, constexprs, 4, 3, needs_dot=False)
