"""Which attention runs on a GPU: the first row of a table that a call fits, each with its reason.

docs/attention.md shows the table. A reason says what was measured, or that nothing was.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Call:
    """What the choice depends on. queries, keys: of the longest sequence."""

    dtype: torch.dtype
    arch: int  # 90 for sm_90
    width: int  # Dh
    queries: int
    keys: int
    causal: bool
    varlen: bool
    padded: bool  # key lengths
    normed: bool  # norm or rotation inside

    @property
    def longest(self) -> int:
        return max(self.queries, self.keys)


@dataclass(frozen=True)
class Row:
    name: str
    fits: Callable[[Call], bool]
    ours: bool
    reason: str


_HEAD_DIMS = (64, 72, 80, 88, 96, 128)  # of the kernels
_LONGEST = 384
ARCHS = (80, 90)
SHARED = 128  # the longest segments of which several share a tile


def _one_kernel(call: Call) -> bool:
    """Whether the backward pass of a dense call is one kernel of ours."""
    if call.arch < 90:
        return call.queries <= 128 and call.width in (64, 128)
    if call.width == 128:
        return call.queries <= 128
    return call.queries <= 256 or (call.queries == call.keys == 257 and not call.causal)


TABLE = (
    Row(
        "other dtypes and devices",
        lambda c: c.dtype not in (torch.bfloat16, torch.float16) or c.arch not in ARCHS,
        False,
        "By design: our kernels multiply 16-bit numbers and have launch tables for sm_80 and sm_90; on "
        "sm_100 they compile, but spill registers.",
    ),
    Row(
        "other head dims",
        lambda c: c.width not in _HEAD_DIMS,
        False,
        "By design: the kernels hold a head in pieces that fit these head dims only.",
    ),
    Row(
        "long",
        lambda c: c.longest > _LONGEST,
        False,
        "Not measured by us: long sequences are bound by arithmetic, where FlashAttention's pipelines reach "
        "more of the tensor cores than Triton (published: 500-650 against about 400 TFLOP/s on Hopper).",
    ),
    Row(
        "short texts",
        lambda c: c.varlen and c.longest <= SHARED,
        True,
        "Not measured: whole segments share a tile of 64 or 128 rows. At a mean of 20 of 64 tokens a padded "
        "batch moves 3.2 times the bytes and multiplies 10 times as much.",
    ),
    Row(
        "norm and rotation on sm_90",
        lambda c: c.normed and c.arch >= 90,
        True,
        "Not measured: applied when queries and keys are loaded, they take no pass over memory of their own "
        "in the forward, and one over the gradients in the backward pass.",
    ),
    Row(
        "segments",
        lambda c: c.varlen,
        True,
        "Not measured: SDPA needs padded copies of q, k and v, and a mask, which its flash kernel refuses.",
    ),
    Row(
        "key lengths",
        lambda c: c.padded,
        True,
        "Not measured: SDPA needs copies of k and v without the padding, and a mask, which its flash kernel "
        "refuses.",
    ),
    Row(
        "short sequences",
        _one_kernel,
        True,
        "Not measured: the backward pass is one kernel that reads five tensors and writes three, half of "
        "what FlashAttention's moves. Compiled: no registers are spilled at Dh 64 and up to 128 queries, few "
        "at other head dims up to 96 and 257 queries.",
    ),
    Row(
        "everything else",
        lambda c: True,
        False,
        "Not measured: our backward pass would compute many rows that are not there, or take two passes with "
        "7/5 of SDPA's products.",
    ),
)


def choose(call: Call) -> Row:
    return next(row for row in TABLE if row.fits(call))
