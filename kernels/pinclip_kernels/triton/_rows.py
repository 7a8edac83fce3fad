"""What the kernels over rows of D features share: how a program walks them, and LayerNorm of a tile of them.

A row is read and written whole, by the warps that lie along it: every thread has 8 neighboring features of it
(16 bytes in half precision) and works at several rows at once, so that their loads are under way together.
Sums over a row stay in one to eight warps, sums over rows stay in a thread. A program walks many rows, and
leaves what it has summed over them as one row of `partials`, added up in the order of the programs.

Shapes: n rows, D features of a row, P programs.
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
    """depth: rows that a thread works at together. resident: warps per SM that walk rows."""

    depth: int
    resident: int
    reason: str


@dataclass(frozen=True)
class RowConfig:
    """A tile of ROWS × BLOCK features, `warps` to a program, `programs` per SM."""

    rows: int
    block: int
    warps: int
    programs: int

    def full(self, device: torch.device) -> int:
        """Programs that fill the device."""
        return self.programs * multiprocessors(device)

    def grid(self, steps: int, device: torch.device) -> int:
        """Programs that share `steps` tiles; at least one, which then writes sums of nothing."""
        return max(1, min(steps, self.full(device)))


def row_config(width: int, walk: RowWalk) -> RowConfig:
    """The tile for rows of `width` features: 8 for every thread of the warps along a row."""
    assert 0 < width <= WIDEST
    block = max(16, triton.next_power_of_2(width))
    warps = max(1, block // 256)
    return RowConfig(walk.depth * 256 * warps // block, block, warps, min(32, walk.resident // warps))


# Inside kernels ------------------------------------------------------------------------------------------


@triton.jit
def row_tile(rows, there, D: tl.constexpr, BLOCK: tl.constexpr):
    """Places of whole rows in a tensor [n, D], and the mask of those that are there."""
    cols = tl.arange(0, BLOCK)
    return rows.to(tl.int64)[:, None] * D + cols[None, :], there[:, None] & (cols < D)[None, :]


@triton.jit
def row_vector(vector, D: tl.constexpr, BLOCK: tl.constexpr):
    """A vector [D] in fp32, with zeros behind it."""
    cols = tl.arange(0, BLOCK)
    return tl.load(vector + cols, mask=cols < D, other=0.0).to(tl.float32)


@triton.jit
def add_to_partials(partials, sums, D: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of this program over its rows, as its row of [P, D]."""
    cols = tl.arange(0, BLOCK)
    tl.store(partials + tl.program_id(0).to(tl.int64) * D + cols, sums, mask=cols < D)


@triton.jit
def standardize(r, here, eps, D: tl.constexpr):
    """(r - mean) / sqrt(var + eps), mean, and 1 / sqrt(var + eps), of every row; r is zero outside `here`."""
    mean = tl.sum(r, 1) / D
    centered = tl.where(here, r - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centered * centered, 1) / D + eps)
    return centered * rstd[:, None], mean, rstd


@triton.jit
def standardize_backward(grad, x_hat, rstd, D: tl.constexpr):
    """Gradient of r where x_hat, rstd = standardize(r) and x_hat has the gradient `grad`."""
    level = tl.sum(grad, 1) / D
    along = tl.sum(grad * x_hat, 1) / D
    return (grad - level[:, None] - x_hat * along[:, None]) * rstd[:, None]


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
    constexprs = {"D": width, "ROWS": config.rows, "BLOCK": config.block, **constants}
    kinds = {"eps": "fp32", **dict.fromkeys(_INTEGERS, "i32"), **pointers}
    kinds |= dict.fromkeys(constexprs, "constexpr")
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    name = f"{kernel.__name__}/{kind}/D{width}"
    return CompileCase(name, kernel, signature, constexprs, config.warps, 3, needs_dot=False)
