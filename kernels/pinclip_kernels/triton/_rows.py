"""What the kernels over rows of D features share: how a program walks them, and LayerNorm of a tile of them.

A row is read and written whole, by the warps that lie along it: every thread has 8 neighboring features of it
(16 bytes in half precision) and works at several rows at once, so that their loads are under way together.
Where D is between two powers of two, the threads take the lower one, and the features behind it are a second
piece, of 1, 2 or 4 to a thread: 1152 = 128 threads · (8 + 1). So no thread is left without features, and all
of them lie along a row: sums over a row stay in one to eight warps, sums over rows stay in a thread.

Inside kernels a row, or a tile of them, is therefore a tuple of one or two tensors: [rows, T, F] each, and
[1, T, F] for a vector. A program walks many rows, and leaves what it has summed over them as one row of
`partials`, added up in the order of the programs.

Shapes: n rows, D features of a row, T threads along it, F features of a piece to a thread, P programs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pinclip_kernels.triton._launch import CompileCase, multiprocessors

WIDEST = 2048  # features of a row; a wider one would take more than eight warps

# Launch table --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowWalk:
    """depth: rows that a thread works at together. resident: warps per SM that walk rows with 8 features to
    a thread; fewer where a thread has more."""

    depth: int
    resident: int
    reason: str


@dataclass(frozen=True)
class RowConfig:
    """Tiles of `rows` rows, of which `threads` threads have so many features of every piece; `warps` to a
    program, `programs` per SM."""

    rows: int
    threads: int
    features: tuple[int, ...]
    warps: int
    programs: int

    def constants(self, width: int) -> dict:
        """What every kernel over rows of `width` features is compiled for."""
        return {"D": width, "ROWS": self.rows, "T": self.threads, "FEATURES": self.features}

    def full(self, device: torch.device) -> int:
        """Programs that fill the device."""
        return self.programs * multiprocessors(device)

    def grid(self, steps: int, device: torch.device) -> int:
        """Programs that share `steps` tiles; at least one, which then writes sums of nothing."""
        return max(1, min(steps, self.full(device)))


def row_config(width: int, walk: RowWalk) -> RowConfig:
    """The tile for rows of `width` features: 8 for every thread of the warps along a row; in two pieces where
    the second one is smaller than the first and every thread has a share of it."""
    assert 0 < width <= WIDEST
    threads = max(16, triton.next_power_of_2(width)) // 8
    rest = triton.next_power_of_2(max(1, triton.cdiv(2 * width, threads) - 8))
    if threads >= 64 and rest < 8:
        return _config(threads // 2, (8, rest), walk)
    return _config(threads, (8,), walk)


def _config(threads: int, features: tuple[int, ...], walk: RowWalk) -> RowConfig:
    warps = max(1, threads // 32)
    together = max(4, warps)  # an SM has four parts, and each the same number of warps
    programs = walk.resident * 8 // (together * sum(features)) * (together // warps)
    return RowConfig(walk.depth * 32 * warps // threads, threads, features, warps, min(32, programs))


# Inside kernels ------------------------------------------------------------------------------------------


@triton.jit
def add(a, b):
    """a + b of every piece."""
    if len(a) == 2:
        return (a[0] + b[0], a[1] + b[1])
    else:
        return (a[0] + b[0],)


@triton.jit
def sub(a, b):
    """a - b of every piece."""
    if len(a) == 2:
        return (a[0] - b[0], a[1] - b[1])
    else:
        return (a[0] - b[0],)


@triton.jit
def mul(a, b):
    """a ∘ b of every piece."""
    if len(a) == 2:
        return (a[0] * b[0], a[1] * b[1])
    else:
        return (a[0] * b[0],)


@triton.jit
def _columns(T: tl.constexpr, FEATURES: tl.constexpr):
    """The features of each piece, [T, F]."""
    t = tl.arange(0, T)
    columns = (t[:, None] * FEATURES[0] + tl.arange(0, FEATURES[0])[None, :],)
    if len(FEATURES) == 2:
        first = T * FEATURES[0] + t * FEATURES[1]
        if FEATURES[1] == 1:
            # Else the compiler would have a thread load neighbors of one row, and another thread of the next
            # row, and then exchange them.
            first = tl.max_contiguous(first, 1)
        columns = columns + (first[:, None] + tl.arange(0, FEATURES[1])[None, :],)  # noqa: RUF005
    return columns


@triton.jit
def _places(rows, there, D: tl.constexpr, T: tl.constexpr, FEATURES: tl.constexpr):
    """Of every piece of these rows: places in a tensor [n, D], and the mask of those that are there."""
    start = rows.to(tl.int64)[:, None, None] * D
    return [
        (start + cols[None, :, :], there[:, None, None] & (cols < D)[None, :, :])
        for cols in _columns(T, FEATURES)
    ]


@triton.jit
def load_rows(base, rows, there, D: tl.constexpr, T: tl.constexpr, FEATURES: tl.constexpr):
    """These rows of a tensor [n, D] in fp32; zero where not there, and behind D."""
    return [
        tl.load(base + place[0], mask=place[1], other=0.0).to(tl.float32)
        for place in _places(rows, there, D, T, FEATURES)
    ]


@triton.jit
def store_rows(base, rows, there, x, D: tl.constexpr, T: tl.constexpr, FEATURES: tl.constexpr):
    """Write x as these rows of a tensor [n, D], where they are there."""
    places = _places(rows, there, D, T, FEATURES)
    for i in tl.static_range(len(FEATURES)):
        at, here = places[i]
        tl.store(base + at, x[i].to(base.dtype.element_ty), mask=here)


@triton.jit
def load_vector(vector, D: tl.constexpr, T: tl.constexpr, FEATURES: tl.constexpr):
    """A vector [D] in fp32, with zeros behind it."""
    return [
        tl.load(vector + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :, :]
        for cols in _columns(T, FEATURES)
    ]


@triton.jit
def no_sums(T: tl.constexpr, FEATURES: tl.constexpr):
    """Sums over no rows."""
    F0: tl.constexpr = FEATURES[0]
    if len(FEATURES) == 2:
        F1: tl.constexpr = FEATURES[1]
        return (tl.zeros([T, F0], tl.float32), tl.zeros([T, F1], tl.float32))
    else:
        return (tl.zeros([T, F0], tl.float32),)


@triton.jit
def add_rows(sums, x):
    """sums + Σ x over the rows."""
    return add(sums, [tl.sum(piece, 0) for piece in x])


@triton.jit
def store_sums(partials, row, sums, D: tl.constexpr, T: tl.constexpr, FEATURES: tl.constexpr):
    """Write sums over rows as one row of partials [.., D]."""
    columns = _columns(T, FEATURES)
    start = (row + tl.zeros([T, 1], tl.int64)) * D
    for i in tl.static_range(len(FEATURES)):
        tl.store(partials + start + columns[i], sums[i], mask=columns[i] < D)


@triton.jit
def sum_row(x):
    """Σ over the features of every row: of a thread first, then over the threads."""
    total = tl.sum(x[0], 2)
    if len(x) == 2:
        total += tl.sum(x[1], 2)
    return tl.sum(total, 1)


@triton.jit
def _zero_behind(x, D: tl.constexpr, T: tl.constexpr, FEATURES: tl.constexpr):
    columns = _columns(T, FEATURES)
    x0 = tl.where((columns[0] < D)[None, :, :], x[0], 0.0)
    if len(x) == 2:
        return (x0, tl.where((columns[1] < D)[None, :, :], x[1], 0.0))
    else:
        return (x0,)


@triton.jit
def standardize(r, eps, D: tl.constexpr, T: tl.constexpr, FEATURES: tl.constexpr):
    """(r - mean) / sqrt(var + eps), mean, and 1 / sqrt(var + eps), of every row; r is zero behind D."""
    mean = sum_row(r) / D
    centered = _zero_behind([piece - mean[:, None, None] for piece in r], D, T, FEATURES)
    rstd = 1.0 / tl.sqrt_rn(sum_row(mul(centered, centered)) / D + eps)
    return [piece * rstd[:, None, None] for piece in centered], mean, rstd


@triton.jit
def standardize_backward(grad, x_hat, rstd, D: tl.constexpr):
    """Gradient of r where x_hat, rstd = standardize(r) and x_hat has the gradient `grad`."""
    level = (sum_row(grad) / D)[:, None, None]
    along = (sum_row(mul(grad, x_hat)) / D)[:, None, None]
    centered = sub([piece - level for piece in grad], [piece * along for piece in x_hat])
    return [piece * rstd[:, None, None] for piece in centered]


# Compilations --------------------------------------------------------------------------------------------

WIDTHS = (192, 768, 1024, 1152, 2048)  # of the model's configurations, and the widest
_INTEGERS = ("n", "pins", "images", "texts", "num_fusion", "num_image", "num_text", "total", "part", "grid")


def row_case(
    kernel,
    kind: str,
    pointers: dict[str, str],
    width: int,
    walk: RowWalk,
    constants: dict = {},  # noqa: B006
) -> CompileCase:
    """One compilation: pointers not named are fp32."""
    config = row_config(width, walk)
    constexprs = {**config.constants(width), **constants}
    kinds = {"eps": "fp32", **dict.fromkeys(_INTEGERS, "i32"), **pointers}
    kinds |= dict.fromkeys(constexprs, "constexpr")
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    name = f"{kernel.__name__}/{kind}/D{width}"
    return CompileCase(name, kernel, signature, constexprs, config.warps, 3, needs_dot=False)
